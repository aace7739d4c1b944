"""Matrix product state (tensor train) over the four modes of a kernel.

Oseledets, Tensor-train decomposition (2011), SIAM J. Sci. Comput. 33, algorithm 1 (TT-SVD). In the order h, w, i, o it is
the naive TT that Garipov et al. (2016), arXiv 1611.03214, compare their TT-conv with.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from tensorly.decomposition import tensor_train
from torch import Tensor

from tnlayers.errors import UserError
from tnlayers.layers import FactorizedConv2d
from tnlayers.method import Factorization
from tnlayers.network import Network
from tnlayers.ranks import Ranks

__all__ = ["MPS", "MPSConv2d"]

_NAMES = {"i": "input", "h": "height", "w": "width", "o": "output"}
_BONDS = ("", "a", "b", "c", "")


@dataclass(frozen=True)
class MPS(Factorization):
    """W[o,i,h,w] = sum_abc input[i,a] height[a,h,b] width[b,w,c] output[c,o]; rank = (a, b, c), along the train.

    Args:
        order: the modes along the train, such as "h w i o".

    Raises:
        ValueError: an order that does not name each of o, i, h and w once.
    """

    order: str = "i h w o"

    replaces: ClassVar[tuple[str, ...]] = ("Conv2d",)
    source: ClassVar[str] = "Oseledets 2011, algorithm 1"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.order if isinstance(self.order, (list, tuple)) else str(self.order).split()
        modes = "".join(map(str, given))
        if sorted(modes) != sorted(_NAMES):
            raise UserError(f"order {self.order!r}: expected the modes i, h, w and o, each once, such as 'h w i o'")
        object.__setattr__(self, "order", " ".join(modes))

    def network(self, weight_shape: tuple[int, ...]) -> Network:
        return _network(self.order)

    def _decompose(self, weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        modes = self.order.split()
        cores = tensor_train(weight.permute(["oihw".index(mode) for mode in modes]), rank=[1, *ranks, 1])
        shaped = [cores[0][0], *cores[1:-1], cores[-1][..., 0]]
        return {_NAMES[mode]: core for mode, core in zip(modes, shaped, strict=True)}


@lru_cache
def _network(order: str) -> Network:
    train = enumerate(order.split())
    cores = {_NAMES[mode]: f"{_BONDS[n]} {mode} {_BONDS[n + 1]}".strip() for n, mode in train}
    return Network(cores, weight="o i h w")


class MPSConv2d(FactorizedConv2d):
    """MPS convolution; `rank` are the three bonds of a train over the modes in `order`, by default "i h w o".

    See `MPS` and `nn.Conv2d`.
    """

    method = MPS
