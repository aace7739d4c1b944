"""The merged weights of a layer's plan, kept while it evaluates: there they do not change from call to call.

A graph that is compiled, exported or traced cannot ask whether a factor has changed since. So what is kept is made before it:
by `eval()`, by a load and by a move to another device or dtype. Eager calls ask each time.
"""

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["Merged"]


class Merged:
    """Weights, and what tells whether they are still those of their factors.

    Torch counts writes in place, except those of fused optimizers (which follow a gradient) and those through `.data` or by another
    process (which are seen at the next `eval()`).

    Attributes:
        weights: the merged weight of each step of the plan.
        factors: the parameters that they were made of.
        waiting: whether gradients were waiting for an optimizer when they were made: its step may not be counted.
        checked: whether an eager call in evaluation made them; a mode is often followed by writes through `.data`, such as
            those that exchange weights for their moving averages.
    """

    def __init__(self, weights: list[Tensor], factors: Sequence[nn.Parameter], *, checked: bool) -> None:
        self.weights, self.factors, self.checked = weights, list(factors), checked
        self.waiting = any(factor.grad is not None for factor in factors)
        self._aliases = [factor.detach() for factor in factors]  # their memory is not given to another tensor
        self._counts = [factor._version for factor in factors]

    def made_of(self, factors: Sequence[Tensor]) -> bool:
        """Whether these are the parameters."""
        return all(own is given for own, given in zip(self.factors, factors, strict=True))

    def unwritten(self) -> bool:
        """Whether torch has counted no write, and seen no exchange of the parameters' memory, since."""
        return all(
            factor._version == count and _lies_as(factor, alias)
            for factor, count, alias in zip(self.factors, self._counts, self._aliases, strict=True)
        )


def _lies_as(factor: Tensor, alias: Tensor) -> bool:
    """Whether two tensors are the same memory, read in the same way."""
    same = factor.data_ptr() == alias.data_ptr() and factor.dtype == alias.dtype
    return same and factor.stride() == alias.stride()  # asking for a shape would leave its mark in a trace
