"""One generator for several layers: all their weights, one after the other, are that of one linear layer.

A method that allows it has an option `joint`: in a rule a name, which joins all the layers that the rule takes, and once the
rule is resolved the layer's `Slice` of what the generator makes. Such layers hold one and the same `factors`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.budget import Choice
from tnlayers.errors import UserError, about
from tnlayers.factorized import FactorizedLayer, Fill
from tnlayers.geometry import Geometry
from tnlayers.layers import layer_type
from tnlayers.linalg import precise
from tnlayers.method import Factorization
from tnlayers.spec import LayerSpec

__all__ = ["Slice", "convert_joined", "entries_made", "generator_of", "generators", "join", "named_apart"]


@dataclass(frozen=True)
class Slice:
    """What a layer takes of a generator that several share: `scale` times its entries from `offset` on, out of `total`.

    The scale is 1 / sqrt(fan-in), so that equal entries mean equal weights for every layer, whatever its width.

    Raises:
        ValueError: values of another type, or out of range.
    """

    name: str
    offset: int
    total: int
    scale: float

    def __post_init__(self) -> None:
        counts = type(self.offset) is int and type(self.total) is int and 0 <= self.offset < self.total
        scaled = isinstance(self.scale, (int, float)) and 0 < self.scale <= 1
        if not (isinstance(self.name, str) and self.name and counts and scaled):
            raise UserError(f"{self}: expected a name, 0 <= offset < total in ints, and a scale above 0 and at most 1")


def join(method: Factorization, geometries: Sequence[Geometry]) -> list[Factorization]:
    """Returns the method of each layer that a rule takes: its slice of the generator where the rule joins them."""
    name: Any = getattr(method, "joint", "")
    if not name or isinstance(name, Slice):
        return [method] * len(geometries)
    ends = list(accumulate(geometry.params for geometry in geometries))
    return [
        replace(method, joint=Slice(name, end - own.params, ends[-1], max(own.fan_in, 1) ** -0.5))  # type: ignore[call-arg]
        for end, own in zip(ends, geometries, strict=True)
    ]


def generator_of(method: Factorization) -> str:
    """Returns the name of the generator that makes a layer and others; an empty one for a layer with its own parameters."""
    joint = getattr(method, "joint", "")
    return joint.name if isinstance(joint, Slice) else ""


def generators(methods: Iterable[Factorization]) -> set[str]:
    """Returns the names of the generators of some layers."""
    return set(map(generator_of, methods)) - {""}


def entries_made(spec: LayerSpec) -> int:
    """Returns how many entries of dense weights the parameters of a layer make, its own or those of its generator."""
    return _slice(spec.method).total if generator_of(spec.method) else spec.geometry.params


def convert_joined(
    layers: Mapping[str, nn.Module], choices: Mapping[str, Choice], init: Fill, limit: int
) -> dict[str, FactorizedLayer]:
    """Returns the layers that generators make, in place of dense ones, by name; those of one generator share its `factors`.

    Args:
        layers: name -> the dense layer; it is not changed.
        choices: name -> what becomes of it; layers with parameters of their own are left out.
        init: what the generators start with; "decompose" fits all the weights of one together.
        limit: how many entries a generator may make at most; a file must not ask for all memory.

    Raises:
        ValueError: layers that cannot have one generator, or slices that do not go together.
    """
    specs = {name: choice.spec for name, choice in choices.items() if choice.spec}
    made: dict[str, FactorizedLayer] = {}
    for generator in sorted(generators(spec.method for spec in specs.values())):
        own = {name: spec for name, spec in specs.items() if generator_of(spec.method) == generator}
        with about(f"joint {generator!r} of {', '.join(own)}"):
            factors = _generator(layers, own, init, limit).factors
            for name, spec in own.items():
                kind, plan = layer_type(spec.method, type(layers[name])), choices[name].plan
                made[name] = kind.from_spec(layers[name], spec, plan, init=init, factors=factors)
    return made


def _generator(
    layers: Mapping[str, nn.Module], specs: Mapping[str, LayerSpec], init: Fill, limit: int
) -> FactorizedLayer:
    """Returns the linear layer whose weight is that of all the layers, one after the other."""
    slices = {name: _slice(spec.method) for name, spec in specs.items()}
    names = sorted(slices, key=lambda name: slices[name].offset)
    weights = {name: specs[name].geometry.exchanged(_weight(layers[name])) for name in names}
    alone, *others = (spec.method.alone() for spec in specs.values())
    if any(other != alone for other in others) or len({own.total for own in slices.values()}) > 1:
        raise UserError("layers of one generator need the same rank, options and total; put them under one rule")
    _check([weights[name] for name in names], [slices[name] for name in names], whole=init == "decompose")
    first, total = weights[names[0]], slices[names[0]].total
    if total > limit:
        raise UserError(f"the generator would make {total} entries; the model has {limit} parameters")
    linear = nn.utils.skip_init(nn.Linear, 1, total, bias=False, dtype=first.dtype, device=first.device)
    linear.requires_grad_(first.requires_grad)
    if init == "decompose":
        parts = [precise(weights[name]).flatten() / slices[name].scale for name in names]
        with torch.no_grad():
            linear.weight.copy_(torch.cat(parts).unsqueeze(1))
    return layer_type(alone, nn.Linear).from_spec(linear, LayerSpec(Geometry.of(linear), alone), init=init)


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
    """Returns the layers' methods; a generator of a copied block, which is not the one that was copied, gets its own name."""
    taken: dict[int, str] = {}
    methods: dict[str, Factorization] = {}
    for name, layer in layers.items():
        methods[name] = method = layer.spec.method
        if given := generator_of(method):
            if id(layer.factors) not in taken:
                free = (given, *(f"{given} {copy}" for copy in range(2, len(taken) + 2)))
                taken[id(layer.factors)] = next(one for one in free if one not in taken.values())
            methods[name] = replace(method, joint=replace(_slice(method), name=taken[id(layer.factors)]))  # type: ignore[call-arg]
    return methods


def _weight(dense: nn.Module) -> Tensor:
    assert isinstance(dense.weight, Tensor)
    return dense.weight


def _slice(method: Factorization) -> Slice:
    return method.joint  # type: ignore[attr-defined]
