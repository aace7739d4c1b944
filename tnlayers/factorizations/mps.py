"""Matrix product state (tensor train) over the four modes of a kernel, in the order input, height, width, output.

Oseledets, Tensor-train decomposition (2011), algorithm 1 (TT-SVD).
"""

from dataclasses import dataclass
from typing import ClassVar

from tensorly.decomposition import tensor_train
from torch import Tensor

from tnlayers.factorizations.base import Factorization
from tnlayers.network import Network
from tnlayers.ranks import Ranks

__all__ = ["MPS"]

_NETWORK = Network({"input": "i a", "height": "a h b", "width": "b w c", "output": "c o"}, weight="o i h w")


@dataclass(frozen=True)
class MPS(Factorization):
    """W[o,i,h,w] = sum_abc input[i,a] height[a,h,b] width[b,w,c] output[c,o]; rank = (a, b, c)."""

    replaces: ClassVar[str] = "Conv2d"

    def network(self, weight_shape: tuple[int, ...]) -> Network:
        return _NETWORK

    def _decompose(self, weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        first, height, width, last = tensor_train(weight.permute(1, 2, 3, 0), rank=[1, *ranks, 1])
        return {"input": first[0], "height": height, "width": width, "output": last[:, :, 0]}
