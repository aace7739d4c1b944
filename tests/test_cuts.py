"""Cuts against numpy's SVD, against the laws of truncation, and against the factorizations that truncate the same cuts."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.tolerances import EXACT, FLOAT32, FLOAT64
from tnlayers import MPS, Factorization, LayerSpec, LowRank, Tucker
from tnlayers.cuts import cut_label, cuts_of, norm_loss, random_weight, split, truncate_cuts
from tnlayers.geometry import Geometry
from tnlayers.linalg import effective_rank, entropy

MODES = {2: "oi", 3: "oiw", 4: "oihw", 5: "oidhw"}
CONV = (12, 8, 3, 2)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


RANDOM: dict[str, Callable[[], Tensor]] = {
    "generic": lambda: randn(*CONV),
    "non-square": lambda: randn(2, 16, 3, 3),
    "prime-sized": lambda: randn(11, 13, 3, 3),
    "1x1": lambda: randn(7, 5, 1, 1),
    "linear": lambda: randn(30, 7),
    "Conv1d": lambda: randn(6, 5, 3),
    "Conv3d": lambda: randn(5, 4, 2, 3, 2),
    "rank deficient": lambda: torch.einsum("or,ri,hs,sw->oihw", randn(12, 2), randn(2, 8), randn(3, 1), randn(1, 2)),
    "zero": lambda: torch.zeros(CONV, dtype=torch.float64),
    "ill-conditioned": lambda: randn(*CONV) * torch.logspace(0, -12, 12, dtype=torch.float64).reshape(-1, 1, 1, 1),
    "tiny": lambda: 1e-30 * randn(*CONV),
    "non-contiguous": lambda: randn(2, 3, 8, 12).permute(3, 2, 1, 0),
    "float32": lambda: torch.randn(CONV),
}
REAL = ("conv1.weight", "layer1.0.conv1.weight", "layer3.0.conv1.weight", "layer3.2.conv2.weight", "linear.weight")


OTHER_MODES = ("linear", "Conv1d", "Conv3d", "linear.weight")


def rows(without: tuple[str, ...] = ()) -> list[Any]:
    real = [pytest.param(name, marks=pytest.mark.data) for name in REAL if name not in without]
    return [*(name for name in RANDOM if name not in without), *real]


of_four_modes = pytest.mark.parametrize("weight", rows(without=OTHER_MODES), indirect=True)


@pytest.fixture(params=rows())
def weight(request: pytest.FixtureRequest) -> Tensor:
    """A random weight of each kind, and kernels of the published ResNet-20."""
    if request.param in RANDOM:
        return RANDOM[request.param]()
    published = torch.load(request.getfixturevalue("resnet20_checkpoint"), map_location="cpu", weights_only=True)
    return published["state_dict"][f"module.{request.param}"]


def tolerance(weight: Tensor) -> dict[str, float]:
    return FLOAT64 if weight.dtype == torch.float64 else FLOAT32


def matrix_of(weight: Tensor, cut: str) -> np.ndarray:
    """The modes that name the cut in the rows, be they the shorter side or not."""
    array, modes = weight.detach().double().numpy(), MODES[weight.dim()]
    near = [modes.index(mode) for mode in cut]
    far = [axis for axis in range(len(modes)) if axis not in near]
    return array.transpose(near + far).reshape(math.prod(array.shape[axis] for axis in near), -1)


def values_of(weight: Tensor, cut: str) -> np.ndarray:
    return np.linalg.svd(matrix_of(weight, cut), compute_uv=False)


def rank_of(weight: Tensor, cut: str, within: float = 1e-10) -> int:
    values = values_of(weight, cut)
    return int((values > within * values[0]).sum())


def norm_of(weight: Tensor) -> float:
    """1 for zeros, so that it can be divided by."""
    return float(np.linalg.norm(weight.detach().double().numpy())) or 1.0


def bonds_of(count: int) -> list[int]:
    return sorted({1, 2, count // 2, count - 1, count} & set(range(1, count + 1)))


# ---- which cuts there are


@pytest.mark.parametrize(("modes", "count"), [(2, 1), (3, 3), (4, 7), (5, 15)])
def test_every_cut_is_there_once(modes: int, count: int) -> None:
    shape = tuple(range(2, 2 + modes))
    names = MODES[modes]
    sides = [frozenset(side) for size in range(1, modes) for side in itertools.combinations(names, size)]
    found = [frozenset({frozenset(cut), frozenset(names) - frozenset(cut)}) for cut in cuts_of(shape)]
    assert len(found) == len(set(found)) == count
    assert set(found) == {frozenset({side, frozenset(names) - side}) for side in sides}


def test_the_names_of_cuts() -> None:
    assert cuts_of((7, 5)) == ("i",)
    assert cuts_of((7, 5, 3)) == ("o", "i", "w")
    assert cuts_of(CONV) == ("o", "i", "h", "w", "oi", "ih", "iw")
    labels = [cut_label(cut, CONV) for cut in cuts_of(CONV)]
    assert labels == ["o|ihw", "i|ohw", "h|oiw", "w|oih", "oi|hw", "ih|ow", "iw|oh"]
    assert cut_label("i", (7, 5)) == "i|o"


# ---- one cut


def test_values_are_those_of_the_matrix(weight: Tensor) -> None:
    for cut in cuts_of(weight.shape):
        values = split(weight, cut).values
        assert values.dtype == torch.float64
        np.testing.assert_allclose(values / norm_of(weight), values_of(weight, cut) / norm_of(weight), atol=1e-13)


def test_the_loss_is_what_is_discarded(weight: Tensor) -> None:
    """||W - W~||^2 = sum of discarded s^2 = ||W||^2 - ||W~||^2, so that eps^2 = 1 - (1 - delta)^2."""
    near = tolerance(weight)
    for cut in cuts_of(weight.shape):
        now, values = split(weight, cut), values_of(weight, cut) / norm_of(weight)
        for bond in bonds_of(len(values)):
            loss = norm_loss(weight, now.truncated(bond))
            assert now.eps(bond) == pytest.approx(math.sqrt((values[bond:] ** 2).sum()), rel=1e-10, abs=1e-12)
            assert loss.eps == pytest.approx(now.eps(bond), rel=near["rtol"], abs=near["atol"])
            assert loss.eps**2 == pytest.approx(1 - (1 - loss.delta) ** 2, abs=near["atol"])


def test_the_loss_falls_with_the_bond_dimension(weight: Tensor) -> None:
    for cut in cuts_of(weight.shape):
        now = split(weight, cut)
        bonds = range(1, len(now.values) + 1)
        losses = [now.eps(bond) for bond in bonds]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] == 0
        for eps in (*losses, 0.0, 0.3, 0.7, 1.0, 2.0):
            assert now.bond(eps) == min(bond for bond, loss in zip(bonds, losses, strict=True) if loss <= eps)


def test_a_truncation_is_a_projection(weight: Tensor) -> None:
    for cut in cuts_of(weight.shape):
        now = split(weight, cut)
        for bond in bonds_of(len(now.values))[:-1]:
            once = now.truncated(bond)
            assert rank_of(once, cut, 1e-10 if once.dtype == torch.float64 else 1e-5) <= bond
            twice = split(once, cut).truncated(bond)
            torch.testing.assert_close(twice / norm_of(weight), once / norm_of(weight), **tolerance(weight))
        torch.testing.assert_close(now.truncated(len(now.values)), weight, **EXACT)


def test_a_truncation_has_the_bond_dimension() -> None:
    weight = randn(*CONV)
    for cut in cuts_of(CONV):
        now = split(weight, cut)
        bonds = list(range(1, len(now.values) + 1))
        assert [rank_of(now.truncated(bond), cut) for bond in bonds] == bonds


def test_a_truncation_is_numpys(weight: Tensor) -> None:
    """Where the next singular value is clearly smaller: elsewhere the best matrix is not unique."""
    for cut in cuts_of(weight.shape):
        matrix = matrix_of(weight, cut) / norm_of(weight)
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        for bond in bonds_of(len(values))[:-1]:
            if values[bond - 1] - values[bond] > 1e-3:
                best = (left[:, :bond] * values[:bond]) @ right[:bond]
                found = matrix_of(split(weight, cut).truncated(bond), cut) / norm_of(weight)
                torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(best), **tolerance(weight))


def test_no_other_projection_loses_less(weight: Tensor) -> None:
    """Eckart-Young, among the best matrices in column spaces near and far."""
    for cut in cuts_of(weight.shape):
        now = split(weight, cut)
        matrix = matrix_of(weight, cut) / norm_of(weight)
        left = np.linalg.svd(matrix, full_matrices=False)[0]
        for bond, distance in itertools.product(bonds_of(len(now.values)), (1e-3, 0.1, 10.0)):
            basis = np.linalg.qr(left[:, :bond] + distance * np.random.randn(len(matrix), bond))[0]
            assert np.linalg.norm(matrix - basis @ (basis.T @ matrix)) >= now.eps(bond) - 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bonds", [(("o", 2),), (("h", 1),), (("iw", 2),), (("i", 3), ("ih", 4), ("o", 3))], ids=str)
def test_a_truncation_is_a_plain_tensor_like_the_weight(bonds: tuple[tuple[str, int], ...], dtype: torch.dtype) -> None:
    """Computed in float64 under autocast too, rounded once, and without a gradient."""
    weight = nn.Parameter(randn(*CONV).to(dtype).to(memory_format=torch.channels_last))
    before = weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        truncated = truncate_cuts(weight, bonds)
    torch.testing.assert_close(truncated, truncate_cuts(before.double(), bonds).to(dtype), **EXACT)
    assert truncated.is_contiguous()
    assert not truncated.requires_grad
    torch.testing.assert_close(weight.detach(), before, **EXACT)


def test_a_split_outlives_the_overwriting_of_its_weight() -> None:
    for cut in cuts_of(CONV):
        weight = randn(*CONV)
        now = split(weight, cut)
        first, whole = now.truncated(1), weight.clone()
        for bond in (1, len(now.values)):
            weight.copy_(now.truncated(bond))
            now.truncated(len(now.values)).zero_()
        torch.testing.assert_close(weight, whole, **EXACT)
        torch.testing.assert_close(now.truncated(1), first, **EXACT)


# ---- several cuts

SINGLE = tuple(itertools.permutations([("o", 4), ("i", 3), ("h", 2), ("w", 1)]))
TRAINS = (
    (("i", 4), ("ih", 6), ("o", 5)),
    (("o", 5), ("ih", 6), ("i", 4)),
    (("h", 2), ("oi", 4), ("o", 5)),
    (("o", 5), ("oi", 4), ("h", 2)),
)
INSIDE_OUT = (("ih", 3), ("i", 2), ("o", 2))  # no cut crosses another, but the whole is no projection


@pytest.mark.parametrize("bonds", [*SINGLE, *TRAINS, INSIDE_OUT], ids=str)
def test_cuts_that_do_not_cross_keep_each_others_bond_dimensions(bonds: tuple[tuple[str, int], ...]) -> None:
    truncated = truncate_cuts(randn(*CONV), bonds)
    assert [rank_of(truncated, cut) for cut, _ in bonds] == [bond for _, bond in bonds]


@of_four_modes
@pytest.mark.parametrize("bonds", [SINGLE[0], SINGLE[-1], *TRAINS], ids=str)
def test_single_modes_and_trains_are_one_projection(weight: Tensor, bonds: tuple[tuple[str, int], ...]) -> None:
    near = tolerance(weight)
    truncated = truncate_cuts(weight, bonds)
    loss = norm_loss(weight, truncated)
    each = [split(weight, cut).eps(min(bond, len(values_of(weight, cut)))) for cut, bond in bonds]
    assert max(each) - near["atol"] <= loss.eps
    assert loss.eps**2 <= sum(eps**2 for eps in each) + near["atol"]
    assert loss.eps**2 == pytest.approx(1 - (1 - loss.delta) ** 2, abs=near["atol"])
    torch.testing.assert_close(truncate_cuts(truncated, bonds) / norm_of(weight), truncated / norm_of(weight), **near)


def test_the_order_of_cuts_that_cross_matters() -> None:
    weight = randn(*CONV)
    first, second = (truncate_cuts(weight, bonds) for bonds in ([("ih", 3), ("iw", 3)], [("iw", 3), ("ih", 3)]))
    assert (rank_of(first, "iw"), rank_of(second, "ih")) == (3, 3)
    assert rank_of(first, "ih") > 3
    assert rank_of(second, "iw") > 3
    assert norm_loss(first, second).eps > 0.1


def test_a_bond_above_the_attainable_changes_nothing(weight: Tensor) -> None:
    bonds = [(cut, 10**6) for cut in cuts_of(weight.shape)]
    torch.testing.assert_close(truncate_cuts(weight, bonds), weight, **EXACT)
    torch.testing.assert_close(truncate_cuts(weight, []), weight, **EXACT)


# ---- the factorizations that make these cuts low rank


def decomposed(method: Factorization, weight: Tensor, ranks: tuple[int, ...]) -> Tensor:
    factors, _ = LayerSpec(Geometry(1, tuple(weight.shape)), method.with_rank(ranks)).decompose(weight.double())
    return method.network(tuple(weight.shape)).reconstruct(factors).reshape(weight.shape)


def attained(method: Factorization, weight: Tensor) -> tuple[int, ...]:
    """Ranks of about a third of what is attainable."""
    shape = tuple(weight.shape)
    return method.clamp(shape, tuple(math.ceil(rank / 3) for rank in method.max_ranks(shape)))


@pytest.mark.parametrize(
    ("method", "cuts"),
    [
        (MPS(1), ("i", "ih", "o")),
        (MPS(1, order="h w i o"), ("h", "oi", "o")),
        (LowRank(1), ("ih",)),
    ],
    ids=["MPS", "MPS-h w i o", "LowRank"],
)
@of_four_modes
def test_cuts_are_those_of_the_train_and_of_the_low_rank_scheme(
    weight: Tensor, method: Factorization, cuts: tuple[str, ...]
) -> None:
    weight = weight.double()
    ranks = attained(method, weight)
    truncated = truncate_cuts(weight, list(zip(cuts, ranks, strict=True)))
    expected = decomposed(method, weight, ranks)
    torch.testing.assert_close(truncated / norm_of(weight), expected / norm_of(weight), **FLOAT64)


@of_four_modes
def test_tucker_is_at_least_as_good_as_the_cuts_o_and_i(weight: Tensor) -> None:
    """HOOI goes on from this truncation, whose eps^2 is at most twice that of the best: the sum over two cuts."""
    weight = weight.double()
    ranks = attained(Tucker(1), weight)
    cuts = norm_loss(weight, truncate_cuts(weight, list(zip("oi", ranks, strict=True)))).eps
    tucker = norm_loss(weight, decomposed(Tucker(1), weight, ranks)).eps
    assert tucker - 1e-7 <= cuts <= math.sqrt(2) * tucker + 1e-7


def test_tucker_and_the_cuts_agree_on_a_weight_of_that_rank() -> None:
    weight = torch.einsum("or,rshw,is->oihw", randn(12, 5), randn(5, 3, 3, 2), randn(8, 3))
    for truncated in (truncate_cuts(weight, [("o", 5), ("i", 3)]), decomposed(Tucker(1), weight, (5, 3))):
        torch.testing.assert_close(truncated, weight, **FLOAT64)


# ---- entropy


@pytest.mark.parametrize("k", [1, 2, 7])
def test_equal_values_have_the_entropy_of_their_number(k: int) -> None:
    for scale in (1.0, 1e-30, 1e30):
        values = torch.cat([torch.full((k,), scale, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)])
        assert entropy(values) == pytest.approx(math.log(k), abs=1e-12)


def test_entropy_is_the_logarithm_of_the_effective_rank(weight: Tensor) -> None:
    for cut in cuts_of(weight.shape):
        found = entropy(split(weight, cut).values)
        if weight.any():
            assert math.exp(found) == pytest.approx(effective_rank(torch.tensor(matrix_of(weight, cut))), rel=1e-10)
        else:
            assert found == 0
    assert math.isnan(entropy(torch.tensor([math.nan, 1.0])))


# ---- random weights


def test_a_random_weight_has_the_values_of_the_weight(weight: Tensor) -> None:
    """So that it loses the same at every bond dimension of that cut, and of no other."""
    for cut in cuts_of(weight.shape):
        now = split(weight, cut)
        drawn = random_weight(weight.shape, cut, now.values, torch.Generator().manual_seed(1))
        assert drawn.shape == weight.shape
        torch.testing.assert_close(
            torch.tensor(values_of(drawn, cut)) / norm_of(weight), now.values / norm_of(weight), **FLOAT64
        )
    if weight.dim() == 4 and weight.any() and min(weight.shape) > 1:
        assert np.abs(values_of(drawn, "o") - values_of(weight, "o")).max() > 1e-3 * norm_of(weight)


def test_the_generator_decides() -> None:
    values = torch.tensor([3.0, 4.0])
    first, again, other = (random_weight(CONV, "ih", values, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    torch.testing.assert_close(first, again, **EXACT)
    assert norm_loss(first, other).eps > 0.1


@pytest.mark.parametrize("count", [0, 1, 2, 8])
def test_fewer_values_than_the_cut_has_are_the_norm(count: int) -> None:
    values = torch.arange(count, 0, -1.0, dtype=torch.float64)
    drawn = random_weight(CONV, "i", values, torch.Generator().manual_seed(0))
    assert float(torch.linalg.vector_norm(drawn)) == pytest.approx(float(torch.linalg.vector_norm(values)), rel=1e-10)
    np.testing.assert_allclose(values_of(drawn, "i")[:count], values, atol=1e-12)
    np.testing.assert_allclose(values_of(drawn, "i")[count:], 0, atol=1e-12)


def test_no_direction_is_preferred() -> None:
    """A QR of Gaussians alone would give the first entry of every first vector the same sign."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([random_weight((3, 4), "i", torch.ones(3), generator) for _ in range(2000)])
    assert (drawn.mean(0).abs() < 4 * drawn.std(0) / math.sqrt(len(drawn))).all()


# ---- what is refused

NOT_FINITE = torch.full(CONV, float("nan"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cuts_of((3,)), r"a weight of shape \(3,\) has 1 modes; cuts are known of 2 to 5"),
        (lambda: split(randn(*6 * [2]), "i"), r"shape \(2, 2, 2, 2, 2, 2\) has 6 modes; cuts are known of 2 to 5"),
        (lambda: split(randn(*CONV), "ow"), r"cut 'ow': a weight of shape \(12, 8, 3, 2\) has o, i, h, w, oi, ih, iw"),
        (lambda: split(randn(7, 5), "o"), r"cut 'o': a weight of shape \(7, 5\) has i$"),
        (lambda: cut_label("hi", CONV), r"cut 'hi': a weight of shape .* has o, i, h, w, oi, ih, iw"),
        (lambda: random_weight(CONV, "d", torch.ones(1), torch.Generator()), r"cut 'd': a weight of shape"),
        (
            lambda: random_weight(CONV, "h", torch.ones(4), torch.Generator()),
            r"4 singular values: the cut 'h' .* has 3",
        ),
        (lambda: split(NOT_FINITE, "i"), "the weight has values that are not finite; it has no spectrum"),
        (lambda: truncate_cuts(NOT_FINITE, [("i", 1)]), "the weight has values that are not finite"),
        (lambda: truncate_cuts(randn(*CONV), [("h", 0)]), "bond dimension 0: this cut has 1 to 3"),
        (lambda: split(randn(*CONV), "h").truncated(4), "bond dimension 4: this cut has 1 to 3"),
        (lambda: split(randn(*CONV), "h").eps(-1), "bond dimension -1: this cut has 1 to 3"),
        (lambda: split(randn(*CONV), "h").bond(-0.1), "eps -0.1: expected a norm loss of at least 0, such as 0.3"),
        (lambda: split(randn(*CONV), "h").bond(math.nan), "eps nan: expected a norm loss of at least 0"),
    ],
)
def test_errors_name_what_was_given_and_what_there_is(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
