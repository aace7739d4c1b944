"""What reaches each layer when a model runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tnlayers.factorized import FactorizedLayer
from tnlayers.geometry import DENSE, Call, Geometry

__all__ = ["Example", "calls_of", "countable_layers", "evaluating", "layer_inputs"]

Example = Tensor | tuple[Tensor, ...]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode and turns gradients off for this block; afterwards every module's mode is as it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            if isinstance(module, FactorizedLayer):
                module.train(mode)  # it also drops the weights that it merged
            module.training = mode


def countable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the convolutions and linears, dense and factorized, whose costs are counted; shared ones once."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in DENSE or isinstance(module, FactorizedLayer)
    }


def layer_inputs(model: nn.Module, example_input: Example) -> dict[str, list[Tensor]]:
    """Records the inputs of each call of each countable layer, in one pass in evaluation mode; absent if it is not called."""
    seen: dict[str, list[Tensor]] = {}

    def record(name: str) -> RemovableHandle:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            seen.setdefault(name, []).append((*args, *kwargs.values())[0].detach())

        return layers[name].register_forward_pre_hook(hook, with_kwargs=True)

    layers = countable_layers(model)
    handles = [record(name) for name in layers]
    try:
        with evaluating(model), torch.compiler.set_stance("force_eager"):  # one pass is not worth a compilation
            model(*(example_input if isinstance(example_input, tuple) else (example_input,)))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def calls_of(geometry: Geometry, inputs: Sequence[Tensor]) -> list[Call]:
    """Returns how a layer was called with these inputs."""
    return [geometry.call(x) for x in inputs]
