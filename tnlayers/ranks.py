"""Rank rules: from spectra and sizes to integers. Pure functions; no weights, no layers.

A layer enters as a `Candidate`: two functions of its ranks, the error and the cost.
"""

import math
import operator
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import pairwise, product
from typing import Any, Literal

from tnlayers.errors import UserError

__all__ = [
    "Candidate",
    "MacsKept",
    "Of",
    "Outside",
    "ParamsKept",
    "Rank",
    "RankRule",
    "Ranks",
    "RelativeError",
    "allocate",
    "check_multiple",
    "check_rank",
    "within_error",
]

Ranks = tuple[int, ...]
Of = Literal["rule", "model"]


@dataclass(frozen=True)
class _Rule:
    """A rank that is decided by one number, the first field; the last one is what the ranks are multiples of.

    With `multiple=8` every bond is a multiple of 8, except one that is at the highest rank which the weight's shape attains: that
    need not be a multiple. A layer stays dense where no such ranks are cheaper, and as it is where its ranks are below them.
    """

    def __post_init__(self) -> None:
        value, *_, multiple = astuple(self)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise UserError(f"{type(self).__name__}({value!r}): expected a number above 0 and at most 1")
        check_multiple(type(self).__name__, value, multiple)

    def __str__(self) -> str:
        (_, first), *others = ((field, getattr(self, field.name)) for field in fields(self))
        said = [repr(first), *(f"{field.name}={value}" for field, value in others if value != field.default)]
        return f"{type(self).__name__}({', '.join(said)})"


@dataclass(frozen=True)
class _Budget(_Rule):
    """A fraction to keep, of what a rule takes or of the whole model.

    Of the model, everything that no rule takes counts as kept, and so do the layers of other rules at what they come to cost;
    all rules with such a budget share it.
    """

    fraction: float
    of: Of = "rule"
    multiple: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of not in ("rule", "model"):
            raise UserError(
                f"{type(self).__name__}({self.fraction!r}, of={self.of!r}): expected of='rule' or of='model'"
            )


@dataclass(frozen=True)
class ParamsKept(_Budget):
    """Keep this fraction of the weights' parameters (not the biases) of all layers that the rule matches, shared out well.

    With of="model" it is a fraction of all parameters of the model. With multiple=8 the ranks are multiples of 8, except those
    at the highest rank that the weight's shape attains; the budget is then met as nearly as such ranks allow, from below.
    """


@dataclass(frozen=True)
class MacsKept(_Budget):
    """Keep this fraction of the multiply-accumulates of all layers that the rule matches, shared out where they matter most.

    With of="model" it is a fraction of all that the model's forward does. With multiple=8 the ranks are multiples of 8, except
    those at the highest rank that the weight's shape attains; the budget is then met as nearly as such ranks allow, from below.
    """


@dataclass(frozen=True)
class RelativeError(_Rule):
    """In every layer the cheapest ranks found whose ||W - W~||_F / ||W||_F is at most this, measured on the factors in their dtype.

    With multiple=8 only ranks that are multiples of 8, or the highest that the weight's shape attains, are looked for.
    """

    error: float
    multiple: int = 1


RankRule = ParamsKept | MacsKept | RelativeError
Rank = int | Sequence[int] | RankRule


def check_multiple(rule: str, value: object, multiple: object) -> None:
    """Refuses what ranks cannot be multiples of; the name and the number of the rule that has it are for the message.

    Raises:
        UserError: it is no int of at least 1.
    """
    if type(multiple) is not int or multiple < 1:
        raise UserError(f"{rule}({value!r}, multiple={multiple!r}): expected an int of at least 1, such as multiple=8")


def check_rank(rank: object) -> int | Ranks | RankRule:
    """Returns the rank as an int, a tuple of ints or a rule.

    Raises:
        ValueError: anything else; for a bare float the message says which rules it could have meant.
    """
    if isinstance(rank, RankRule):
        return rank
    if isinstance(rank, float):
        raise UserError(
            f"rank {rank!r} is a bare float; say what it is a fraction of: ParamsKept({rank!r}), MacsKept({rank!r}) "
            f"or RelativeError({rank!r})"
        )
    try:
        given: tuple[Any, ...] = tuple(rank) if isinstance(rank, (list, tuple)) else (rank,)
        ranks = tuple(operator.index(value) for value in given if not isinstance(value, bool))
    except TypeError:
        ranks = ()
    if not ranks or len(ranks) < len(given):
        raise UserError(f"rank {rank!r}: expected an int, a tuple of ints, ParamsKept, MacsKept or RelativeError")
    if min(ranks) < 1:
        raise UserError(f"rank {rank!r}: every rank must be at least 1")
    return ranks if isinstance(rank, (list, tuple)) else ranks[0]


@dataclass(frozen=True)
class Candidate:
    """A layer whose ranks are to be chosen.

    Attributes:
        max_ranks: the highest ranks that it may have, 0 for one that may have none; lower ones are multiples of `multiple`.
        error: ranks -> the squared relative error, or a tight estimate of it.
        costs: for each way of computing the layer: ranks -> parameters or multiply-accumulates.
        dense_cost: what the dense layer costs; budgets are fractions of it.
        present_cost: what the layer costs if it is left as it is, for it may be factorized already; None if it may not stay so.
        clamp: ranks -> those that `error` and `costs` are asked of: each at most what is attainable next to the others.
        multiple: what its ranks are multiples of, where they are below `max_ranks`.
    """

    max_ranks: Ranks
    error: Callable[[Ranks], float]
    costs: Sequence[Callable[[Ranks], int]]
    dense_cost: int
    present_cost: int | None
    clamp: Callable[[Ranks], Ranks] = tuple
    multiple: int = 1


@dataclass(frozen=True)
class _Point:
    """A choice for one layer: its ranks (None: left as it is), what it costs, and its squared relative error."""

    ranks: Ranks | None
    cost: int
    error: float

    @property
    def loss(self) -> float:
        """-log of the fraction of the squared norm that is kept: summed over the layers, what a signal loses on its way.

        For small errors it is the squared error itself; unlike that it lets no layer be emptied for the others.
        """
        return -math.log1p(-min(self.error, 1 - 1e-12))


# Enough steps to meet a budget within a fraction of a percent, few enough for a net of wide layers.
_STEPS = 128
_FEW = 512  # choices of ranks, all of which take no longer to look at than a path through those of a wide layer


def _path(candidate: Candidate, cost: Callable[[Ranks], int]) -> list[_Point]:
    """Goes from the highest ranks down, each step lowering the bond that loses the least for what it saves, until nothing saves."""
    unit = candidate.multiple
    steps = [unit * max(1, rank // (unit * _STEPS)) for rank in candidate.max_ranks]

    def point(ranks: Ranks) -> _Point:
        return _Point(ranks, cost(ranks), candidate.error(ranks))

    def lowered(ranks: Ranks, bond: int) -> Ranks:
        """Other bonds go down with it where they would be above what they then attain."""
        new = max(1, math.ceil((ranks[bond] - steps[bond]) / unit)) * unit
        return candidate.clamp((*ranks[:bond], new, *ranks[bond + 1 :]))

    def loss(new: _Point, old: _Point) -> tuple[float, float]:
        lost, saved = new.error - old.error, old.cost - new.cost
        if saved > 0:
            return lost / saved, new.error
        return 0.0 if lost <= 0 else math.inf, new.error

    ranks = candidate.max_ranks
    path = [point(ranks)]
    while max(ranks) > unit:
        options = {lowered(ranks, bond) for bond, rank in enumerate(ranks) if rank > unit}
        rate, best = min(
            ((loss(new, path[-1]), new) for new in map(point, sorted(options))), key=operator.itemgetter(0)
        )
        if rate[0] == math.inf:
            break
        path.append(best)
        ranks = best.ranks or ranks
    return path


def _points(candidate: Candidate) -> list[_Point]:
    """Returns choices of ranks: all there are where multiples leave few, or else paths through them."""
    unit = candidate.multiple
    below = [[*range(unit, rank, unit), *([rank] if rank else [])] for rank in candidate.max_ranks]
    if unit > 1 and math.prod(map(len, below)) <= _FEW:  # none where a rank is 0
        return [
            _Point(ranks, min(cost(ranks) for cost in candidate.costs), candidate.error(ranks))
            for ranks in product(*below)
        ]
    return [point for cost in candidate.costs for point in _path(candidate, cost)]


def _frontier(candidate: Candidate) -> list[_Point]:
    """Returns the layer as it is and the choices that cost less, cheapest first; each dearer one has a smaller error."""
    found = _points(candidate)
    if candidate.present_cost is not None:
        present = _Point(None, candidate.present_cost, 0.0)
        found = [*(point for point in found if point.cost < present.cost), present]
    frontier: list[_Point] = []
    for point in sorted(found, key=lambda point: (point.cost, point.error)):
        if not frontier or point.error < frontier[-1].error:
            frontier.append(point)
    return frontier


def _hull(frontier: list[_Point]) -> list[int]:
    """Returns the places of the frontier's lower convex hull: there the error falls fastest for what it costs."""
    hull: list[int] = []
    for place, point in enumerate(frontier):
        while len(hull) >= 2:
            first, second = frontier[hull[-2]], frontier[hull[-1]]
            if (second.loss - first.loss) * (point.cost - first.cost) < (point.loss - first.loss) * (
                second.cost - first.cost
            ):
                break
            hull.pop()
        hull.append(place)
    return hull


@dataclass(frozen=True)
class Outside:
    """What a budget of the whole model counts beside the layers that share it.

    Attributes:
        present: what it costs and keeps costing.
        dense: what it costs in the dense model.
    """

    present: int = 0
    dense: int = 0


def allocate(candidates: Sequence[Candidate], fraction: float, outside: Outside | None = None) -> list[Ranks | None]:
    """Chooses the ranks of every layer (None: better left as it is), which together cost at most `fraction` of the dense layers.

    Minimises the sum of the layers' losses (-log of the squared norm kept): from the cheapest choices upward, always the step that
    lowers the error most for what it costs (exact on the convex hull), then the finer steps that still fit.

    Args:
        candidates: the layers.
        fraction: of what the dense layers cost, or the whole dense model.
        outside: the rest of the model, if the fraction is one of the whole model.

    Raises:
        ValueError: the lowest ranks everywhere already cost more.
    """
    rest = outside or Outside()
    dense = rest.dense + sum(candidate.dense_cost for candidate in candidates)
    budget = fraction * dense - rest.present
    frontiers = [_frontier(candidate) for candidate in candidates]
    chosen = [0] * len(frontiers)
    spent = sum(frontier[0].cost for frontier in frontiers)
    if spent > budget:
        least = (rest.present + spent) / dense
        fixed = f"; what no such rule may touch is already {rest.present / dense:.1%} of the model" if outside else ""
        multiples = {candidate.multiple for candidate in candidates} - {1}
        lowest = (
            f"the lowest multiples of {max(multiples)} in every layer keep"
            if multiples
            else "rank 1 in every layer keeps"
        )
        raise UserError(
            f"a fraction of {fraction:g} cannot be reached: {lowest} {least:.3g} of "
            f"{'the whole model' if outside else 'these layers'}{fixed}; ask for more"
        )
    upgrades = []
    for layer, frontier in enumerate(frontiers):
        hull = _hull(frontier)
        for low, high in pairwise(hull):
            gain = (frontier[low].loss - frontier[high].loss) / (frontier[high].cost - frontier[low].cost)
            upgrades.append((-gain, layer, high))
    for _, layer, high in sorted(upgrades):
        frontier, place = frontiers[layer], chosen[layer]
        spare = budget - (spent - frontier[place].cost)
        costs = [point.cost for point in frontier]
        reached = min(high, bisect_left(costs, math.floor(spare) + 1) - 1)
        if reached > place:
            spent += frontier[reached].cost - frontier[place].cost
            chosen[layer] = reached
    return [frontier[place].ranks for frontier, place in zip(frontiers, chosen, strict=True)]


def within_error(candidate: Candidate, error: float, measured: Callable[[Ranks], float]) -> tuple[Ranks | None, float]:
    """Finds the cheapest ranks whose relative error is at most `error`; None if the layer as it is costs less.

    Args:
        candidate: the layer; its estimates say what is worth measuring.
        error: the largest relative error.
        measured: ranks -> the relative error of what they really give; costly, and asked as seldom as possible.

    Returns:
        The ranks and their measured error; with None the smallest one that was measured, infinite if none was.
    """
    rest = [point for point in _frontier(candidate) if point.ranks is not None]
    allowed, least = error**2, math.inf
    while fitting := [point for point in rest if point.error <= allowed]:
        point, *rest = fitting
        assert point.ranks is not None
        found = measured(point.ranks)
        if found <= error:
            return point.ranks, found
        least = min(least, found)
        if rest:  # what it is above its estimate is mostly rounding, which is much the same at the next ranks
            excess = found**2 - error**2
            allowed = max(min(point.error - excess, point.error / 2), rest[-1].error)
    return None, least
