"""Cuts of a weight: the splits of its modes in two, the spectra there, and what truncating them takes away.

Legend:
    o, i      output and input channels (features of a linear)
    d, h, w   depth, height and width of the kernel
    m, n      rows and columns of a cut's matrix, m <= n: the shorter side is in the rows
    k         singular values; a cut has m

A cut is named by the modes on its one side: of a kernel (o, i, h, w), "ih" is the split of i, h from o, w. The bond dimension
of a cut is how many singular values are kept there. Truncating the cuts of trained kernels, layer by layer, to see what a
network can do without is the subject of Singh, Jahromi and Orús (2024), arXiv 2403.14379.

Which factorization makes which cuts low rank: Tucker-2 the cuts o and i; an MPS in the order i h w o the cuts i, ih and o; the
low-rank scheme of Tai et al. the cut ih; the rank of a CP bounds the bond of every cut.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from tnlayers.errors import UserError
from tnlayers.linalg import decomposing, fold, left_svd, precise, relative_error, tails, unfold

__all__ = [
    "NormLoss",
    "Split",
    "cut_label",
    "cuts_of",
    "norm_loss",
    "random_weight",
    "split",
    "splits",
    "truncate_cuts",
]

_MODES = {2: "oi", 3: "oiw", 4: "oihw", 5: "oidhw"}


def cuts_of(shape: Sequence[int]) -> tuple[str, ...]:
    """Lists every cut of a weight of this shape, single modes first.

    N modes have 2^(N-1) - 1 cuts: a Conv2d kernel seven, a linear one ("i").

    Raises:
        ValueError: a shape of fewer than two or more than five modes.
    """
    modes = _modes(shape)
    found = []
    for size in range(1, len(modes) // 2 + 1):
        for side in combinations(modes, size):
            if 2 * size < len(modes) or modes[1] in side:  # of two equal sides the one with i, as in "ih"
                found.append("".join(side))
    return tuple(found)


def cut_label(cut: str, shape: Sequence[int]) -> str:
    """Names both sides of a cut, such as "ih|ow".

    Raises:
        ValueError: a cut that a weight of this shape does not have.
    """
    modes = _modes(shape)
    return "|".join("".join(modes[axis] for axis in side) for side in _sides(shape, cut))


@dataclass(frozen=True, eq=False)
class Split:
    """A weight over a cut, as it was when it was split.

    Attributes:
        values: (k,) singular values in float64, descending.
    """

    values: Tensor
    _basis: Tensor = field(repr=False)  # (m, k)
    _rows: tuple[int, ...] = field(repr=False)
    _weight: Tensor = field(repr=False)

    def eps(self, bond: int) -> float:
        """Computes ||W - W~|| / ||W|| of the truncation to this bond dimension: sqrt(discarded s^2 / all s^2).

        Raises:
            ValueError: a bond dimension that the cut does not have.
        """
        self._check(bond)
        return self._losses()[bond]

    def bond(self, eps: float) -> int:
        """Finds the smallest bond dimension, at least 1, at which the truncation loses at most this.

        Raises:
            ValueError: a norm loss below 0.
        """
        if not eps >= 0:
            raise UserError(f"eps {eps}: expected a norm loss of at least 0, such as 0.3")
        return next(bond for bond, loss in enumerate(self._losses()) if bond >= 1 and loss <= eps)

    def truncated(self, bond: int) -> Tensor:
        """Returns the weight with this bond dimension at the cut: the projection on its leading singular vectors.

        Raises:
            ValueError: a bond dimension that the cut does not have.
        """
        self._check(bond)
        if bond == len(self.values):  # which projects on everything
            return self._weight.clone()
        with decomposing():
            basis = self._basis[:, :bond]
            kept = basis @ (basis.mT @ unfold(precise(self._weight), self._rows))
            return fold(kept, self._rows, self._weight.shape).to(self._weight)

    def _losses(self) -> list[float]:
        """Computes eps at every bond dimension from 0 on."""
        discarded = tails(self.values.square().tolist())
        return [math.sqrt(lost / discarded[0]) if lost > 0 else 0.0 for lost in discarded]

    def _check(self, bond: int) -> None:
        if not 1 <= bond <= len(self.values):
            raise UserError(f"bond dimension {bond}: this cut has 1 to {len(self.values)}")


def split(weight: Tensor, cut: str) -> Split:
    """Computes the singular values and vectors of a weight at a cut, in float64.

    Raises:
        ValueError: a cut that this weight does not have, or values that are not finite.
    """
    return _split(_kept(weight), cut)


def splits(weight: Tensor) -> dict[str, Split]:
    """Splits a weight at every cut that it has; together the splits hold one copy of it.

    Raises:
        ValueError: a shape that `cuts_of` does not take, or values that are not finite.
    """
    kept = _kept(weight)
    return {cut: _split(kept, cut) for cut in cuts_of(weight.shape)}


def truncate_cuts(weight: Tensor, bonds: Sequence[tuple[str, int]]) -> Tensor:
    """Truncates a weight along several cuts, one after the other, each time by the singular vectors of what is left.

    Two cuts cross where each side of the one shares modes with each side of the other, as ih and iw do; single modes cross
    nothing. Cuts that do not cross keep each other's bond dimensions in any order; of two that cross, the later may raise the
    rank at the earlier again. For single modes (sequentially truncated HOSVD, Vannieuwenhoven et al. 2012) and for the cuts of a
    train from one end to the other (TT-SVD, Oseledets 2011) the whole is one projection of the weight, and eps^2 is at most the
    sum of what each cut alone would lose.

    Args:
        weight: of any shape that `cuts_of` takes.
        bonds: (cut, bond dimension) in the order in which they are applied; a bond above the attainable changes nothing.

    Raises:
        ValueError: a cut that this weight does not have, a bond dimension below 1, or values that are not finite.
    """
    left = precise(_kept(weight))
    for cut, bond in bonds:
        now = _split(left, cut)
        left = now.truncated(min(bond, len(now.values)))
    return left.to(weight)


@dataclass(frozen=True)
class NormLoss:
    """What a truncation takes from the norm of a weight.

    Attributes:
        eps: ||W - W~|| / ||W||.
        delta: 1 - ||W~|| / ||W||; 1 - sqrt(1 - eps^2) where W~ is a projection of the weight.
    """

    eps: float
    delta: float


def norm_loss(weight: Tensor, truncated: Tensor) -> NormLoss:
    """Computes both norm losses of a truncated weight; those of a weight of zeros are 0."""
    norm = torch.linalg.vector_norm(precise(weight))
    kept = torch.linalg.vector_norm(precise(truncated))
    return NormLoss(relative_error(weight, truncated), 0.0 if norm == 0 else float(1 - kept / norm))


def random_weight(shape: Sequence[int], cut: str, values: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a weight that has these singular values at a cut, in random directions: the control of a truncation.

    Both singular bases are uniformly distributed (Haar), as those of a Gaussian matrix are (Mezzadri 2007).

    Args:
        shape: of the weight.
        cut: where.
        values: (k,) or fewer: the others are 0.
        generator: on the CPU.

    Returns:
        The weight in float64, on the CPU.

    Raises:
        ValueError: a cut that a weight of this shape does not have, or more values than it has there.
    """
    rows = _rows(shape, cut)
    with decomposing():
        m, k = math.prod(shape[axis] for axis in rows), len(values)
        if k > m:
            raise UserError(f"{k} singular values: the cut {cut!r} of a weight of shape {tuple(shape)} has {m}")
        left, right = _random_basis(m, k, generator), _random_basis(math.prod(shape) // m, k, generator)
        return fold((left * precise(values).cpu()) @ right.mT, rows, shape)


def _kept(weight: Tensor) -> Tensor:
    """Copies a weight that has a spectrum, for it may be overwritten with what is truncated."""
    if not torch.isfinite(weight).all():
        raise UserError("the weight has values that are not finite; it has no spectrum")
    return weight.detach().clone()


def _split(weight: Tensor, cut: str) -> Split:
    """Splits a weight that is finite and does not change."""
    rows = _rows(weight.shape, cut)
    with decomposing():
        basis, values = left_svd(unfold(precise(weight), rows))
    return Split(values, basis, rows, weight)


def _random_basis(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Draws (rows, columns) orthonormal columns; without the signs the first rows of all would be negative."""
    basis, triangle = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    return basis * triangle.diagonal().sign()


def _modes(shape: Sequence[int]) -> str:
    if len(shape) not in _MODES:
        raise UserError(f"a weight of shape {tuple(shape)} has {len(shape)} modes; cuts are known of 2 to 5")
    return _MODES[len(shape)]


def _sides(shape: Sequence[int], cut: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Finds the axes on both sides of a cut."""
    modes = _modes(shape)
    if cut not in cuts_of(shape):
        raise UserError(f"cut {cut!r}: a weight of shape {tuple(shape)} has {', '.join(cuts_of(shape))}")
    near = tuple(axis for axis, mode in enumerate(modes) if mode in cut)
    return near, tuple(axis for axis in range(len(modes)) if axis not in near)


def _rows(shape: Sequence[int], cut: str) -> tuple[int, ...]:
    """Finds the axes on the shorter side of a cut."""
    return min(_sides(shape, cut), key=lambda side: math.prod(shape[axis] for axis in side))
