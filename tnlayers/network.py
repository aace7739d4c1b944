"""A factorization as a network of named factors, written as index strings.

Legend (used in every network string of this package):
    o, i    output and input channels (features of a linear); o1, o2, ... their factors when tensorized
    d, h, w depth, height and width of the kernel
    g       groups of a grouped convolution
    others  bonds, the indices that are summed; a bond in more than two factors is a hyperedge (CP)

`Network({"input": "s i", "core": "r s h w", "output": "o r"}, weight="o i h w")` is Tucker-2: the weight is the product of
the factors, summed over the indices that it does not have. Parentheses fuse indices into one mode: `"(o1 o2) (i1 i2)"`.
Everything that depends on the method alone follows from these strings: shapes, counts, cuts, the contraction, the scale.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from torch import Tensor

from tnlayers.contraction import Contraction, Indices, Sizes, contraction, size_of
from tnlayers.errors import UserError

__all__ = ["MODE_NAMES", "Network", "window_of"]

_MODE = re.compile(r"\(([^()]+)\)|([^\s()]+)")


MODE_NAMES = {"i": "input", "d": "depth", "h": "height", "w": "width", "o": "output"}
"""What the factor of a mode is called."""


@lru_cache
def window_of(weight_shape: Sequence[int]) -> str:
    """Returns the indices of a weight behind o and i: "h w" for (o, i, h, w), "w" for (o, i, w), none for a linear."""
    return " ".join("dhw"[5 - len(weight_shape) :]) if len(weight_shape) > 2 else ""


@dataclass(frozen=True, eq=False)
class Network:
    """Named factors and the weight that they make.

    Args:
        factors: name -> index string, in the order in which they meet the activation (input side first).
        weight: the modes of the dense weight: output, input, then the spatial ones.
        rank: the bonds in the order in which a rank lists them; by default that of the factors.

    Raises:
        ValueError: an index of the weight that no factor has, a bond that only one factor has, or a repeated index.
    """

    factors: Mapping[str, str]
    weight: str
    rank: str = ""

    def __post_init__(self) -> None:
        for name, text in self.factors.items():
            indices = text.split()
            for index in indices:
                if indices.count(index) > 1:
                    raise UserError(
                        f"factor {name!r} ({text!r}) has index {index!r} twice; an index may occur once in a factor"
                    )
                if index not in self.weight_indices and len(self._holders(index)) < 2:
                    raise UserError(
                        f"index {index!r} of factor {name!r} is in no other factor and not in the weight {self.weight!r}; "
                        "a bond joins two factors or more"
                    )
        for index in self.weight_indices:
            if self.weight_indices.count(index) > 1:
                raise UserError(f"the weight {self.weight!r} has index {index!r} twice")
            if not self._holders(index):
                raise UserError(f"index {index!r} of the weight {self.weight!r} is in no factor; add it to one")
        if self.rank and not all(self._holders(bond) for bond in self.bonds):
            raise UserError(
                f"rank {self.rank!r} names a bond that no factor has; expected an order of the summed indices"
            )

    def __eq__(self, other: object) -> bool:
        """The order of the factors counts: it is that in which they meet the activation."""
        return isinstance(other, Network) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @cached_property
    def _identity(self) -> tuple[object, ...]:
        return tuple(self.factors.items()), self.weight, self.rank

    def _holders(self, index: str) -> list[str]:
        return [name for name, text in self.factors.items() if index in text.split()]

    @cached_property
    def modes(self) -> tuple[Indices, ...]:
        """The indices that each mode of the weight is fused from."""
        return tuple(tuple((fused or single).split()) for fused, single in _MODE.findall(self.weight))

    @cached_property
    def weight_indices(self) -> Indices:
        return tuple(index for mode in self.modes for index in mode)

    @cached_property
    def indices(self) -> dict[str, Indices]:
        """The indices of each factor."""
        return {name: tuple(text.split()) for name, text in self.factors.items()}

    @cached_property
    def bonds(self) -> Indices:
        """The indices that are summed, in the order in which a rank lists them."""
        found = (index for indices in self.indices.values() for index in indices)
        return tuple(
            dict.fromkeys((*self.rank.split(), *(index for index in found if index not in self.weight_indices)))
        )

    def grouped(self) -> "Network":
        """Returns the network of a grouped convolution: one more index `g` in every factor and in front of the output mode."""
        output, *others = _MODE.findall(self.weight)
        fused = " ".join(["g", output[0] or output[1]])
        rest = [f"({fused_mode})" if fused_mode else single for fused_mode, single in others]
        factors = {name: f"g {text}" for name, text in self.factors.items()}
        return Network(factors, " ".join([f"({fused})", *rest]), self.rank)

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return {name: tuple(sizes[index] for index in indices) for name, indices in self.indices.items()}

    def weight_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(size_of(mode, sizes) for mode in self.modes)

    def num_params(self, sizes: Sizes) -> int:
        return sum(size_of(indices, sizes) for indices in self.indices.values())

    def sizes_from(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Returns the size of every index, read off the factors' shapes.

        Raises:
            ValueError: a factor is missing, has another number of indices, or two factors disagree on an index.
        """
        sizes: dict[str, int] = {}
        for name, indices in self.indices.items():
            shape = tuple(shapes[name]) if name in shapes else None
            if shape is None or len(shape) != len(indices):
                raise UserError(
                    f"factor {name!r} has shape {shape}; expected the {len(indices)} indices {self.factors[name]!r}"
                )
            for index, size in zip(indices, shape, strict=True):
                if sizes.setdefault(index, size) != size:
                    raise UserError(
                        f"index {index!r} is {sizes[index]} in one factor and {size} in {name!r} (shape {shape})"
                    )
        return sizes

    def clamp(self, sizes: Sizes) -> dict[str, int]:
        """Returns the sizes with every bond at most the product of the other indices of each of its factors.

        Above that a factor has linearly dependent slices, which carry nothing. Starting from bonds without bound, it
        gives the attainable ranks: the smaller side of the cut that each bond makes. Not meant for hyperedges.
        """
        clamped, lowered = dict(sizes), True
        while lowered:
            lowered = False
            for bond, others in self._limits:
                if clamped[bond] > (limit := size_of(others, clamped)):
                    clamped[bond], lowered = limit, True
        return clamped

    @cached_property
    def _limits(self) -> list[tuple[str, Indices]]:
        """Each bond of each factor, with the other indices there, whose product bounds it."""
        return [
            (bond, tuple(index for index in indices if index not in (bond, "g")))
            for indices in self.indices.values()
            for bond in indices
            if bond in self.bonds
        ]

    def cut(self, bond: str) -> tuple[Indices, Indices]:
        """Returns the two sets of weight indices that removing a bond leaves apart; its spectrum is that of this unfolding.

        Raises:
            ValueError: the bond is a hyperedge or part of a loop, so that removing it separates nothing.
        """
        side: set[str] = {self._holders(bond)[0]}
        grown = True
        while grown:
            reached = {index for name in side for index in self.indices[name]} - {bond, "g"}
            wider = side | {name for name, indices in self.indices.items() if reached.intersection(indices)}
            grown, side = wider != side, wider
        if len(self._holders(bond)) > 2 or side >= set(self._holders(bond)):
            raise UserError(
                f"bond {bond!r} does not cut the network {dict(self.factors)} in two; a method with such a bond overrides max_ranks, "
                "clamp and error_estimate, as CP does"
            )
        near = {index for name in side for index in self.indices[name]}
        weight = [index for index in self.weight_indices if index != "g"]
        return tuple(index for index in weight if index in near), tuple(index for index in weight if index not in near)

    def contraction(self, names: Sequence[str], output: Sequence[str]) -> Contraction:
        """Returns the product of the named factors, left to right, with the indices of `output` left in that order."""
        return contraction(names, self.indices, output)

    @cached_property
    def _whole(self) -> Contraction:
        return self.contraction(tuple(self.factors), self.weight_indices)

    def reconstruct(self, factors: Mapping[str, Tensor]) -> Tensor:
        """Returns the dense weight, differentiable in the factors."""
        sizes = self.sizes_from({name: factor.shape for name, factor in factors.items()})
        return self._whole(factors).reshape(self.weight_shape(sizes))

    def init_std(self, sizes: Sizes, weight_std: float) -> float:
        """Returns the standard deviation of every factor's independent entries that gives the weight `weight_std`.

        An entry of the weight is a sum over all bonds of a product of one entry of each factor, so its variance is
        (product of the bond dimensions) times (product of the factors' variances).
        """
        return (weight_std / math.sqrt(size_of(self.bonds, sizes))) ** (1 / len(self.factors))
