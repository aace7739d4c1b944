"""The contract of a method: its index strings, how to decompose, and where it comes from.

A method is a frozen dataclass in a file of its own. `rank` (and what else the method needs) are its fields, `network` its
strings; this class derives the rest. Weights come in as (o, i, h, w) or (o, i), one group at a time, in float64.

The parameters of a layer are the network's factors. A method that generates them from something smaller says how, by
overriding what stands under "parameters" below (`ADTN` does).
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import isabstract
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from tnlayers.errors import UnsupportedLayer, UserError
from tnlayers.linalg import (
    check_finite,
    decomposing,
    left_singular_vectors,
    precise,
    relative_error,
    scale_of,
    singular_values,
    tails,
    unfold,
)
from tnlayers.network import Indices, Network, size_of
from tnlayers.ranks import Rank, RankRule, Ranks, check_rank

__all__ = ["Factorization", "known_methods"]

Shapes = Mapping[str, tuple[int, ...]]

_OPEN = {"rank", "replaces", "source", "per_group"}
"""What a method may state of itself."""
_UNBOUNDED = 1 << 40  # larger than any mode; `Network.clamp` brings it down to the attainable rank


@dataclass(frozen=True)
class Factorization(ABC):
    """How a layer is factorized.

    Args:
        rank: an int (that bond dimension wherever it is attainable), one int for each bond, or a rule.

    Raises:
        ValueError: a rank below 1, a bare float, or another number of ranks than the method has bonds.
    """

    rank: Rank

    replaces: ClassVar[tuple[str, ...]]
    """The torch layers that the method factorizes: "Conv2d", "Linear"."""
    source: ClassVar[str]
    """Where it comes from: authors, year, paper, equation."""
    per_group: ClassVar[bool] = True
    """Whether each group of a grouped convolution is fitted by itself."""

    def __init_subclass__(cls) -> None:
        """Options that would take the place of what every method has, or of what a rule says beside them, are refused."""
        super().__init_subclass__()
        own = vars(cls).get("__annotations__", {}).keys() - _OPEN
        taken = own & {*dir(Factorization), "pattern", "method", "plan", "reason", "dense"}
        if taken:
            raise TypeError(f"{cls.__name__}: an option cannot be called {sorted(taken)[0]!r}; choose another name")

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", check_rank(self.rank))

    @abstractmethod
    def network(self, weight_shape: tuple[int, ...]) -> Network:
        """Returns the factors' index strings."""

    @abstractmethod
    def _decompose(self, weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        """Fits the factors of an attainable rank that are closest to the weight, or nearly so."""

    def mode_sizes(self, weight_shape: tuple[int, ...]) -> dict[str, int]:
        """Returns the sizes of the weight's indices; a method that tensorizes modes has more of them."""
        return dict(zip(self.network(weight_shape).weight_indices, weight_shape, strict=True))

    def bonds(self, weight_shape: tuple[int, ...]) -> Indices:
        """Returns what the entries of a rank are."""
        return self.network(weight_shape).bonds

    def formula(self, weight_shape: tuple[int, ...]) -> str:
        """Returns the weight, as a product that is summed over the bonds."""
        factors = self.network(weight_shape).factors
        return " ".join(f"{name}[{indices}]" for name, indices in factors.items())

    def max_ranks(self, weight_shape: tuple[int, ...]) -> Ranks:
        """Returns the rank of each bond from which on every weight is represented exactly."""
        return self.clamp(weight_shape, (_UNBOUNDED,) * len(self.bonds(weight_shape)))

    def clamp(self, weight_shape: tuple[int, ...], ranks: Ranks) -> Ranks:
        """Returns the ranks, each at most what is attainable next to the others."""
        sizes = self.network(weight_shape).clamp(self.sizes(weight_shape, ranks))
        return tuple(sizes[bond] for bond in self.bonds(weight_shape))

    def sizes(self, weight_shape: tuple[int, ...], ranks: Ranks) -> dict[str, int]:
        """Returns the size of every index of the network."""
        return self.mode_sizes(weight_shape) | dict(zip(self.bonds(weight_shape), ranks, strict=True))

    def ranks(self, weight_shape: tuple[int, ...]) -> Ranks:
        """Returns the explicit ranks for a weight of this shape; what is above the attainable is clamped, and said.

        Raises:
            ValueError: the rank is a rule (resolve it first), or has another number of entries than there are bonds.
        """
        bonds = self.bonds(weight_shape)
        if isinstance(self.rank, RankRule):
            raise UserError(f"rank {self.rank} is a rule; resolve it to integers first")
        broadcast = isinstance(self.rank, int)
        asked = (self.rank,) * len(bonds) if isinstance(self.rank, int) else tuple(self.rank)
        if len(asked) != len(bonds):
            raise UserError(
                f"rank {self.rank!r} has {len(asked)} entries; {type(self).__name__} takes {len(bonds)}, for the bonds {bonds}"
            )
        attained = self.clamp(weight_shape, asked)
        if attained != asked and not (broadcast and self.rank in attained):
            warnings.warn(
                f"{type(self).__name__}: rank {self.rank} is above what a weight of shape {weight_shape} attains; "
                f"clamped to {attained}",
                stacklevel=3,
            )
        return attained

    @classmethod
    def name(cls) -> str:
        """Returns what rules, configurations and checkpoints call the method: with its module where it is none of this package's."""
        ours = cls.__module__.startswith("tnlayers.methods.")
        return cls.__name__ if ours else f"{cls.__module__}.{cls.__qualname__}"

    def with_rank(self, rank: Rank) -> Self:
        return replace(self, rank=rank)

    def check_replaces(self, dense_type: type) -> None:
        """Refuses a layer of another kind than the method is for.

        Raises:
            UnsupportedLayer: the torch layer is none that the method replaces.
        """
        if dense_type.__name__ not in self.replaces:
            replaced = " and ".join(self.replaces)
            raise UnsupportedLayer(f"{type(self).__name__} replaces {replaced}, not {dense_type.__name__}")

    def error_estimate(self, weight: Tensor) -> Callable[[Ranks], float]:
        """Ranks -> the squared relative error of truncating the weight to them; never below the error of the best fit.

        Each bond cuts the weight's indices in two. Bonds whose sides are disjoint are truncated together by projections
        that commute (HOSVD), and what they keep is read off the energies of the rotated weight, exactly. Any other bond
        (the middle of a train) adds what its own singular values discard (TT-SVD, Oseledets 2011, theorem 2.2).
        """
        shape = tuple(weight.shape)
        network, sizes = self.network(shape), self.mode_sizes(shape)
        with decomposing():
            modes = weight.reshape([sizes[index] for index in network.weight_indices])
            energy, spectra = _energies(modes, _sides(network, sizes))
        total = float(energy.sum())
        lost_list: Any = _lost(energy).tolist()
        discarded = {place: tails(values) for place, values in spectra.items()}
        outer = [place for place in range(len(network.bonds)) if place not in spectra]

        def error(ranks: Ranks) -> float:
            lost = lost_list
            for place in outer:
                lost = lost[ranks[place] - 1]
            lost = lost + sum(lost_by[ranks[place]] for place, lost_by in discarded.items())
            return lost / total if total > 0 else 0.0

        return error

    def decompose(
        self, weight: Tensor, ranks: Ranks, groups: int = 1, dtype: torch.dtype = torch.float64
    ) -> tuple[dict[str, Tensor], float]:
        """Fits the parameters, rounded to the dtype; returns them and their relative error, checked on what they then make.

        Args:
            weight: (o, i, h, w) or (o, i), of all groups, in float64.
            ranks: attainable ones, of each group.
            groups: of a grouped convolution; the parameters of more than one have the index g in front.
            dtype: of the parameters. Where one of them would leave its range they share their norm evenly.

        Raises:
            UserError: the weight is not finite, or the factors are no better than zeros.
        """
        check_finite(weight)
        scale = scale_of(weight)
        with decomposing():
            scaled = weight if scale == 1 else weight / scale
            parts = [self._decompose(part, ranks) for part in scaled.chunk(groups if self.per_group else 1)]
            parameters = {
                name: (torch.stack([part[name] for part in parts]) if len(parts) > 1 else first).contiguous()
                for name, first in parts[0].items()
            }
            if scale != 1:
                self.scale(parameters, scale)
            parameters = _rounded(parameters, dtype)
            shape = (weight.shape[0] // groups, *weight.shape[1:])
            network = self.network(shape).grouped() if groups > 1 else self.network(shape)
            exact = {name: precise(value) for name, value in parameters.items()}
            made = self.factors(exact, network.shapes(self.sizes(shape, ranks) | {"g": groups}))
            error = relative_error(weight, network.reconstruct(made).reshape(weight.shape))
        if not error <= 1 + 1e-6 + torch.finfo(dtype).eps:
            raise UserError(
                f"{type(self).__name__} at rank {ranks} failed: relative error {error:.3g} on {tuple(weight.shape)}, where zeros "
                "have 1; take another rank or method"
            )
        return parameters, error

    # ---- parameters: the factors themselves, unless a method generates those

    def alone(self) -> Self:
        """Returns the method for a layer whose parameters make no other layers; see `tnlayers.joint`."""
        return self

    def parameter_shapes(self, factor_shapes: Shapes, ranks: Ranks) -> Shapes:
        """Returns the shape of every parameter, of all groups."""
        return factor_shapes

    def factors(self, parameters: Mapping[str, Tensor], factor_shapes: Shapes) -> Mapping[str, Tensor]:
        """Returns the network's factors, differentiable in the parameters."""
        return parameters

    def ranks_from(self, network: Network, shapes: Shapes) -> Ranks:
        """Returns the ranks of parameters of these shapes.

        Raises:
            ValueError: they are not this method's.
        """
        sizes = network.sizes_from(shapes)
        return tuple(sizes[bond] for bond in network.bonds)

    def draw(self, parameters: Mapping[str, Tensor], network: Network, sizes: Mapping[str, int], std: float) -> None:
        """Fills the parameters at random so that an entry of the weight is expected to have the standard deviation."""
        factor_std = network.init_std(sizes, std)
        for parameter in parameters.values():
            torch.nn.init.normal_(parameter, std=factor_std)

    def scale(self, parameters: Mapping[str, Tensor], by: float) -> None:
        """Multiplies the weight that the parameters make."""
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.mul_(by ** (1 / len(parameters)))


def known_methods() -> dict[str, type[Factorization]]:
    """Returns by its name every method whose module this program has imported, its own ones too."""
    waiting, found = [Factorization], {}
    for kind in waiting:
        waiting += kind.__subclasses__()
        if not isabstract(kind):
            found[kind.name()] = kind
    return found


def _rounded(parameters: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Rounds to the dtype; if the largest entry of one is out of its range, all are first scaled to the same largest entry.

    The product of the scales is 1, and the weight is linear in each parameter.
    """
    largest = {name: float(value.abs().max()) if value.numel() else 0.0 for name, value in parameters.items()}
    low, high = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    if all(low <= size <= high for size in largest.values()) or not all(largest.values()):
        return {name: value.to(dtype) for name, value in parameters.items()}
    mean = math.exp(sum(map(math.log, largest.values())) / len(largest))
    return {name: (value / largest[name] * mean).to(dtype) for name, value in parameters.items()}


def _lost(energy: Tensor) -> Tensor:
    """Returns for (r1 - 1, ..., rd - 1) the sum of all that is outside of the leading r1 x ... x rd block.

    Only sums of what is lost: the difference of the whole and what is kept would be noise below 1e-16 of the whole.
    """
    lost, kept = torch.zeros_like(energy.sum()), energy
    for axis in range(energy.dim()):
        rest = kept.flatten(axis + 1).sum(dim=-1) if axis + 1 < kept.dim() else kept
        beyond = rest.flip(axis).cumsum(axis).flip(axis)
        beyond = torch.cat(
            [beyond.narrow(axis, 1, beyond.shape[axis] - 1), torch.zeros_like(beyond.narrow(axis, 0, 1))], axis
        )
        lost, kept = lost.unsqueeze(axis) + beyond, kept.cumsum(axis)
    return lost


def _sides(network: Network, sizes: Mapping[str, int]) -> list[tuple[list[int], bool]]:
    """Returns for each bond the axes on the smaller side of its cut, and whether earlier bonds have none of them."""
    used: set[int] = set()
    sides = {}
    cuts = [min(network.cut(bond), key=lambda side: size_of(side, sizes)) for bond in network.bonds]
    for place in sorted(range(len(cuts)), key=lambda place: size_of(cuts[place], sizes)):
        axes = [network.weight_indices.index(index) for index in cuts[place]]
        sides[place] = (axes, used.isdisjoint(axes))
        if used.isdisjoint(axes):
            used.update(axes)
    return [sides[place] for place in range(len(cuts))]


def _energies(weight: Tensor, sides: Sequence[tuple[list[int], bool]]) -> tuple[Tensor, dict[int, list[float]]]:
    """Returns the squared entries of the weight in the singular bases of the disjoint sides, an axis a side, and the others' spectra."""
    spectra = {}
    rotated, axes_left = weight, list(range(weight.dim()))
    for place, (axes, disjoint) in enumerate(sides):
        matrix = unfold(weight, axes)
        if not disjoint:
            spectra[place] = singular_values(matrix).square().tolist()
            continue
        basis = left_singular_vectors(matrix)
        now = [axes_left.index(axis) for axis in axes]
        rest = [axis for axis in range(rotated.dim()) if axis not in now]
        shape = [rotated.shape[axis] for axis in rest]
        rotated = (basis.mT @ unfold(rotated, now)).mT.reshape(*shape, -1)
        axes_left = [*(axes_left[axis] for axis in rest), -1 - place]
    ends = [axes_left.index(-1 - place) for place, (_, disjoint) in enumerate(sides) if disjoint]
    return unfold(rotated.square(), ends).sum(dim=1).reshape([rotated.shape[axis] for axis in ends]), spectra
