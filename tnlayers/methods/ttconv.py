"""Tensor train of a kernel with tensorized channels: one core for the window, one for each pair of channel modes.

Garipov, Podoprikhin, Novikov and Vetrov, Ultimate tensorization: compressing convolutional and FC layers alike (2016),
arXiv 1611.03214: the TT-conv kernel K(x, y, c, s) = G0[x, y] G1[c1, s1] ... Gd[cd, sd], a product of matrices. The fit is
TT-SVD, Oseledets (2011), algorithm 1.
"""

from dataclasses import dataclass
from typing import ClassVar

from tnlayers.layers import FactorizedConv2d
from tnlayers.method import CONVOLUTIONS
from tnlayers.methods.tt import Tensorized

__all__ = ["TTConv", "TTConv2d"]


@dataclass(frozen=True)
class TTConv(Tensorized):
    """W[(o1..od),(i1..id),h,w] = sum spatial[h,w,r0] core1[r0,i1,o1,r1] core2[r1,i2,o2,r2] ... ; rank = (r0, ..., r_{d-1}).

    Args:
        in_shape, out_shape: the modes (i1, ..., id) and (o1, ..., od) whose products are the channels of a group; three
            balanced ones by default. The window (h, w) is one mode and is not split.
    """

    replaces: ClassVar[tuple[str, ...]] = CONVOLUTIONS
    source: ClassVar[str] = "Garipov et al. 2016, arXiv 1611.03214"


class TTConv2d(FactorizedConv2d):
    """TT-conv: a train over the window and the pairs of channel modes; `rank=(r0, ..., r_{d-1})`, `in_shape`, `out_shape`.

    See `TTConv` and `nn.Conv2d`.
    """

    method = TTConv
