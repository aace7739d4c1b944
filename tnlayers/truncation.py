"""Lowering the ranks of a model's layers: ranks are decided first, for all layers together; weights are touched second."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from tnlayers.budget import Slot, lowered, settle
from tnlayers.errors import UserError, about
from tnlayers.factorized import FactorizedLayer, slot_of
from tnlayers.geometry import Geometry
from tnlayers.layers import layer_type
from tnlayers.linalg import check_finite
from tnlayers.method import Factorization
from tnlayers.ranks import MacsKept, ParamsKept, Rank, RankRule
from tnlayers.rules import Rule, fits
from tnlayers.spec import LayerSpec
from tnlayers.surgery import method_for, replace_layers
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
    whatever their methods; nothing changes where it is kept already. `RelativeError` is against the present weights,
    layer by layer. An int lowers every bond that is above it. Plans are made anew: "auto" for a layer of which nothing says how
    it is used.

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
    slots = _checked(model, rank, example_input, pattern, rules)
    if not isinstance(rank, RankRule):  # which lowers what there is
        slots = {name: slot for name, slot in slots.items() if slot.present}
    # Such a budget counts the best plans, so layers whose ranks stay take theirs as well.
    plans_too = isinstance(rank, MacsKept) and _fraction(slots.values(), by_macs=True) > rank.fraction
    return [
        Rule(name, choice.spec.method, plan=choice.plan)
        for (name, slot), choice in zip(slots.items(), settle(list(slots.values()), rank), strict=True)
        if choice.spec
        and (slot.present is None or slot.present[0] != choice.spec or (plans_too and slot.present[1] != choice.plan))
    ]


def check_truncation(model: nn.Module, rank: Rank, *, pattern: str = "*", rules: Sequence[Rule] = ()) -> None:
    """Refuses what can be known to be impossible long before the truncation comes.

    Raises:
        ValueError: no layer matches, or one cannot be truncated by this rank; see `resolve_truncation`.
    """
    _checked(model, rank, None, pattern, rules)


def truncate(model: nn.Module, rules: Sequence[Rule]) -> dict[str, float]:
    """Does what `resolve_truncation` decided: lowers ranks in place, keeping the closest weights, and factorizes dense layers.

    The factors are new Parameters where their shape changes: an optimizer made before holds the old ones
    (`lightning_modules.callbacks.RankSchedule` sees to that during training).

    Args:
        model: changed in place.
        rules: what `resolve_truncation` returns.

    Returns:
        For each layer's name ||W - W~||_F / ||W||_F against the weight before.

    Raises:
        ValueError: a rule without a method or one that does not fit its layer, or a weight that is not finite.
    """
    errors = {}
    for rule in rules:
        if rule.factorization is None:
            raise UserError(f"{rule.pattern!r} has no method; expected what resolve_truncation returns")
        _check_weight(rule.pattern, model.get_submodule(rule.pattern))
    for rule in rules:
        layer, method = model.get_submodule(rule.pattern), rule.factorization
        assert method is not None
        if isinstance(layer, FactorizedLayer):
            errors[rule.pattern] = layer.truncate(method.rank, rule.plan)
        else:
            new = layer_type(method, type(layer)).from_spec(layer, LayerSpec(Geometry.of(layer), method), rule.plan)
            replace_layers(model, {layer: new})
            errors[rule.pattern] = new.decomposition_error or 0.0
    return errors


def fraction_kept(
    model: nn.Module,
    by: type[ParamsKept] | type[MacsKept],
    example_input: Example | None = None,
    *,
    pattern: str = "*",
    rules: Sequence[Rule] = (),
) -> float:
    """Returns the fraction of the dense layers' parameters or multiply-accumulates that the selected layers have now."""
    return _fraction(_select(model, example_input, pattern, rules).values(), by_macs=by is MacsKept)


def _fraction(slots: Iterable[Slot], *, by_macs: bool) -> float:
    costs = [slot.cost(by_macs=by_macs) for slot in slots]
    return sum(present for present, _ in costs) / sum(dense for _, dense in costs)


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
        have = f"its factorized layers are {', '.join(map(repr, methods))}" if methods else "the model has none"
        raise UserError(f"pattern {pattern!r} matches no factorized layer; {have}")
    inputs = layer_inputs(model, example_input) if example_input is not None else {}
    slots = {}
    for name, method in found.items():
        layer = model.get_submodule(name)
        calls = calls_of(Geometry.of(layer), inputs[name]) if name in inputs else None
        slots[name] = slot_of(layer, method, calls)
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
