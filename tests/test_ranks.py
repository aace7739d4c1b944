"""Rank rules: budgets are met and spent well, against brute force on small cases; an error that is promised is kept."""

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.cases import CASES, Case
from tnlayers import (
    MPS,
    FactorizedLayer,
    LayerSpec,
    MacsKept,
    MPSConv2d,
    ParamsKept,
    RelativeError,
    Rule,
    Tucker,
    TuckerConv2d,
    resolve,
    resolve_truncation,
    tensorize,
    truncate,
)
from tnlayers.allocation import Candidate, within_error
from tnlayers.allocation import allocate as allocate_any
from tnlayers.geometry import Geometry
from tnlayers.ranks import check_rank


def allocate(candidates: list[Candidate], fraction: float) -> list[tuple[int, ...] | None]:
    """For layers that may become one thing each."""
    return [found and found[1] for found in allocate_any([[each] for each in candidates], fraction)]


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
    ranks, found = within_error(item, error, lambda ranks: item.error(ranks) ** 0.5)
    assert ranks is not None
    assert found**2 == pytest.approx(item.error(ranks))
    assert item.error(ranks) <= error**2 < item.error((ranks[0] - 1,))


def test_an_error_that_no_cheaper_rank_meets_leaves_the_layer_dense() -> None:
    assert within_error(candidate(0.99, 5, 10), 1e-9, lambda ranks: 0.0) == (None, math.inf)


@pytest.mark.parametrize("rounding", [0.0, 0.3, 0.7, 0.95, 1.0, 5.0])
def test_rounding_is_measured_seldom_and_counted(rounding: float) -> None:
    """Found wherever there are such ranks; the estimate of the first is met, the rest is rounding."""
    item, error, asked = candidate(0.8, 60, 10), 0.05, []

    def measured(ranks: tuple[int, ...]) -> float:
        asked.append(ranks)
        return math.hypot(item.error(ranks) ** 0.5, rounding * error)

    ranks, found = within_error(item, error, measured)
    assert (ranks is None) == (rounding >= 1)
    assert (found <= error) == (rounding < 1)
    assert found == min(map(measured, asked[:]))
    assert len(asked) // 2 <= 4


@pytest.mark.parametrize("rule", [ParamsKept, MacsKept, RelativeError])
@pytest.mark.parametrize("value", [0, -0.1, 1.5, True, "half", None])
def test_bad_fractions_are_named(rule: type, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{rule.__name__}\({value!r}\): expected a number above 0 and at most 1"):
        rule(value)


def test_ranks_are_ints_tuples_or_rules() -> None:
    assert check_rank(3) == 3
    assert check_rank([3, 4]) == (3, 4)
    assert check_rank(MacsKept(0.5)) == MacsKept(0.5)


# ---- what RelativeError promises

EXACT_CASES = [case for case in CASES if case.exact]
LARGEST = {torch.float64: 1e200, torch.float32: 1e37, torch.bfloat16: 1e37, torch.float16: 2e4}
SMALLEST = {torch.float64: 1e-200, torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float16: 1e-3}


def difference(before: Tensor, after: Tensor) -> float:
    """||W - W~|| / ||W|| in plain float64, of weights whose squares may leave its range."""
    scale = before.abs().max().clamp(min=5e-324)
    return float(((before - after) / scale).norm() / (before / scale).norm().clamp(min=5e-324))


def made(layer: FactorizedLayer) -> Tensor:
    """What the factors, as they are in their dtype, make in float64."""
    factors = {name: factor.detach().double() for name, factor in layer.factors.items()}
    return layer.spec.network.reconstruct(layer.spec.method.factors(factors, {}))


def drawn(case: Case, dtype: torch.dtype) -> nn.Module:
    """A dense layer whose weight is random, of decaying spectrum, exactly or nearly of low rank, or zero; of any size."""
    dense = case.dense(groups=random.choice([1, 1, 2, 4])) if case.is_conv else case.dense()
    weight = dense.weight
    assert isinstance(weight, Tensor)
    low = case.convert(dense, random.randint(1, 3)).weight.detach()
    decay = torch.logspace(0, -random.choice([2, 6, 14]), len(weight)).reshape(-1, *[1] * (weight.dim() - 1))
    noise = weight.detach() * 10 ** random.uniform(-12, -2)
    with torch.no_grad():
        weight.copy_(random.choice([weight, weight * decay, low, low, low + noise, low + noise, 0 * weight]))
        size = random.choice([1.0, 1.0, 0.01, LARGEST[dtype], SMALLEST[dtype]])
        weight.mul_(size / weight.abs().max().clamp(min=1e-30))
    return dense.to(dtype)


@pytest.mark.parametrize("case", EXACT_CASES, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:.*above what a weight")
def test_the_relative_error_of_the_layer_as_it_is_then_is_kept(case: Case) -> None:
    """Whichever way a layer is made or truncated; where none can be, that is said."""
    converted = truncated = 0
    random.seed(case.name)
    for _ in range(20):
        dtype = random.choice(list(LARGEST))
        lowest = math.log10(4 * torch.finfo(dtype).eps)
        dense, error = drawn(case, dtype), 10 ** random.uniform(random.choice([-13, lowest]), -0.05)
        assert isinstance(dense.weight, Tensor)
        weight, method = Geometry.of(dense).exchanged(dense.weight.detach().double()), case.method(RelativeError(error))
        net = nn.Sequential(dense)
        rules = [Rule("0", method)]
        (resolved,) = resolve(net, rules)
        tensorize(net, random.choice([rules, [resolved]]))
        layer = net[0]
        if isinstance(layer, FactorizedLayer):
            assert difference(weight, made(layer)) <= error
            assert layer.decomposition_error == pytest.approx(difference(weight, made(layer)), rel=1e-6, abs=1e-14)
            assert layer.spec == case.convert(dense, RelativeError(error)).spec
            converted += 1
        else:
            assert f"{error!r}" in resolved.reason
            assert "cheaper" in resolved.reason
            with pytest.raises(ValueError, match=r"is cheaper than the dense .*leave it dense \(RelativeError"):
                case.convert(dense, RelativeError(error))
            layer = case.convert(dense, random.choice([2, 4, 8]))
        before, error, net = (
            made(layer),
            10 ** random.uniform(random.choice([-13, -0.5, -0.2]), -0.05),
            nn.Sequential(layer),
        )
        if random.random() < 0.5:
            lost = layer.truncate(RelativeError(error))
        else:
            lost = truncate(net, resolve_truncation(net, RelativeError(error))).get("0", 0.0)
        found = difference(before, made(layer))
        assert found <= error
        assert lost == pytest.approx(found, rel=1e-6, abs=1e-14)
        truncated += found > 0
    assert converted >= 1
    assert truncated >= 1


@pytest.mark.parametrize("error", [0.02, 0.005, 0.001])
def test_rounding_to_bfloat16_counts(error: float) -> None:
    """Asked 0.005 it was 0.0057, and asked 0.001 it was 0.0028."""
    dense = nn.Conv2d(32, 32, 3)
    with torch.no_grad():
        dense.weight.mul_(torch.logspace(0, -4, 32).reshape(-1, 1, 1, 1)).copy_(
            TuckerConv2d.from_dense(dense, rank=(12, 8)).weight
        )
    dense = dense.bfloat16()
    if error > 0.003:
        layer = TuckerConv2d.from_dense(dense, rank=RelativeError(error))
        assert difference(dense.weight.detach().double(), made(layer)) <= error
        return
    with pytest.raises(ValueError, match=r"reach 0\.00\d+ at best in bfloat16") as said:
        TuckerConv2d.from_dense(dense, rank=RelativeError(error))
    reached = float(str(said.value).split("reach ")[1].split()[0])
    TuckerConv2d.from_dense(dense, rank=RelativeError(reached))
    (resolved,) = resolve(nn.Sequential(dense), [Rule("0", Tucker(RelativeError(error)))])
    assert "at best in bfloat16" in resolved.reason


@pytest.mark.parametrize("error", [1e-9, 1e-12, 1e-13])
def test_small_errors_are_no_noise(error: float) -> None:
    """A kernel of rank (30, 4, 1) is found to be one; with what is missing to 1e-9 it needs more."""
    exact = MPSConv2d(40, 16, (8, 4), rank=(30, 4, 1), dtype=torch.float64).to_dense()
    weight = exact.weight.detach().clone()
    assert MPSConv2d.from_dense(exact, rank=RelativeError(error)).rank == (30, 4, 1)
    with torch.no_grad():
        exact.weight.add_(5e-9 * weight.norm() / weight.numel() ** 0.5 * torch.randn_like(weight))
    net = tensorize(nn.Sequential(exact), [Rule("0", MPS(RelativeError(1e-8)))])
    assert isinstance(net[0], FactorizedLayer)
    assert net[0].decomposition_error is not None
    assert 1e-9 < net[0].decomposition_error <= 1e-8
    with pytest.raises(ValueError, match="dense is cheaper"):
        MPSConv2d.from_dense(exact, rank=RelativeError(1e-9))


def test_one_decomposition_tells_the_rank_and_makes_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[tuple[int, ...]] = []
    decompose: Callable[..., object] = LayerSpec.decompose

    def counted(self: LayerSpec, *given: object) -> object:
        fits.append(self.ranks)
        return decompose(self, *given)

    dense = TuckerConv2d(16, 16, 3, rank=4).to_dense()
    monkeypatch.setattr(LayerSpec, "decompose", counted)
    tensorize(nn.Sequential(dense), [Rule("0", Tucker(RelativeError(0.1)))])
    layer = TuckerConv2d.from_dense(dense, rank=RelativeError(0.1))
    assert len(fits) == 2
    layer.truncate(RelativeError(0.5))
    assert len(fits) == 3
