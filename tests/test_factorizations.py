"""Decompositions against the bounds of the SVD, on weights that break the careless."""

import itertools
import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tensorly
import torch
from torch import Tensor, nn

from tests.cases import CASES
from tnlayers import (
    CP,
    MPS,
    BlockTerm,
    CPConv2d,
    CPMatrix,
    Factorization,
    LayerSpec,
    Rule,
    TensorRing,
    TTConv,
    Tucker,
    TuckerMatrix,
    UserError,
    tensorize,
    to_chains,
)
from tnlayers.geometry import Geometry
from tnlayers.linalg import left_singular_vectors, singular_values, unfold
from tnlayers.methods import cp

SHAPES = {"conv": (12, 8, 3, 2), "pointwise": (7, 5, 1, 1), "prime": (11, 13, 3, 3), "thin": (2, 16, 3, 3)}


def weights(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """One weight of each kind that decompositions meet."""
    generic = torch.randn(shape, dtype=torch.float64)
    low = torch.einsum("or,ri->oi", torch.randn(shape[0], 2).double(), torch.randn(2, math.prod(shape[1:])).double())
    scales = torch.logspace(0, -12, shape[0], dtype=torch.float64)
    return {
        "generic": generic,
        "rank deficient": low.reshape(shape),
        "zero": torch.zeros_like(generic),
        "ill-conditioned": generic * scales.reshape(-1, *(1 for _ in shape[1:])),
        "tiny": 1e-30 * generic,
    }


METHODS = {case.name: case.method(1) for case in CASES if case.exact}
UNCUT = (CP, BlockTerm, TensorRing)
"""Of these a bond is a hyperedge, or part of a loop."""
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def shape_for(method: Factorization, name: str) -> tuple[int, ...]:
    shape = SHAPES[name]
    return shape if "Conv2d" in method.replaces else (shape[0] * shape[2], shape[1] * shape[3])


def fitted(method: Factorization, weight: Tensor, ranks: tuple[int, ...]) -> tuple[dict[str, Tensor], float]:
    shape = tuple(weight.shape)
    return LayerSpec(Geometry(1, shape), method.with_rank(method.clamp(shape, ranks))).decompose(weight)


def error_at(method: Factorization, weight: Tensor, ranks: tuple[int, ...]) -> float:
    return fitted(method, weight, ranks)[1]


def ladder(method: Factorization, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Ranks that grow together, from 1 to the attainable."""
    most = method.max_ranks(shape)
    steps = max(most)
    return [
        tuple(max(1, math.ceil(rank * step / steps)) for rank in most)
        for step in range(1, steps + 1, max(1, steps // 6))
    ] + [most]


@pytest.mark.parametrize("name", SHAPES)
@every_method
def test_error_falls_with_rank_and_vanishes_at_the_attainable(method: Factorization, name: str) -> None:
    shape = shape_for(method, name)
    for kind, weight in weights(shape).items():
        errors = [error_at(method, weight, ranks) for ranks in ladder(method, shape)]
        assert errors[-1] < 1e-7 if kind == "ill-conditioned" else errors[-1] < 1e-10, kind
        assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(errors)), (kind, errors)


@pytest.mark.parametrize("name", SHAPES)
@every_method
def test_the_estimate_bounds_the_error(method: Factorization, name: str) -> None:
    shape = shape_for(method, name)
    for kind, weight in weights(shape).items():
        estimate = method.error_estimate(weight)
        for ranks in ladder(method, shape):
            attained = method.clamp(shape, ranks)
            assert error_at(method, weight, ranks) <= math.sqrt(estimate(attained)) + 1e-6, (kind, attained)


@pytest.mark.parametrize("name", [name for name in METHODS if not isinstance(METHODS[name], UNCUT)])
def test_no_cut_is_beaten(name: str) -> None:
    """The error is at least what each bond's own cut discards (Eckart-Young): a smaller one would be a wrong one."""
    method = METHODS[name]
    shape = shape_for(method, "conv")
    weight = torch.randn(shape, dtype=torch.float64)
    network, sizes = method.network(shape), method.mode_sizes(shape)
    modes = weight.reshape([sizes[index] for index in network.weight_indices])
    ranks = method.clamp(shape, tuple(max(1, rank // 2) for rank in method.max_ranks(shape)))
    error = error_at(method, weight, ranks)
    for bond, rank in zip(network.bonds, ranks, strict=True):
        axes = [network.weight_indices.index(index) for index in network.cut(bond)[0]]
        values = np.linalg.svd(unfold(modes, axes).numpy(), compute_uv=False)
        assert error >= math.sqrt((values[rank:] ** 2).sum() / (values**2).sum()) - 1e-12


def test_hooi_improves_on_the_truncated_hosvd() -> None:
    weight = torch.randn(16, 16, 3, 3, dtype=torch.float64)
    assert error_at(Tucker(1), weight, (5, 6)) < math.sqrt(Tucker(1).error_estimate(weight)((5, 6)))


@pytest.mark.parametrize(("method", "ranks"), [(CP(1), (24,)), (BlockTerm(1), (3, 6))], ids=["CP", "BlockTerm"])
def test_als_improves_on_its_start(method: Factorization, ranks: tuple[int, ...]) -> None:
    weight = torch.randn(16, 16, 3, 3, dtype=torch.float64)
    assert error_at(method, weight, ranks) < 0.95 * math.sqrt(method.error_estimate(weight)(ranks))


def test_few_terms_of_many_channels_improve_on_their_start() -> None:
    """What their vectors span is not what the kernel's leading singular vectors do."""
    weight = torch.randn(48, 40, 3, 3, dtype=torch.float64)
    assert error_at(CP(1), weight, (10,)) < 0.995 * math.sqrt(CP(1).error_estimate(weight)((10,)))


@pytest.mark.parametrize("order", ["i d h w o", "h w i o"])
def test_the_estimate_of_a_pointwise_train_is_its_error(order: str) -> None:
    """All bonds between the channels make one cut, which loses its own tail once."""
    weight, method = torch.randn(12, 20, 1, 1, dtype=torch.float64), MPS(1, order=order)
    values = np.linalg.svd(weight[..., 0, 0].numpy(), compute_uv=False)
    ranks = method.clamp((12, 20, 1, 1), (5, 5, 5))
    assert method.error_estimate(weight)(ranks) == pytest.approx((values[5:] ** 2).sum() / (values**2).sum())


def test_block_terms_lie_between_their_bounds() -> None:
    """One block is Tucker; several lose what no sum of that many inner channels keeps, and less than Tucker as dear."""
    weight = torch.randn(16, 16, 3, 3, dtype=torch.float64)
    assert error_at(BlockTerm(1, blocks=1), weight, (5, 6)) == pytest.approx(
        error_at(Tucker(1), weight, (5, 6)), abs=2e-3
    )
    error = error_at(BlockTerm(1), weight, (2, 4))
    for axis, kept in ((0, 4 * 2), (1, 4 * 4)):
        values = np.linalg.svd(unfold(weight, [axis]).numpy(), compute_uv=False)
        assert error >= math.sqrt((values[kept:] ** 2).sum() / (values**2).sum()) - 1e-12
    assert error < error_at(Tucker(1), weight, (8, 7))  # 744 parameters, and 672 of the blocks


def test_blocks_are_the_groups_of_one_convolution() -> None:
    net = tensorize(nn.Sequential(nn.Conv2d(16, 24, 3, padding=1)), [Rule("0", BlockTerm((2, 3)))])
    net[0].set_plan("factors")
    first, core, last = to_chains(net)[0]
    assert (first.out_channels, core.groups, core.weight.shape, last.in_channels) == (12, 4, (8, 3, 3, 3), 8)


@every_method
def test_results_do_not_depend_on_the_call(method: Factorization) -> None:
    weight = torch.randn(shape_for(method, "conv"), dtype=torch.float64)
    ranks = method.clamp(tuple(weight.shape), (3,) * len(method.max_ranks(tuple(weight.shape))))
    first, second = (fitted(method, weight, ranks)[0] for _ in range(2))
    for name, factor in first.items():
        torch.testing.assert_close(factor, second[name], rtol=0, atol=0)


@every_method
def test_the_users_tensorly_backend_and_weight_are_left_alone(method: Factorization) -> None:
    weight = torch.randn(shape_for(method, "conv"), dtype=torch.float64)
    before, backend = weight.clone(), tensorly.get_backend()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = error_at(method, weight, method.max_ranks(tuple(weight.shape)))
    assert error < 1e-10  # autocast did not reach the decomposition
    assert tensorly.get_backend() == backend == "numpy"
    torch.testing.assert_close(weight, before, rtol=0, atol=0)


@every_method
def test_a_weight_that_is_not_finite_is_refused(method: Factorization) -> None:
    weight = torch.full(shape_for(method, "conv"), float("nan"), dtype=torch.float64)
    with pytest.raises(ValueError, match="not finite"):
        fitted(method, weight, method.max_ranks(tuple(weight.shape)))


@every_method
def test_ranks_are_clamped_next_to_each_other(method: Factorization) -> None:
    """A bond above the product of its neighbours would be padded with vectors that mean nothing."""
    shape = shape_for(method, "pointwise")
    bonds = len(method.max_ranks(shape))
    for place in range(bonds):
        asked = tuple(10**6 if bond == place else 1 for bond in range(bonds))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attained = replace(method, rank=asked).ranks(shape)
        assert error_at(method, torch.randn(shape, dtype=torch.float64), attained) <= 1
        network = method.network(shape)
        sizes = method.sizes(shape, attained)
        for indices in network.indices.values():
            for bond in set(indices) & set(network.bonds):
                others = math.prod(sizes[index] for index in indices if index != bond)
                assert sizes[bond] <= others or isinstance(method, UNCUT)


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (7, 7), (1, 9)])
def test_singular_vectors_and_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, _ = np.linalg.svd(matrix.numpy(), full_matrices=False)
    np.testing.assert_allclose(singular_values(matrix).numpy(), s, rtol=1e-10)
    ours = left_singular_vectors(matrix).numpy()
    assert ours.shape == u.shape
    np.testing.assert_allclose(np.abs((ours * u).sum(axis=0)), 1, rtol=1e-8)


def test_singular_values_far_apart() -> None:
    """The eigenvalues of the Gram matrix are rounded to 1e-16 of the largest, and 1e-12 squared is far below."""
    left, right = (torch.linalg.qr(torch.randn(size, 4, dtype=torch.float64)).Q for size in (9, 30))
    wanted = torch.tensor([1, 1e-3, 1e-7, 1e-12], dtype=torch.float64)
    found = singular_values((left * wanted) @ right.mT)
    torch.testing.assert_close(found[:4], wanted, rtol=1e-2, atol=0)
    assert found[4] < 1e-15


def test_wide_kernels_take_thin_factors_only() -> None:
    """A full set of right vectors of this unfolding would take 17 GB."""
    weight = torch.randn(96, 512, 9, 10, dtype=torch.float64)
    assert left_singular_vectors(unfold(weight, [0])).shape == (96, 96)
    assert len(singular_values(unfold(weight, [0]))) == 96


def test_a_ring_of_one_is_the_train() -> None:
    """The oracle is `TTConv`; in a wider ring the first cut keeps q times as many of its values."""
    weight = torch.randn(12, 8, 3, 3, dtype=torch.float64)
    modes = {"in_shape": (2, 2, 2), "out_shape": (2, 2, 3)}
    for ranks in ((1, 1, 1), (4, 5, 6), (9, 16, 6)):
        ring, line = TensorRing(1, **modes, ring=1), TTConv(1, **modes)
        assert error_at(ring, weight, ranks) == pytest.approx(error_at(line, weight, ranks), abs=1e-12)
    ring = TensorRing(1, ring=3)
    most = ring.max_ranks((12, 8, 3, 3))
    values = np.linalg.svd(unfold(weight, [2, 3]).numpy(), compute_uv=False)
    assert error_at(ring, weight, (2, *most[1:])) ** 2 == pytest.approx((values[6:] ** 2).sum() / (values**2).sum())


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        (TensorRing, {"ring": 0}, "ring 0: expected the size of the bond"),
        (TensorRing, {"ring": True}, "ring True: expected the size of the bond"),
        (BlockTerm, {"blocks": 0}, "blocks 0: expected how many blocks are summed"),
        (TuckerMatrix, {"in_shape": (2,) * 5}, "expected a tuple of at most 4 positive ints"),
    ],
)
def test_options_are_checked(method: type[Factorization], options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        method(1, **options)


def border(shape: tuple[int, ...]) -> Tensor:
    """A kernel of CP rank 3 to which kernels of rank 2 come as close as one likes, by terms of opposite sign without bound."""
    a, b = torch.linalg.qr(torch.randn(shape[0], 2, dtype=torch.float64)).Q.T
    x, y = torch.eye(shape[2], dtype=torch.float64)[:2]
    weight = torch.zeros(shape, dtype=torch.float64)
    for vectors in ((a, a, y), (a, b, x), (b, a, x)):
        weight[..., 0] += torch.einsum("o,i,h->oih", *vectors)
    return weight


def test_terms_that_cancel_are_held_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound of `_als`, where it binds: without the ridge this fit has a degeneracy of 3.9, and the bound there is 3.1."""
    weight = border((16, 16, 3, 3))
    monkeypatch.setattr(cp, "_SWEEPS", 1000)
    monkeypatch.setattr(cp, "_TOLERANCE", -1.0)
    monkeypatch.setattr(cp, "_DAMPING", 1.0)
    factors, error = fitted(CP(1), weight, (2,))
    start = CP(1).error_estimate(weight)((2,))
    terms = torch.einsum("ir,hr,wr,or->roihw", *factors.values())
    assert terms.square().sum() / weight.square().sum() <= 1 + math.log(start / error**2)
    assert error**2 < start / 100


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("method", [CP(1), CPMatrix(1)], ids=["CP", "CPMatrix"])
def test_terms_stay_of_the_weights_size(method: Factorization, scale: float) -> None:
    assert isinstance(method, CP)
    found = weights((16, 16, 3, 3)) | {"border": border((16, 16, 3, 3))}
    for kind, weight in found.items():
        scaled = scale * (weight if type(method) is CP else weight.flatten(2)[..., 0])
        for rank in (1, 2, 3, 20):
            factors, error = fitted(method, scaled, (rank,))
            assert math.isfinite(error)
            assert method.degeneracy(factors) < 4, (kind, rank)


def test_degeneracy_is_that_of_the_terms() -> None:
    factors = {
        name: torch.randn(2, 5, 3) for name in ("input", "height", "width", "output")
    }  # two groups of three terms
    terms = torch.einsum("gir,ghr,gwr,gor->rgoihw", *map(Tensor.double, factors.values()))
    expected = float(terms.square().sum().sqrt() / terms.sum(dim=0).norm())
    assert CP(3).degeneracy(factors) == pytest.approx(expected)
    assert CP(3).degeneracy({name: 1e-80 * factor.double() for name, factor in factors.items()}) == pytest.approx(
        expected
    )
    assert CP(3).degeneracy({name: 0 * factor for name, factor in factors.items()}) == 0


@pytest.mark.parametrize(("shape", "rank"), [((4, 4, 3, 3), 2), ((6, 5, 3, 3), 3), ((64, 64, 3, 3), 8)])
def test_few_terms_are_found_again(shape: tuple[int, ...], rank: int) -> None:
    """Beyond what float32 tells apart."""
    torch.manual_seed(0)
    factors = [torch.randn(size, rank, dtype=torch.float64) for size in shape]
    dense = nn.Conv2d(shape[1], shape[0], shape[2:], dtype=torch.float64)  # type: ignore[arg-type]
    with torch.no_grad():
        dense.weight.copy_(torch.einsum("or,ir,hr,wr->oihw", factors))
    assert CPConv2d.from_dense(dense, rank=rank).decomposition_error <= 1e-5  # type: ignore[operator]
