"""From a rank, an int or a rule, to what becomes of the layers that share it."""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.allocation import Candidate, Outside, allocate, within_error
from tnlayers.errors import UserError
from tnlayers.geometry import NOMINAL_CALLS, Call, Geometry
from tnlayers.linalg import check_finite, precise, scale_of
from tnlayers.method import Factorization
from tnlayers.ranks import MacsKept, Rank, RankRule, Ranks, RelativeError, check_rank
from tnlayers.roles import Partition
from tnlayers.schedule import ByMode, PlanChoice, of_mode
from tnlayers.spec import LayerSpec

__all__ = ["Choice", "Fit", "Slot", "lowered", "settle"]

Fit = tuple[dict[str, Tensor], float]
"""What `LayerSpec.decompose` returns: the parameters and their relative error."""


@dataclass(frozen=True, eq=False)
class Slot:
    """A layer whose ranks are to be settled, dense or factorized already.

    Attributes:
        geometry: of the dense layer.
        method: the method to apply, or the one the layer has; its rank is ignored where it is factorized.
        weight: makes the dense weight; None for a layer that is trained from scratch, whose singular values all count alike.
        dtype: of the factors.
        device_type: where it runs.
        calls: how it is used; None where nothing says.
        present: what it is and how it is computed, if it is factorized: then no rank rises.
        others: the same layer under other methods, one of which may be chosen instead.
    """

    geometry: Geometry
    method: Factorization
    weight: Callable[[], Tensor] | None
    dtype: torch.dtype
    device_type: str = "cpu"
    calls: Sequence[Call] | None = None
    present: tuple[LayerSpec, Partition] | None = None
    others: tuple["Slot", ...] = ()

    @staticmethod
    def of_dense(
        layer: nn.Module, method: Factorization, calls: Sequence[Call] | None = None, *, flat: bool = False
    ) -> "Slot":
        """Describes a torch layer; `flat` is whether it is trained from scratch, so that its present weight does not count."""
        geometry, dense = Geometry.of(layer), layer.weight
        assert isinstance(dense, Tensor)
        known = None if flat else lambda: geometry.exchanged(dense)
        return Slot(geometry, method, known, dense.dtype, dense.device.type, calls)

    def highest(self, multiple: int = 1) -> Ranks:
        """Returns the highest ranks that the layer may have: those it has, or from which on every weight is represented exactly.

        One that is below what the weight's shape attains is lowered to a multiple, which is 0 where there is none.
        """
        attainable = self.method.max_ranks(self.geometry.weight_shape)
        ranks = self.present[0].ranks if self.present else attainable
        return tuple(
            rank if rank >= most else rank // multiple * multiple for rank, most in zip(ranks, attainable, strict=True)
        )

    @property
    def used(self) -> Sequence[Call]:
        return self.calls or NOMINAL_CALLS

    def cost(self, *, by_macs: bool) -> tuple[int, int]:
        """Returns what the layer costs as it is and as a dense one: parameters of the weight, or multiply-accumulates."""
        dense = self.geometry.macs(self.used) if by_macs else self.geometry.params
        if self.present is None:
            return dense, dense
        spec, plan = self.present
        return spec.macs(self.used, plan) if by_macs else spec.params, dense


@dataclass(frozen=True)
class Choice:
    """What becomes of a layer.

    Attributes:
        spec: what it is made; None to leave it as it is.
        plan: how it is computed.
        reason: why it is left.
        fit: its parameters, where they had to be made to know the rank.
    """

    spec: LayerSpec | None
    plan: PlanChoice = "auto"
    reason: str = ""
    fit: Fit | None = None


def settle(
    slots: Sequence[Slot], rank: Rank, plan: PlanChoice = "auto", outside: Outside | None = None
) -> list[Choice]:
    """Decides what becomes of each layer. A budget is shared out among all of them.

    Args:
        slots: the layers.
        rank: an int or tuple holds for each layer; an int lowers those that are factorized already.
        plan: how they are computed; "auto" becomes the best for the calls where these are known. Under `MacsKept` that is
            the one with the fewest multiply-accumulates, since these are what was asked for.
        outside: the rest of the model, for a budget that is a fraction of the whole.

    Raises:
        ValueError: a budget out of reach, or `RelativeError` without trained weights.
    """
    rank, by_macs = check_rank(rank), isinstance(rank, MacsKept)
    if not isinstance(rank, RankRule):
        choices = [
            Choice(lowered(slot.present[0], rank) if slot.present else LayerSpec(slot.geometry, slot.method))
            for slot in slots
        ]
    elif isinstance(rank, RelativeError):
        if any(slot.weight is None for slot in slots):
            raise UserError(f"{rank} needs trained weights; from scratch give a rank, ParamsKept or MacsKept")
        choices = [_cheapest([_accurate(one, rank) for one in (slot, *slot.others)]) for slot in slots]
    else:
        if rank.of == "model" and outside is None:
            raise UserError(f"{rank} is a budget of a model, and this is one layer; give {replace(rank, of='rule')}")
        options = [(slot, *slot.others) for slot in slots]
        several = any(slot.others for slot in slots)
        if several and any(slot.weight is None for slot in slots):
            raise UserError(
                "which of several methods loses the least is measured on trained weights; from scratch give one method"
            )
        candidates = [[_candidate(one, rank, by_macs=by_macs, measures=several) for one in each] for each in options]
        chosen = allocate(candidates, rank.fraction, outside)
        elsewhere = Choice(None, reason=f"{rank}: {_dense_is_cheaper(rank)} or the budget is better spent elsewhere")
        choices = [
            elsewhere if found is None else Choice(_highest(each[found[0]]).at(found[1]))
            for each, found in zip(options, chosen, strict=True)
        ]
    return [
        replace(choice, plan=_planned(choice.spec, slot, plan, by_macs=by_macs))
        for slot, choice in zip(slots, choices, strict=True)
    ]


def _planned(spec: LayerSpec | None, slot: Slot, plan: PlanChoice, *, by_macs: bool) -> PlanChoice:
    if spec is None or plan != "auto" or not (by_macs or slot.calls):
        return plan
    fast = spec.best_plan(slot.used, slot.device_type)
    if not by_macs:
        return fast
    fewest, training = spec.fewest_macs(slot.used), of_mode(fast, training=True)
    return fewest if training == fewest else ByMode(fewest, training)


def lowered(spec: LayerSpec, rank: int | Sequence[int]) -> LayerSpec:
    """Returns a factorized layer's spec at the ranks of a tuple, or with every bond that is above an int lowered to it.

    Raises:
        UserError: a tuple of another length, or one that would raise a rank; parameters that make other layers too.
    """
    if isinstance(rank, int):
        return spec.at(tuple(min(rank, old) for old in spec.ranks))
    ranks = tuple(rank)
    if len(ranks) != len(spec.ranks):
        raise UserError(f"rank {ranks} has {len(ranks)} entries; the layer has {spec.ranks}")
    if any(map(operator.gt, ranks, spec.ranks)):
        raise UserError(f"rank {ranks} is above the present {spec.ranks}; a truncation only lowers it")
    return LayerSpec(spec.geometry, spec.method.with_rank(ranks))


def _dense_is_cheaper(rule: RankRule) -> str:
    return "dense is cheaper" + (f" than multiples of {rule.multiple}" if rule.multiple > 1 else "")


def _highest(slot: Slot) -> LayerSpec:
    return slot.present[0] if slot.present else LayerSpec(slot.geometry, slot.method.with_rank(slot.highest()))


def _cheapest(choices: Sequence[Choice]) -> Choice:
    """Returns the choice with the fewest parameters; the first where none of them has any."""
    made = [(choice.spec.params, place) for place, choice in enumerate(choices) if choice.spec]
    return choices[min(made)[1] if made else 0]


def _candidate(slot: Slot, rule: RankRule, *, by_macs: bool, measures: bool = False) -> Candidate:
    """Returns what the rank rules need to know of a layer; ranks that hold each other down count as what they attain.

    With `measures` some of the errors are those of the factors that a method really finds: estimates of different methods are bounds
    of different tightness.
    """
    highest, unit = _highest(slot), rule.multiple
    costs: list[Callable[[Ranks], int]] = [lambda ranks: highest.at(ranks).params]
    if by_macs:
        costs = [highest.macs_of_ranks(slot.used, plan) for plan in highest.plans]
    present_cost: int | None
    present_cost, dense_cost = slot.cost(by_macs=by_macs)
    clamp = cache(partial(highest.method.clamp, highest.geometry.weight_shape))  # asked for every way of computing
    max_ranks, error = slot.highest(unit), _error(slot)
    if slot.present and max_ranks != highest.ranks and all(max_ranks):
        present_cost = None  # its ranks are no multiples, and there are some below them
    measured = partial(_measured, slot, highest) if measures and slot.weight else None
    if unit == 1:
        return Candidate(max_ranks, error, costs, dense_cost, present_cost, clamp, measured=measured)

    def attained(of: Callable[[Ranks], float]) -> Callable[[Ranks], Any]:
        return lambda ranks: of(clamp(ranks))

    # What a multiple attains next to others may be none, so that walks go over the multiples themselves.
    return Candidate(
        max_ranks, attained(error), [*map(attained, costs)], dense_cost, present_cost, multiple=unit, measured=measured
    )


def _measured(slot: Slot, highest: LayerSpec, ranks: Ranks) -> float:
    assert slot.weight is not None
    return highest.at(ranks).decompose(precise(slot.weight()))[1] ** 2


def _accurate(slot: Slot, rule: RelativeError) -> Choice:
    """Returns the cheapest ranks whose factors, in their dtype, are found to make the weight to within the error."""
    assert slot.weight is not None
    weight, highest = precise(slot.weight()), _highest(slot)
    slot = replace(slot, weight=lambda: weight)  # of a factorized layer it is costly
    last: list[Fit] = []

    def measured(ranks: Ranks) -> float:
        last[:] = [highest.at(ranks).decompose(weight, slot.dtype)]
        return last[0][1]

    ranks, error = within_error(_candidate(slot, rule, by_macs=False), rule.error, measured)
    if ranks is not None:
        return Choice(highest.at(ranks), fit=last[0])
    if error == math.inf:
        return Choice(None, reason=f"{rule}: {_dense_is_cheaper(rule)}")
    reached = f"{1.001 * error:.4g} at best in {str(slot.dtype).removeprefix('torch.')}"  # never below what it is
    return Choice(None, reason=f"{rule}: factors that are cheaper than dense reach {reached}")


def _error(slot: Slot) -> Callable[[Ranks], float]:
    """Returns a function from attained ranks to the squared relative error over all groups."""
    if slot.weight is None:
        full = math.prod(slot.method.max_ranks(slot.geometry.weight_shape))
        return lambda attained: 1 - math.prod(attained) / full
    check_finite(weight := slot.weight())
    whole = precise(weight)
    parts = (whole / scale_of(whole)).chunk(slot.geometry.groups)
    energies = [float(part.square().sum()) for part in parts]
    estimates = [slot.method.error_estimate(part) for part in parts]

    def error(attained: Ranks) -> float:
        lost = sum(energy * estimate(attained) for energy, estimate in zip(energies, estimates, strict=True))
        return lost / sum(energies) if sum(energies) > 0 else 0.0

    return error
