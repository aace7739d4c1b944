"""The dense form of a tensorized model, to compare it with."""

import copy
from typing import TypeVar

from torch import Tensor, nn

from tnlayers.factorized import FactorizedLayer
from tnlayers.opened import replace_layers

__all__ = ["dense_form"]

Model = TypeVar("Model", bound=nn.Module)


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
