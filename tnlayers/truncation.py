"""Lowering the ranks of a model's layers: ranks are decided first, for all layers together; weights are touched second."""

import glob
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from tnlayers.allocation import Outside
from tnlayers.anyof import AnyOf
from tnlayers.assigning import method_for
from tnlayers.budget import Slot, lowered, settle
from tnlayers.counting import whole_cost
from tnlayers.errors import UserError, about
from tnlayers.factorized import FactorizedLayer
from tnlayers.geometry import Geometry
from tnlayers.layers import layer_type
from tnlayers.linalg import check_finite
from tnlayers.method import Factorization
from tnlayers.opened import open_in_place, opened_view, replace_layers
from tnlayers.ranks import MacsKept, Of, ParamsKept, Rank, RankRule
from tnlayers.rules import Rule, fits
from tnlayers.schedule import of_mode
from tnlayers.spec import LayerSpec
from tnlayers.tracing import Example, calls_of, layer_inputs

__all__ = ["check_truncation", "fraction_kept", "resolve_truncation", "truncate"]


def resolve_truncation(
    model: nn.Module,
    rank: Rank,
    example_input: Example | None = None,
    *,
    pattern: str = "*",
    rules: Sequence[Rule] = (),
) -> list[Rule]:
    """Makes one rule for each layer that has to change: its exact name, integer ranks and plan. The model is not changed.

    A budget (`ParamsKept`, `MacsKept`) is a fraction of the *dense* layers, shared out among all layers that are selected,
    whatever their methods, or with of="model" of the whole dense model, where all other layers count as kept; nothing changes
    where it is kept already at such ranks. `RelativeError` is against the present weights, layer by layer. An int lowers every bond that is
    above it. Plans are made anew: "auto" for a layer of which nothing says how it is used.

    Args:
        model: holds factorized layers.
        rank: what to truncate to.
        example_input: what the model takes; gives each layer's input size, for plans and for `MacsKept` on convolutions.
        pattern: which layers; `*`, `?` and `[...]` as in file names.
        rules: layers that an earlier budget left dense take part too, by the method of the first rule that matches them.

    Raises:
        ValueError: no layer matches, a budget out of reach, a layer that cannot be truncated by this rank, or one whose
            weight is not finite.
    """
    view = _view(model, rules, example_input)
    return _resolved(view, rank, example_input, _checked(view, rank, example_input, pattern, rules))


def _view(model: nn.Module, rules: Sequence[Rule], example_input: Example | None = None) -> nn.Module:
    return opened_view(model, [rule.pattern for rule in rules], example_input)


def _resolved(model: nn.Module, rank: Rank, example_input: Example | None, slots: Mapping[str, Slot]) -> list[Rule]:
    """Makes one rule for each of the selected layers that has to change."""
    if not isinstance(rank, RankRule):  # which lowers what there is
        slots = {name: slot for name, slot in slots.items() if slot.present}
    if isinstance(rank, MacsKept) and example_input is not None:
        if not (reached := {name: slot for name, slot in slots.items() if slot.calls}):
            raise UserError(
                f"{rank} depends on how the layers are used; give an example_input that reaches {next(iter(slots))!r}"
            )
        slots = reached
    outside = _outside(model, rank, example_input, slots.values())
    # Such a budget counts the best plans, so layers whose ranks stay take theirs as well.
    plans_too = isinstance(rank, MacsKept) and _fraction(slots.values(), by_macs=True, outside=outside) > rank.fraction
    settled = settle(list(slots.values()), rank, outside=outside)
    return [
        Rule(name, choice.spec.method, plan=choice.plan)
        for (name, slot), choice in zip(slots.items(), settled, strict=True)
        if choice.spec
        and (
            slot.present is None
            or slot.present[0] != choice.spec
            or (plans_too and slot.present[1] != of_mode(choice.plan, training=False))
        )
    ]


def _outside(model: nn.Module, rank: Rank, example_input: Example | None, slots: Iterable[Slot]) -> Outside | None:
    """Returns what a model costs beside the selected layers, for a budget of the whole model."""
    if not isinstance(rank, (ParamsKept, MacsKept)) or rank.of == "rule":
        return None
    by_macs = isinstance(rank, MacsKept)
    if by_macs and example_input is None:
        raise UserError(f"{rank} is a fraction of all that a forward does; give an example_input")
    present, dense = whole_cost(model, example_input, by_macs=by_macs)
    costs = [slot.cost(by_macs=by_macs) for slot in slots]
    return Outside(present - sum(now for now, _ in costs), dense - sum(full for _, full in costs))


def check_truncation(model: nn.Module, rank: Rank, *, pattern: str = "*", rules: Sequence[Rule] = ()) -> None:
    """Refuses what can be known to be impossible long before the truncation comes.

    Raises:
        ValueError: no layer matches, or one cannot be truncated by this rank; see `resolve_truncation`.
    """
    _checked(_view(model, rules), rank, None, pattern, rules)


def truncate(model: nn.Module, rules: Sequence[Rule], example_input: Example | None = None) -> dict[str, float]:
    """Lowers ranks in place, keeping the closest weights, and factorizes the dense layers that `resolve_truncation` names.

    The factors are new Parameters where their shape changes: an optimizer made before holds the old ones
    (`lightning_modules.callbacks.RankSchedule` sees to that during training).

    Args:
        model: changed in place.
        rules: what `resolve_truncation` returns; or patterns, as `tensorize` takes them: the first that matches a factorized layer
            wins, and a budget is shared by the layers of its rule. A truncation keeps each layer's method.
        example_input: what the model takes, for patterns; see `resolve_truncation`.

    Returns:
        For each layer's name ||W - W~||_F / ||W||_F against the weight before.

    Raises:
        ValueError: a rule without a method, one that does not fit its layer or matches none, or a weight that is not finite.
    """
    errors = {}
    rules = _by_name(model, rules, example_input)
    open_in_place(model, [rule.pattern for rule in rules])
    for rule in rules:
        if not isinstance(rule.factorization, Factorization):
            raise UserError(f"{rule.pattern!r} has no one method; expected what resolve_truncation returns")
        _check_weight(rule.pattern, model.get_submodule(rule.pattern))
    for rule in rules:
        layer, method = model.get_submodule(rule.pattern), rule.factorization
        assert isinstance(method, Factorization)
        if isinstance(layer, FactorizedLayer):
            errors[rule.pattern] = layer.truncate(method.rank, rule.plan)
        else:
            new = layer_type(method, type(layer)).from_spec(layer, LayerSpec(Geometry.of(layer), method), rule.plan)
            replace_layers(model, {layer: new})
            errors[rule.pattern] = new.decomposition_error or 0.0
    return errors


def _by_name(model: nn.Module, rules: Sequence[Rule], example_input: Example | None) -> list[Rule]:
    """Returns the rules, with one for each layer in place of those that are patterns or have a budget.

    Raises:
        UserError: a rule that matches no factorized layer of its method, or none that an earlier rule has left.
    """
    modules = dict(model.named_modules())
    layers = {name: layer for name, layer in modules.items() if isinstance(layer, FactorizedLayer)}
    resolved: list[Rule] = []
    taken: set[str] = set()
    for rule in rules:
        names = [name for name in layers if fits(name, rule.pattern) and name not in taken]
        taken |= {*names}
        budget = rule.factorization and isinstance(rule.factorization.rank, RankRule)
        if rule.pattern in modules and not budget:
            resolved.append(rule)
        elif rule.factorization and names:
            resolved += _under(model, rule, names, example_input)
        elif not any(fits(name, rule.pattern) for name in layers):
            raise UserError(_no_layer(rule.pattern, layers))
    return resolved


def _under(model: nn.Module, rule: Rule, names: Sequence[str], example_input: Example | None) -> list[Rule]:
    """Makes one rule for each layer of a pattern that has to change."""
    asked = rule.factorization
    assert asked is not None
    slots: dict[str, Slot] = {}
    for name in names:
        slots |= _checked(model, asked.rank, example_input, glob.escape(name), ())
        own = slots[name].method
        allowed = [type(method) for method in (asked.methods if isinstance(asked, AnyOf) else [asked])]
        if type(own) not in allowed:
            raise UserError(
                f"rule {rule.pattern!r}: {name!r} is {type(own).__name__}, and a truncation keeps the method; give "
                f"{type(own).__name__}, or change the method by tensorize"
            )
    return _resolved(model, asked.rank, example_input, slots)


def fraction_kept(
    model: nn.Module,
    by: type[ParamsKept] | type[MacsKept],
    example_input: Example | None = None,
    *,
    pattern: str = "*",
    rules: Sequence[Rule] = (),
    of: Of = "rule",
) -> float:
    """Returns the fraction of the dense layers' parameters or multiply-accumulates that the selected layers have now.

    With of="model" it is that of the whole model.
    """
    if of == "model":
        present, dense = whole_cost(model, example_input, by_macs=by is MacsKept)
        return present / max(dense, 1)
    slots = _select(_view(model, rules, example_input), example_input, pattern, rules)
    return _fraction(slots.values(), by_macs=by is MacsKept)


def _fraction(slots: Iterable[Slot], *, by_macs: bool, outside: Outside | None = None) -> float:
    rest = outside or Outside()
    costs = [slot.cost(by_macs=by_macs) for slot in slots]
    return (rest.present + sum(now for now, _ in costs)) / (rest.dense + sum(dense for _, dense in costs))


def _no_layer(pattern: str, names: Iterable[str]) -> str:
    have = ", ".join(map(repr, names))
    return f"pattern {pattern!r} matches no factorized layer; " + (
        f"its factorized layers are {have}" if have else "the model has none"
    )


def _select(model: nn.Module, example_input: Example | None, pattern: str, rules: Sequence[Rule]) -> dict[str, Slot]:
    """Returns the factorized layers, and the dense ones that a rule lets become factorized, by name."""
    methods: dict[str, Factorization] = {}
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLayer):
            methods[name] = module.spec.method
        elif (method := method_for(model, name, rules)) is not None:
            methods[name] = method
    found = {name: method for name, method in methods.items() if fits(name, pattern)}
    if not found:
        raise UserError(_no_layer(pattern, methods))
    inputs = layer_inputs(model, example_input) if example_input is not None else {}
    slots = {}
    for name, method in found.items():
        layer = model.get_submodule(name)
        calls = calls_of(Geometry.of(layer), inputs[name]) if name in inputs else None
        slots[name] = layer.slot(calls) if isinstance(layer, FactorizedLayer) else Slot.of_dense(layer, method, calls)
    return slots


def _checked(
    model: nn.Module, rank: Rank, example_input: Example | None, pattern: str, rules: Sequence[Rule]
) -> Mapping[str, Slot]:
    slots = _select(model, example_input, pattern, rules)
    for name, slot in slots.items():
        _check_weight(name, model.get_submodule(name))
        with about(name):
            try:
                _check(slot, rank)
            except UserError as error:
                raise UserError(f"{error}; leave the layer out by a pattern") from None
    return slots


def _check_weight(name: str, layer: nn.Module) -> None:
    with about(name):
        for parameter in layer.factors.values() if isinstance(layer, FactorizedLayer) else [layer.weight]:
            check_finite(parameter)  # type: ignore[arg-type]


def _check(slot: Slot, rank: Rank) -> None:
    asked = slot.method.with_rank(rank).rank
    if slot.present and not isinstance(asked, RankRule):
        lowered(slot.present[0], asked)
