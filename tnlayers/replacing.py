"""Exchanging the layers of a model for others, and the dense form of a tensorized one."""

import copy
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from tnlayers.factorized import FactorizedLayer

__all__ = ["dense_form", "replace_layers"]

Model = TypeVar("Model", bound=nn.Module)


def replace_layers(model: Model, replacements: Mapping[nn.Module, nn.Module]) -> Model:
    """Replaces a module in every place where it is used, so that a shared one stays shared."""
    if model in replacements:
        return replacements[model]  # type: ignore[return-value]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    return model


def dense_form(model: Model) -> Model:
    """Returns a copy of a model with dense layers in place of factorized ones; it shares all other parameters with the model."""
    # What a forward has left in an attribute cannot be copied where it has a gradient.
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    shared = [*model.parameters(), *(value for value in kept if not value.is_leaf)]
    copied = copy.deepcopy(model, {id(value): value for value in shared})
    layers: dict[nn.Module, nn.Module] = {
        layer: layer.to_dense() for layer in copied.modules() if isinstance(layer, FactorizedLayer)
    }
    return replace_layers(copied, layers)
