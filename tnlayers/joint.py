"""Layers whose parameters are those of one generator: all their weights, one after the other, are that of one linear layer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tnlayers.budget import Choice
from tnlayers.errors import UserError
from tnlayers.factorized import FactorizedLayer, Fill
from tnlayers.geometry import Geometry
from tnlayers.layers import layer_type
from tnlayers.linalg import precise
from tnlayers.method import Factorization, Slice
from tnlayers.spec import LayerSpec

__all__ = ["convert_together", "named_apart"]


def convert_together(
    layers: Mapping[str, nn.Module], choices: Mapping[str, Choice], init: Fill, limit: int
) -> dict[str, FactorizedLayer]:
    """The layers in place of dense ones, by name; they share one `factors`.

    Args:
        layers: name -> the dense layer; it is not changed.
        choices: name -> what becomes of it; its method has a slice.
        init: "decompose" fits all the weights together.
        limit: how many entries the generator may make at most; a file must not ask for all memory.

    Raises:
        ValueError: layers that cannot have one generator, or slices that do not go together.
    """
    specs = {name: choice.spec for name, choice in choices.items() if choice.spec}
    methods = {name: spec.method for name, spec in specs.items()}
    names = sorted(methods, key=lambda name: _slice(methods[name]).offset)
    slices, weights = [_slice(methods[name]) for name in names], [_weight(layers[name]) for name in names]
    alone, *others = (methods[name].with_joint("") for name in names)
    if any(other != alone for other in others) or len({own.total for own in slices}) > 1:
        raise UserError("layers of one generator need the same rank, options and total; put them under one rule")
    _check(weights, slices, whole=init == "decompose")
    first, total = weights[0], slices[0].total
    if total > limit:
        raise UserError(f"the generator would make {total} entries; the model has {limit} parameters")
    linear = nn.utils.skip_init(nn.Linear, 1, total, bias=False, dtype=first.dtype, device=first.device)
    linear.requires_grad_(first.requires_grad)
    if init == "decompose":
        parts = [precise(weight).flatten() / own.scale for weight, own in zip(weights, slices, strict=True)]
        with torch.no_grad():
            linear.weight.copy_(torch.cat(parts).unsqueeze(1))
    whole = layer_type(alone, linear).from_spec(linear, LayerSpec(Geometry.of(linear), alone), init=init)
    return {
        name: layer_type(alone, layers[name]).from_spec(
            layers[name], specs[name], choices[name].plan, init=init, shared=whole.factors
        )
        for name in names
    }


def _check(weights: Sequence[Tensor], slices: Sequence[Slice], *, whole: bool) -> None:
    total = slices[0].total
    ends = [own.offset + weight.numel() for own, weight in zip(slices, weights, strict=True)]
    if len({(weight.dtype, weight.device, weight.requires_grad) for weight in weights}) > 1:
        raise UserError("layers of one generator need the same dtype and device, and all or none of them trained")
    if ends[-1] > total or any(own.offset < end for own, end in zip(slices[1:], ends, strict=False)):
        raise UserError(f"the slices overlap or leave the {total} entries of the generator: {list(slices)}")
    if whole and sum(weight.numel() for weight in weights) != total:
        raise UserError(f"the layers leave out some of the generator's {total} entries; give it all its layers")


def named_apart(layers: Mapping[str, FactorizedLayer]) -> dict[str, Factorization]:
    """The layers' methods; generators of the same name that are not the same one (in a copied block) get names of their own."""
    taken: dict[int, str] = {}
    methods = {}
    for name, layer in layers.items():
        method, generator = layer.spec.method, id(layer.factors)
        if isinstance(method.joint, Slice):
            if generator not in taken:
                given = method.joint.name
                free = (given, *(f"{given} {copy}" for copy in range(2, len(taken) + 2)))
                taken[generator] = next(one for one in free if one not in taken.values())
            method = method.with_joint(replace(method.joint, name=taken[generator]))
        methods[name] = method
    return methods


def _weight(dense: nn.Module) -> Tensor:
    assert isinstance(dense.weight, Tensor)
    return dense.weight


def _slice(method: Factorization) -> Slice:
    assert isinstance(method.joint, Slice)
    return method.joint
