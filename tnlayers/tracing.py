"""What reaches each layer when a model runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tnlayers.factorized import FactorizedLayer
from tnlayers.geometry import DENSE, Call, Geometry

__all__ = [
    "Example",
    "arguments_of",
    "calls_of",
    "countable_layers",
    "evaluating",
    "factorized_layers",
    "layer_inputs",
    "map_tensors",
    "modes_kept",
    "num_samples",
    "plain_attention",
    "tensors_in",
]

Example = Tensor | tuple[Any, ...] | dict[str, Any] | list[Any]
"""What a model takes: a tuple holds positional arguments, a dict holds keyword arguments, anything else is the one argument.

The arguments may hold tensors in lists, tuples and dicts, as the pictures of a detector or the tokens of a language model do.
"""


def arguments_of(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and the keyword arguments that an example stands for."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, tuple) else ((example,), {})


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors of a value that may nest lists, tuples and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Returns a value of the same nesting with another tensor in each one's place."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [map_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode and turns gradients off for this block; afterwards every module's mode is as it was."""
    with modes_kept(model), torch.no_grad():
        model.eval()
        yield


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Gives every module the mode back that it had before this block."""
    training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in training.items():
            if isinstance(module, FactorizedLayer):
                module.train(mode)  # it also drops the weights that it merged
            module.training = mode


@contextmanager
def plain_attention() -> Iterator[None]:
    """Turns off the path on which torch computes attention layers as one operator, which nothing is known about."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def countable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers that there are methods for, dense and factorized; shared ones once."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in DENSE or isinstance(module, FactorizedLayer)
    }


def factorized_layers(model: nn.Module) -> dict[str, FactorizedLayer]:
    """Returns the factorized layers of a model by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, FactorizedLayer)}


def layer_inputs(
    model: nn.Module, example_input: Example, noted: Callable[[Tensor], Any] = Tensor.detach
) -> dict[str, list[Any]]:
    """Records the inputs of each call of each countable layer, in one pass in evaluation mode; absent if it is not called.

    Args:
        model: the model.
        example_input: what it takes.
        noted: what to record of an input, which is itself by default.
    """
    seen: dict[str, list[Any]] = {}

    def record(name: str) -> RemovableHandle:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            seen.setdefault(name, []).append(noted((*args, *kwargs.values())[0]))

        return layers[name].register_forward_pre_hook(hook, with_kwargs=True)

    layers = countable_layers(model)
    handles = [record(name) for name in layers]
    args, kwargs = arguments_of(example_input)
    try:
        with evaluating(model), torch.compiler.set_stance("force_eager"):  # one pass is not worth a compilation
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def num_samples(model: nn.Module, inputs: Mapping[str, Sequence[Tensor]], example_input: Example) -> int:
    """Returns how many samples an example holds.

    These are the items of a first argument that is a list, else the first dimension of the first tensor, unless the layer
    that is called first gets an input without a batch dimension.
    """
    args, kwargs = arguments_of(example_input)
    first = next(iter([*args, *kwargs.values()]), None)
    if isinstance(first, list):
        return max(len(first), 1)
    for name, calls in inputs.items():
        if calls[0].is_floating_point():
            if calls[0].dim() == 1 + len(Geometry.of(model.get_submodule(name)).axes):
                return 1
            break
    sizes = [value.shape[0] for value in tensors_in([args, kwargs]) if value.dim()]
    return max(sizes[0], 1) if sizes else 1


def calls_of(geometry: Geometry, inputs: Sequence[Tensor]) -> list[Call]:
    """Returns how a layer was called with these inputs."""
    return [geometry.call(x) for x in inputs]
