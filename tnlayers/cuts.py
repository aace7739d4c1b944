"""Cuts of a weight: the splits of its modes in two, the spectra there, and what truncating them takes away.

Legend:
    o, i      output and input channels (features of a linear)
    d, h, w   depth, height and width of the kernel
    m, n      rows and columns of a cut's matrix, m <= n: the shorter side is in the rows
    k         singular values, k = m

A cut is named by the modes on its one side: of a kernel (o, i, h, w), "ih" is the split of i, h from o, w. The bond dimension
of a cut is how many singular values are kept there. Truncating the cuts of trained kernels, layer by layer, to see what a
network can do without is the subject of Singh, Jahromi and Orús (2024), arXiv 2403.14379.

Which factorization makes which cuts low rank: Tucker-2 the cuts o and i; an MPS in the order i h w o the cuts i, ih and o; the
low-rank scheme of Tai et al. the cut ih; the rank of a CP bounds the bond of every cut.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from tnlayers.linalg import decomposing, precise, relative_error, unfold

__all__ = [
    "NormLoss",
    "Split",
    "cut_label",
    "cuts_of",
    "entropy",
    "norm_loss",
    "random_weight",
    "split",
    "truncate_cuts",
]

_MODES = {2: "oi", 3: "oiw", 4: "oihw", 5: "oidhw"}


def cuts_of(shape: Sequence[int]) -> tuple[str, ...]:
    """Every cut of a weight of this shape, single modes first: 2^(k-1) - 1 of k modes: seven of a Conv2d kernel, one
    ("i") of a linear.

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
    """Both sides of a cut, such as "ih|ow"."""
    return f"{cut}|{''.join(mode for mode in _modes(shape) if mode not in cut)}"


@dataclass(frozen=True)
class Split:
    """A weight as a matrix over a cut.

    Attributes:
        values: (k,) singular values, descending.
    """

    values: Tensor
    _basis: Tensor
    _matrix: Tensor
    _axes: tuple[int, ...]
    _weight: Tensor

    def eps(self, bond: int) -> float:
        """||W - W~|| / ||W|| of the truncation to this bond dimension: sqrt(discarded s^2 / all s^2)."""
        energies = self.values.square()
        return math.sqrt(float(energies[bond:].sum() / energies.sum())) if energies.sum() > 0 else 0.0

    def bond(self, eps: float) -> int:
        """The smallest bond dimension, at least 1, at which the truncation loses at most this."""
        return next(bond for bond in range(1, len(self.values) + 1) if self.eps(bond) <= eps)

    def truncated(self, bond: int) -> Tensor:
        """The weight with the bond dimension of this cut: the projection on its leading singular vectors.

        Raises:
            ValueError: a bond dimension that the cut does not have.
        """
        if not 1 <= bond <= len(self.values):
            raise ValueError(f"bond dimension {bond}: this cut has 1 to {len(self.values)}")
        with decomposing():
            basis = self._basis[:, :bond]
            kept = basis @ (basis.mT @ self._matrix)
            return _fold(kept, self._axes, self._weight.shape).to(self._weight)


def split(weight: Tensor, cut: str) -> Split:
    """The singular values and vectors of a weight at a cut, in float64.

    Raises:
        ValueError: a cut that this weight does not have, or values that are not finite.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has values that are not finite; it has no spectrum")
    axes = _rows(weight.shape, cut)
    with decomposing():
        matrix = unfold(precise(weight), axes)
        m, n = matrix.shape
        # Wide: the left vectors and the values of the small triangle are those of the whole.
        small = torch.linalg.qr(matrix.mT, mode="r").R.mT if n > 2 * m else matrix
        basis, values, _ = torch.linalg.svd(small, full_matrices=False)
    return Split(values, basis, matrix, axes, weight)


def truncate_cuts(weight: Tensor, bonds: Sequence[tuple[str, int]]) -> Tensor:
    """The weight truncated along several cuts, one after the other, each time by the singular vectors of what is left.

    The order counts where the sides of two cuts overlap, and there a later truncation may raise the rank of an earlier cut. Those of
    single modes commute up to the choice of their vectors (sequentially truncated HOSVD, Vannieuwenhoven et al. 2012).

    Args:
        weight: of any shape that `cuts_of` takes.
        bonds: (cut, bond dimension) in the order in which they are applied; a bond above the attainable changes nothing.
    """
    for cut, bond in bonds:
        now = split(weight, cut)
        weight = now.truncated(min(bond, len(now.values)))
    return weight


@dataclass(frozen=True)
class NormLoss:
    """What a truncation takes from the norm of a weight.

    Attributes:
        eps: ||W - W~|| / ||W||.
        delta: 1 - ||W~|| / ||W||; for projections 1 - sqrt(1 - eps^2).
    """

    eps: float
    delta: float


def norm_loss(weight: Tensor, truncated: Tensor) -> NormLoss:
    """Both norm losses of a truncated weight; those of a weight of zeros are 0."""
    norm = torch.linalg.vector_norm(precise(weight))
    kept = torch.linalg.vector_norm(precise(truncated))
    return NormLoss(relative_error(weight, truncated), float(1 - kept / norm) if norm > 0 else 0.0)


def entropy(values: Tensor) -> float:
    """The entanglement entropy of a cut in nats: -sum p ln p with p = s^2 / sum(s^2); its exponential is the effective rank.

    Args:
        values: (k,) singular values.
    """
    energies = values.double().square()
    return float(torch.special.entr(energies / energies.sum()).sum()) if energies.sum() > 0 else 0.0


def random_weight(shape: Sequence[int], cut: str, values: Tensor, generator: torch.Generator) -> Tensor:
    """A weight in float64 with these singular values at a cut, in directions drawn at random: the control of a truncation.

    Args:
        shape: of the weight.
        cut: where.
        values: (k,) or fewer.
        generator: on the CPU.
    """
    axes = _rows(shape, cut)
    m = math.prod(shape[axis] for axis in axes)
    n = math.prod(shape) // m
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64)).Q for size in (m, n)
    )
    return _fold((left * values.cpu().double()) @ right.mT, axes, shape)


def _modes(shape: Sequence[int]) -> str:
    if len(shape) not in _MODES:
        raise ValueError(f"a weight of shape {tuple(shape)} has {len(shape)} modes; cuts are known of 2 to 5")
    return _MODES[len(shape)]


def _rows(shape: Sequence[int], cut: str) -> tuple[int, ...]:
    """The axes on the shorter side of a cut."""
    modes = _modes(shape)
    if cut not in cuts_of(shape):
        raise ValueError(f"cut {cut!r}: a weight of shape {tuple(shape)} has {', '.join(cuts_of(shape))}")
    sides = [[axis for axis, mode in enumerate(modes) if (mode in cut) == near] for near in (True, False)]
    return tuple(min(sides, key=lambda axes: math.prod(shape[axis] for axis in axes)))


def _fold(matrix: Tensor, rows: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The inverse of `unfold`."""
    order = [*rows, *(axis for axis in range(len(shape)) if axis not in rows)]
    return matrix.reshape([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(len(shape))])
