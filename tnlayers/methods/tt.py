"""Tensor train of a tensorized matrix: features split into small modes, one core for each pair of them.

Novikov, Podoprikhin, Osokin and Vetrov, Tensorizing neural networks (2015), arXiv 1509.06569, section 4; the fit is TT-SVD,
Oseledets (2011), algorithm 1.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from torch import Tensor

from tnlayers.errors import UserError
from tnlayers.layers import FactorizedEmbedding, FactorizedLinear
from tnlayers.method import Factorization
from tnlayers.network import Network, window_of
from tnlayers.ranks import Ranks

__all__ = ["TT", "TTEmbedding", "TTLinear", "Tensorized", "balanced_shape", "train"]


@dataclass(frozen=True)
class Tensorized(Factorization):
    """A train with one core for each pair of modes (i_k, o_k) that the channels or features are split into.

    The window of a convolution is not split and has a core in front.

    Args:
        in_shape, out_shape: the modes (i1, ..., id) and (o1, ..., od) whose products are the channels or features; three
            balanced ones by default.

    Raises:
        ValueError: the two shapes differ in length, have fewer than two modes, or do not multiply to the channels.
    """

    in_shape: tuple[int, ...] | None = None
    out_shape: tuple[int, ...] | None = None

    cores: ClassVar[int] = 3
    """The number of modes by default."""
    most_cores: ClassVar[int] = 10
    """The largest number of modes: n factors have 2^(n - 1) plans."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("in_shape", "out_shape"):
            if (shape := getattr(self, name)) is not None:
                modes = shape if isinstance(shape, (list, tuple)) and len(shape) <= self.most_cores else ()
                if not modes or not all(type(mode) is int and mode > 0 for mode in modes):
                    raise UserError(
                        f"{name} {shape!r}: expected a tuple of at most {self.most_cores} positive ints, such as (4, 8, 4)"
                    )
                object.__setattr__(self, name, tuple(shape))

    def shapes(self, weight_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns (out_shape, in_shape) for this weight."""
        given = self.out_shape or self.in_shape
        cores = len(given) if given else self.cores
        out_shape, in_shape = (
            shape or balanced_shape(channels, cores)
            for shape, channels in zip((self.out_shape, self.in_shape), weight_shape[:2], strict=True)
        )
        for name, shape, channels in zip(
            ("out_shape", "in_shape"), (out_shape, in_shape), weight_shape[:2], strict=True
        ):
            if math.prod(shape) != channels:
                raise UserError(f"{name} {shape} multiplies to {math.prod(shape)}; expected {channels}")
        if len(out_shape) != len(in_shape) or len(in_shape) < 2:
            raise UserError(f"in_shape {in_shape} and out_shape {out_shape} need the same number of modes, two or more")
        return out_shape, in_shape

    def network(self, weight_shape: tuple[int, ...]) -> Network:
        return train(len(self.shapes(weight_shape)[0]), window_of(weight_shape))

    def mode_sizes(self, weight_shape: tuple[int, ...]) -> dict[str, int]:
        out_shape, in_shape = self.shapes(weight_shape)
        sizes = {f"o{n}": size for n, size in enumerate(out_shape, 1)}
        sizes |= {f"i{n}": size for n, size in enumerate(in_shape, 1)}
        return sizes | dict(zip(window_of(weight_shape).split(), weight_shape[2:], strict=True))

    def tensorized(self, weight: Tensor) -> Tensor:
        """Returns the weight with its modes split: one axis for each index of the network's weight."""
        shape = tuple(weight.shape)
        sizes = self.mode_sizes(shape)
        return weight.reshape([sizes[index] for index in self.network(shape).weight_indices])

    def fused(self, weight: Tensor) -> Tensor:
        """Returns the weight with one axis for each core, in which the core's own modes are fused."""
        network, tensor = self.network(tuple(weight.shape)), self.tensorized(weight)
        cores = [
            [network.weight_indices.index(index) for index in indices if index in network.weight_indices]
            for indices in network.indices.values()
        ]
        order = [axis for axes in cores for axis in axes]
        return tensor.permute(order).reshape([math.prod(tensor.shape[axis] for axis in axes) for axes in cores])

    def _decompose(self, weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        """Runs TT-SVD on the weight with the indices of each core fused, in the order of the cores."""
        shape = tuple(weight.shape)
        from tensorly.decomposition import tensor_train  # here, since TensorLy takes long to import

        cores = tensor_train(self.fused(weight), rank=[1, *ranks, 1])
        shapes = self.network(shape).shapes(self.sizes(shape, ranks))
        return {name: core.reshape(shape) for core, (name, shape) in zip(cores, shapes.items(), strict=True)}


@dataclass(frozen=True)
class TT(Tensorized):
    """W[(o1..od),(i1..id)] = sum core1[i1,o1,r1] core2[r1,i2,o2,r2] ... ; rank = the d - 1 bonds.

    Args:
        in_shape, out_shape: the modes (i1, ..., id) and (o1, ..., od) whose products are the features; three balanced
            ones by default.
    """

    replaces: ClassVar[tuple[str, ...]] = ("Linear", "Embedding")
    source: ClassVar[str] = "Novikov et al. 2015, arXiv 1509.06569, section 4"


@lru_cache
def train(count: int, window: str) -> Network:
    """Returns the train of so many pairs of modes, after a core for the window where there is one."""
    modes = range(1, count + 1)
    bonds = ["r0" if window else "", *(f"r{n}" for n in modes[:-1]), ""]
    cores = {f"core{n}": f"{bonds[n - 1]} i{n} o{n} {bonds[n]}".strip() for n in modes}
    spatial = {"spatial": f"{window} r0"} if window else {}
    outputs, inputs = (" ".join(f"{end}{n}" for n in modes) for end in "oi")
    return Network(spatial | cores, weight=f"({outputs}) ({inputs}) {window}".strip())


@lru_cache
def balanced_shape(features: int, count: int) -> tuple[int, ...]:
    """Splits `features` into `count` factors as even as its primes allow, ascending: 784 in 3 gives (7, 8, 14)."""
    primes, rest = [], features
    for divisor in range(2, math.isqrt(features) + 1):
        while rest % divisor == 0:
            primes.append(divisor)
            rest //= divisor
    shape = [1] * count
    for prime in sorted([*primes, *([rest] if rest > 1 else [])], reverse=True):
        shape[shape.index(min(shape))] *= prime
    return tuple(sorted(shape))


class TTEmbedding(FactorizedEmbedding):
    """Tensor-train table (Khrulkov et al. 2019, arXiv 1901.10787): a row is made of one slice of each core. See `TT` and `nn.Embedding`."""

    method = TT


class TTLinear(FactorizedLinear):
    """Tensor-train linear; `rank` are its d - 1 bonds, `in_shape` and `out_shape` its modes. See `TT` and `nn.Linear`."""

    method = TT
