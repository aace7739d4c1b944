"""The contract of a method: its index strings, how to decompose, and where it comes from.

A method is a frozen dataclass in a file of its own. `rank` (and what else the method needs) are its fields, `network` its
strings; this class derives the rest. Weights come in as (o, i) or (o, i, ...), with the d, h, w that the window has behind, one
group at a time, in float64; whether a convolution is transposed makes no difference to a method.

The parameters of a layer are the network's factors. A method that generates them from something smaller says how, by
overriding what stands under "parameters" below (`ADTN` does).
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import get_annotations, isabstract
from typing import ClassVar, Self

import torch
from torch import Tensor

from tnlayers.contraction import Indices, size_of
from tnlayers.errors import UnsupportedLayer, UserError
from tnlayers.linalg import decomposing, leading_subspace, singular_values, tails, unfold
from tnlayers.network import Network
from tnlayers.ranks import Rank, RankRule, Ranks, check_rank

__all__ = ["CONVOLUTIONS", "Factorization", "known_methods"]

CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
"""The torch layers whose weights are (o, i) and a window, for the `replaces` of a method."""

Shapes = Mapping[str, tuple[int, ...]]

_OPEN = {"rank", "replaces", "source", "per_group"}
"""Names that a method's class body may annotate although the base class has them."""
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
    """The torch layers that the method factorizes, such as "Conv2d" or "Linear"."""
    source: ClassVar[str]
    """Where it comes from: authors, year, paper, equation."""
    per_group: ClassVar[bool] = True
    """Whether each group of a grouped convolution is fitted by itself."""

    def __init_subclass__(cls) -> None:
        """Refuses an option whose name is taken by the contract or by a rule's own keys."""
        super().__init_subclass__()
        own = get_annotations(cls).keys() - _OPEN
        taken = own & {*dir(Factorization), "pattern", "method", "plan", "reason", "dense"}
        if taken:
            raise TypeError(f"{cls.__name__}: an option cannot be called {sorted(taken)[0]!r}; choose another name")

    def __post_init__(self) -> None:
        self.check_stated()
        object.__setattr__(self, "rank", check_rank(self.rank))

    @classmethod
    def check_stated(cls) -> None:
        """Refuses a class that does not state what every method has to.

        Raises:
            TypeError: it lacks `replaces`, `source`, or the decorator that makes its options fields.
        """
        missing = [name for name in ("replaces", "source") if not hasattr(cls, name)]
        if missing:
            raise TypeError(f"{cls.__name__} does not state `{missing[0]}`, as every method has to")
        if get_annotations(cls).keys() - _OPEN and "__dataclass_params__" not in vars(cls):
            raise TypeError(f"{cls.__name__} is no dataclass by itself: put @dataclass(frozen=True) above it")

    @abstractmethod
    def network(self, weight_shape: tuple[int, ...]) -> Network:
        """Returns the factors' index strings, which are the same for every rank."""

    @abstractmethod
    def _decompose(self, weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        """Returns the factors of these attainable ranks that are closest to the weight, or nearly so, each by its name."""

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
        return _name_of(cls)

    def with_rank(self, rank: Rank) -> Self:
        return replace(self, rank=rank)

    def check_replaces(self, dense_type: type) -> None:
        """Refuses a layer of another kind than the method is for.

        Raises:
            UnsupportedLayer: the torch layer is none that the method replaces.
        """
        if dense_type.__name__ not in self.replaces:
            raise UnsupportedLayer(f"{type(self).__name__} replaces {self.replaced()}, not {dense_type.__name__}")

    @classmethod
    def replaced(cls) -> str:
        """Returns what the method replaces, in words."""
        convolutions = ["convolutions"] if {*CONVOLUTIONS} <= {*cls.replaces} else []
        return " and ".join(
            [*convolutions, *(kind for kind in cls.replaces if not convolutions or kind not in CONVOLUTIONS)]
        )

    def error_estimate(self, weight: Tensor) -> Callable[[Ranks], float]:
        """Attained ranks -> the squared relative error of truncating the weight to them; never below that of the best fit.

        Each bond cuts the weight's indices in two. Bonds whose sides are disjoint are truncated together by projections
        that commute (HOSVD), and what they keep is read off the energies of the rotated weight, exactly. Any other bond
        (the middle of a train) adds what its own singular values discard (TT-SVD, Oseledets 2011, theorem 2.2).
        """
        shape = tuple(weight.shape)
        network, sizes = self.network(shape), self.mode_sizes(shape)
        with decomposing():
            modes = weight.reshape([sizes[index] for index in network.weight_indices])
            energy, spectra = _energies(modes, sides := _sides(network, sizes))
        total = float(energy.sum())
        lost_table = _lost(energy).cpu().numpy()  # which may have as many entries as the weight
        discarded = {place: tails(values) for place, values in spectra.items()}
        outer = [place for place in sides if place not in spectra]

        def error(ranks: Ranks) -> float:
            lost = lost_table.item(*(ranks[place] - 1 for place in outer))
            lost = lost + sum(lost_by[ranks[place]] for place, lost_by in discarded.items())
            return lost / total if total > 0 else 0.0

        return error

    def remark(self, factors: Mapping[str, Tensor]) -> str:
        """Returns what a report should say of a layer's factors; mostly nothing."""
        return ""

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
    """Returns by its name every method whose module this program has imported, its own ones too.

    A class that states nothing of itself is what methods have in common, and no method.
    """
    waiting, found = [Factorization], {}
    for kind in waiting:
        waiting += kind.__subclasses__()
        if not isabstract(kind) and (hasattr(kind, "replaces") or hasattr(kind, "source")):
            found[_name_of(kind)] = kind  # a class that was refused may have another `name`
    return found


def _name_of(method: type) -> str:
    ours = method.__module__.startswith("tnlayers.methods.")
    return method.__name__ if ours else f"{method.__module__}.{method.__qualname__}"


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


def _sides(network: Network, sizes: Mapping[str, int]) -> dict[int, tuple[list[int], bool]]:
    """Returns for each bond the axes on the smaller side of its cut, and whether earlier bonds have none of them.

    Of bonds whose cuts differ by axes of size 1 alone there is one: their ranks are the same, and truncate the same.
    """
    used: set[int] = set()
    sides: dict[int, tuple[list[int], bool]] = {}
    cuts = {place: network.cut(bond) for place, bond in enumerate(network.bonds)}
    distinct = {frozenset(frozenset(index for index in side if sizes[index] > 1) for side in cuts[n]): n for n in cuts}
    smaller = {place: min(cuts[place], key=lambda side: size_of(side, sizes)) for place in distinct.values()}
    for place, side in sorted(smaller.items(), key=lambda item: size_of(item[1], sizes)):
        axes = [network.weight_indices.index(index) for index in side]
        sides[place] = (axes, used.isdisjoint(axes) and len(smaller) > 1)  # one cut alone needs no basis
        if used.isdisjoint(axes):
            used.update(axes)
    return dict(sorted(sides.items()))


def _energies(weight: Tensor, sides: Mapping[int, tuple[list[int], bool]]) -> tuple[Tensor, dict[int, list[float]]]:
    """Returns the squared entries of the weight in the singular bases of the disjoint sides, an axis a side, and the others' spectra."""
    spectra = {}
    rotated, axes_left = weight, list(range(weight.dim()))
    for place, (axes, disjoint) in sides.items():
        matrix = unfold(weight, axes)
        if not disjoint:
            spectra[place] = singular_values(matrix).square().tolist()
            continue
        basis = leading_subspace(matrix, min(matrix.shape))  # any orthonormal basis gives a bound
        now = [axes_left.index(axis) for axis in axes]
        rest = [axis for axis in range(rotated.dim()) if axis not in now]
        shape = [rotated.shape[axis] for axis in rest]
        rotated = (basis.mT @ unfold(rotated, now)).mT.reshape(*shape, -1)
        axes_left = [*(axes_left[axis] for axis in rest), -1 - place]
    ends = [axes_left.index(-1 - place) for place, (_, disjoint) in sides.items() if disjoint]
    return unfold(rotated.square(), ends).sum(dim=1).reshape([rotated.shape[axis] for axis in ends]), spectra
