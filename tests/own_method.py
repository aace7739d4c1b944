"""A method in a user's file: what tnlayers' own methods are, and nothing that they know."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tnlayers import Factorization, Network

_NETWORK = Network({"kernel": "c a h w r", "matrix": "r d b"}, weight="(b a) (d c) h w")


@dataclass(frozen=True)
class Blocks(Factorization):
    """W[(b a),(d c),h,w] = sum_r matrix[r,d,b] kernel[c,a,h,w,r]: `blocks` x `blocks` multiples of the same r kernels."""

    blocks: int = 2

    replaces: ClassVar[tuple[str, ...]] = ("Conv2d",)
    source: ClassVar[str] = "own"

    def network(self, weight_shape: tuple[int, ...]) -> Network:
        return _NETWORK

    def mode_sizes(self, weight_shape: tuple[int, ...]) -> dict[str, int]:
        o, i, h, w = weight_shape
        b, d = math.gcd(self.blocks, o), math.gcd(self.blocks, i)
        return {"b": b, "a": o // b, "d": d, "c": i // d, "h": h, "w": w}

    def _decompose(self, weight: Tensor, ranks: tuple[int, ...]) -> dict[str, Tensor]:
        b, a, d, c, h, w = self.mode_sizes(tuple(weight.shape)).values()
        split = weight.reshape(b, a, d, c, h, w).permute(3, 1, 4, 5, 2, 0).reshape(-1, d * b)
        u, s, vh = torch.linalg.svd(split, full_matrices=False)
        kernel = (u * s)[:, : ranks[0]].reshape(c, a, h, w, -1)
        return {"kernel": kernel, "matrix": vh[: ranks[0]].reshape(-1, d, b)}
