"""A few filters of the full window, then a pointwise mix of them: the truncated SVD of a convolution.

Zhang, Zou, He and Sun, Accelerating very deep convolutional networks for classification and detection (2016), arXiv 1505.06798,
section 3.1, there for the responses; for the weight itself it is the theorem of Eckart and Young, the global optimum.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from torch import Tensor

from tnlayers.layers import FactorizedConv2d
from tnlayers.method import CONVOLUTIONS, Factorization
from tnlayers.methods.lowrank import best_pair
from tnlayers.network import Network, window_of
from tnlayers.ranks import Ranks

__all__ = ["SVD", "SVDConv2d"]


@dataclass(frozen=True)
class SVD(Factorization):
    """W[o,i,h,w] = sum_r output[o,r] filters[r,i,h,w]; rank = r, the filters of each group. For a linear layer it is `LowRank`."""

    replaces: ClassVar[tuple[str, ...]] = (*CONVOLUTIONS, "Linear")
    source: ClassVar[str] = "Zhang et al. 2016, arXiv 1505.06798, section 3.1"

    def network(self, weight_shape: tuple[int, ...]) -> Network:
        return _network(window_of(weight_shape))

    def _decompose(self, weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        return best_pair(self.network(tuple(weight.shape)), weight, ranks[0])


@lru_cache
def _network(window: str) -> Network:
    return Network({"filters": f"r i {window}".strip(), "output": "o r"}, weight=f"o i {window}".strip())


class SVDConv2d(FactorizedConv2d):
    """`rank` filters of the full window in each group, then a pointwise mix of them. See `SVD` and `nn.Conv2d`."""

    method = SVD
