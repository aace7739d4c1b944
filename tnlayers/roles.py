"""What each index of a network does in each step of a partition of its factors.

Within one step an index of the group is
    kernel    a spatial index of the weight
    kept      in the activation, and needed again later: it groups the convolution (CP's r, or g)
    consumed  in the activation, and summed here
    produced  new in the activation
and the activation's other indices are carried: they move into the batch.

The activation holds its indices in some order. A step needs those that it consumes side by side: a convolution and a linear
step last, a bmm step anywhere. What it produces comes last, or after a bmm step where the consumed ones were, so that
a tensor train is contracted from one end to the other without any index being moved.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from tnlayers.contraction import Contraction, Indices
from tnlayers.network import Network

__all__ = ["Operation", "Partition", "Roles", "roles_of"]

Partition = tuple[tuple[str, ...], ...]
Operation = Literal["convolution", "linear", "bmm"]


@dataclass(frozen=True)
class Roles:
    """What each index does in one step of a partition; depends on the network's strings alone.

    Attributes:
        before: the activation's indices in the order in which the step before leaves them.
        wanted: the same in the order in which this step takes them.
        after: those that it leaves.
        behind: the carried ones that stay behind what is consumed and produced.
    """

    names: tuple[str, ...]
    before: Indices
    carried: Indices
    kept: Indices
    consumed: Indices
    produced: Indices
    kernel: Indices
    behind: Indices
    merge: Contraction

    @property
    def ahead(self) -> Indices:
        """The carried indices in front."""
        return self.carried[: len(self.carried) - len(self.behind)]

    @property
    def wanted(self) -> Indices:
        return (*self.ahead, *self.kept, *self.consumed, *self.behind)

    @property
    def after(self) -> Indices:
        return (*self.ahead, *self.kept, *self.produced, *self.behind)


def _ends(network: Network) -> tuple[Indices, Indices, Indices]:
    """Returns the indices of the input, of the output, and the spatial ones; `g` belongs to both ends."""
    output, inputs, *spatial = network.modes
    group = tuple(index for index in output if index == "g")
    return (*group, *inputs), output, tuple(index for mode in spatial for index in mode)


@lru_cache(maxsize=4096)  # rank rules ask for the same few thousands of times
def roles_of(
    network: Network, partition: Partition, operations: tuple[Operation, ...] | None = None
) -> tuple[Roles, ...]:
    """Returns the roles of the indices in each step; without operations, those of convolutions and linear steps."""
    inputs, outputs, spatial = _ends(network)
    held, steps = inputs, []
    for n, names in enumerate(partition):
        group = dict.fromkeys(index for name in names for index in network.indices[name])
        later = {index for other in partition[n + 1 :] for name in other for index in network.indices[name]}
        needed = later.union(outputs)
        kept = tuple(index for index in held if index in group and index in needed)
        consumed = tuple(index for index in held if index in group and index not in needed)
        produced = tuple(index for index in group if index not in (*held, *spatial) and index in needed)
        kernel = tuple(index for index in spatial if index in group)
        carried = tuple(index for index in held if index not in group)
        behind: Indices = ()
        if operations and operations[n] == "bmm" and consumed:
            last = max(held.index(index) for index in consumed)
            behind = tuple(index for index in held[last:] if index in carried)
        roles = Roles(
            names=names,
            before=held,
            carried=carried,
            kept=kept,
            consumed=consumed,
            produced=produced,
            kernel=kernel,
            behind=behind,
            merge=network.contraction(names, (*kept, *produced, *consumed, *kernel)),
        )
        steps.append(roles)
        held = roles.after
    return tuple(steps)
