"""From rules to the layers of a model, and back. Ranks are decided first; weights are touched second."""

import difflib
import warnings
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from tnlayers.budget import Choice, settle
from tnlayers.errors import UserError, about
from tnlayers.factorized import FactorizedLayer, Fill, Init, slot_of
from tnlayers.geometry import DENSE, Call, Geometry
from tnlayers.joint import convert_joined, entries_made, generators, join, named_apart
from tnlayers.layers import layer_type
from tnlayers.linalg import check_finite
from tnlayers.method import Factorization
from tnlayers.opened import replace_layers
from tnlayers.ranks import MacsKept
from tnlayers.rules import Rule, fits
from tnlayers.tracing import Example, calls_of, layer_inputs

__all__ = [
    "factorize",
    "method_for",
    "methods_of",
    "refusal",
    "replace_layers",
    "resolve",
    "rules_of",
    "tensorize",
    "to_dense",
]

Model = TypeVar("Model", bound=nn.Module)


def resolve(
    model: nn.Module, rules: Sequence[Rule], example_input: Example | None = None, *, init: Init = "decompose"
) -> list[Rule]:
    """Makes one rule for each layer that a rule matches: its exact name, integer ranks and plan. The model is not changed.

    A rule matches a layer whose name fits its pattern and whose type its method replaces; the first match wins. A budget
    (`ParamsKept`, `MacsKept`) holds for all the layers of its rule together. A layer for which no rank is cheaper than
    the dense one, that cannot be replaced, or whose factors' dtype is too coarse for a `RelativeError`, resolves to None
    with the reason.

    Args:
        model: the dense model.
        rules: what to do with which layers, first match wins.
        example_input: what the model takes; gives each layer's input size, and is needed for `MacsKept` on convolutions.
        init: "random" when the factors will be trained from scratch: then the present weights do not count.

    Raises:
        ValueError: a pattern that matches nothing, a budget out of reach, `MacsKept` without an example input, weights that
            are not finite, an `init` that is neither.
    """
    return [
        Rule(name, choice.spec.method if choice.spec else None, choice.reason, choice.plan)
        for name, choice in _resolved(model, rules, example_input, init).items()
    ]


def _resolved(model: nn.Module, rules: Sequence[Rule], example_input: Example | None, init: Init) -> dict[str, Choice]:
    """Decides by name what becomes of each layer that a rule matches."""
    if init not in ("decompose", "random"):
        raise UserError(f"init {init!r}: expected 'decompose' or 'random'")
    dense = {name: module for name, module in model.named_modules() if type(module) in DENSE}
    done = {name for name, module in model.named_modules() if isinstance(module, FactorizedLayer)}
    taken = _assign(rules, dense, done)
    inputs = layer_inputs(model, example_input) if example_input is not None else {}
    calls = {name: calls_of(Geometry.of(dense[name]), inputs[name]) for name in dense if name in inputs}
    refused = {name: reason for name in dense if (reason := refusal(model, name))}
    resolved: dict[str, Choice] = {}
    for rule, names in zip(rules, taken, strict=True):
        if rule.factorization is None:
            reason = rule.reason or f"the rule {rule.pattern!r} leaves it dense"
            resolved |= {name: Choice(None, reason=reason) for name in names}
            continue
        resolved |= {name: Choice(None, reason=refused[name]) for name in names if name in refused}
        layers = {name: dense[name] for name in names if name not in refused}
        for name, layer in layers.items() if init == "decompose" else ():
            with about(name):
                check_finite(layer.weight)
        with about(f"rule {rule.pattern!r}"):
            resolved |= _choices(rule, layers, calls, flat=init == "random")
    return {name: resolved[name] for name in dense if name in resolved}


def _choices(
    rule: Rule, layers: dict[str, nn.Module], calls: dict[str, list[Call]], *, flat: bool
) -> dict[str, Choice]:
    """Decides what becomes of the layers that one rule takes."""
    method = rule.factorization
    assert method is not None
    unseen = [name for name in layers if name not in calls]
    if (
        isinstance(method.rank, MacsKept)
        and unseen
        and (calls or any(isinstance(layers[name], nn.Conv2d) for name in unseen))
    ):
        raise UserError(
            f"{method.rank} depends on how the layers are used; give an example_input that reaches {unseen[0]!r}"
        )
    methods = join(method, [Geometry.of(layer) for layer in layers.values()])
    slots = [
        slot_of(layer, own, calls.get(name), flat=flat)
        for (name, layer), own in zip(layers.items(), methods, strict=True)
    ]
    choices = dict(zip(layers, settle(slots, method.rank, rule.plan), strict=True))
    for name, choice in choices.items() if isinstance(method.rank, (int, tuple)) else ():
        if (spec := choice.spec) and spec.params >= (entries := entries_made(spec)):
            warnings.warn(
                f"{name}: {type(method).__name__} of rank {spec.ranks} has {spec.params} parameters and the dense weight "
                f"{entries}; lower the rank or leave the layer dense",
                stacklevel=4,
            )
    return choices


def _assign(rules: Sequence[Rule], dense: dict[str, nn.Module], done: set[str]) -> list[list[str]]:
    """Returns the names of the layers that each rule takes."""
    taken: list[list[str]] = [[] for _ in rules]
    matched = [any(fits(name, rule.pattern) for name in done) for rule in rules]
    for name, module in dense.items():
        takers = [
            place
            for place, rule in enumerate(rules)
            if fits(name, rule.pattern) and _replaces(rule.factorization, type(module))
        ]
        for place in takers:
            matched[place] = True
        if takers:
            taken[takers[0]].append(name)
    for rule, found, names in zip(rules, matched, taken, strict=True):
        if not found:
            raise UserError(_no_match(rule, dense))
        if rule.factorization and not names and not any(fits(name, rule.pattern) for name in done):
            warnings.warn(
                f"rule {rule.pattern!r} takes no layer: earlier rules take all that it matches; put it before them",
                stacklevel=4,
            )
    return taken


def _replaces(method: Factorization | None, kind: type[nn.Module]) -> bool:
    return method is None or kind.__name__ in method.replaces


def method_for(model: nn.Module, name: str, rules: Sequence[Rule]) -> Factorization | None:
    """Returns what the first rule that matches a dense layer would make of it; None if it has to stay dense."""
    layer = model.get_submodule(name)
    if type(layer) not in DENSE:
        return None
    matching = [rule for rule in rules if fits(name, rule.pattern) and _replaces(rule.factorization, type(layer))]
    return matching[0].factorization if matching and not refusal(model, name) else None


def _no_match(rule: Rule, dense: dict[str, nn.Module]) -> str:
    kind = " and ".join(rule.factorization.replaces) if rule.factorization else None
    names = [name for name, module in dense.items() if _replaces(rule.factorization, type(module))]
    other = [name for name in dense if fits(name, rule.pattern)]
    if other:
        what, method = type(dense[other[0]]).__name__, type(rule.factorization).__name__
        return f"pattern {rule.pattern!r} matches only {what} layers such as {other[0]!r}, and {method} replaces {kind}"
    near = difflib.get_close_matches(rule.pattern, names, n=3, cutoff=0.4) or names[:3]
    layers = f"{kind} layers" if kind else "layers"
    hint = f"near misses: {', '.join(map(repr, near))}" if near else "the model has none that could be replaced"
    return f"pattern {rule.pattern!r} matches no layer; of the {len(names)} {layers} {hint}"


def refusal(model: nn.Module, name: str) -> str:
    """Returns why a layer that has a matching rule must stay as it is; empty if nothing speaks against replacing it."""
    layer = model.get_submodule(name)
    aliases = [alias for alias, module in model.named_modules(remove_duplicate=False) if module is layer]
    own = {f"{alias}.{key}".lstrip(".") for alias in aliases for key, _ in layer.named_parameters()}
    for parameter in layer.parameters():
        holders = {key for key, other in model.named_parameters(remove_duplicate=False) if other is parameter}
        if holders - own:
            return f"it is tied to {sorted(holders - own)[0]!r}"
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if any(hooks):
        return "it has hooks, which a replacement would lose"
    if next(layer.parameters()).is_complex():
        return "its weight is complex"
    return ""


def tensorize(
    model: Model, rules: Sequence[Rule], *, init: Init = "decompose", example_input: Example | None = None
) -> Model:
    """Replaces layers in place by factorized ones and returns the model (the layer itself if the model is one layer).

    Args:
        model: the dense model.
        rules: rules, resolved or not; see `resolve`.
        init: "decompose" keeps the weights as closely as the ranks allow; "random" initialises anew.
        example_input: what the model takes; see `resolve`.

    Raises:
        ValueError: what `resolve` raises.
    """
    chosen = {name: choice for name, choice in _resolved(model, rules, example_input, init).items() if choice.spec}
    new = [choice.spec.method for choice in chosen.values() if choice.spec]
    for name in generators(methods_of(model).values()) & generators(new):
        raise UserError(f"joint {name!r}: the model has a generator of this name; choose another")
    layers = {name: model.get_submodule(name) for name in chosen}
    limit = sum(parameter.numel() for parameter in model.parameters())
    made = factorize(layers, chosen, init, limit)
    return replace_layers(model, {layers[name]: made[name] for name in made})


def factorize(
    layers: Mapping[str, nn.Module], choices: Mapping[str, Choice], init: Fill, limit: int
) -> dict[str, FactorizedLayer]:
    """Makes the factorized layers in place of dense ones, by name; those of one generator share it.

    Args:
        layers: name -> the dense layer; it is not changed.
        choices: name -> what becomes of it.
        init: what they start with.
        limit: how many entries a generator may make at most.

    Raises:
        ValueError: a method that does not fit its layer.
    """
    made = convert_joined(layers, choices, init, limit)
    for name, choice in choices.items():
        if name not in made and (spec := choice.spec):
            with about(name):
                kind = layer_type(spec.method, type(layers[name]))
                made[name] = kind.from_spec(layers[name], spec, choice.plan, init=init, fit=choice.fit)
    return made


def to_dense(model: Model, rules: Sequence[Rule] | None = None) -> Model:
    """Replaces factorized layers in place by the dense ones that compute the same; returns the model.

    Args:
        model: the model.
        rules: only layers that one of them matches; by default all.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FactorizedLayer)}
    return replace_layers(
        model,
        {layer: layer.to_dense() for name, layer in layers.items() if rules is None or _matches(rules, name, layer)},
    )


def _matches(rules: Sequence[Rule], name: str, layer: FactorizedLayer) -> bool:
    kind = layer.dense_type
    return any(fits(name, rule.pattern) and _replaces(rule.factorization, kind) for rule in rules)


def rules_of(model: nn.Module) -> list[Rule]:
    """Returns what the factorized layers of a model are, as resolved rules: the structure that a checkpoint has to carry."""
    plans = {name: layer.plan_choice for name, layer in model.named_modules() if isinstance(layer, FactorizedLayer)}
    return [Rule(name, method, plan=plans[name]) for name, method in methods_of(model).items()]


def methods_of(model: nn.Module) -> dict[str, Factorization]:
    """Returns the methods of the factorized layers, by name."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FactorizedLayer)}
    return named_apart(layers)
