"""Lowering the ranks of a model's factorized layers: ranks are decided first, for all layers together; weights are touched second."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from tnlayers.budget import candidate_of
from tnlayers.factorizations import Factorization
from tnlayers.factorized import FactorizedLayer
from tnlayers.geometry import NOMINAL_CALLS, Call
from tnlayers.ranks import Candidate, MacsKept, ParamsKept, Rank, RankRule, Ranks, RelativeError, allocate, within_error
from tnlayers.rules import Rule, fits
from tnlayers.tracing import Example, calls_of, layer_inputs

__all__ = ["fraction_kept", "resolve_truncation", "truncate"]


@dataclass(frozen=True)
class _Selected:
    """A factorized layer, and how it is called."""

    name: str
    layer: FactorizedLayer
    calls: Sequence[Call]

    @property
    def method(self) -> Factorization:
        return self.layer.factorization

    def cost(self, *, by_macs: bool) -> tuple[int, int]:
        """What the layer costs as it is and as a dense one: parameters of the weight, or multiply-accumulates."""
        geometry, layer = self.layer.geometry, self.layer
        if not by_macs:
            return sum(factor.numel() for factor in layer.factors.values()), geometry.num_params
        macs = geometry.network_macs(layer.network, layer.index_sizes, layer.plan.groups, self.calls)
        return macs, geometry.macs(self.calls)

    def candidate(self, *, by_macs: bool) -> Candidate:
        """For the rank rules: truncations of the present weight from the present rank downward."""
        dense = self.layer.to_dense()
        found = candidate_of(self.method, dense, self.calls, by_macs=by_macs)
        return replace(found, max_ranks=self.layer.ranks, present_cost=self.cost(by_macs=by_macs)[0])


def resolve_truncation(
    model: nn.Module, rank: Rank, example_input: Example | None = None, *, pattern: str = "*"
) -> list[Rule]:
    """One rule for each factorized layer whose rank has to fall: its exact name, integer ranks and plan. The model is not changed.

    A budget (`ParamsKept`, `MacsKept`) is a fraction of the *dense* layers, shared out among all the layers that the pattern
    matches, whatever their methods; nothing changes where it is kept already. `RelativeError` is against the present weights,
    layer by layer. An int lowers every bond that is above it.

    Args:
        model: holds factorized layers.
        rank: what to truncate to.
        example_input: what the model takes; gives each layer's input size, for plans and for `MacsKept` on convolutions.
        pattern: which layers; `*`, `?` and `[...]` as in file names.

    Raises:
        ValueError: no factorized layer matches, a budget out of reach, or a layer that cannot be truncated by this rank.
    """
    selected = _select(model, example_input, pattern)
    for each in selected:
        _check(each, rank)
    by_macs = isinstance(rank, MacsKept)
    if not isinstance(rank, RankRule):
        chosen: list[Ranks | None] = [_lowered(each, rank) for each in selected]
    else:
        candidates = [each.candidate(by_macs=by_macs) for each in selected]
        if isinstance(rank, RelativeError):
            chosen = [within_error(candidate, rank.error) for candidate in candidates]
        else:
            chosen = allocate(candidates, rank.fraction)
    return [
        _rule(each, ranks, by_macs=by_macs)
        for each, ranks in zip(selected, chosen, strict=True)
        if ranks not in (None, each.layer.ranks)
    ]


def truncate(model: nn.Module, rules: Sequence[Rule]) -> dict[str, float]:
    """Lowers the ranks of factorized layers in place, keeping the closest weights.

    The factors are new Parameters where their shape changes: an optimizer made before holds the old ones
    (`lightning_modules.callbacks.RankSchedule` sees to that during training).

    Args:
        model: changed in place.
        rules: what `resolve_truncation` returns.

    Returns:
        For each layer's name ||W - W~||_F / ||W||_F against the weight before.

    Raises:
        ValueError: a rule that names no factorized layer, or has a rank above the present one.
    """
    errors = {}
    for rule in rules:
        layer = model.get_submodule(rule.pattern)
        if not isinstance(layer, FactorizedLayer) or rule.factorization is None:
            raise ValueError(
                f"{rule.pattern!r} is a {type(layer).__name__}; expected a factorized layer and its new rank"
            )
        errors[rule.pattern] = layer.truncate(rule.factorization.rank)
        layer.set_plan(rule.factorization.plan)
    return errors


def fraction_kept(
    model: nn.Module, by: type[ParamsKept] | type[MacsKept], example_input: Example | None = None, *, pattern: str = "*"
) -> float:
    """The fraction of the dense layers' parameters or multiply-accumulates that the factorized layers have now."""
    costs = [each.cost(by_macs=by is MacsKept) for each in _select(model, example_input, pattern)]
    return sum(present for present, _ in costs) / sum(dense for _, dense in costs)


def _select(model: nn.Module, example_input: Example | None, pattern: str) -> list[_Selected]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FactorizedLayer)}
    found = {name: layer for name, layer in layers.items() if fits(name, pattern)}
    if not found:
        have = f"its factorized layers are {', '.join(map(repr, layers))}" if layers else "the model has none"
        raise ValueError(f"pattern {pattern!r} matches no factorized layer; {have}")
    inputs = layer_inputs(model, example_input) if example_input is not None else {}
    return [
        _Selected(name, layer, calls_of(layer.geometry, inputs[name]) if name in inputs else NOMINAL_CALLS)
        for name, layer in found.items()
    ]


def _check(each: _Selected, rank: Rank) -> None:
    try:
        if each.method.joint:
            raise ValueError("its parameters make other layers too")
        each.method.with_rank(rank)
    except ValueError as error:
        raise ValueError(f"{each.name}: {error}; leave the layer out by a pattern") from None


def _lowered(each: _Selected, rank: Rank) -> Ranks | None:
    """An explicit rank, each bond of it at most the present one."""
    present = each.layer.ranks
    asked = (rank,) * len(present) if isinstance(rank, int) else tuple(rank)  # type: ignore[arg-type]
    if len(asked) != len(present):
        raise ValueError(f"{each.name}: rank {rank!r} has {len(asked)} entries; the layer has {present}")
    return each.method.clamp(each.layer.geometry.weight_shape, tuple(map(min, asked, present)))


def _rule(each: _Selected, ranks: Ranks | None, *, by_macs: bool) -> Rule:
    """The layer at its new ranks, computed in the way that is then the best: a plan that was made for larger ranks need not be."""
    assert ranks is not None
    geometry, method = each.layer.geometry, replace(each.method, rank=ranks)
    if by_macs:
        return Rule(each.name, replace(method, plan=geometry.fewest_macs(method, ranks, each.calls)))
    device = next(iter(each.layer.factors.values())).device.type
    return Rule(each.name, replace(method, plan=geometry.fastest(method, ranks, device, each.calls)))
