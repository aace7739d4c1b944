"""Factors that come from TensorLy, tltorch and plain layers, and go to TensorLy: the oracle is what those make of them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorly
import torch
from tensorly.decomposition import parafac, tensor_train, tucker
from tensorly.tt_matrix import TTMatrix
from torch import Tensor, nn

from tests.tolerances import FLOAT64
from tnlayers import (
    CP,
    MPS,
    SVD,
    TT,
    CPMatrix,
    Factorization,
    FullTucker,
    LowRank,
    Rule,
    Tucker,
    TuckerMatrix,
    UnsupportedLayer,
    UserError,
    from_layers,
    from_tensorly,
    tensorize,
    to_tensorly,
)
from tnlayers.factorized import FactorizedLayer
from tnlayers.geometry import Geometry


@pytest.fixture(autouse=True)
def _with_torch() -> Any:
    torch.set_default_dtype(torch.float64)
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        yield
    torch.set_default_dtype(torch.float32)


def made(tensor: Any) -> Tensor:
    """What TensorLy makes of its own tensor: a matrix of a `TTMatrix`."""
    return tensor.to_matrix() if isinstance(tensor, TTMatrix) else tensor.to_tensor()  # type: ignore[no-any-return]


CONV, LINEAR = nn.Conv2d(8, 12, (3, 2), padding=1, dtype=torch.float64), nn.Linear(30, 28)
BOTH_WAYS: tuple[tuple[nn.Module, Factorization], ...] = (
    (CONV, CP(5)),
    (CONV, Tucker((4, 3))),
    (CONV, FullTucker((4, 3, 2, 2))),
    (CONV, MPS((3, 4, 5))),
    (nn.Conv1d(8, 12, 3), Tucker((4, 3))),
    (nn.Conv3d(4, 6, 2), MPS((3, 4, 4, 3))),
    (nn.ConvTranspose2d(8, 12, (3, 2), 2), CP(5)),
    (LINEAR, CPMatrix(6)),
    (LINEAR, TuckerMatrix((3, 4, 3, 4))),
    (LINEAR, TT((4, 5))),
    (nn.Embedding(30, 28), TT((4, 5))),
)


@pytest.mark.parametrize(("dense", "method"), BOTH_WAYS, ids=lambda value: f"{value}"[:24])
def test_there_and_back(dense: nn.Module, method: Factorization) -> None:
    dense = dense.to(torch.float64)
    layer = tensorize(nn.Sequential(dense), [Rule("0", method)])[0]
    assert isinstance(layer, FactorizedLayer)
    tensor = to_tensorly(layer)
    weight = Geometry.of(dense).exchanged(layer.weight.detach())
    theirs = made(tensor)
    theirs = theirs.permute({4: (3, 0, 1, 2), 5: (4, 0, 1, 2, 3)}[theirs.dim()]) if type(method) is MPS else theirs
    torch.testing.assert_close(theirs.reshape(weight.shape), weight, **FLOAT64)
    again = from_tensorly(dense, tensor)
    assert type(again) is type(layer)
    assert again.spec.ranks == layer.spec.ranks
    assert type(again.spec.method) is type(method)
    torch.testing.assert_close(again.weight, layer.weight, **FLOAT64)
    if getattr(dense, "bias", None) is not None:
        torch.testing.assert_close(again.bias, dense.bias)


def test_what_tensorly_decomposes() -> None:
    weight = CONV.weight.detach()
    for tensor, order in (
        (parafac(weight, 4, init="random", normalize_factors=True, random_state=0), ""),
        (tucker(weight, (4, 3, 2, 1), init="random", random_state=0), ""),
        (tensor_train(weight, (1, 4, 5, 2, 1)), "o i h w"),
    ):
        layer = from_tensorly(CONV, tensor, **({"order": order} if order else {}))
        torch.testing.assert_close(layer.weight, tensor.to_tensor(), **FLOAT64)


def test_bonds_above_the_attainable_stay_exact() -> None:
    """Such as tltorch draws: the weight has other factors, of the attainable ranks."""
    factors = [torch.randn(5, 40), torch.randn(3, 40), torch.randn(2, 40)]
    conv = nn.Conv1d(3, 5, 2)
    layer = from_tensorly(conv, SimpleNamespace(weights=torch.rand(40), factors=factors))
    assert layer.rank == 6
    cores = [torch.randn(1, 3, 9), torch.randn(9, 2, 9), torch.randn(9, 5, 1)]
    train = from_tensorly(conv, SimpleNamespace(factors=cores))
    assert train.ranks == (3, 5)
    torch.testing.assert_close(train.weight, torch.einsum("xia,awb,boy->oiw", *cores), **FLOAT64)


def test_tensors_of_another_kind() -> None:
    with pytest.raises(UserError, match="a tuple has no factors; expected a CPTensor"):
        from_tensorly(nn.Linear(4, 4), (torch.zeros(2, 2), [torch.zeros(4, 2)]))
    arrays = SimpleNamespace(factors=[torch.randn(size, 2).numpy() for size in (6, 4, 3)], weights=np.ones(2))
    layer = from_tensorly(nn.Conv1d(4, 6, 3), arrays)
    expected = np.einsum("or,ir,kr->oik", *arrays.factors)
    torch.testing.assert_close(layer.weight, torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("dense", "factors", "said"),
    [
        (nn.Conv1d(3, 5, 2), [(5, 4), (3, 4)], "the tensor has 2 factors; this layer has 3"),
        (nn.Conv1d(3, 5, 2), [(5, 4), (3, 4), (3, 4)], r"makes a weight of the shape \(5, 3, 3\)"),
        (nn.Conv1d(3, 5, 2), [(5, 4), (3, 6), (2, 4)], "index 'r' is"),
        (nn.Linear(6, 4), [(2, 3), (2, 3), (2, 3), (2, 3)], r"in_shape \(2, 2\) multiplies to 4; expected 6"),
        (nn.Conv1d(4, 6, 2, groups=2), [(3, 4), (2, 4), (2, 4)], "2 groups"),
    ],
)
def test_tensors_of_other_sizes_are_refused(dense: nn.Module, factors: list[tuple[int, ...]], said: str) -> None:
    tensor = SimpleNamespace(factors=[torch.randn(shape) for shape in factors])
    with pytest.raises(UserError, match=said):
        from_tensorly(dense, tensor)


def test_what_has_no_type_is_refused() -> None:
    for conv, method, said in ((CONV, SVD(3), "no type for SVD"), (nn.Conv2d(8, 12, 3, groups=2), CP(3), "2 groups")):
        layer = tensorize(nn.Sequential(conv.double()), [Rule("0", method)])[0]
        with pytest.raises(UnsupportedLayer, match=said):
            to_tensorly(layer)  # type: ignore[arg-type]


PAIRS: dict[str, tuple[list[nn.Module], type[Factorization]]] = {
    "linears": ([nn.Linear(30, 6), nn.Linear(6, 28)], LowRank),
    "one bias": ([nn.Linear(30, 6), nn.Linear(6, 28, bias=False)], LowRank),
    "no bias": ([nn.Linear(30, 6, bias=False), nn.Linear(6, 28, bias=False)], LowRank),
    "filters": ([nn.Conv2d(8, 5, 3, stride=2, padding=1), nn.Conv2d(5, 12, 1)], SVD),
    "filters in 1d": ([nn.Conv1d(8, 5, 3, dilation=2), nn.Conv1d(5, 12, 1)], SVD),
    "separable": (
        [nn.Conv2d(8, 5, (3, 1), (2, 1), (1, 0), bias=False), nn.Conv2d(5, 12, (1, 4), (1, 3), (0, 2), (1, 2))],
        LowRank,
    ),
    "Tucker": ([nn.Conv2d(8, 4, 1), nn.Conv2d(4, 5, 3, 2, dilation=2), nn.Conv2d(5, 12, 1)], Tucker),
    "Tucker with padding": (
        [nn.Conv3d(8, 4, 1, bias=False), nn.Conv3d(4, 5, 3, padding=1), nn.Conv3d(5, 12, 1, bias=False)],
        Tucker,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_layers_in_a_row(name: str) -> None:
    layers, method = PAIRS[name]
    row = nn.Sequential(*layers).double()
    layer = from_layers(row)
    assert type(layer.spec.method) is method
    x = (
        torch.randn(3, 30)
        if isinstance(layers[0], nn.Linear)
        else torch.randn(2, 8, *(9,) * (layers[0].weight.dim() - 2))
    )  # type: ignore[operator]
    torch.testing.assert_close(layer(x), row(x), **FLOAT64)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3)], "expected two linears"),
        ([nn.Linear(3, 3)] * 3, "no method computes these in a row"),
        ([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)], "no method computes these in a row"),
        ([nn.Linear(3, 2), nn.Linear(3, 2)], "gives 2 and .* takes 3; they do not follow each other"),
        ([nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 5, 1)], "expected one group"),
        ([nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(4, 5, 1)], "padding with a number"),
        ([nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 5, 1, 2)], "along one axis"),
        ([nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 5, 1)], "pads what has a bias already"),
    ],
)
def test_rows_that_are_no_one_layer_are_refused(layers: list[nn.Module], said: str) -> None:
    with pytest.raises(UnsupportedLayer, match=said):
        from_layers(layers)
