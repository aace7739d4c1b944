"""What becomes of the layers of a model under its rules: budgets of each rule first, then that of the whole model."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from tnlayers.allocation import Outside
from tnlayers.anyof import AnyOf
from tnlayers.budget import Choice, Slot, settle
from tnlayers.counting import whole_cost
from tnlayers.errors import UserError, about
from tnlayers.factorized import FactorizedLayer, Init
from tnlayers.geometry import Call, Geometry, dense_type_of
from tnlayers.joint import entries_made, generator_of, join
from tnlayers.method import Factorization
from tnlayers.ranks import MacsKept, ParamsKept
from tnlayers.roles import Partition
from tnlayers.rules import Rule
from tnlayers.spec import LayerSpec
from tnlayers.tracing import Example, calls_of, layer_inputs

__all__ = ["Costs", "settle_rules"]

Layers = Mapping[str, nn.Module]
_NEAR = 0.97  # of a budget: what is left of one that was met


@dataclass
class Costs:
    """Adds up what layers cost; the parameters that several share count once.

    Attributes:
        by_macs: whether it counts multiply-accumulates, of all calls, or else parameters.
        calls: how each layer is used, by name.
    """

    by_macs: bool
    calls: Mapping[str, Sequence[Call]]
    _seen: set[str] = field(default_factory=set)

    def of_spec(self, name: str, spec: LayerSpec, plan: Partition) -> int:
        if self.by_macs:
            return spec.macs(self.calls.get(name, ()), plan)
        generator = generator_of(spec.method)
        counted = generator in self._seen
        self._seen |= {generator} - {""}
        return 0 if counted else spec.params

    def of_layer(self, name: str, layer: nn.Module) -> int:
        if isinstance(layer, FactorizedLayer):
            return self.of_spec(name, layer.spec, layer.plan.groups)
        return self.of_dense(name, layer)

    def of_dense(self, name: str, layer: nn.Module) -> int:
        geometry = Geometry.of(layer)
        return geometry.macs(self.calls.get(name, ())) if self.by_macs else geometry.params


def settle_rules(
    model: nn.Module, rules: Sequence[Rule], taken: Sequence[Layers], example_input: Example | None, init: Init
) -> dict[str, Choice]:
    """Decides by name what becomes of the layers that the rules take.

    Args:
        model: holds the layers.
        rules: the rules.
        taken: what each rule takes, none of it refused, by name.
        example_input: what the model takes.
        init: "random" where present weights do not count.

    Raises:
        UserError: a budget out of reach, budgets of the whole model that differ, or one of multiply-accumulates without an example.
    """
    inputs = layer_inputs(model, example_input) if example_input is not None and any(taken) else {}
    calls = {
        name: calls_of(Geometry.of(layer), inputs[name])
        for layers in taken
        for name, layer in layers.items()
        if name in inputs
    }
    settled: dict[str, Choice] = {}
    shared: list[tuple[Rule, Layers]] = []
    for rule, layers in zip(rules, taken, strict=True):
        if rule.factorization is None:
            continue
        rank = rule.factorization.rank
        with about(f"rule {rule.pattern!r}"):
            unreached = _unreached(rule.factorization, layers, calls, example_input)
        settled |= {name: _stay(layers[name], reason) for name, reason in unreached.items()}
        own = {name: layer for name, layer in layers.items() if name not in unreached}
        if isinstance(rank, (ParamsKept, MacsKept)) and rank.of == "model":
            shared.append((rule, own))
            continue
        with about(f"rule {rule.pattern!r}"):
            settled |= _choices([(rule, own)], calls, flat=init == "random")
    if shared:
        with about(f"rule {', '.join(repr(rule.pattern) for rule, _ in shared)}"):
            outside = _outside(model, shared, settled, calls, example_input)
            settled |= _choices(shared, calls, outside, flat=init == "random")
    return settled


def _stay(layer: nn.Module, reason: str) -> Choice:
    """Returns the choice that changes nothing."""
    if isinstance(layer, FactorizedLayer):
        return Choice(layer.spec, layer.plan_choice, reason)
    return Choice(None, reason=reason)


def _unreached(
    method: Factorization | AnyOf, layers: Layers, calls: Mapping[str, list[Call]], example_input: Example | None
) -> dict[str, str]:
    """Returns the layers whose multiply-accumulates a budget needs and the example does not tell, with the reason."""
    unseen = [name for name in layers if name not in calls]
    if not isinstance(method.rank, MacsKept) or not unseen:
        return {}
    whole = method.rank.of == "model" and example_input is None
    blind = example_input is None and any(Geometry.of(layers[name]).axes for name in unseen)
    if whole or blind or (example_input is not None and len(unseen) == len(layers)):
        raise UserError(
            f"{method.rank} depends on how the layers are used; give an example_input that reaches {unseen[0]!r}"
        )
    if example_input is None:
        return {}
    return dict.fromkeys(unseen, f"{method.rank}: the example input never calls it, so what it costs is not known")


def _outside(
    model: nn.Module,
    shared: Sequence[tuple[Rule, Layers]],
    settled: Mapping[str, Choice],
    calls: Mapping[str, list[Call]],
    example_input: Example | None,
) -> Outside:
    """Returns what the rest of the model costs once the other rules are applied, and costs in the dense model.

    Raises:
        UserError: budgets of the whole model that differ.
    """
    ranks = {rule.factorization.rank for rule, _ in shared if rule.factorization}
    if len(ranks) > 1:
        raise UserError(f"budgets of the whole model are one for all rules, and these are {', '.join(map(str, ranks))}")
    by_macs = isinstance(next(iter(ranks)), MacsKept)
    present, dense = whole_cost(model, example_input, by_macs=by_macs)
    before, after = Costs(by_macs, calls), Costs(by_macs, calls)
    for _, layers in shared:
        present -= sum(before.of_layer(name, layer) for name, layer in layers.items())
        dense -= sum(before.of_dense(name, layer) for name, layer in layers.items())
    for name, choice in settled.items():
        if choice.spec is not None:
            layer = model.get_submodule(name)
            plan = choice.spec.compile(choice.plan, "cpu").groups
            present += after.of_spec(name, choice.spec, plan) - before.of_layer(name, layer)
    return Outside(present, dense)


def _choices(
    shared: Sequence[tuple[Rule, Layers]],
    calls: Mapping[str, list[Call]],
    outside: Outside | None = None,
    *,
    flat: bool,
) -> dict[str, Choice]:
    """Decides what becomes of the layers under one rank: those of one rule, or of all rules with a budget of the whole model."""
    slots: dict[str, Slot] = {}
    layers: dict[str, nn.Module] = {}
    plans = {name: rule.plan for rule, own in shared for name in own}
    for rule, own in shared:
        assert rule.factorization is not None
        rank = rule.factorization.rank
        layers |= own
        slots |= _slots(rule.factorization, own, calls, flat=flat)
    if isinstance(rank, (ParamsKept, MacsKept)) and _is_kept(slots, rank, outside or Outside()):
        return {name: _stay(layer, "") for name, layer in layers.items()}
    plan = shared[0][0].plan if len(shared) == 1 else "auto"
    choices = dict(zip(slots, settle(list(slots.values()), rank, plan, outside), strict=True))
    for name, choice in choices.items():
        layer = layers[name]
        if choice.spec is None:
            choices[name] = _stay(layer, choice.reason)
            if isinstance(layer, FactorizedLayer) and slots[name].present is None:
                warnings.warn(
                    f"{name} stays {type(layer.spec.method).__name__} of rank {layer.spec.ranks}: {choice.reason}; `to_dense` "
                    "makes it dense",
                    stacklevel=6,
                )
        elif isinstance(layer, FactorizedLayer) and layer.spec == choice.spec and plans[name] == "auto":
            choices[name] = replace(choice, plan=choice.plan if slots[name].present else layer.plan_choice)
        elif plans[name] != "auto":
            choices[name] = replace(choice, plan=plans[name])
        if isinstance(rank, (int, tuple)):
            _warn_of_growth(name, choices[name])
    return choices


def _slots(
    given: Factorization | AnyOf, layers: Layers, calls: Mapping[str, list[Call]], *, flat: bool
) -> dict[str, Slot]:
    """Describes the layers of a rule; of several methods each layer has one slot or more, the others within the first."""
    if not isinstance(given, AnyOf):
        methods = join(given, [Geometry.of(layer) for layer in layers.values()])
        return {
            name: _slot(layer, method, calls.get(name), flat=flat)
            for (name, layer), method in zip(layers.items(), methods, strict=True)
        }
    found = {}
    for name, layer in layers.items():
        own = given.for_kind(dense_type_of(layer).__name__)
        slots = [_slot(layer, method, calls.get(name), flat=flat) for method in own]
        first, *others = [slot for slot in slots if slot.present] or slots  # ranks of its own method only fall
        found[name] = replace(first, others=tuple(others))
    return found


def _slot(layer: nn.Module, method: Factorization, calls: list[Call] | None, *, flat: bool) -> Slot:
    """Describes a layer: under a budget the ranks of one that has the method already only fall; others are made anew."""
    if isinstance(layer, FactorizedLayer):
        own = layer.spec.method
        budget = isinstance(method.rank, (ParamsKept, MacsKept))
        if budget and type(method) is type(own) and replace(method, rank=own.rank) == own:
            return layer.slot(calls, flat=flat)
        layer = layer.to_dense()
    return Slot.of_dense(layer, method, calls, flat=flat)


def _is_kept(slots: Mapping[str, Slot], rank: ParamsKept | MacsKept, outside: Outside) -> bool:
    """Tells whether all layers have their method, at such ranks, and are within the budget; says so where they are far below it."""
    own = {name: slot.present[0].ranks for name, slot in slots.items() if slot.present}
    if not own or own != {name: slot.highest(rank.multiple) for name, slot in slots.items()}:
        return False
    costs = [slot.cost(by_macs=isinstance(rank, MacsKept)) for slot in slots.values()]
    kept = (outside.present + sum(cost for cost, _ in costs)) / (outside.dense + sum(dense for _, dense in costs))
    if kept < _NEAR * rank.fraction:
        warnings.warn(
            f"{', '.join(slots)}: {rank} changes nothing, since {kept:.3g} is kept already; ranks that were given up do not "
            "come back",
            stacklevel=6,
        )
    return kept <= rank.fraction


def _warn_of_growth(name: str, choice: Choice) -> None:
    if (spec := choice.spec) and spec.params >= (entries := entries_made(spec)):
        warnings.warn(
            f"{name}: {type(spec.method).__name__} of rank {spec.ranks} has {spec.params} parameters and the dense weight "
            f"{entries}; lower the rank or leave the layer dense",
            stacklevel=6,
        )
