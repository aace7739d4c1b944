"""CP (canonical polyadic): a sum of rank-one terms, one vector for each mode of the kernel.

Lebedev et al., Speeding-up convolutional neural networks using fine-tuned CP-decomposition (2015), arXiv 1412.6553.

CP has no SVD, and alternating least squares (ALS) from a random start is slow and can diverge. Here it starts from a CP
that is in closed form: in the singular bases of height and width, every (o, i) slice of the kernel is split by an SVD. Its
terms are orthogonal, so their singular values are a spectrum whose tail is the error of dropping them; all of them are
an exact CP of rank h w min(o, i), and ALS from there can only improve.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac
from torch import Tensor

from tnlayers.layers import FactorizedConv2d
from tnlayers.linalg import decomposing, left_singular_vectors, relative_error, tails, unfold
from tnlayers.method import Factorization
from tnlayers.network import Network
from tnlayers.ranks import Ranks

__all__ = ["CP", "CPConv2d"]

_NETWORK = Network({"input": "i r", "height": "h r", "width": "w r", "output": "o r"}, weight="o i h w")
_SWEEPS = 50
_RIDGE = 1e-8  # keeps the normal equations solvable when terms become parallel


@dataclass(frozen=True)
class CP(Factorization):
    """W[o,i,h,w] = sum_r output[o,r] input[i,r] height[h,r] width[w,r]; rank = r."""

    replaces: ClassVar[tuple[str, ...]] = ("Conv2d",)
    source: ClassVar[str] = "Lebedev et al. 2015, arXiv 1412.6553"

    def network(self, weight_shape: tuple[int, ...]) -> Network:
        return _NETWORK

    def max_ranks(self, weight_shape: tuple[int, ...]) -> Ranks:
        out_channels, in_channels, height, width = weight_shape
        return (height * width * min(out_channels, in_channels),)

    def clamp(self, weight_shape: tuple[int, ...], ranks: Ranks) -> Ranks:
        return (min(ranks[0], self.max_ranks(weight_shape)[0]),)

    def error_estimate(self, weight: Tensor) -> Callable[[Ranks], float]:
        """Returns what the orthogonal terms that are left out weigh: the error that ALS starts from."""
        with decomposing():
            spectrum = torch.linalg.svdvals(_slices(weight)[0]).square().flatten().sort(descending=True).values.tolist()
        discarded = tails(spectrum)
        return lambda ranks: discarded[ranks[0]] / discarded[0] if discarded[0] > 0 else 0.0

    def _decompose(self, weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        (rank,) = ranks
        start = _orthogonal_terms(weight, rank)
        if rank == self.max_ranks(tuple(weight.shape))[0] or not weight.any():
            return _balanced(start)
        fitted = _fit(weight, start)
        candidates = [_balanced(start), _balanced(fitted)]
        errors = [relative_error(weight, _NETWORK.reconstruct(factors)) for factors in candidates]
        return candidates[1] if errors[1] <= errors[0] else candidates[0]


def _slices(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the (h, w, o, i) slices in the singular bases of height and width, and those bases."""
    height, width = _basis(weight, 2), _basis(weight, 3)
    return torch.einsum("oihw,hp,wq->pqoi", weight, height, width), height, width


def _basis(weight: Tensor, axis: int) -> Tensor:
    """Returns the singular basis of a mode, completed where the unfolding has fewer columns than rows."""
    basis = left_singular_vectors(unfold(weight, [axis]))
    return basis if basis.shape[1] == basis.shape[0] else torch.linalg.qr(basis, mode="complete").Q


def _orthogonal_terms(weight: Tensor, rank: int) -> CPTensor:
    slices, height, width = _slices(weight)
    left, values, right = torch.linalg.svd(slices, full_matrices=False)
    best = values.flatten().argsort(descending=True)[:rank]
    p, q, k = torch.unravel_index(best, values.shape)
    factors = [left[p, q, :, k].mT * values[p, q, k], right[p, q, k].mT, height[:, p], width[:, q]]
    return CPTensor((torch.ones_like(values[p, q, k]), factors))


def _fit(weight: Tensor, start: CPTensor) -> CPTensor:
    """Runs ALS on the kernel compressed to the channel subspaces that the rank can use (Tucker first: the core is smaller).

    The core is fitted at norm 1, so that the ridge means the same for every weight.
    """
    rank, norm = start.rank, torch.linalg.vector_norm(weight)
    output = left_singular_vectors(unfold(weight, [0]))[:, :rank]
    inputs = left_singular_vectors(unfold(weight, [1]))[:, :rank]
    core = torch.einsum("oihw,or,is->rshw", weight / norm, output, inputs)
    factors = [output.mT @ start.factors[0] / norm, inputs.mT @ start.factors[1], *start.factors[2:]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorLy warns of its own solver's fallbacks; the caller compares the errors
        fitted = parafac(
            core, rank, init=CPTensor((start.weights, factors)), n_iter_max=_SWEEPS, tol=1e-6, l2_reg=_RIDGE
        )
    return CPTensor(
        (fitted.weights, [norm * output @ fitted.factors[0], inputs @ fitted.factors[1], *fitted.factors[2:]])
    )


def _balanced(terms: CPTensor) -> dict[str, Tensor]:
    """Spreads every term's norm evenly over its four vectors, so that no factor trains faster than another."""
    norms = [torch.linalg.vector_norm(factor, dim=0) for factor in terms.factors]
    total = terms.weights.abs() * torch.stack(norms).prod(dim=0)
    signs = [terms.weights.sign(), *(torch.ones_like(total) for _ in norms[1:])]
    output, inputs, height, width = (
        factor / norm.clamp_min(torch.finfo(norm.dtype).tiny) * total ** (1 / len(norms)) * sign
        for factor, norm, sign in zip(terms.factors, norms, signs, strict=True)
    )
    return {"input": inputs, "height": height, "width": width, "output": output}


class CPConv2d(FactorizedConv2d):
    """CP convolution: a sum of rank-one kernels; `rank` is how many. See `CP` and `nn.Conv2d`."""

    method = CP
