"""What a checkpoint says of its tensorized layers: plain values that are written, checked and followed.

    {"version": 1, "layers": [{"pattern": "conv2", "method": "Tucker", "rank": [4, 4], "dense": {"type": "Conv2d", ...}}]}

A layer is a resolved rule, and under "dense" the arguments of the torch layer that it stands for, of which some (a stride, a
padding) show in no shape of a state dict. An entry "opened" names the dense layers of opened modules, where there are some. A
file may be hostile: what it says is only compared, and nothing is allocated before all of it fits the model.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from tnlayers.budget import Choice
from tnlayers.errors import UserError, about, as_checkpoint_error
from tnlayers.factorized import FactorizedLayer
from tnlayers.geometry import DENSE, Geometry, arguments, dense_type_of
from tnlayers.method import Factorization
from tnlayers.opened import Opened, open_in_place, opened_view, replace_layers
from tnlayers.reasons import refusal
from tnlayers.rules import Rule
from tnlayers.spec import LayerSpec
from tnlayers.surgery import factorize, rules_of

__all__ = ["check_plain", "restructure", "structure_of"]

_VERSION = 1
_DEPTH = 8
_VALUES = 100_000
_BITS = 64
_CHARACTERS = 4000


def structure_of(model: nn.Module) -> dict[str, Any]:
    """Returns the tensorized layers of a model, as strings, numbers and lists."""
    rules = rules_of(model)
    if lost := {
        type(rule.factorization).__name__ for rule in rules if type(rule.factorization).__module__ == "__main__"
    }:
        warnings.warn(
            f"{', '.join(sorted(lost))}: a method of __main__ loads only into a program whose __main__ defines it; move it "
            "to a module of its own and import it",
            stacklevel=2,
        )
    layers = [rule.to_plain() | {"dense": _dense(model.get_submodule(rule.pattern))} for rule in rules]
    opened = [
        f"{name}.{child}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, Opened)
        for child, layer in module.linears.items()
        if not isinstance(layer, FactorizedLayer)
    ]
    return {"version": _VERSION, "layers": layers} | ({"opened": opened} if opened else {})


def restructure(model: nn.Module, structure: object, source: object) -> dict[nn.Module, nn.Module]:
    """Makes a model's layers those of a description, in place, whatever they are now: dense, the same, or others.

    Args:
        model: has the layers that the description names, dense or tensorized.
        structure: what `structure_of` gave; None, for a file that says nothing, leaves the model as it is.
        source: the file, for messages.

    Returns:
        The layers that were replaced, and what by. The weights of the new ones are not set: a state dict has to follow.

    Raises:
        CheckpointError: a description that is not understood or is of another model, which then stays as it was.
    """
    if structure is None:
        return {}
    with as_checkpoint_error(f"{source} has a structure that is not understood"):
        wanted = _read(structure)
    with as_checkpoint_error(f"{source} does not fit {type(model).__name__}"):
        opened = _opened(structure)
        view = opened_view(model, [*wanted, *opened])
        layers = {name: module for name, module in view.named_modules() if _dense(module)}
        for name, (_, dense) in wanted.items():
            _check_dense(name, dense, layers)
        rules = {name: rule for name, (rule, _) in wanted.items()}
        if unknown := [name for name in opened if name not in layers]:
            raise UserError(f"{unknown[0]!r} matches no layer of an opened module")
        if rules == {rule.pattern: rule for rule in rules_of(model)}:
            open_in_place(model, opened)
            return {}
        made = _made(view, layers, rules)
    open_in_place(model, [*made, *opened])
    replacements = {model.get_submodule(name): layer for name, layer in made.items()}
    replace_layers(model, replacements)
    return replacements


def _made(model: nn.Module, layers: Mapping[str, nn.Module], rules: Mapping[str, Rule]) -> dict[str, nn.Module]:
    """Returns what the rules make of a model's layers, by name, and dense ones for factorized layers without a rule."""
    if model in layers.values() or isinstance(model, Opened):
        raise UserError("it is one layer by itself, which cannot be replaced in place; give a module that holds it")
    choices = {}
    for name, rule in rules.items():
        if not isinstance(layers[name], FactorizedLayer) and (reason := refusal(model, name)):
            raise UserError(f"{name}: {reason}")
        choices[name] = Choice(_spec(rule, layers[name]), rule.plan)
    dense = {
        name: layer.to_dense() if isinstance(layer, FactorizedLayer) else layer
        for name, layer in layers.items()
        if isinstance(layer, FactorizedLayer) or name in rules
    }
    limit = sum(Geometry.of(layer).params for layer in layers.values())
    made = factorize(dense, choices, "empty", limit)
    return {name: made.get(name, dense[name]) for name in dense}


def _read(structure: Any) -> dict[str, tuple[Rule, Mapping[str, Any] | None]]:
    """Returns by name the rule and the dense layer's arguments; None for those where the file is too old to say."""
    check_plain(structure)
    version = structure.get("version") if isinstance(structure, dict) else None
    if type(version) is not int or version != _VERSION:
        raise UserError(f"it is of version {version!r} and this tnlayers reads {_VERSION}; update tnlayers")
    layers = structure.get("layers")
    if not isinstance(layers, list):
        raise UserError("it has no list of layers; save it again")
    found: dict[str, tuple[Rule, Mapping[str, Any] | None]] = {}
    for place, entry in enumerate(layers):
        plain = dict(entry) if isinstance(entry, dict) else entry
        dense = plain.pop("dense", None) if isinstance(entry, dict) else None
        with about(f"layers[{place}]"):
            rule = Rule.from_plain(plain)
        if (
            not isinstance(rule.factorization, Factorization)
            or rule.pattern in found
            or not isinstance(dense, dict | None)
        ):
            raise UserError(f"layers[{place}]: {entry}: expected another layer, its method and its dense arguments")
        found[rule.pattern] = (rule, dense)
    return found


def _opened(structure: Any) -> list[str]:
    """Returns the dense layers of modules that the file has opened."""
    names = structure.get("opened", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError("'opened' is no list of names")
    return names


def _dense(layer: nn.Module) -> dict[str, Any]:
    """Returns the type and the arguments of the torch layer that a layer is or stands for, plain; empty for other modules."""
    dense_type = dense_type_of(layer)
    if dense_type not in DENSE:
        return {}
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in arguments(layer).items()}
    return {"type": dense_type.__name__} | given


def _check_dense(name: str, dense: Mapping[str, Any] | None, layers: Mapping[str, nn.Module]) -> None:
    if name not in layers:
        raise UserError(f"{name!r} matches no layer; it has {', '.join(layers) or 'none that could be tensorized'}")
    own = _dense(layers[name])
    given = own if dense is None else dense
    for key in sorted(own.keys() | given.keys()):
        theirs, ours = given.get(key, "missing"), own.get(key, "missing")
        if type(theirs) is not type(ours) or theirs != ours:
            raise UserError(f"{name}: {key} is {theirs} in the file and {ours} in the model")


def _spec(rule: Rule, layer: nn.Module) -> LayerSpec:
    """Returns what a rule makes of a layer. Refuses unattainable ranks: we never write them, and they could exhaust memory."""
    method, geometry = rule.factorization, Geometry.of(layer)
    assert isinstance(method, Factorization)
    with about(rule.pattern):
        method.check_replaces(dense_type_of(layer))
    shape, ranks = geometry.weight_shape, method.rank
    attained = method.max_ranks(shape)
    if not isinstance(ranks, tuple) or len(ranks) != len(attained) or method.clamp(shape, ranks) != ranks:
        raise UserError(f"{rule.pattern}: rank {ranks}: a weight of shape {shape} attains {attained} at most")
    return LayerSpec(geometry, method)


def check_plain(value: object) -> None:
    """Refuses all but strings, numbers, lists and mappings, few and small enough to be looked through and shown.

    Raises:
        UserError: other values, or too many of them.
    """
    waiting, seen = [(value, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        seen += 1
        if depth > _DEPTH or seen > _VALUES:
            raise UserError(f"it is more than {_DEPTH} levels deep or has more than {_VALUES} values")
        if isinstance(item, dict):
            waiting.extend((part, depth + 1) for part in item.values())
            if not all(isinstance(key, str) for key in item):
                raise UserError("it has keys that are not strings")
        elif isinstance(item, list | tuple):
            waiting.extend((part, depth + 1) for part in item)
        elif isinstance(item, int) and item.bit_length() > _BITS:
            raise UserError(f"it holds a number of more than {_BITS} bits")
        elif isinstance(item, str) and len(item) > _CHARACTERS:
            raise UserError(f"it holds a text of more than {_CHARACTERS} characters")
        elif not isinstance(item, str | int | float | None):
            raise UserError(f"it holds a {type(item).__name__}; expected strings, numbers, lists and mappings")
