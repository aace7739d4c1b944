"""What a call keeps for its backward pass."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["kept_bytes"]


def kept_bytes(compute: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], x: Tensor) -> int:
    """Returns the bytes of what autograd saves in a call, and of the parameters with their gradients.

    The input is not counted, which others keep as well, nor is what is there for a part of the forward or backward pass alone.

    Args:
        compute: takes the input.
        parameters: whose gradients will be taken.
        x: the input, whose gradient will be taken too.
    """
    x = x.detach().requires_grad_()
    given = {value.untyped_storage().data_ptr() for value in (x, *parameters)}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return value.detach()  # the graph holds it, so that its memory is not given to another one

    with torch.enable_grad(), saved_tensors_hooks(keep, lambda value: value):
        out = compute(x)
    saved = sum(size for place, size in kept.items() if place not in given)
    del out
    return saved + 2 * sum(value.numel() * value.element_size() for value in parameters)
