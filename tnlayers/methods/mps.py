"""Matrix product state (tensor train) over the modes of a kernel.

Oseledets, Tensor-train decomposition (2011), SIAM J. Sci. Comput. 33, algorithm 1 (TT-SVD). In the order h, w, i, o it is
the naive TT that Garipov et al. (2016), arXiv 1611.03214, compare their TT-conv with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from torch import Tensor

from tnlayers.errors import UserError
from tnlayers.layers import FactorizedConv2d
from tnlayers.method import CONVOLUTIONS, Factorization
from tnlayers.network import MODE_NAMES, Network, window_of
from tnlayers.ranks import Ranks

__all__ = ["MPS", "MPSConv2d"]

_BONDS = "abce"  # "d" is a mode


@dataclass(frozen=True)
class MPS(Factorization):
    """W[o,i,h,w] = sum_abc input[i,a] height[a,h,b] width[b,w,c] output[c,o]; rank = (a, b, c), along the train.

    Args:
        order: the modes along the train, such as "h w i o". Those that a kernel does not have are left out, and by default
            the window lies between the input and the output, whatever its dimensions.

    Raises:
        ValueError: an order that does not name each mode once.
    """

    order: str = "i d h w o"

    replaces: ClassVar[tuple[str, ...]] = CONVOLUTIONS
    source: ClassVar[str] = "Oseledets 2011, algorithm 1"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.order if isinstance(self.order, (list, tuple)) else str(self.order).split()
        modes = "".join(map(str, given))
        if len(set(modes)) < len(modes) or not {*"iwo"} <= {*modes} <= {*MODE_NAMES}:
            raise UserError(f"order {self.order!r}: expected the modes i, h, w and o, each once, such as 'h w i o'")
        object.__setattr__(self, "order", " ".join(modes))

    def network(self, weight_shape: tuple[int, ...]) -> Network:
        return _network(self.order, _modes(weight_shape))

    def _decompose(self, weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        from tensorly.decomposition import tensor_train  # here, since TensorLy takes long to import

        own = _modes(weight.shape)
        modes = [mode for mode in self.order.split() if mode in own]
        cores = tensor_train(weight.permute([own.index(mode) for mode in modes]), rank=[1, *ranks, 1])
        shaped = [cores[0][0], *cores[1:-1], cores[-1][..., 0]]
        return {MODE_NAMES[mode]: core for mode, core in zip(modes, shaped, strict=True)}


def _modes(weight_shape: Sequence[int]) -> str:
    """Returns the modes of a weight in its own order."""
    return f"oi{window_of(weight_shape)}".replace(" ", "")


@lru_cache
def _network(order: str, own: str) -> Network:
    """Returns the train over the modes that a weight has.

    Raises:
        UserError: the order leaves one of them out.
    """
    modes = [mode for mode in order.split() if mode in own]
    if len(modes) < len(own):
        raise UserError(f"order {order!r} leaves out a mode of a weight with the modes {' '.join(own)}; name it")
    bonds = ["", *_BONDS[: len(modes) - 1], ""]
    cores = {MODE_NAMES[mode]: f"{bonds[n]} {mode} {bonds[n + 1]}".strip() for n, mode in enumerate(modes)}
    return Network(cores, weight=" ".join(own))


class MPSConv2d(FactorizedConv2d):
    """MPS convolution; `rank` are the three bonds of a train over the modes in `order`, by default input, window, output.

    See `MPS` and `nn.Conv2d`.
    """

    method = MPS
