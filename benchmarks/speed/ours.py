"""How the nets that are measured are made."""

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, nn

from tnlayers import FactorizedLayer, Rule, autotune, tensorize

__all__ = ["ours"]

Net = TypeVar("Net", bound=nn.Module)


def ours(net: Net, rules: Sequence[Rule], example: Tensor) -> Net:
    """Replaces layers in place, and chooses how each is computed for such an input: all benchmarks choose here."""
    net = tensorize(net, rules, init="random", example_input=example)
    if any(isinstance(module, FactorizedLayer) for module in net.modules()):
        autotune(net, example)
    return net
