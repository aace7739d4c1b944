"""Rank rules: budgets are met and spent well, against brute force on small cases."""

import itertools
import math

import pytest

from tnlayers import MacsKept, ParamsKept, RelativeError
from tnlayers.ranks import Candidate, allocate, check_rank, within_error


def candidate(decay: float, size: int, cost: int, norm: float = 1.0) -> Candidate:
    """A layer with one bond whose energies fall geometrically; rank r costs `cost * r`, dense `cost * size`."""
    energies = [norm * decay**n for n in range(size)]
    total = sum(energies)
    return Candidate(
        (size,),
        lambda ranks: sum(energies[ranks[0] :]) / total,
        [lambda ranks: cost * ranks[0]],
        dense_cost=cost * size,
        present_cost=cost * size,
    )


def loss(candidates: list[Candidate], chosen: tuple[tuple[int, ...] | None, ...]) -> float:
    return sum(-math.log1p(-item.error(ranks)) if ranks else 0 for item, ranks in zip(candidates, chosen, strict=True))


def cost(candidates: list[Candidate], chosen: tuple[tuple[int, ...] | None, ...]) -> int:
    return sum(
        item.costs[0](ranks) if ranks else item.dense_cost for item, ranks in zip(candidates, chosen, strict=True)
    )


@pytest.mark.parametrize("fraction", [0.2, 0.4, 0.6, 0.9])
def test_allocation_is_near_the_best_there_is(fraction: float) -> None:
    candidates = [candidate(0.5, 6, 10), candidate(0.9, 7, 3), candidate(0.8, 5, 25)]
    budget = fraction * sum(item.dense_cost for item in candidates)
    options = [[*((rank,) for rank in range(1, item.max_ranks[0])), None] for item in candidates]
    feasible = [chosen for chosen in itertools.product(*options) if cost(candidates, chosen) <= budget]
    best = min(loss(candidates, chosen) for chosen in feasible)
    chosen = tuple(allocate(candidates, fraction))
    assert cost(candidates, chosen) <= budget
    assert loss(candidates, chosen) <= 1.25 * best + 1e-9


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.7])
def test_a_budget_is_used_to_within_a_percent(fraction: float) -> None:
    candidates = [candidate(decay, 200, size) for decay, size in [(0.9, 40), (0.99, 10), (0.95, 70), (0.97, 25)]]
    dense = sum(item.dense_cost for item in candidates)
    spent = cost(candidates, tuple(allocate(candidates, fraction)))
    assert 0.99 * fraction <= spent / dense <= fraction


def test_a_layer_whose_factors_cost_more_stays_dense() -> None:
    useless = Candidate((3,), lambda ranks: 0.1, [lambda ranks: 100 * ranks[0]], 90, 90)
    assert allocate([useless, candidate(0.5, 6, 10)], 1.0)[0] is None


def test_a_budget_out_of_reach_says_what_is_in_reach() -> None:
    with pytest.raises(ValueError, match=r"a fraction of 0.01 cannot be reached: rank 1 in every layer keeps 0.167"):
        allocate([candidate(0.5, 6, 10)], 0.01)


def test_no_layer_is_emptied_for_the_others() -> None:
    """A sum of squared errors would let one layer lose nearly everything, since an error is never above 1."""
    flat = [candidate(0.99, 50, 10) for _ in range(4)] + [candidate(0.99, 50, 40)]
    chosen = allocate(flat, 0.3)
    assert all(item.error(ranks) < 0.9 for item, ranks in zip(flat, chosen, strict=True) if ranks)


@pytest.mark.parametrize("error", [0.5, 0.1, 0.01])
def test_the_cheapest_ranks_within_an_error(error: float) -> None:
    item = candidate(0.5, 20, 10)
    ranks = within_error(item, error)
    assert ranks is not None
    assert item.error(ranks) <= error**2 < item.error((ranks[0] - 1,))


def test_an_error_that_no_cheaper_rank_meets_leaves_the_layer_dense() -> None:
    assert within_error(candidate(0.99, 5, 10), 1e-9) is None


@pytest.mark.parametrize("rule", [ParamsKept, MacsKept, RelativeError])
@pytest.mark.parametrize("value", [0, -0.1, 1.5, True, "half", None])
def test_bad_fractions_are_named(rule: type, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{rule.__name__}\({value!r}\): expected a number above 0 and at most 1"):
        rule(value)


def test_ranks_are_ints_tuples_or_rules() -> None:
    assert check_rank(3) == 3
    assert check_rank([3, 4]) == (3, 4)
    assert check_rank(MacsKept(0.5)) == MacsKept(0.5)
