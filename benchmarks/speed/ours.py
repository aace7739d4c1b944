"""How the nets that are measured are made."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from tnlayers import FactorizedLayer, Rule, autotune, tensorize

__all__ = ["macs_kept", "ours"]

Net = TypeVar("Net", bound=nn.Module)


def ours(net: Net, rules: Sequence[Rule], example: Tensor) -> Net:
    """Replaces layers in place, and chooses how each is computed for such an input: all benchmarks choose here."""
    net = tensorize(net, rules, init="random", example_input=example)
    if any(isinstance(module, FactorizedLayer) for module in net.modules()):
        autotune(net, example)
    return net


def macs_kept(layer: FactorizedLayer, shape: Sequence[int]) -> float:
    """Returns what part of the dense layer's multiply-accumulates the plan that has the fewest leaves, on an input of this shape."""
    spec = layer.spec
    calls = [spec.geometry.call(torch.empty(shape, device="meta"))]
    return spec.macs(calls, spec.fewest_macs(calls)) / spec.geometry.macs(calls)
