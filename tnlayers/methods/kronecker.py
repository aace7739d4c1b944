"""A sum of Kronecker products: a matrix over one half of the channel modes times a small kernel over the other half.

Van Loan and Pitsianis, Approximation with Kronecker products (1993): rearranged so that the indices of A are the rows and those
of B the columns, sum_r A_r (x) B_r is a matrix of rank r, so that the truncated SVD is the global optimum.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from tnlayers.errors import UserError
from tnlayers.layers import FactorizedConv2d
from tnlayers.method import CONVOLUTIONS
from tnlayers.methods.tt import Tensorized
from tnlayers.network import Network, window_of

__all__ = ["Kronecker", "KroneckerConv2d"]


@dataclass(frozen=True)
class Kronecker(Tensorized):
    """W[(o1 o2),(i1 i2),h,w] = sum_r matrix[r,i1,o1] kernel[i2,o2,h,w,r]; rank = r.

    Args:
        in_shape, out_shape: the modes (i1, i2) and (o1, o2) whose products are the channels of a group. By default
            they are balanced, and the larger one goes to the matrix: the kernel is what costs.

    Raises:
        ValueError: shapes of another number of modes than two.
    """

    replaces: ClassVar[tuple[str, ...]] = (*CONVOLUTIONS, "Linear")
    source: ClassVar[str] = "Van Loan and Pitsianis 1993"
    cores: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, shape in (("in_shape", self.in_shape), ("out_shape", self.out_shape)):
            if shape is not None and len(shape) != 2:
                raise UserError(f"{name} {shape}: expected two modes, such as (8, 8)")

    def shapes(self, weight_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out_shape, in_shape = super().shapes(weight_shape)
        return self.out_shape or out_shape[::-1], self.in_shape or in_shape[::-1]

    def network(self, weight_shape: tuple[int, ...]) -> Network:
        return _network(window_of(weight_shape))


@lru_cache
def _network(window: str) -> Network:
    kernel = " ".join(["i2 o2", *window.split(), "r"])
    return Network({"kernel": kernel, "matrix": "r i1 o1"}, weight=f"(o1 o2) (i1 i2) {window}".strip())


class KroneckerConv2d(FactorizedConv2d):
    """A sum of Kronecker products; `rank` is how many, `in_shape` and `out_shape` the two modes. See `Kronecker` and `nn.Conv2d`."""

    method = Kronecker
