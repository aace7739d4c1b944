"""Vertical filters, then horizontal ones: the kernel's rows and columns apart.

Tai, Xiao, Zhang, Wang and E, Convolutional neural networks with low-rank regularization (2016), arXiv 1511.06067,
section 2: the scheme W~ = sum_k H_k V_k^T, and its global optimum in closed form (theorem 1).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tnlayers.layers import FactorizedConv2d
from tnlayers.method import Factorization
from tnlayers.network import Network
from tnlayers.ranks import Ranks

__all__ = ["LowRank", "LowRankConv2d"]

_NETWORK = Network({"vertical": "r i h", "horizontal": "o r w"}, weight="o i h w")


@dataclass(frozen=True)
class LowRank(Factorization):
    """W[o,i,h,w] = sum_r horizontal[o,r,w] vertical[r,i,h]; rank = r, the filters in between, of each group.

    The vertical filters take the vertical stride, padding and dilation, the horizontal ones the horizontal ones and the bias.
    From scratch, put one BatchNorm after the layer (none is in between), as the paper does.
    """

    replaces: ClassVar[tuple[str, ...]] = ("Conv2d",)
    source: ClassVar[str] = "Tai et al. 2016, arXiv 1511.06067, theorem 1"

    def network(self, weight_shape: tuple[int, ...]) -> Network:
        return _NETWORK

    def _decompose(self, weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        """Takes one SVD of the (i h, o w) unfolding, each singular value shared evenly between its two filters."""
        out_channels, in_channels, height, width = weight.shape
        unfolding = weight.permute(1, 2, 0, 3).reshape(in_channels * height, out_channels * width)
        left, values, right = torch.linalg.svd(unfolding, full_matrices=False)
        rounding = torch.finfo(values.dtype).eps * max(unfolding.shape) * values[0]
        values = values[: ranks[0]]
        # Where a value is 0 one of its filters is 0 and not both, which no gradient would ever move.
        share = values.sqrt().where(values > rounding, 1.0)
        vertical = (left[:, : ranks[0]] * share).mT.reshape(-1, in_channels, height)
        horizontal = ((values / share)[:, None] * right[: ranks[0]]).reshape(-1, out_channels, width).transpose(0, 1)
        return {"vertical": vertical, "horizontal": horizontal}


class LowRankConv2d(FactorizedConv2d):
    """Vertical filters, then horizontal ones; `rank` is how many in each group. See `LowRank` and `nn.Conv2d`."""

    method = LowRank
