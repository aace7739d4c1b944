"""The contract of a method: its index strings, how to decompose, and where it comes from.

A method is a frozen dataclass in a file of its own. `rank` (and what else the method needs) are its fields, `network` its
strings; this class derives the rest. Weights come in as (o, i, h, w) or (o, i), one group at a time, in float64.
"""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from tnlayers.linalg import decomposing, relative_error, singular_values, unfold
from tnlayers.network import Network
from tnlayers.plan import PlanChoice
from tnlayers.ranks import Rank, RankRule, Ranks, check_rank

__all__ = ["Factorization"]

_UNBOUNDED = 1 << 40  # larger than any mode; `Network.clamp` brings it down to the attainable rank


@dataclass(frozen=True)
class Factorization(ABC):
    """How a layer is factorized.

    Args:
        rank: an int (that bond dimension wherever it is attainable), one int for each bond, or a rule.
        plan: how the layer is computed; see `tnlayers.plan`.

    Raises:
        ValueError: a rank below 1, a bare float, or another number of ranks than the method has bonds.
    """

    rank: Rank
    plan: PlanChoice = "auto"

    replaces: ClassVar[str]
    """The torch layer that the method factorizes: "Conv2d" or "Linear"."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", check_rank(self.rank))
        if isinstance(self.plan, list):
            object.__setattr__(self, "plan", tuple(tuple(group) for group in self.plan))

    @abstractmethod
    def network(self, weight_shape: tuple[int, ...]) -> Network:
        """The factors' index strings."""

    @abstractmethod
    def _decompose(self, weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        """The factors of an attainable rank that are closest to the weight, or nearly so."""

    def mode_sizes(self, weight_shape: tuple[int, ...]) -> dict[str, int]:
        """The sizes of the weight's indices; a method that tensorizes modes has more of them."""
        return dict(zip(self.network(weight_shape).weight_indices, weight_shape, strict=True))

    def max_ranks(self, weight_shape: tuple[int, ...]) -> Ranks:
        """The rank of each bond from which on every weight is represented exactly."""
        network = self.network(weight_shape)
        sizes = network.clamp(self.mode_sizes(weight_shape) | dict.fromkeys(network.bonds, _UNBOUNDED))
        return tuple(sizes[bond] for bond in network.bonds)

    def clamp(self, weight_shape: tuple[int, ...], ranks: Ranks) -> Ranks:
        """The ranks, each at most what is attainable next to the others."""
        network = self.network(weight_shape)
        sizes = network.clamp(self.mode_sizes(weight_shape) | dict(zip(network.bonds, ranks, strict=True)))
        return tuple(sizes[bond] for bond in network.bonds)

    def sizes(self, weight_shape: tuple[int, ...], ranks: Ranks) -> dict[str, int]:
        """The size of every index of the network."""
        return self.mode_sizes(weight_shape) | dict(zip(self.network(weight_shape).bonds, ranks, strict=True))

    def ranks(self, weight_shape: tuple[int, ...]) -> Ranks:
        """The explicit ranks for a weight of this shape; what is above the attainable is clamped, and said.

        Raises:
            ValueError: the rank is a rule (resolve it first), or has another number of entries than there are bonds.
        """
        bonds = self.network(weight_shape).bonds
        if isinstance(self.rank, RankRule):
            raise ValueError(f"rank {self.rank} is a rule; resolve it to integers first")
        broadcast = isinstance(self.rank, int)
        asked = (self.rank,) * len(bonds) if isinstance(self.rank, int) else tuple(self.rank)
        if len(asked) != len(bonds):
            raise ValueError(
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

    def with_rank(self, rank: Rank) -> Self:
        return replace(self, rank=rank)

    def spectra(self, weight: Tensor) -> list[Tensor]:
        """For each bond the singular values of its cut: what a smaller rank there discards."""
        shape = tuple(weight.shape)
        network, sizes = self.network(shape), self.mode_sizes(shape)
        modes = weight.reshape([sizes[index] for index in network.weight_indices])
        cuts = (network.cut(bond)[0] for bond in network.bonds)
        with decomposing():
            return [
                singular_values(unfold(modes, [network.weight_indices.index(index) for index in cut])) for cut in cuts
            ]

    def decompose(self, weight: Tensor, ranks: Ranks) -> tuple[dict[str, Tensor], float]:
        """The factors and their relative error, checked on the reconstruction.

        Raises:
            ValueError: the weight is not finite.
            ArithmeticError: the factors are no better than zeros, so that the decomposition itself failed.
        """
        if not torch.isfinite(weight).all():
            raise ValueError("the weight has values that are not finite; it cannot be decomposed")
        with decomposing():
            factors = {name: factor.contiguous() for name, factor in self._decompose(weight, ranks).items()}
            error = relative_error(weight, self.network(tuple(weight.shape)).reconstruct(factors))
        if not error <= 1 + 1e-6:
            raise ArithmeticError(
                f"{type(self).__name__} at rank {ranks} failed: relative error {error:.3g} on {tuple(weight.shape)}"
            )
        return factors, error
