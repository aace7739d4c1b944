"""CP (canonical polyadic): a sum of rank-one terms, one vector for each mode of the kernel.

Lebedev et al., Speeding-up convolutional neural networks using fine-tuned CP-decomposition (2015), arXiv 1412.6553.

CP has no SVD, and alternating least squares (ALS) from a random start is slow and can diverge. Here it starts from a CP
that is in closed form: in the singular bases of the window's modes, every (o, i) slice of the kernel is split by an SVD. Its
terms are orthogonal, so their singular values are a spectrum whose tail is the error of dropping them; all of them are
an exact CP of rank h w min(o, i), and ALS from there can only improve.

In the functions below a tensor has two matrix modes in front (o, i of a kernel) and others behind.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac
from torch import Tensor

from tnlayers.layers import FactorizedConv2d
from tnlayers.linalg import decomposing, left_singular_vectors, relative_error, tails, unfold
from tnlayers.method import CONVOLUTIONS, Factorization
from tnlayers.network import MODE_NAMES, Network, window_of
from tnlayers.ranks import Ranks

__all__ = ["CP", "CPConv2d"]

_SWEEPS = 50
_RIDGE = 1e-8  # keeps the normal equations solvable when terms become parallel


@dataclass(frozen=True)
class CP(Factorization):
    """W[o,i,h,w] = sum_r output[o,r] input[i,r] height[h,r] width[w,r]; rank = r."""

    replaces: ClassVar[tuple[str, ...]] = CONVOLUTIONS
    source: ClassVar[str] = "Lebedev et al. 2015, arXiv 1412.6553"

    def network(self, weight_shape: tuple[int, ...]) -> Network:
        return _network(window_of(weight_shape))

    def tensor(self, weight: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """Returns the weight as the tensor that is fitted, two matrix modes first, and the factor of each of its modes."""
        names = ["output", "input", *(MODE_NAMES[mode] for mode in window_of(weight.shape).split())]
        return weight, tuple(names)

    def max_ranks(self, weight_shape: tuple[int, ...]) -> Ranks:
        shape = self.tensor(torch.empty(weight_shape, device="meta"))[0].shape
        return (math.prod(shape[2:]) * min(shape[:2]),)

    def clamp(self, weight_shape: tuple[int, ...], ranks: Ranks) -> Ranks:
        return (min(ranks[0], self.max_ranks(weight_shape)[0]),)

    def error_estimate(self, weight: Tensor) -> Callable[[Ranks], float]:
        """Returns what the orthogonal terms that are left out weigh: the error that ALS starts from."""
        with decomposing():
            slices, _ = _slices(self.tensor(weight)[0])
            spectrum = torch.linalg.svdvals(slices).square().flatten().sort(descending=True).values.tolist()
        discarded = tails(spectrum)
        return lambda ranks: discarded[ranks[0]] / discarded[0] if discarded[0] > 0 else 0.0

    def _decompose(self, weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        (rank,) = ranks
        tensor, names = self.tensor(weight)
        candidates = [_orthogonal_terms(tensor, rank)]
        if rank < self.max_ranks(tuple(weight.shape))[0] and weight.any():
            candidates.append(_fit(tensor, candidates[0]))
        balanced = [dict(zip(names, _balanced(terms), strict=True)) for terms in candidates]
        network = self.network(tuple(weight.shape))
        return min(reversed(balanced), key=lambda factors: relative_error(weight, network.reconstruct(factors)))


@lru_cache
def _network(window: str) -> Network:
    modes = ["i", *window.split(), "o"]
    return Network({MODE_NAMES[mode]: f"{mode} r" for mode in modes}, weight=f"o i {window}")


def _slices(tensor: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Returns the slices over the matrix modes in the singular bases of the others, those in front, and the bases."""
    bases = [_basis(tensor, axis) for axis in range(2, tensor.dim())]
    for basis in bases:
        tensor = torch.tensordot(tensor, basis, dims=([2], [0]))  # which puts the new mode behind all others
    return tensor.permute(*range(2, tensor.dim()), 0, 1), bases


def _basis(tensor: Tensor, axis: int) -> Tensor:
    """Returns the singular basis of a mode, completed where the unfolding has fewer columns than rows."""
    basis = left_singular_vectors(unfold(tensor, [axis]))
    return basis if basis.shape[1] == basis.shape[0] else torch.linalg.qr(basis, mode="complete").Q


def _orthogonal_terms(tensor: Tensor, rank: int) -> CPTensor:
    slices, bases = _slices(tensor)
    left, values, right = torch.linalg.svd(slices, full_matrices=False)
    best = values.flatten().argsort(descending=True)[:rank]
    *places, k = torch.unravel_index(best, values.shape)
    ends = [left.movedim(-1, -2)[(*places, k)].mT * values[(*places, k)], right[(*places, k)].mT]
    others = [basis[:, place] for basis, place in zip(bases, places, strict=True)]
    return CPTensor((torch.ones_like(ends[0][0]), [*ends, *others]))


def _fit(tensor: Tensor, start: CPTensor) -> CPTensor:
    """Runs ALS on the tensor compressed to the matrix subspaces that the rank can use (Tucker first: the core is smaller).

    The core is fitted at norm 1, so that the ridge means the same for every weight.
    """
    rank, norm = start.rank, torch.linalg.vector_norm(tensor)
    first = left_singular_vectors(unfold(tensor, [0]))[:, :rank]
    second = left_singular_vectors(unfold(tensor, [1]))[:, :rank]
    core = torch.einsum("oi...,or,is->rs...", tensor / norm, first, second)
    factors = [first.mT @ start.factors[0] / norm, second.mT @ start.factors[1], *start.factors[2:]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorLy warns of its own solver's fallbacks; the caller compares the errors
        fitted = parafac(
            core, rank, init=CPTensor((start.weights, factors)), n_iter_max=_SWEEPS, tol=1e-6, l2_reg=_RIDGE
        )
    return CPTensor(
        (fitted.weights, [norm * first @ fitted.factors[0], second @ fitted.factors[1], *fitted.factors[2:]])
    )


def _balanced(terms: CPTensor) -> list[Tensor]:
    """Spreads every term's norm evenly over its vectors, so that no factor trains faster than another."""
    norms = [torch.linalg.vector_norm(factor, dim=0) for factor in terms.factors]
    total = terms.weights.abs() * torch.stack(norms).prod(dim=0)
    signs = [terms.weights.sign(), *(torch.ones_like(total) for _ in norms[1:])]
    return [
        factor / norm.clamp_min(torch.finfo(norm.dtype).tiny) * total ** (1 / len(norms)) * sign
        for factor, norm, sign in zip(terms.factors, norms, signs, strict=True)
    ]


class CPConv2d(FactorizedConv2d):
    """CP convolution: a sum of rank-one kernels; `rank` is how many. See `CP` and `nn.Conv2d`."""

    method = CP
