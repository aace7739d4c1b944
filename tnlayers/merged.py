"""The merged weights of a layer's plan, kept while it evaluates: there they do not change from call to call.

A graph that is compiled, exported or traced cannot ask whether a factor has changed since. So what is kept is made before it:
by `eval()`, by a load and by a move to another device or dtype. Eager calls ask each time.
"""

from collections.abc import Sequence
from functools import cache
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["Merged"]


class Merged:
    """Weights, and what tells whether they are still those of their factors.

    Torch counts writes in place, but not those of fused optimizers, whose steps it announces. What is written through `.data` or by
    another process is seen at the next `eval()`.

    Attributes:
        weights: the merged weight of each step of the plan.
        factors: the parameters that they were made of.
        stepped: whether an optimizer of one of the factors has taken a step since.
        checked: whether an eager call in evaluation made them; a mode is often followed by writes through `.data`, such as
            those that exchange weights for their moving averages.
    """

    def __init__(self, weights: list[Tensor], factors: Sequence[nn.Parameter], *, checked: bool) -> None:
        self.weights, self.factors, self.checked, self.stepped = weights, list(factors), checked, False
        self._aliases = [factor.detach() for factor in factors]  # their memory is not given to another tensor
        self._counts = [factor._version for factor in factors]
        _told_of_steps().add(self)

    def made_of(self, factors: Sequence[Tensor]) -> bool:
        """Whether these are the parameters."""
        return all(own is given for own, given in zip(self.factors, factors, strict=True))

    def unwritten(self) -> bool:
        """Whether no step was announced, no write counted, and no exchange of the parameters' memory seen."""
        return not self.stepped and all(
            factor._version == count and _lies_as(factor, alias)
            for factor, count, alias in zip(self.factors, self._counts, self._aliases, strict=True)
        )


@cache
def _told_of_steps() -> "WeakSet[Merged]":
    """All that is kept at present, which torch tells of every optimizer's step from now on."""
    present: WeakSet[Merged] = WeakSet()

    @torch.compiler.disable
    def tell(optimizer: torch.optim.Optimizer, *_: object) -> None:
        kept = list(present)  # empty while everything trains
        stepped = {id(value) for group in optimizer.param_groups if kept for value in group["params"]}
        for merged in kept:
            merged.stepped |= any(id(factor) in stepped for factor in merged.factors)

    register_optimizer_step_post_hook(tell)
    return present


def _lies_as(factor: Tensor, alias: Tensor) -> bool:
    """Whether two tensors are the same memory, read in the same way."""
    same = factor.data_ptr() == alias.data_ptr() and factor.dtype == alias.dtype
    return same and factor.stride() == alias.stride()  # asking for a shape would leave its mark in a trace
