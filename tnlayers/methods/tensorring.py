"""Tensor ring: a train over pairs of modes whose last core is joined to the first by one more bond.

Zhao, Zhou, Xie, Zhang and Cichocki, Tensor ring decomposition (2016), arXiv 1606.05535; the fit is its TR-SVD (algorithm 1).
As layers: Wang, Sun, Eriksson, Wang and Aggarwal, Wide compression: tensor ring nets (2018), arXiv 1802.09052.

The closing bond q is part of a loop, so no cut has its spectrum. It is an option and no part of the rank; at the size 1
the ring is the train.

Legend: n1, n2, ..., nd are the modes of the cores, each fused from a core's own indices; r1, ..., r_{d-1} the bonds between them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from tnlayers.contraction import Indices
from tnlayers.errors import UserError
from tnlayers.layers import FactorizedConv2d, FactorizedLinear
from tnlayers.linalg import decomposing, singular_values, tails, unfold
from tnlayers.method import CONVOLUTIONS
from tnlayers.methods.tt import Tensorized, train
from tnlayers.network import Network, window_of
from tnlayers.ranks import Ranks

__all__ = ["TensorRing", "TensorRingConv2d", "TensorRingLinear"]


@dataclass(frozen=True)
class TensorRing(Tensorized):
    """W[(o1..od),(i1..id)] = sum core1[q,i1,o1,r1] core2[r1,i2,o2,r2] ... cored[r_{d-1},id,od,q]; rank = the bonds but q.

    Args:
        in_shape, out_shape: as of `TT`; a convolution has a core for its window in front, as of `TTConv`. By default the
            large modes of the input come first and those of the output last, which takes the fewest multiplications.
        ring: the size of q. It is at most that of the first and of the last core's mode, which a pointwise
            convolution, whose window is one position, lowers to 1.

    Raises:
        ValueError: a ring below 1.
    """

    ring: int = 2

    replaces: ClassVar[tuple[str, ...]] = (*CONVOLUTIONS, "Linear")
    source: ClassVar[str] = "Zhao et al. 2016, arXiv 1606.05535, algorithm 1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.ring) is not int or self.ring < 1:
            raise UserError(f"ring {self.ring!r}: expected the size of the bond that closes the ring, an int such as 2")

    def shapes(self, weight_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out_shape, in_shape = super().shapes(weight_shape)
        return out_shape, self.in_shape or in_shape[::-1]

    def network(self, weight_shape: tuple[int, ...]) -> Network:
        return _ring(len(self.shapes(weight_shape)[0]), window_of(weight_shape))

    def mode_sizes(self, weight_shape: tuple[int, ...]) -> dict[str, int]:
        modes = self._core_modes(weight_shape)
        return super().mode_sizes(weight_shape) | {"q": min(self.ring, modes[0], modes[-1])}

    def bonds(self, weight_shape: tuple[int, ...]) -> Indices:
        return tuple(bond for bond in self.network(weight_shape).bonds if bond != "q")

    def clamp(self, weight_shape: tuple[int, ...], ranks: Ranks) -> Ranks:
        """Also lowers the first bond to what is left of the first cut's rank beside q."""
        modes, q = self._core_modes(weight_shape), self.mode_sizes(weight_shape)["q"]
        first = math.ceil(min(modes[0], math.prod(modes[1:])) / q)
        return super().clamp(weight_shape, (min(ranks[0], first), *ranks[1:]))

    def ranks_from(self, network: Network, shapes: Mapping[str, Sequence[int]]) -> Ranks:
        sizes = network.sizes_from(shapes)
        return tuple(sizes[bond] for bond in network.bonds if bond != "q")

    def error_estimate(self, weight: Tensor) -> Callable[[Ranks], float]:
        """Returns what TR-SVD discards at most: tail 1 from q r1 on, and of each later bond that of the opened ring at full r1.

        A smaller r1 leaves rows of the opened ring out, and no singular value rises with that.
        """
        shape = tuple(weight.shape)
        with decomposing():
            values, _, rest = self._opened(weight, self.max_ranks(shape)[0])
            spectra = [singular_values(unfold(rest, range(n))).square().tolist() for n in range(2, rest.dim() - 1)]
            first, *later = map(tails, [values.square().tolist(), *spectra])
        q, total = self.mode_sizes(shape)["q"], first[0]

        def error(ranks: Ranks) -> float:
            lost = first[min(q * ranks[0], len(first) - 1)]
            lost += sum(tail[min(rank, len(tail) - 1)] for tail, rank in zip(later, ranks[1:], strict=True))
            return lost / total if total > 0 else 0.0

        return error

    def _decompose(self, weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        shape = tuple(weight.shape)
        _, first, rest = self._opened(weight, ranks[0])
        shapes = self.network(shape).shapes(self.sizes(shape, ranks))
        modes = [ranks[0] * rest.shape[1], *rest.shape[2:-2], rest.shape[-2] * rest.shape[-1]]
        from tensorly.decomposition import tensor_train  # here, since TensorLy takes long to import

        others = tensor_train(rest.reshape(modes), rank=[1, *ranks[1:], 1]) if len(ranks) > 1 else [rest]
        cores = zip(shapes.items(), [first, *others], strict=True)
        return {name: core.reshape(core_shape) for (name, core_shape), core in cores}

    def _opened(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the first cut's singular values, the first core (q, n1, r1) and the others' product (r1, n2, ..., nd, q)."""
        fused, q = self.fused(weight), self.mode_sizes(tuple(weight.shape))["q"]
        left, values, right = torch.linalg.svd(fused.flatten(1), full_matrices=False)
        missing = max(0, rank * q - len(values))  # where q does not divide the rank of the cut
        left = torch.nn.functional.pad(left[:, : rank * q], (0, missing))
        right = torch.nn.functional.pad((values[:, None] * right)[: rank * q], (0, 0, 0, missing))
        first = left.reshape(-1, rank, q).permute(2, 0, 1)
        return values, first, right.reshape(rank, q, *fused.shape[1:]).movedim(1, -1)

    def _core_modes(self, weight_shape: tuple[int, ...]) -> list[int]:
        """Returns n1, ..., nd."""
        out_shape, in_shape = self.shapes(weight_shape)
        window = [math.prod(weight_shape[2:])] if len(weight_shape) > 2 else []
        return [*window, *(o * i for o, i in zip(out_shape, in_shape, strict=True))]


@lru_cache
def _ring(count: int, window: str) -> Network:
    open_ring = train(count, window)
    first, *_, last = open_ring.factors
    ends = {first: f"q {open_ring.factors[first]}", last: f"{open_ring.factors[last]} q"}
    return Network(dict(open_ring.factors) | ends, open_ring.weight)


class TensorRingConv2d(FactorizedConv2d):
    """Tensor ring over the window and the pairs of channel modes; `rank=(r0, ..., r_{d-1})`, `in_shape`, `out_shape`, `ring`.

    See `TensorRing` and `nn.Conv2d`.
    """

    method = TensorRing


class TensorRingLinear(FactorizedLinear):
    """Tensor ring of a tensorized linear; `rank` are its d - 1 bonds, `in_shape` and `out_shape` its modes, `ring` the closing bond.

    See `TensorRing` and `nn.Linear`.
    """

    method = TensorRing
