"""What reaches each layer when a model runs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tnlayers.layers import FactorizedLayer

__all__ = ["countable_layers", "evaluating", "layer_inputs"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for this block; every module's mode as it was afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def countable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The convolutions and linears, dense and factorized, whose costs are counted; shared ones once."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Conv2d, nn.Linear) or isinstance(module, FactorizedLayer)
    }


def layer_inputs(model: nn.Module, example_input: Tensor | tuple[Tensor, ...]) -> dict[str, list[Tensor]]:
    """The inputs of each call of each countable layer, in one pass in evaluation mode; a layer that is not called is absent."""
    seen: dict[str, list[Tensor]] = {}

    def record(name: str) -> nn.modules.module.RemovableHandle:  # type: ignore[name-defined]
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, []).append(inputs[0].detach())

        return layers[name].register_forward_pre_hook(hook)

    layers = countable_layers(model)
    handles = [record(name) for name in layers]
    try:
        with evaluating(model):
            model(*(example_input if isinstance(example_input, tuple) else (example_input,)))
    finally:
        for handle in handles:
            handle.remove()
    return seen
