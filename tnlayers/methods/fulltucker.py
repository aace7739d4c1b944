"""Tucker over all modes of a kernel: the channel modes as in Tucker-2, and the modes of the window as well.

The fit is HOOI, De Lathauwer, De Moor and Vandewalle, On the best rank-1 and rank-(R1, ..., RN) approximation of
higher-order tensors (2000), algorithm 4.2.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from torch import Tensor

from tnlayers.layers import FactorizedConv2d
from tnlayers.linalg import tucker
from tnlayers.method import CONVOLUTIONS, Factorization
from tnlayers.network import MODE_NAMES, Network, window_of
from tnlayers.ranks import Ranks

__all__ = ["FullTucker", "FullTuckerConv2d"]


@dataclass(frozen=True)
class FullTucker(Factorization):
    """W[o,i,h,w] = sum_rsab output[o,r] core[r,s,a,b] input[s,i] height[h,a] width[w,b]; rank = (r, s, a, b)."""

    replaces: ClassVar[tuple[str, ...]] = CONVOLUTIONS
    source: ClassVar[str] = "De Lathauwer et al. 2000, algorithm 4.2"

    def network(self, weight_shape: tuple[int, ...]) -> Network:
        return _network(window_of(weight_shape))

    def _decompose(self, weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        core, bases = tucker(weight, dict(enumerate(ranks)))
        window = [MODE_NAMES[mode] for mode in window_of(weight.shape).split()]
        factors = {name: bases[axis] for axis, name in enumerate(window, 2)}
        return {"input": bases[1].mT} | factors | {"core": core, "output": bases[0]}


@lru_cache
def _network(window: str) -> Network:
    bonds = dict(zip(window.split(), "abc", strict=False))
    factors = {MODE_NAMES[mode]: f"{mode} {bond}" for mode, bond in bonds.items()}
    rank = " ".join(["r s", *bonds.values()])
    return Network(
        {"input": "s i"} | factors | {"core": rank, "output": "o r"}, weight=f"o i {window}".strip(), rank=rank
    )


class FullTuckerConv2d(FactorizedConv2d):
    """Tucker of all four modes; `rank=(rank_out, rank_in, rank_height, rank_width)`. See `FullTucker` and `nn.Conv2d`."""

    method = FullTucker
