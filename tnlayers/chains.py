"""Factorized layers as chains of torch's own layers, for tools that know only those: quantizers, adapters, fusing passes."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tnlayers.errors import UserError, about
from tnlayers.factorized import FactorizedLayer
from tnlayers.opened import replace_layers
from tnlayers.plan import Plan
from tnlayers.rules import Rule
from tnlayers.steps import Step
from tnlayers.surgery import matching_layers

__all__ = ["to_chains"]

Model = TypeVar("Model", bound=nn.Module)

_PADS = {"constant": "ZeroPad", "reflect": "ReflectionPad", "replicate": "ReplicationPad", "circular": "CircularPad"}


def to_chains(model: Model, rules: Sequence[Rule] | None = None) -> Model:
    """Replaces factorized layers in place by `nn.Sequential`s that compute the same; returns the model.

    There is one torch layer for each group of the layer's plan, named after the factors in it: "input", "core" and "output" of a
    `TuckerConv2d`. They train, but they are no longer known as factors: nothing truncates them, and `save_safetensors` stores
    them as any other layers. A chain has no `weight`, and no `output_size` when it is called.

    Args:
        model: the model; layers with the plan "dense" become one dense layer.
        rules: only layers that one of them matches; by default all.

    Raises:
        UserError: a layer that no chain computes, such as an embedding, or a tensor train whose factors each see a part of
            the channels. The model is then unchanged.
    """
    chains: dict[nn.Module, nn.Module] = {}
    for name, layer in matching_layers(model, rules).items():
        with about(name or type(layer).__name__):
            chains[layer] = _chain(layer)
    return replace_layers(model, chains)


def _chain(layer: FactorizedLayer) -> nn.Sequential:
    plan, bias = layer.plan, layer.bias
    if not isinstance(plan, Plan) or not plan.is_chain:
        raise UserError(
            f"no chain of torch's layers computes this {type(layer).__name__} with the plan {plan.groups}; make it dense "
            "by `to_dense`, or leave it by giving rules for the others"
        )
    with torch.no_grad():
        weights = layer.merged_weights(plan)
    made: OrderedDict[str, nn.Module] = OrderedDict()
    for group, step, weight in zip(plan.groups, plan.steps, weights, strict=True):
        name, last = "_".join(group), step is plan.steps[-1]
        if step.pad:
            made[f"{name}_pad"] = getattr(nn, f"{_PADS[step.pad_mode]}{len(step.stride)}d")(step.pad)
        made[name] = _torch_layer(step, weight, bias if last else None)
        made[name].weight.requires_grad_(any(factor.requires_grad for factor in layer.factors.values()))
    return nn.Sequential(made).train(layer.training).to(memory_format=layer._memory_format)


def _torch_layer(step: Step, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
    """Returns the torch layer of a step, with copies of the weight and of the bias."""
    channels = {"in_channels": step.kept * step.consumed, "out_channels": step.kept * step.produced}
    options: dict[str, Any] = {"bias": bias is not None, "device": "meta"}
    window: dict[str, Any] = {
        "kernel_size": step.weight_shape[2:] or (1,) * len(step.stride),
        "stride": step.subsample or step.stride,
        "padding": step.padding,
        "dilation": step.dilation,
        "groups": step.kept,
    }
    made: Any
    if not step.stride:
        made = nn.Linear(step.consumed, step.produced, **options)
    elif step.output_padding:
        kind = getattr(nn, f"ConvTranspose{len(step.stride)}d")
        made = kind(**channels, **window, output_padding=step.output_padding, **options)
    else:
        made = getattr(nn, f"Conv{len(step.stride)}d")(**channels, **window, **options)
    weight = weight.detach().clone(memory_format=torch.contiguous_format)
    made.weight = nn.Parameter(weight.reshape(made.weight.shape))
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return made
