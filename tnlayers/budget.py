"""From a rank rule to explicit ranks for the layers that share it."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tnlayers.factorizations import Factorization, Slice
from tnlayers.geometry import NOMINAL_CALLS, Call, Geometry
from tnlayers.linalg import check_finite, precise, scale_of
from tnlayers.plan import Partition, partitions
from tnlayers.ranks import Candidate, MacsKept, RankRule, Ranks, RelativeError, allocate, within_error

__all__ = ["Choice", "Fit", "accurate", "candidate_of", "settle"]

Fit = tuple[dict[str, Tensor], float]
"""What `Factorization.decompose` returns: the parameters and their relative error."""


@dataclass(frozen=True)
class Choice:
    """What becomes of a layer.

    Attributes:
        method: with explicit ranks; None to leave the layer as it is.
        reason: why it is left.
        fit: its parameters, where they had to be made to know the rank.
    """

    method: Factorization | None
    reason: str = ""
    fit: Fit | None = None


def settle(
    factorization: Factorization,
    layers: Sequence[nn.Module],
    *,
    calls: Sequence[Sequence[Call]] | None = None,
    flat: bool = False,
    present: Ranks | None = None,
    dtype: torch.dtype | None = None,
) -> list[Choice]:
    """The factorization with explicit ranks for each layer, or none where dense is cheaper or the budget better spent elsewhere.

    A budget is shared out among all the layers. Under `MacsKept` a plan left to "auto" becomes the one with the fewest
    multiply-accumulates, since that is what was asked for.

    Args:
        factorization: the method; its rank may be a rule.
        layers: dense layers that it can replace.
        calls: how each layer is called; nominal by default.
        flat: whether all singular values count alike: for layers that are trained from scratch.
        present: the ranks that the layers have already; a rule goes no higher.
        dtype: of the factors, by default the layers' own.

    Raises:
        ValueError: a budget out of reach, or `RelativeError` without trained weights.
    """
    rule = factorization.rank
    if not isinstance(rule, RankRule):
        geometries = [Geometry(dense) for dense in layers]
        placed = _laid_out(factorization, geometries)
        return [
            Choice(own.with_rank(own.ranks(geometry.weight_shape)))
            for own, geometry in zip(placed, geometries, strict=True)
        ]
    if flat and isinstance(rule, RelativeError):
        raise ValueError(f"{rule} needs trained weights; from scratch give a rank, ParamsKept or MacsKept")
    used = calls or [NOMINAL_CALLS] * len(layers)
    by_macs = isinstance(rule, MacsKept)
    candidates = [
        candidate_of(factorization, dense, of_layer, by_macs=by_macs, flat=flat, present=present)
        for dense, of_layer in zip(layers, used, strict=True)
    ]
    if isinstance(rule, RelativeError):
        return [
            accurate(factorization, dense, candidate, rule, dtype)
            for dense, candidate in zip(layers, candidates, strict=True)
        ]
    elsewhere = Choice(None, f"{rule}: dense is cheaper or the budget is better spent elsewhere")
    return [
        elsewhere if ranks is None else Choice(_explicit(factorization, Geometry(dense), ranks, of_layer))
        for dense, ranks, of_layer in zip(layers, allocate(candidates, rule.fraction), used, strict=True)
    ]


def accurate(
    factorization: Factorization,
    dense: nn.Module,
    candidate: Candidate,
    rule: RelativeError,
    dtype: torch.dtype | None = None,
) -> Choice:
    """The cheapest ranks whose factors, in their dtype, are found to make the dense layer's weight to within the error."""
    weight, geometry = dense.weight, Geometry(dense)
    assert isinstance(weight, Tensor)
    number = dtype or weight.dtype
    last: list[Fit] = []

    def measured(ranks: Ranks) -> float:
        attained = factorization.clamp(geometry.weight_shape, ranks)
        last[:] = [factorization.decompose(precise(weight), attained, geometry.groups, number)]
        return last[0][1]

    ranks, error = within_error(candidate, rule.error, measured)
    if ranks is not None:
        return Choice(factorization.with_rank(factorization.clamp(geometry.weight_shape, ranks)), fit=last[0])
    if error == math.inf:
        return Choice(None, f"{rule}: dense is cheaper")
    reached = f"{1.001 * error:.4g} at best in {str(number).removeprefix('torch.')}"  # never below what it is
    return Choice(None, f"{rule}: factors that are cheaper than dense reach {reached}")


def _laid_out(factorization: Factorization, geometries: Sequence[Geometry]) -> list[Factorization]:
    """Layers with a generator in common take its entries one after the other."""
    name = factorization.joint
    if not name or isinstance(name, Slice):
        return [factorization for _ in geometries]
    ends = list(itertools.accumulate(geometry.num_params for geometry in geometries))
    return [
        factorization.with_joint(Slice(name, end - geometry.num_params, ends[-1], max(geometry.fan_in, 1) ** -0.5))
        for end, geometry in zip(ends, geometries, strict=True)
    ]


def _explicit(factorization: Factorization, geometry: Geometry, ranks: Ranks, calls: Sequence[Call]) -> Factorization:
    attained = factorization.clamp(geometry.weight_shape, ranks)
    explicit = factorization.with_rank(attained)
    if isinstance(factorization.rank, MacsKept) and explicit.plan == "auto":
        explicit = replace(explicit, plan=geometry.fewest_macs(explicit, attained, calls))
    return explicit


def candidate_of(
    factorization: Factorization,
    dense: nn.Module,
    calls: Sequence[Call],
    *,
    by_macs: bool,
    flat: bool = False,
    present: Ranks | None = None,
) -> Candidate:
    """What the rank rules need to know of one dense layer; ranks that hold each other down count as what they attain.

    If it stands for a factorized one, that has the ranks `present`: they are the most, and what leaving it costs.
    """
    geometry = Geometry(dense)
    network, shape = geometry.network(factorization), geometry.weight_shape

    def sizes(ranks: Ranks) -> dict[str, int]:
        return geometry.sizes(factorization, factorization.clamp(shape, ranks))

    def macs_of(groups: Partition) -> Callable[[Ranks], int]:
        return lambda ranks: geometry.network_macs(network, sizes(ranks), groups, calls)

    max_ranks = present or factorization.max_ranks(shape)
    error = _flat_error(factorization, shape) if flat else _error(factorization, dense, geometry)
    costs: list[Callable[[Ranks], int]] = [lambda ranks: network.num_params(sizes(ranks))]
    dense_cost = geometry.num_params
    if by_macs:
        costs = [macs_of(groups) for groups in partitions(tuple(network.factors))]
        dense_cost = geometry.macs(calls)
    present_cost = min(cost(present) for cost in costs) if present else dense_cost
    return Candidate(max_ranks, error, costs, dense_cost, present_cost)


def _flat_error(factorization: Factorization, shape: tuple[int, ...]) -> Callable[[Ranks], float]:
    full = math.prod(factorization.max_ranks(shape))
    return lambda ranks: 1 - math.prod(factorization.clamp(shape, ranks)) / full


def _error(factorization: Factorization, dense: nn.Module, geometry: Geometry) -> Callable[[Ranks], float]:
    """Ranks -> the squared relative error over all groups."""
    weight = dense.weight
    assert isinstance(weight, Tensor)
    check_finite(weight)
    whole = precise(weight)
    parts = (whole / scale_of(whole)).chunk(geometry.groups)
    energies = [float(part.square().sum()) for part in parts]
    estimates = [factorization.error_estimate(part) for part in parts]

    def error(ranks: Ranks) -> float:
        attained = factorization.clamp(geometry.weight_shape, ranks)
        lost = sum(energy * estimate(attained) for energy, estimate in zip(energies, estimates, strict=True))
        return lost / sum(energies) if sum(energies) > 0 else 0.0

    return error
