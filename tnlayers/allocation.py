"""Sharing out a budget: from errors and costs to integer ranks. Pure functions; no weights, no layers.

A layer enters as one `Candidate` or several, for each method that it may be factorized by: two functions of its ranks, the error
and the cost.
"""

import math
import operator
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

from tnlayers.errors import UserError
from tnlayers.ranks import Ranks

__all__ = ["Candidate", "Outside", "allocate", "within_error"]


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
        measured: ranks -> the squared relative error that they really give, where `error` alone is no fair comparison with
            other candidates for the same layer; costly, and asked a few times.
    """

    max_ranks: Ranks
    error: Callable[[Ranks], float]
    costs: Sequence[Callable[[Ranks], int]]
    dense_cost: int
    present_cost: int | None
    clamp: Callable[[Ranks], Ranks] = tuple
    multiple: int = 1
    measured: Callable[[Ranks], float] | None = None


@dataclass(frozen=True)
class _Point:
    """A choice for one layer: its ranks (None: left as it is), what it costs, its squared relative error, whose candidate it is."""

    ranks: Ranks | None
    cost: int
    error: float
    candidate: int = 0

    @property
    def loss(self) -> float:
        """-log of the fraction of the squared norm that is kept: summed over the layers, what a signal loses on its way.

        For small errors it is the squared error itself; unlike that it lets no layer be emptied for the others.
        """
        return -math.log1p(-min(self.error, 1 - 1e-12))


# Enough steps to meet a budget within a fraction of a percent, few enough for a net of wide layers.
_STEPS = 128
_MEASURED = 4  # choices of a layer, between which what is measured over what was estimated is interpolated
_LEAST = 1e-12  # squared error that counts
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


def _frontier(candidates: Sequence[Candidate]) -> list[_Point]:
    """Returns a layer as it is and the choices that cost less, cheapest first; each dearer one has a smaller error."""
    found: list[_Point] = []
    for number, candidate in enumerate(candidates):
        points = _points(candidate)
        if candidate.present_cost is not None:
            points = [point for point in points if point.cost < candidate.present_cost]
        if candidate.measured:
            points = _corrected(_lower(points), candidate.measured)
        found += [replace(point, candidate=number) for point in points]
    present = [candidate.present_cost for candidate in candidates if candidate.present_cost is not None]
    return _lower([*found, *(_Point(None, cost, 0.0) for cost in present[:1])])


def _lower(points: Sequence[_Point]) -> list[_Point]:
    """Returns those of which none that costs as little has as small an error."""
    lower: list[_Point] = []
    for point in sorted(points, key=lambda point: (point.cost, point.error)):
        if not lower or point.error < lower[-1].error:
            lower.append(point)
    return lower


def _corrected(points: Sequence[_Point], measured: Callable[[Ranks], float]) -> list[_Point]:
    """Multiplies the estimated errors by what is measured over them at some of the costs, and interpolated between these.

    The costs are spread evenly in their logarithm, but for the least, at which hardly anything is kept.
    """
    costs = [math.log(max(point.cost, 1)) for point in points]
    ends = (costs[0], costs[-1]) if costs else (0.0, 0.0)
    wanted = [ends[0] + (ends[1] - ends[0]) * step / _MEASURED for step in range(1, _MEASURED + 1)]
    places = sorted({min(range(len(costs)), key=lambda place: abs(costs[place] - at)) for at in wanted if costs})
    known: list[tuple[float, float]] = []
    for place in places:
        ranks, error = points[place].ranks, points[place].error
        assert ranks is not None
        known.append((costs[place], math.log(max(measured(ranks), _LEAST) / max(error, _LEAST))))
    return [
        replace(point, error=min(point.error * math.exp(_interpolated(known, cost)), 1.0))
        for point, cost in zip(points, costs, strict=True)
    ]


def _interpolated(known: Sequence[tuple[float, float]], at: float) -> float:
    """Returns the value at a place between known ones, or that of the nearest outside of them."""
    for (low, first), (high, second) in pairwise(known):
        if low <= at <= high:
            return first + (second - first) * (at - low) / (high - low)
    return known[0][1] if at < known[0][0] else known[-1][1]


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


def allocate(
    layers: Sequence[Sequence[Candidate]], fraction: float, outside: Outside | None = None
) -> list[tuple[int, Ranks] | None]:
    """Chooses a candidate and its ranks for every layer (None: better left as it is), at most `fraction` of the dense layers together.

    Minimises the sum of the layers' losses (-log of the squared norm kept): from the cheapest choices upward, always the step that
    lowers the error most for what it costs (exact on the convex hull), then the finer steps that still fit.

    Args:
        layers: for each layer what it may become.
        fraction: of what the dense layers cost, or the whole dense model.
        outside: the rest of the model, if the fraction is one of the whole model.

    Raises:
        ValueError: the lowest ranks everywhere already cost more.
    """
    rest = outside or Outside()
    dense = rest.dense + sum(candidates[0].dense_cost for candidates in layers)
    budget = fraction * dense - rest.present
    frontiers = [_frontier(candidates) for candidates in layers]
    chosen = [0] * len(frontiers)
    spent = sum(frontier[0].cost for frontier in frontiers)
    if spent > budget:
        least = (rest.present + spent) / dense
        fixed = f"; what no such rule may touch is already {rest.present / dense:.1%} of the model" if outside else ""
        multiples = {candidate.multiple for candidates in layers for candidate in candidates} - {1}
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
    points = [frontier[place] for frontier, place in zip(frontiers, chosen, strict=True)]
    return [None if point.ranks is None else (point.candidate, point.ranks) for point in points]


def within_error(candidate: Candidate, error: float, measured: Callable[[Ranks], float]) -> tuple[Ranks | None, float]:
    """Finds the cheapest ranks whose relative error is at most `error`; None if the layer as it is costs less.

    Args:
        candidate: the layer; its estimates say what is worth measuring.
        error: the largest relative error.
        measured: ranks -> the relative error of what they really give; costly, and asked as seldom as possible.

    Returns:
        The ranks and their measured error; with None the smallest one that was measured, infinite if none was.
    """
    rest = [point for point in _frontier([candidate]) if point.ranks is not None]
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
