"""CP (canonical polyadic): a sum of rank-one terms, one vector for each mode of the kernel.

Lebedev et al., Speeding-up convolutional neural networks using fine-tuned CP-decomposition (2015), arXiv 1412.6553.

CP has no SVD, and alternating least squares (ALS) from a random start is slow and can diverge. Here it starts from a CP
that is in closed form: in the singular bases of the window's modes, every (o, i) slice of the kernel is split by an SVD. Its
terms are orthogonal, so their singular values are a spectrum whose tail is the error of dropping them; all of them are
an exact CP of rank h w min(o, i), and ALS from there can only improve. Plain ALS leaves the start slowly; with
momentum, as in Mitchell, Ye and De Sterck, Nesterov acceleration of alternating least squares for canonical tensor decomposition
(2018), arXiv 1810.05846, it needs fewer sweeps.

Terms that cancel each other (degeneracy) are held down as in Phan et al., Stable low-rank tensor decomposition for
compression of convolutional neural network (2020), arXiv 2008.05441: of two fits that are as close the one whose terms have the
smaller norms is wanted. There it is a second optimisation under a bound on the error, here a ridge in every step of ALS.

In the functions below a tensor has two matrix modes in front (o, i of a kernel) and others behind.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from tnlayers.layers import FactorizedConv2d
from tnlayers.linalg import decomposing, left_singular_vectors, precise, relative_error, tails, unfold
from tnlayers.method import CONVOLUTIONS, Factorization
from tnlayers.network import MODE_NAMES, Network, window_of
from tnlayers.ranks import Ranks

if TYPE_CHECKING:
    from tensorly.cp_tensor import CPTensor

__all__ = ["CP", "CPConv2d"]

_SWEEPS = 50
_TOLERANCE = 1e-6  # of what a sweep lowers, in the units of the relative error
_LITTLE = 1e-3  # the same, of the relative error itself where that is small
_MOMENTUM = 1.0  # how far a sweep goes on along the last one's change before it starts
_BRAKE = 0.9  # of the momentum, after a sweep from too far
_COARSE = 1e-2  # of the squared error: above, float32 does for all sweeps but the last
_HEAVY = 1e7  # of a tensor's entries times terms, from which on a sweep takes long
_DAMPING = 0.15  # of the squared error; see `_als`
_LEAST_RIDGE = 1e-12  # keeps the normal equations solvable where nothing is left
_MOST_ENTRIES = 200_000_000  # of what a step of ALS holds; above, the closed form stays as it is
_MOST_WORK = 90_000_000_000  # multiply-accumulates of all sweeps, some four seconds; above there are fewer sweeps


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

    def remark(self, factors: Mapping[str, Tensor]) -> str:
        return f"degeneracy {self.degeneracy(factors):.2f}"

    def degeneracy(self, factors: Mapping[str, Tensor]) -> float:
        """Returns sqrt(sum_r ||term_r||^2) / ||sum_r term_r||: 1 for orthogonal terms, large for terms that cancel each other.

        Rounding in a low precision, and errors made while training, are magnified by as much. Terms of zeros have 0.

        Args:
            factors: of a layer, as in `layer.spec.method.degeneracy(layer.factors)`.
        """
        with decomposing():
            lengths, alike = [], []
            for factor in map(precise, factors.values()):
                length = torch.linalg.vector_norm(factor, dim=-2, keepdim=True)
                unit = _divided(factor, length)
                lengths.append(length)
                alike.append(unit.mT @ unit)
            terms = torch.stack(lengths).log().sum(dim=0)
            if not torch.isfinite(terms).any():
                return 0.0
            terms = (terms - terms.max()).exp()  # the product itself may be out of range
            whole = (terms.mT @ terms * torch.stack(alike).prod(dim=0)).sum().clamp_min(0)
            return float((terms.square().sum() / whole).sqrt())

    def _decompose(self, weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        (rank,) = ranks
        tensor, names = self.tensor(weight)
        terms = _orthogonal_terms(tensor, rank)
        if rank < self.max_ranks(tuple(weight.shape))[0] and weight.any() and _sweeps(tensor.shape, rank):
            terms = min(_fit(tensor, terms), terms, key=lambda terms: relative_error(tensor, _product(terms)))
        return dict(zip(names, _balanced(terms), strict=True))


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


def _orthogonal_terms(tensor: Tensor, rank: int) -> "CPTensor":
    slices, bases = _slices(tensor)
    left, values, right = torch.linalg.svd(slices, full_matrices=False)
    best = values.flatten().argsort(descending=True)[:rank]
    *places, k = torch.unravel_index(best, values.shape)
    ends = [left.movedim(-1, -2)[(*places, k)].mT * values[(*places, k)], right[(*places, k)].mT]
    others = [basis[:, place] for basis, place in zip(bases, places, strict=True)]
    return _terms(torch.ones_like(ends[0][0]), [*ends, *others])


def _terms(norms: Tensor, factors: Sequence[Tensor]) -> "CPTensor":
    from tensorly.cp_tensor import CPTensor  # here, since TensorLy takes long to import

    return CPTensor((norms, factors))


def _fit(tensor: Tensor, start: "CPTensor") -> "CPTensor":
    norm = torch.linalg.vector_norm(tensor)
    terms = _als(tensor / norm, _units(start.weights / norm, start.factors))
    return _terms(norm * terms.weights, terms.factors)


def _sweeps(shape: Sequence[int], rank: int) -> int:
    """Returns how many sweeps over a tensor of this shape are worth their time: fewer, at last none, as it and the rank grow."""
    if max(map(math.prod, _halves(shape))) * rank > _MOST_ENTRIES:
        return 0
    return min(_SWEEPS, _MOST_WORK // (2 * math.prod(shape) * rank + len(shape) * rank**3))


def _als(tensor: Tensor, terms: "CPTensor") -> "CPTensor":
    """Returns terms by their norms and unit vectors after ALS from others, on a tensor of norm 1.

    While one factor is solved for, the columns of the others have norm 1, so that a ridge weighs the norms of the terms: every
    sweep lowers error^2 + ridge * sum_r ||term_r||^2, and terms that cancel each other cost more than they gain. With a ridge of
    c times the present error^2 the sum stays below its start plus log(error_start^2 / error^2) / c.

    Float32 on a CPU is twice as fast and does where the error is large and a sweep takes long; elsewhere it might mean TF32.
    """
    left = (tensor - _product(terms)).square().sum()
    sweeps = _sweeps(tensor.shape, terms.rank)
    heavy = tensor.numel() * terms.rank > _HEAVY
    if heavy and left > _COARSE and tensor.device.type == "cpu" and sweeps > 1:
        terms, done = _swept(tensor.float(), _to(terms, torch.float32), left.float(), sweeps - 1, enough=_COARSE)
        terms, sweeps = _to(terms, tensor.dtype), sweeps - done
        left = (tensor - _product(terms)).square().sum()  # that of float32 may be all rounding
    return _swept(tensor, terms, left, sweeps)[0]


def _swept(tensor: Tensor, terms: "CPTensor", left: Tensor, sweeps: int, enough: float = 0.0) -> "tuple[CPTensor, int]":
    """Sweeps until little is gained, or the squared error is small enough; returns the terms and how many sweeps it were.

    A sweep starts ahead of the present terms, where the last change leads to. If it ends no better it is undone, the next starts
    from the terms themselves, and those after it less far ahead.
    """
    before, momentum, done = terms, _MOMENTUM, 0
    while done < sweeps and left > enough:
        ahead = [now + momentum * (now - last) for now, last in zip(terms.factors, before.factors, strict=True)]
        ridge = (_DAMPING * left).clamp_min(_LEAST_RIDGE)
        new, error = _sweep(tensor, _units(terms.weights, ahead).factors, ridge)
        old = (left + ridge * terms.weights.square().sum()).sqrt()
        done, gain = done + 1, float(old - (error + ridge * new.weights.square().sum()).sqrt())
        if gain > 0:
            before, terms, left = terms, new, error
            if gain <= min(_TOLERANCE, _LITTLE * float(left.sqrt())):
                break
        elif before is terms:
            break
        else:
            before, momentum = terms, _BRAKE * momentum
    return terms, done


def _sweep(tensor: Tensor, factors: Sequence[Tensor], ridge: Tensor) -> "tuple[CPTensor, Tensor]":
    """Solves for one factor after the other; returns the terms and their squared error. The first factor given does not count."""
    factors, grams = list(factors), [factor.mT @ factor for factor in factors]
    split = len(_halves(tensor.shape)[0])
    matrix = tensor.flatten(split).flatten(0, split - 1)
    damping = ridge * torch.eye(len(grams[0])).to(tensor)
    for modes, unfolded in ((range(split), matrix), (range(split, tensor.dim()), matrix.mT)):
        product = unfolded @ _joined([factor for other, factor in enumerate(factors) if other not in modes])
        product = product.unflatten(0, [tensor.shape[mode] for mode in modes])
        for mode in modes:
            projected = _contracted(product, [factors[other] for other in modes], mode - modes[0])
            gram = torch.stack(grams[:mode] + grams[mode + 1 :]).prod(dim=0)
            solved = torch.cholesky_solve(projected.mT, torch.linalg.cholesky(gram + damping)).mT
            norms = torch.linalg.vector_norm(solved, dim=0)
            factors[mode] = _divided(solved, norms)
            grams[mode] = factors[mode].mT @ factors[mode]
    error = tensor.square().sum() - 2 * (projected * solved).sum() + (gram * (solved.mT @ solved)).sum()
    return _terms(norms, factors), error.clamp_min(0)


def _units(norms: Tensor, factors: Sequence[Tensor]) -> "CPTensor":
    """Returns the same terms by unit vectors; the norms take on the vectors'."""
    lengths = [torch.linalg.vector_norm(factor, dim=0) for factor in factors]
    units = [_divided(factor, length) for factor, length in zip(factors, lengths, strict=True)]
    return _terms(norms * torch.stack(lengths).prod(dim=0), units)


def _divided(factor: Tensor, length: Tensor) -> Tensor:
    """Returns zeros where the length is 0."""
    return factor / length.clamp_min(torch.finfo(length.dtype).tiny)


def _to(terms: "CPTensor", dtype: torch.dtype) -> "CPTensor":
    return _terms(terms.weights.to(dtype), [factor.to(dtype) for factor in terms.factors])


def _halves(shape: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Splits the modes in two whose products are as even as their order allows.

    What a tensor is when multiplied by the terms' vectors of one half serves every mode of the other (Phan, Tichavsky and
    Cichocki 2013, Fast alternating LS algorithms for high order CANDECOMP/PARAFAC), and is small.
    """
    splits = [(shape[:n], shape[n:]) for n in range(1, len(shape))]
    return min(splits, key=lambda halves: max(map(math.prod, halves)))


def _contracted(product: Tensor, factors: Sequence[Tensor], mode: int) -> Tensor:
    """Returns (n, r): of (n1, n2, ..., r) all modes but one are summed with each term's vectors."""
    for axis in reversed(range(len(factors))):
        if axis != mode:
            product = torch.linalg.vecdot(product.movedim(axis, -2), factors[axis], dim=-2)
    return product


def _joined(factors: Sequence[Tensor]) -> Tensor:
    """Returns (n1 n2 ..., r), the products of each term's vectors."""
    from tensorly.tenalg import khatri_rao  # here, since TensorLy takes long to import

    return khatri_rao(factors) if len(factors) > 1 else factors[0]


def _product(terms: "CPTensor") -> Tensor:
    """Returns the tensor that the terms make, by the halves of its modes: TensorLy holds all modes but one of every term."""
    split = len(_halves(terms.shape)[0])
    return (_joined(terms.factors[:split]) * terms.weights @ _joined(terms.factors[split:]).mT).reshape(terms.shape)


def _balanced(terms: "CPTensor") -> list[Tensor]:
    """Spreads every term's norm evenly over its vectors, so that no factor trains faster than another."""
    norms = [torch.linalg.vector_norm(factor, dim=0) for factor in terms.factors]
    total = terms.weights.abs() * torch.stack(norms).prod(dim=0)
    signs = [terms.weights.sign(), *(torch.ones_like(total) for _ in norms[1:])]
    return [
        _divided(factor, norm) * total ** (1 / len(norms)) * sign
        for factor, norm, sign in zip(terms.factors, norms, signs, strict=True)
    ]


class CPConv2d(FactorizedConv2d):
    """CP convolution: a sum of rank-one kernels; `rank` is how many. See `CP` and `nn.Conv2d`."""

    method = CP
