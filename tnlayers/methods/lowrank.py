"""Two factors in place of one: for a linear layer its truncated SVD, for a convolution vertical filters, then horizontal ones.

Tai, Xiao, Zhang, Wang and E, Convolutional neural networks with low-rank regularization (2016), arXiv 1511.06067,
section 2: the scheme W~ = sum_k H_k V_k^T, and its global optimum in closed form (theorem 1), which for a linear layer is the
theorem of Eckart and Young. In three dimensions depth comes first and the plane second, as in Tran et al., A closer look at
spatiotemporal convolutions for action recognition (2018), arXiv 1711.11248, whose order is the other one.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tnlayers.layers import FactorizedConv2d, FactorizedEmbedding, FactorizedLinear
from tnlayers.linalg import leading_subspace, unfold
from tnlayers.method import Factorization
from tnlayers.network import Network
from tnlayers.ranks import Ranks

__all__ = ["LowRank", "LowRankConv2d", "LowRankEmbedding", "LowRankLinear", "best_pair"]

_NETWORKS = {
    2: Network({"input": "r i", "output": "o r"}, weight="o i"),
    4: Network({"vertical": "r i h", "horizontal": "o r w"}, weight="o i h w"),
    5: Network({"depth": "r i d", "plane": "o r h w"}, weight="o i d h w"),
}


@dataclass(frozen=True)
class LowRank(Factorization):
    """W[o,i,h,w] = sum_r horizontal[o,r,w] vertical[r,i,h], or W[o,i] = sum_r output[o,r] input[r,i]; rank = r, in each group.

    The vertical filters take the vertical stride, padding and dilation, the horizontal ones the horizontal ones and the bias.
    From scratch, put one BatchNorm after a convolution (none is in between), as the paper does.
    """

    replaces: ClassVar[tuple[str, ...]] = (
        "Conv2d",
        "Conv3d",
        "ConvTranspose2d",
        "ConvTranspose3d",
        "Linear",
        "Embedding",
    )
    source: ClassVar[str] = "Tai et al. 2016, arXiv 1511.06067, theorem 1"

    def network(self, weight_shape: tuple[int, ...]) -> Network:
        return _NETWORKS[len(weight_shape)]

    def _decompose(self, weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        return best_pair(self.network(tuple(weight.shape)), weight, ranks[0])


def best_pair(network: Network, weight: Tensor, rank: int) -> dict[str, Tensor]:
    """Returns the two factors with one bond of this size that are closest to the weight.

    These are the weight's projection on its leading singular vectors on the shorter side (Eckart and Young), each singular value
    shared evenly between the two.
    """
    (bond,) = network.bonds
    (first, near), (second, far) = (
        (name, [index for index in indices if index != bond]) for name, indices in network.indices.items()
    )
    unfolding = unfold(weight, [network.weight_indices.index(index) for index in near])
    turned = unfolding.shape[0] > unfolding.shape[1]
    short = unfolding.mT if turned else unfolding
    vectors = leading_subspace(short, rank)
    rows = vectors.mT @ short
    values = torch.linalg.vector_norm(rows, dim=1)
    rounding = torch.finfo(values.dtype).eps * max(short.shape) * values.max()
    # Where a value is 0 one of its filters is 0 and not both, which no gradient would ever move.
    share = values.sqrt().where(values > rounding, 1.0)
    left, right = vectors * share, rows / share[:, None]
    if turned:
        left, right = right.mT, left.mT
    sizes = dict(zip(network.weight_indices, weight.shape, strict=True)) | {bond: rank}
    made = {
        first: ([*near, bond], left),
        second: ([bond, *far], right),
    }
    return {
        name: matrix.reshape([sizes[index] for index in held]).permute(
            [held.index(index) for index in network.indices[name]]
        )
        for name, (held, matrix) in made.items()
    }


class LowRankConv2d(FactorizedConv2d):
    """Vertical filters, then horizontal ones; `rank` is how many in each group. See `LowRank` and `nn.Conv2d`."""

    method = LowRank


class LowRankLinear(FactorizedLinear):
    """Two linear layers with `rank` features in between: from dense, the truncated SVD. See `LowRank` and `nn.Linear`."""

    method = LowRank


class LowRankEmbedding(FactorizedEmbedding):
    """Rows of `rank` entries, and one linear layer from them: from dense, the truncated SVD. See `LowRank` and `nn.Embedding`."""

    method = LowRank
