"""What a factorized layer is, whatever its weights: the one place that knows its shapes and what it costs."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tnlayers.contraction import size_of
from tnlayers.cost import Machine, estimate, macs, products, schedules
from tnlayers.errors import UserError
from tnlayers.geometry import NOMINAL_CALLS, Call, Geometry
from tnlayers.linalg import check_finite, decomposing, precise, relative_error, scale_of
from tnlayers.lookup import Lookup
from tnlayers.method import Factorization
from tnlayers.network import Network
from tnlayers.plan import Plan
from tnlayers.ranks import Ranks
from tnlayers.roles import Partition
from tnlayers.schedule import ByMode, PlanChoice, Schedule, of_mode, partition_of, partitions

__all__ = ["LayerSpec", "rounded"]


@dataclass(frozen=True)
class LayerSpec:
    """The geometry of a dense layer, a method in its place, and integer ranks.

    Attributes:
        geometry: of the dense layer.
        method: its rank becomes one int for each bond, each at most what is attainable; what is clamped is said.

    Raises:
        ValueError: the rank is a rule, or has another number of entries than there are bonds.
    """

    geometry: Geometry
    method: Factorization

    def __post_init__(self) -> None:
        attained = self.method.ranks(self.geometry.weight_shape)
        if attained != self.method.rank:
            object.__setattr__(self, "method", replace(self.method, rank=attained))

    @property
    def ranks(self) -> Ranks:
        assert isinstance(self.method.rank, tuple)
        return self.method.rank

    @cached_property
    def network(self) -> Network:
        network = self.method.network(self.geometry.weight_shape)
        return network.grouped() if self.geometry.groups > 1 else network

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """The size of every index of the network."""
        return self.method.sizes(self.geometry.weight_shape, self.ranks) | {"g": self.geometry.groups}

    @cached_property
    def factor_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.network.shapes(self.sizes)

    @cached_property
    def parameter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every parameter that makes the weight: the factors', unless the method generates those."""
        return dict(self.method.parameter_shapes(self.factor_shapes, self.ranks))

    @property
    def params(self) -> int:
        """Parameters in place of the dense weight."""
        return sum(map(math.prod, self.parameter_shapes.values()))

    def at(self, ranks: Ranks) -> "LayerSpec":
        """Returns the same method at other ranks, each at most what is attainable next to the others."""
        attained = self.method.clamp(self.geometry.weight_shape, ranks)
        other = replace(self, method=self.method.with_rank(attained))
        other.__dict__["network"] = self.network  # which no rank changes
        return other

    def of_parameters(self, shapes: Mapping[str, tuple[int, ...]]) -> "LayerSpec":
        """Returns the same method at the ranks that parameters of these shapes have.

        Raises:
            ValueError: they are not its parameters, or of ranks that no weight attains, which could ask for all memory.
        """
        ranks = self.method.ranks_from(self.network, shapes)
        found = self.at(ranks)
        if found.ranks != ranks or found.parameter_shapes != shapes:
            raise UserError(f"parameters of the shapes {dict(shapes)} are not those of {found.method}")
        return found

    # ---- its weight

    def reconstruct(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns the dense weight that parameters make, differentiable in them."""
        return self.network.reconstruct(self.method.factors(parameters, self.factor_shapes))

    def decompose(self, weight: Tensor, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], float]:
        """Fits the parameters, rounded to the dtype; returns them and their relative error, checked on what they then make.

        Args:
            weight: (o, i, ...), of all groups, in float64. The parameters of a grouped convolution have the index
                g in front.
            dtype: of the parameters. Where one of them would leave its range they share their norm evenly.

        Raises:
            UserError: the weight is not finite, or the factors are no better than zeros.
            TypeError: the method gives other parameters than its network has.
        """
        check_finite(weight)
        method, name, scale = self.method, type(self.method).__name__, scale_of(weight)
        with decomposing():
            parts = (weight if scale == 1 else weight / scale).chunk(self.geometry.groups if method.per_group else 1)
            fitted = [method._decompose(part, self.ranks) for part in parts]
            parameters = {
                key: (torch.stack([part[key] for part in fitted]) if len(fitted) > 1 else first).contiguous()
                for key, first in fitted[0].items()
            }
            shapes = {key: tuple(value.shape) for key, value in parameters.items()}
            if shapes != self.parameter_shapes:
                raise TypeError(
                    f"{name}._decompose gives {shapes}; its network at rank {self.ranks} has {self.parameter_shapes}"
                )
            if scale != 1:
                method.scale(parameters, scale)
            parameters = rounded(parameters, dtype)
            made = self.reconstruct({key: precise(value) for key, value in parameters.items()})
            error = relative_error(weight, made.reshape(weight.shape))
        if not error <= 1 + 1e-6 + torch.finfo(dtype).eps:
            raise UserError(
                f"{name} at rank {self.ranks} failed: relative error {error:.3g} on {tuple(weight.shape)}, where zeros "
                "have 1; take another rank or method"
            )
        return parameters, error

    # ---- how it is computed

    @cached_property
    def _lookup(self) -> Lookup:
        return Lookup.compile(self.network, self.sizes)

    @property
    def plans(self) -> Sequence[Partition]:
        """Every way to compute the layer, from all factors apart to all together; there is one for a look-up."""
        return [self._lookup.groups] if self.geometry.lookup else list(partitions(tuple(self.network.factors)))

    def macs(self, calls: Sequence[Call], plan: Partition) -> int:
        """Multiply-accumulates of all the calls, once the weights of the plan are merged; bias not counted."""
        if self.geometry.lookup:
            return sum(call.rows for call in calls) * self._lookup.macs(self.sizes)
        axes, input_size = self.geometry.axes, self.geometry.input_size
        return sum(call.rows * macs(self.network, self.sizes, plan, axes, input_size(call)) for call in calls)

    def macs_of_ranks(self, calls: Sequence[Call], plan: Partition) -> Callable[[Ranks], int]:
        """Returns a function from attained ranks to `macs` there, in which all that no rank changes is multiplied out."""
        if self.geometry.lookup:
            return lambda ranks: self.at(ranks).macs(calls, plan)
        bonds = self.method.bonds(self.geometry.weight_shape)
        terms: Counter[tuple[int, ...]] = Counter()  # the places of the ranks in a product -> what it is multiplied by
        for call in calls:
            for positions, run in products(self.network, plan, self.geometry.axes, self.geometry.input_size(call)):
                fixed = size_of((index for index in run if index not in bonds), self.sizes)
                terms[tuple(bonds.index(index) for index in run if index in bonds)] += call.rows * positions * fixed
        return lambda ranks: sum(fixed * math.prod(map(ranks.__getitem__, places)) for places, fixed in terms.items())

    def best_plan(self, calls: Sequence[Call] = NOMINAL_CALLS, device_type: str = "cpu") -> PlanChoice:
        """Returns the partitions that the cost model holds to be the fastest for the first of the calls, in inference and in training."""
        if self.geometry.lookup:
            return self._lookup.groups
        inference, training = (
            self.ranked_schedules(calls, device_type, training=mode)[0].groups for mode in (False, True)
        )
        return inference if inference == training else ByMode(inference, training)

    def fewest_macs(self, calls: Sequence[Call]) -> Partition:
        """Returns the partition with the fewest multiply-accumulates; of equals, that with the most steps."""
        return min(self.plans, key=lambda plan: self.macs(calls, plan))

    def ranked_schedules(
        self, calls: Sequence[Call], device_type: str, *, training: bool, groups: Partition | None = None
    ) -> list[Schedule]:
        """Returns every way to compute the layer, that which the cost model holds to be the fastest first.

        Args:
            calls: how the layer is used; the first counts.
            device_type: "cpu" or "cuda".
            training: whether gradients are taken, and weights merged, at every call.
            groups: the partition, where it is given.
        """
        machine, axes, call = Machine.of(device_type, training=training), self.geometry.axes, calls[0]
        size = self.geometry.input_size(call)

        def seconds(schedule: Schedule) -> float:
            return estimate(self.network, self.sizes, schedule, axes, machine, size, call.rows, training=training)

        every = [groups] if groups else partitions(tuple(self.network.factors))
        return sorted(schedules(self.network, self.sizes, axes, every), key=seconds)

    def compile(self, plan: PlanChoice, device_type: str, *, training: bool = False) -> Plan | Lookup:
        """Compiles a plan to integers; a look-up has no choice of one.

        Args:
            plan: the choice; where it names no operations the cost model does.
            device_type: "cpu" or "cuda".
            training: which one of plans by mode.

        Raises:
            UserError: groups that are no partition of the factors, in order.
        """
        if self.geometry.lookup:
            return self._lookup
        one = of_mode(plan, training=training)
        if not isinstance(one, Schedule):
            groups = None if one == "auto" else partition_of(self.network, one)
            one = self.ranked_schedules(NOMINAL_CALLS, device_type, training=training, groups=groups)[0]
        return Plan.compile(self.network, self.sizes, one, self.geometry.axes, self.geometry.pad_mode)


def rounded(parameters: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Rounds to the dtype; if the largest entry of one is out of its range, all are first scaled to the same largest entry.

    The product of the scales is 1, and the weight is linear in each parameter.
    """
    largest = {name: float(value.abs().max()) if value.numel() else 0.0 for name, value in parameters.items()}
    low, high = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    if all(low <= size <= high for size in largest.values()) or not all(largest.values()):
        return {name: value.to(dtype) for name, value in parameters.items()}
    mean = math.exp(sum(map(math.log, largest.values())) / len(largest))
    return {name: (value / largest[name] * mean).to(dtype) for name, value in parameters.items()}
