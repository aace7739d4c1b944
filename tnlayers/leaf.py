"""What torch.fx takes as one operation, as it takes torch's own layers."""

from typing import Any

from torch import nn
from torch.fx import Proxy

__all__ = ["Leaf"]


class Leaf(nn.Module):
    """A module that stands in a traced graph as one call of it.

    How it computes depends on its mode, its input's layout and on what it keeps, which a graph of its operations could not.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Proxy):
                tracer: Any = value.tracer
                return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return super().__call__(*args, **kwargs)
