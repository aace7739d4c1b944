"""Tucker-2: both channel modes compressed, the spatial ones left in the core.

Kim et al., Compression of deep convolutional neural networks for fast and low power mobile applications (2016),
arXiv 1511.06530, section 3; the fit is HOOI, De Lathauwer, De Moor and Vandewalle, On the best rank-1 and
rank-(R1, ..., RN) approximation of higher-order tensors (2000), algorithm 4.2.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from torch import Tensor

from tnlayers.layers import FactorizedConv2d
from tnlayers.linalg import tucker
from tnlayers.method import CONVOLUTIONS, Factorization
from tnlayers.network import Network, window_of
from tnlayers.ranks import Ranks

__all__ = ["Tucker", "TuckerConv2d"]


@dataclass(frozen=True)
class Tucker(Factorization):
    """W[o,i,h,w] = sum_rs output[o,r] core[r,s,h,w] input[s,i]; rank = (rank_out, rank_in) = (r, s)."""

    replaces: ClassVar[tuple[str, ...]] = CONVOLUTIONS
    source: ClassVar[str] = "Kim et al. 2016, arXiv 1511.06530, section 3"

    def network(self, weight_shape: tuple[int, ...]) -> Network:
        return _network(window_of(weight_shape))

    def _decompose(self, weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        rank_out, rank_in = ranks
        core, bases = tucker(weight, {1: rank_in, 0: rank_out})
        return {"input": bases[1].mT, "core": core, "output": bases[0]}


@lru_cache
def _network(window: str) -> Network:
    return Network({"input": "s i", "core": f"r s {window}", "output": "o r"}, weight=f"o i {window}", rank="r s")


class TuckerConv2d(FactorizedConv2d):
    """Tucker-2 convolution: W = core x output x input; `rank=(rank_out, rank_in)`. See `Tucker` and `nn.Conv2d`."""

    method = Tucker
