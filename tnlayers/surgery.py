"""From rules to the layers of a model, and back. Ranks are decided first; weights are touched second."""

import weakref
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from tnlayers.assigning import assign, left_over
from tnlayers.budget import Choice
from tnlayers.counting import num_params
from tnlayers.errors import UserError, about
from tnlayers.factorized import FactorizedLayer, Fill, Init
from tnlayers.joint import convert_joined, generators, named_apart
from tnlayers.layers import layer_type
from tnlayers.linalg import check_finite
from tnlayers.method import Factorization
from tnlayers.opened import close_in_place, open_in_place, opened_view, replace_layers
from tnlayers.optimizers import warn_of_optimizers
from tnlayers.ranks import Rank, RankRule
from tnlayers.reasons import refusal, weight_owners, weight_type
from tnlayers.rules import Rule, fits
from tnlayers.settling import settle_rules
from tnlayers.tracing import Example, factorized_layers
from tnlayers.tuning import autotune, check_values

__all__ = [
    "factorize",
    "matching_layers",
    "methods_of",
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
    (`ParamsKept`, `MacsKept`) holds for all the layers of its rule together, or with of="model" for the whole model. Every module
    that holds a weight and stays as it is resolves to None with the reason: no rule takes it, no rank is cheaper than
    dense, it cannot be replaced, or its factors' dtype is too coarse for a `RelativeError`.

    Modules that multiply by weights inside, such as `nn.MultiheadAttention` and `nn.LSTM`, are seen opened: their linears have
    names, such as "encoder.layers.0.self_attn.in_proj"; see `tnlayers.opened`.

    A layer that is factorized already is decomposed anew, from the weight that its factors make, where a rule asks for
    another method, option or integer rank. Under a budget its ranks only fall; `RelativeError` is against its present weight.

    Args:
        model: the model, dense or tensorized already.
        rules: what to do with which layers, first match wins; None leaves a layer as it is.
        example_input: what the model takes; gives each layer's input size, and is needed for `MacsKept` on convolutions or of the
            whole model.
        init: "random" when the factors will be trained from scratch: then the present weights do not count.

    Raises:
        ValueError: a pattern that matches nothing that its method could take, a budget out of reach, `MacsKept` without an
            example input, weights that are not finite, or under a budget not real, an `init` that is neither.
    """
    return [
        Rule(name, choice.spec.method if choice.spec else None, choice.reason, choice.plan)
        for name, choice in _resolved(model, rules, example_input, init).items()
    ]


def _resolved(model: nn.Module, rules: Sequence[Rule], example_input: Example | None, init: Init) -> dict[str, Choice]:
    """Decides by name what becomes of each layer that a rule takes, and of each that holds a weight and stays."""
    if init not in ("decompose", "random"):
        raise UserError(f"init {init!r}: expected 'decompose' or 'random'")
    if isinstance(rules, Rule) or not all(isinstance(rule, Rule) for rule in rules):
        raise UserError(f"rules {rules!r}: expected a list of rules, such as [Rule('*', Tucker(8))]")
    model = opened_view(model, [rule.pattern for rule in rules], example_input)
    owners = weight_owners(model)
    taken = assign(model, owners, rules)
    resolved: dict[str, Choice] = {}
    for name, reason in left_over(model, owners, rules, taken).items():
        if not isinstance(owners[name], FactorizedLayer):
            resolved[name] = Choice(None, reason=reason)
    layers: list[dict[str, nn.Module]] = []
    for rule, names in zip(rules, taken, strict=True):
        layers.append({})
        for name in names:
            reason = (
                refusal(model, name)
                if rule.factorization
                else rule.reason or f"the rule {rule.pattern!r} leaves it dense"
            )
            if rule.factorization:
                _check_weight(name, owners[name], rule.factorization.rank, init)
            if rule.factorization and not reason:
                layers[-1][name] = owners[name]
            elif not isinstance(owners[name], FactorizedLayer):
                resolved[name] = Choice(None, reason=reason)
        if rule.factorization and names and not layers[-1]:
            raise UserError(
                f"pattern {rule.pattern!r} matches only layers that have to stay as they are, such as {names[0]!r}: "
                f"{refusal(model, names[0])}"
            )
    resolved |= settle_rules(model, rules, layers, example_input, init)
    return {name: resolved[name] for name in owners if name in resolved}


def _check_weight(name: str, layer: nn.Module, rank: Rank, init: Init) -> None:
    """Refuses what cannot be decomposed, or what a budget cannot be over.

    Raises:
        UserError: values that are not finite, and under a rank rule those that are not real or not there.
    """
    kind = weight_type(layer)
    if kind and isinstance(rank, RankRule):
        raise UserError(
            f"{name}: its weight is {kind}, and {rank} needs floating-point numbers; leave it as it is by "
            f"Rule({name!r}, None) before the rule that takes it"
        )
    weights = list(layer.factors.values()) if isinstance(layer, FactorizedLayer) else [layer._parameters.get("weight")]
    for weight in weights if init == "decompose" and not kind else ():
        with about(name):
            if weight is not None and weight.is_meta:
                raise UserError(
                    "its weight is on the meta device, where it has no values; load it first, or give init='random'"
                )
            if weight is not None:
                check_finite(weight)


def tensorize(
    model: Model,
    rules: Sequence[Rule],
    *,
    init: Init = "decompose",
    example_input: Example | None = None,
    tune: bool = False,
) -> Model:
    """Replaces layers in place by factorized ones and returns the model (the layer itself if the model is one layer).

    Args:
        model: the model; layers that are factorized already are made anew where a rule asks for something else.
        rules: rules, resolved or not; see `resolve`.
        init: "decompose" keeps the weights as closely as the ranks allow; "random" initialises anew.
        example_input: what the model takes; see `resolve`.
        tune: whether to measure how each of these layers is computed the fastest; see `autotune`. It takes the place of the
            plans that the rules name. By default nothing is measured, so that the same call always makes the same model, with
            the multiply-accumulates that `resolve` counted.

    Raises:
        ValueError: what `resolve` raises, and `autotune` with `tune`.
    """
    if tune:
        check_values(model, example_input)
    before = [weakref.ref(parameter) for parameter in model.parameters()]
    resolved = _resolved(model, rules, example_input, init)
    model = _tensorized(model, resolved, init)
    warn_of_optimizers(before, model)
    taken = {name for name, choice in resolved.items() if choice.spec}
    if taken and tune and example_input is not None:
        autotune(model, example_input, layers=taken)
    return model


def _tensorized(model: Model, resolved: Mapping[str, Choice], init: Init) -> Model:
    chosen = {name: choice for name, choice in resolved.items() if choice.spec}
    model = open_in_place(model, chosen)
    layers: dict[str, nn.Module] = {name: model.get_submodule(name) for name in chosen}
    for name, choice in list(chosen.items()):
        layer = layers[name]
        if isinstance(layer, FactorizedLayer) and layer.spec == choice.spec:
            if layer.plan_choice != choice.plan:
                layer.set_plan(choice.plan)
            del chosen[name], layers[name]
    new = [choice.spec.method for choice in chosen.values() if choice.spec]
    for name in generators(method for at, method in methods_of(model).items() if at not in layers) & generators(new):
        raise UserError(f"joint {name!r}: the model has a generator of this name; choose another")
    limit = num_params(model, dense=True)
    dense = {name: layer.to_dense() if isinstance(layer, FactorizedLayer) else layer for name, layer in layers.items()}
    made = factorize(dense, chosen, init, limit)
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
    chosen = matching_layers(model, rules)
    return close_in_place(replace_layers(model, {layer: layer.to_dense() for layer in chosen.values()}))


def matching_layers(model: nn.Module, rules: Sequence[Rule] | None) -> dict[str, FactorizedLayer]:
    """Returns the factorized layers that one of the rules matches, by name; all of them where there are no rules."""
    layers = factorized_layers(model)
    return {name: layer for name, layer in layers.items() if rules is None or _matches(rules, name, layer)}


def _matches(rules: Sequence[Rule], name: str, layer: FactorizedLayer) -> bool:
    kind = layer.dense_type.__name__
    fitting = (rule.factorization for rule in rules if fits(name, rule.pattern))
    return any(method is None or kind in method.replaces for method in fitting)


def rules_of(model: nn.Module) -> list[Rule]:
    """Returns what the factorized layers of a model are, as resolved rules: the structure that a checkpoint has to carry."""
    layers = factorized_layers(model)
    return [Rule(name, method, plan=layers[name].plan_choice) for name, method in methods_of(model).items()]


def methods_of(model: nn.Module) -> dict[str, Factorization]:
    """Returns the methods of the factorized layers, by name."""
    return named_apart(factorized_layers(model))
