"""The product of factors, two at a time, each as one matmul, or where nothing is summed as one multiplication.

`torch.einsum` computes the same. For factors as small as those of a layer it takes most of its time to find out how, forward and
backward; here that is found out once.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Contraction", "Indices", "Sizes", "contraction", "size_of"]

Indices = tuple[str, ...]
Sizes = Mapping[str, int]


def size_of(indices: Iterable[str], sizes: Sizes) -> int:
    """Returns the number of values that the indices run through together."""
    return math.prod(sizes[index] for index in indices)


@dataclass(frozen=True)
class _Product:
    """The product of two tensors, summed over some of the indices that they share: (batch, rows, summed) times (batch, summed, columns).

    Attributes:
        swapped: whether the rows are those of the second one.
        left: the order of the axes of the one with the rows; None where they are in order.
        right: that of the one with the columns.
        batch: how many indices they share and keep.
        rows: how many the left one keeps alone.
        summed: how many are summed.
        columns: how many the right one keeps alone.
        indices: all that it runs over.
    """

    swapped: bool
    left: tuple[int, ...] | None
    right: tuple[int, ...] | None
    batch: int
    rows: int
    summed: int
    columns: int
    indices: Indices

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """Returns (batch..., rows..., columns...)."""
        if self.swapped:
            left, right = right, left
        if self.left is not None:
            left = left.permute(self.left)
        if self.right is not None:
            right = right.permute(self.right)
        if not self.summed:
            left = left[(..., *(None for _ in range(self.columns)))]
            return left * right[(*(slice(None) for _ in range(self.batch)), *(None for _ in range(self.rows)))]
        if self.rows == self.summed == self.columns == 1 and not self.batch:
            return torch.mm(left, right)
        ahead, kept = left.shape[: self.batch], left.shape[self.batch : self.batch + self.rows]
        added, summed = right.shape[self.batch + self.summed :], math.prod(left.shape[self.batch + self.rows :])
        lead = (math.prod(ahead),) if self.batch else ()
        left = left.reshape(*lead, math.prod(kept), summed)
        right = right.reshape(*lead, summed, math.prod(added))
        return (torch.bmm if self.batch else torch.mm)(left, right).view(*ahead, *kept, *added)


@dataclass(frozen=True)
class Contraction:
    """The product of some factors, of two at a time, in a fixed order.

    Attributes:
        names: of the factors.
        products: one less than there are factors.
        order: in which the indices of the result are wanted; None where they are in it already.
    """

    names: tuple[str, ...]
    products: tuple[_Product, ...]
    order: tuple[int, ...] | None

    def macs(self, sizes: Sizes) -> int:
        """Multiply-accumulates of all the products."""
        return sum(size_of(product.indices, sizes) for product in self.products)

    def __call__(self, factors: Mapping[str, Tensor]) -> Tensor:
        first, *others = self.names
        result = factors[first]
        for product, name in zip(self.products, others, strict=True):
            result = product(result, factors[name])
        return result if self.order is None else result.permute(self.order)


def contraction(names: Sequence[str], indices: Mapping[str, Indices], output: Sequence[str]) -> Contraction:
    """Compiles the product of the named factors, left to right.

    Args:
        names: of the factors.
        indices: those of each; one that is not in the output is in two factors or more.
        output: the indices that are left, in their order.
    """
    held, products, place = indices[names[0]], [], {index: n for n, index in enumerate(output)}
    for n, name in enumerate(names[1:], start=2):
        needed = {*output, *(index for later in names[n:] for index in indices[later])}
        last = n == len(names)
        product, held = _product(held, indices[name], needed, place, last=last)
        products.append(product)
    return Contraction(tuple(names), tuple(products), _order(held, output))


def _product(
    one: Indices, other: Indices, needed: set[str], place: Mapping[str, int], *, last: bool
) -> tuple[_Product, Indices]:
    """Returns a product and the indices of its result, in their order.

    What comes first in the output comes first where it costs nothing; the last product copies its operands rather than what it
    makes, which is mostly larger.
    """
    batch = tuple(index for index in one if index in other and index in needed)
    summed = tuple(index for index in one if index in other and index not in needed)
    rows, columns = (tuple(index for index in own if index not in (*batch, *summed)) for own in (one, other))
    if last:
        batch, rows, columns = (tuple(sorted(group, key=place.__getitem__)) for group in (batch, rows, columns))
    first_row, first_column = (min((place.get(index, -1) for index in own), default=0) for own in (rows, columns))
    swapped = first_column < first_row
    if swapped:
        one, other, rows, columns = other, one, columns, rows
    left, right = _order(one, (*batch, *rows, *summed)), _order(other, (*batch, *summed, *columns))
    result = (*batch, *rows, *columns)
    counts = (len(batch), len(rows), len(summed), len(columns))
    return _Product(swapped, left, right, *counts, (*batch, *rows, *summed, *columns)), result


def _order(held: Indices, wanted: Sequence[str]) -> tuple[int, ...] | None:
    return None if held == tuple(wanted) else tuple(held.index(index) for index in wanted)
