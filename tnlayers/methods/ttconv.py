"""Tensor train of a kernel with tensorized channels: one core for the window, one for each pair of channel modes.

Garipov, Podoprikhin, Novikov and Vetrov, Ultimate tensorization: compressing convolutional and FC layers alike (2016),
arXiv 1611.03214: the TT-conv kernel K(x, y, c, s) = G0[x, y] G1[c1, s1] ... Gd[cd, sd], a product of matrices. The fit is
TT-SVD, Oseledets (2011), algorithm 1.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from tnlayers.layers import FactorizedConv2d
from tnlayers.methods.tt import Tensorized
from tnlayers.network import Network

__all__ = ["TTConv", "TTConv2d"]


@dataclass(frozen=True)
class TTConv(Tensorized):
    """W[(o1..od),(i1..id),h,w] = sum spatial[h,w,r0] core1[r0,i1,o1,r1] core2[r1,i2,o2,r2] ... ; rank = (r0, ..., r_{d-1}).

    Args:
        in_shape, out_shape: the modes (i1, ..., id) and (o1, ..., od) whose products are the channels of a group; three
            balanced ones by default. The window (h, w) is one mode and is not split.
    """

    replaces: ClassVar[tuple[str, ...]] = ("Conv2d",)
    source: ClassVar[str] = "Garipov et al. 2016, arXiv 1611.03214"

    def network(self, weight_shape: tuple[int, ...]) -> Network:
        return _network(len(self.shapes(weight_shape)[0]))


@lru_cache
def _network(count: int) -> Network:
    modes = range(1, count + 1)
    ends = [*(f"r{n}" for n in modes[:-1]), ""]
    cores = {f"core{n}": f"r{n - 1} i{n} o{n} {ends[n - 1]}".strip() for n in modes}
    fused = [" ".join(f"{end}{n}" for n in modes) for end in "oi"]
    return Network({"spatial": "h w r0", **cores}, weight=f"({fused[0]}) ({fused[1]}) h w")


class TTConv2d(FactorizedConv2d):
    """TT-conv: a train over the window and the pairs of channel modes; `rank=(r0, ..., r_{d-1})`, `in_shape`, `out_shape`.

    See `TTConv` and `nn.Conv2d`.
    """

    method = TTConv
