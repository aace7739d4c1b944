"""Lowering the ranks of a model's layers: ranks are decided first, for all layers together; weights are touched second."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from tnlayers.budget import accurate, candidate_of
from tnlayers.factorizations import Factorization
from tnlayers.factorized import FactorizedLayer, exact_dense
from tnlayers.geometry import NOMINAL_CALLS, Call, Geometry
from tnlayers.layers import layer_type
from tnlayers.linalg import check_finite
from tnlayers.ranks import Candidate, MacsKept, ParamsKept, Rank, RankRule, Ranks, RelativeError, allocate
from tnlayers.rules import Rule, fits
from tnlayers.surgery import method_for, naming, replace_layers
from tnlayers.tracing import Example, calls_of, layer_inputs

__all__ = ["check_truncation", "fraction_kept", "resolve_truncation", "truncate"]


@dataclass(frozen=True)
class _Selected:
    """A layer whose rank may fall, or a dense one that a rule lets become factorized; and how it is called."""

    name: str
    layer: nn.Module
    method: Factorization
    calls: Sequence[Call]

    @property
    def ranks(self) -> Ranks | None:
        """What it has now; None if it is dense."""
        return self.layer.ranks if isinstance(self.layer, FactorizedLayer) else None

    @property
    def geometry(self) -> Geometry:
        return self.layer.geometry if isinstance(self.layer, FactorizedLayer) else Geometry(self.layer)

    def cost(self, *, by_macs: bool) -> tuple[int, int]:
        """What the layer costs as it is and as a dense one: parameters of the weight, or multiply-accumulates."""
        geometry, layer = self.geometry, self.layer
        dense = geometry.macs(self.calls) if by_macs else geometry.num_params
        if not isinstance(layer, FactorizedLayer):
            return dense, dense
        if by_macs:
            return geometry.network_macs(layer.network, layer.index_sizes, layer.plan.groups, self.calls), dense
        return sum(factor.numel() for factor in layer.factors.values()), dense

    def candidate(self, *, by_macs: bool) -> Candidate:
        """For the rank rules: truncations of the present weight from the present rank downward."""
        found = candidate_of(self.method, self.dense, self.calls, by_macs=by_macs, present=self.ranks)
        return replace(found, present_cost=self.cost(by_macs=by_macs)[0])

    def within(self, rule: RelativeError) -> Ranks | None:
        """The cheapest ranks found that keep the present weight to within the error; None if it is cheapest as it is."""
        dtype = next(self.layer.parameters()).dtype
        choice = accurate(self.method, self.dense, self.candidate(by_macs=False), rule, dtype)
        return choice.method.rank if choice.method else None  # type: ignore[return-value]

    @property
    def dense(self) -> nn.Module:
        return exact_dense(self.layer) if isinstance(self.layer, FactorizedLayer) else self.layer


def resolve_truncation(
    model: nn.Module,
    rank: Rank,
    example_input: Example | None = None,
    *,
    pattern: str = "*",
    rules: Sequence[Rule] = (),
) -> list[Rule]:
    """One rule for each layer whose rank has to fall: its exact name, integer ranks and plan. The model is not changed.

    A budget (`ParamsKept`, `MacsKept`) is a fraction of the *dense* layers, shared out among all layers that are selected,
    whatever their methods; nothing changes where it is kept already. `RelativeError` is against the present weights,
    layer by layer. An int lowers every bond that is above it.

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
    selected = _checked(model, rank, example_input, pattern, rules)
    by_macs = isinstance(rank, MacsKept)
    if not isinstance(rank, RankRule):
        chosen: list[Ranks | None] = [_lowered(each, rank) for each in selected]
    elif isinstance(rank, RelativeError):
        chosen = [each.within(rank) for each in selected]
    else:
        chosen = allocate([each.candidate(by_macs=by_macs) for each in selected], rank.fraction)
    return [
        _rule(each, ranks, by_macs=by_macs)
        for each, ranks in zip(selected, chosen, strict=True)
        if ranks is not None and ranks != each.ranks
    ]


def check_truncation(model: nn.Module, rank: Rank, *, pattern: str = "*", rules: Sequence[Rule] = ()) -> None:
    """What can be known of a truncation long before it comes.

    Raises:
        ValueError: no layer matches, or one cannot be truncated by this rank; see `resolve_truncation`.
    """
    _checked(model, rank, None, pattern, rules)


def truncate(model: nn.Module, rules: Sequence[Rule]) -> dict[str, float]:
    """Lowers the ranks of layers in place, keeping the closest weights; a dense layer becomes a factorized one.

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
            raise ValueError(f"{rule.pattern!r} has no method; expected what resolve_truncation returns")
        _check_weight(rule.pattern, model.get_submodule(rule.pattern))
    for rule in rules:
        layer, method = model.get_submodule(rule.pattern), rule.factorization
        assert method is not None
        if isinstance(layer, FactorizedLayer):
            errors[rule.pattern] = layer.truncate(method.rank)
            layer.set_plan(method.plan)
        else:
            new = layer_type(method, layer).convert(layer, method)
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
    """The fraction of the dense layers' parameters or multiply-accumulates that the selected layers have now."""
    costs = [each.cost(by_macs=by is MacsKept) for each in _select(model, example_input, pattern, rules)]
    return sum(present for present, _ in costs) / sum(dense for _, dense in costs)


def _select(model: nn.Module, example_input: Example | None, pattern: str, rules: Sequence[Rule]) -> list[_Selected]:
    methods: dict[str, Factorization] = {}
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLayer):
            methods[name] = module.factorization
        elif (method := method_for(model, name, rules)) is not None:
            methods[name] = method
    found = {name: method for name, method in methods.items() if fits(name, pattern)}
    if not found:
        have = f"its factorized layers are {', '.join(map(repr, methods))}" if methods else "the model has none"
        raise ValueError(f"pattern {pattern!r} matches no factorized layer; {have}")
    layers = {name: model.get_submodule(name) for name in found}
    inputs = layer_inputs(model, example_input) if example_input is not None else {}
    selected = [_Selected(name, layers[name], method, NOMINAL_CALLS) for name, method in found.items()]
    return [
        replace(each, calls=calls_of(each.geometry, inputs[each.name])) if each.name in inputs else each
        for each in selected
    ]


def _checked(
    model: nn.Module, rank: Rank, example_input: Example | None, pattern: str, rules: Sequence[Rule]
) -> list[_Selected]:
    selected = _select(model, example_input, pattern, rules)
    for each in selected:
        _check_weight(each.name, each.layer)
        try:
            _check(each, rank)
        except ValueError as error:
            raise ValueError(f"{each.name}: {error}; leave the layer out by a pattern") from None
    return selected


def _check_weight(name: str, layer: nn.Module) -> None:
    with naming(name):
        for parameter in layer.factors.values() if isinstance(layer, FactorizedLayer) else [layer.weight]:
            check_finite(parameter)  # type: ignore[arg-type]


def _check(each: _Selected, rank: Rank) -> None:
    if each.method.joint:
        raise ValueError("its parameters make other layers too")
    each.method.with_rank(rank)
    if isinstance(rank, (tuple, list)) and each.ranks is not None and len(rank) != len(each.ranks):
        raise ValueError(f"rank {rank!r} has {len(rank)} entries; the layer has {each.ranks}")


def _lowered(each: _Selected, rank: Rank) -> Ranks | None:
    """An explicit rank, each bond of it at most the present one; None for a dense layer."""
    present = each.ranks
    if present is None:
        return None
    asked = (rank,) * len(present) if isinstance(rank, int) else tuple(rank)  # type: ignore[arg-type]
    return each.method.clamp(each.geometry.weight_shape, tuple(map(min, asked, present)))


def _rule(each: _Selected, ranks: Ranks, *, by_macs: bool) -> Rule:
    """The layer at its new ranks, computed in the way that is then the best: a plan that was made for larger ranks need not be."""
    geometry, method = each.geometry, replace(each.method, rank=ranks)
    if by_macs:
        return Rule(each.name, replace(method, plan=geometry.fewest_macs(method, ranks, each.calls)))
    device = next(each.layer.parameters()).device.type
    return Rule(each.name, replace(method, plan=geometry.fastest(method, ranks, device, each.calls)))
