"""How an embedding is computed: only the slices of the factors that a row needs are contracted, never the whole table.

Legend:
    n         the rows that are asked for
    i, o      the row number and the entries of a row, each one index of the network or several
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tnlayers.contraction import Contraction, Sizes, size_of
from tnlayers.network import Network
from tnlayers.roles import Partition

__all__ = ["Lookup"]

_ROW = "n"


@dataclass(frozen=True)
class _Digits:
    """How one factor is read: the digits of the row number that are its indices, and the axes that these are.

    Attributes:
        steps: for each of them how many rows lie between two of its values, its size, and how many slices of the factor.
        order: the axes of the factor, those of the digits first.
        slices: how many slices there are.
        rows: how many rows the table has.
    """

    steps: tuple[tuple[int, int, int], ...]
    order: tuple[int, ...]
    slices: int
    rows: int

    def __call__(self, rows: Tensor, factor: Tensor) -> Tensor:
        """Returns (n, ...): the slice of every row.

        Raises:
            IndexError: a row number that the table does not have.
        """
        place = torch.zeros_like(rows)
        for distance, size, slices in self.steps:
            digit = torch.div(rows, distance, rounding_mode="floor")
            # The leading digit is left as it is, so that the row after the last is none of them.
            place = place + slices * (digit if distance * size == self.rows else digit % size)
        kept = [factor.shape[axis] for axis in self.order[len(self.steps) :]]
        return F.embedding(place, factor.permute(self.order).reshape(self.slices, -1)).view(rows.shape[0], *kept)


@dataclass(frozen=True)
class Lookup:
    """The counterpart of a `Plan` for an embedding: the factors are gathered at a row's digits, then contracted one after the other."""

    groups: Partition
    gathered: Mapping[str, _Digits]
    contraction: Contraction

    @staticmethod
    def compile(network: Network, sizes: Sizes) -> "Lookup":
        """Compiles the look-up in a table (i, o) that a network makes."""
        outputs, inputs = network.modes[:2]
        gathered = {
            name: _digits(indices, inputs, sizes)
            for name, indices in network.indices.items()
            if set(indices).intersection(inputs)
        }
        asked = {
            name: " ".join(
                [*([_ROW] if name in gathered else []), *(index for index in indices if index not in inputs)]
            )
            for name, indices in network.indices.items()
        }
        names = tuple(asked)
        contraction = Network(asked, " ".join((_ROW, *outputs)), network.rank).contraction(names, (_ROW, *outputs))
        return Lookup((names,), gathered, contraction)

    def weights(self, factors: Mapping[str, Tensor], *, channels_last: bool = False) -> list[Tensor]:
        """Returns the factors, as a plan returns its merged weights; they lie in one way only."""
        return [factors[name] for name in self.contraction.names]

    def macs(self, sizes: Sizes) -> int:
        """Multiply-accumulates for one row."""
        return self.contraction.macs({**sizes, _ROW: 1})

    def __call__(self, rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Takes (n,) row numbers to (n, o)."""
        factors = dict(zip(self.contraction.names, weights, strict=True))
        slices = {
            name: self.gathered[name](rows, factor) if name in self.gathered else factor
            for name, factor in factors.items()
        }
        return self.contraction(slices).flatten(1)


def _digits(indices: Sequence[str], inputs: Sequence[str], sizes: Sizes) -> _Digits:
    own = [index for index in indices if index in inputs]
    steps = [
        (
            size_of(inputs[inputs.index(index) + 1 :], sizes),
            sizes[index],
            size_of(own[place + 1 :], sizes),
        )
        for place, index in enumerate(own)
    ]
    axes = [indices.index(index) for index in own]
    order = (*axes, *(axis for axis in range(len(indices)) if axis not in axes))
    return _Digits(tuple(steps), order, size_of(own, sizes), size_of(inputs, sizes))
