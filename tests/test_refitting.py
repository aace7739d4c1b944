"""Factors fitted to outputs: what the windows are, that the error told is that of the outputs, and that it is near the least."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.cases import CASES, GEOMETRIES, Case
from tests.tolerances import EXACT, FLOAT64
from tnlayers import LowRank, Rule, heal, tensorize
from tnlayers.geometry import Geometry
from tnlayers.moments import Moments, windows
from tnlayers.refitting import refit, refit_layers

pytestmark = pytest.mark.filterwarnings("ignore:.*(is above what a weight|and the dense weight|hardly anything)")


def _moments(dense: nn.Module, z: Tensor, y: Tensor) -> Moments:
    moments = Moments(Geometry.of(dense), 1 << 20, 1)
    moments.add(z, y, torch.Generator().manual_seed(0))
    return moments


def _dense_layers() -> list[Any]:
    kinds = {case.layer.dense_type: case for case in CASES}
    rows = [pytest.param(case, {}, id=kind.__name__) for kind, case in kinds.items()]
    conv = kinds[nn.Conv2d]
    return rows + [pytest.param(conv, options, id=str(options)) for options in GEOMETRIES]


@pytest.mark.parametrize(("case", "options"), _dense_layers())
def test_the_windows_times_the_weight_are_the_output(case: Case, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    dense = case.dense(**(options | {"bias": False}))
    x = case.input(3)
    geometry, y = Geometry.of(dense), dense(x).detach()
    weight = geometry.exchanged(dense.weight).detach().unflatten(0, (geometry.groups, -1)).flatten(2)
    made = torch.einsum("gmk,gok->mgo", windows(geometry, x), weight).flatten(1)
    wanted = y.movedim(1, -1).reshape(made.shape)
    torch.testing.assert_close(made, wanted, **FLOAT64)
    some = torch.tensor([len(made) - 1, 0, 1])
    torch.testing.assert_close(windows(geometry, x, some), windows(geometry, x)[:, some], **EXACT)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("centred", [False, True])
def test_the_error_told_is_that_of_the_outputs_and_falls(case: Case, centred: bool) -> None:
    torch.manual_seed(1)
    dense = case.dense(bias=False)
    layer = case.convert(dense, case.smaller_rank)
    mixing = torch.randn(8 if case.is_conv or layer.spec.geometry.axes else 30, dtype=torch.float64).exp()
    x = case.input(24) * mixing.view(-1, *[1] * len(layer.spec.geometry.axes)) + 1
    y = dense(x).detach()
    z = x + 0.1 * torch.randn_like(x)
    moments = _moments(dense, z, y)
    weight = layer.spec.geometry.exchanged(dense.weight.detach())
    parameters, before, after = refit(layer.spec, dict(layer.factors.items()), weight, moments, centred=centred)
    assert after < before
    for name, value in layer.factors.items():
        value.data.copy_(parameters[name])
    with torch.no_grad():
        left, wanted = y - layer(z), y
    if centred:
        along = [0, *range(2, y.dim())] if layer.spec.geometry.axes else [0]
        left, wanted = (one - one.mean(along, keepdim=True) for one in (left, wanted))
    error = float(left.square().sum() / wanted.square().sum())
    assert error == pytest.approx(after, rel=0.1, abs=1e-3)  # up to what holds the weight near the dense one


def test_a_matrix_of_two_factors_reaches_the_least_error_there_is() -> None:
    """Of all weights of rank r it is the r leading singular values of W A^(1/2): Izenman, Reduced-rank regression (1975)."""
    torch.manual_seed(2)
    dense = nn.Linear(20, 16, bias=False, dtype=torch.float64)
    x = torch.randn(400, 20, dtype=torch.float64) @ torch.randn(20, 20, dtype=torch.float64)
    (layer,) = tensorize(nn.Sequential(copy.deepcopy(dense)), [Rule("0", LowRank(5))])
    moments = _moments(dense, x, dense(x).detach())
    _, before, after = refit(layer.spec, dict(layer.factors.items()), dense.weight, moments, centred=False)
    values = torch.linalg.svdvals(dense(x).detach())
    least = float(values[5:].square().sum() / values.square().sum())
    assert least <= after <= 1.02 * least + 2e-3
    assert before > 1.1 * after


@pytest.mark.parametrize("spoilt", ["one sample", "a constant channel", "zeros"])
def test_inputs_that_say_little_leave_the_weight_where_it_was(spoilt: str) -> None:
    torch.manual_seed(3)
    dense = nn.Conv2d(6, 8, 3, padding=1)
    (layer,) = tensorize(nn.Sequential(copy.deepcopy(dense)), [Rule("0", LowRank(8))])
    x = torch.randn(1 if spoilt == "one sample" else 16, 6, 5, 5)
    x[:, 2] = 1.0
    x = x * 0 if spoilt == "zeros" else x
    model = nn.Sequential(layer)
    refit_layers(model, nn.Sequential(dense), [(((x,), {}), ((x,), {}), None)], 0)
    assert torch.isfinite(layer.weight).all()
    with torch.no_grad():
        assert float((layer.weight - dense.weight).norm() / dense.weight.norm()) < 1  # nearer than none
        assert float((layer(x) - dense(x)).norm()) <= 0.5 * float((dense(x)).norm()) + 1e-6


def test_a_bias_takes_the_mean_and_a_frozen_one_stays() -> None:
    torch.manual_seed(4)
    dense = nn.Linear(12, 10)
    x = torch.randn(256, 12) + 3
    for frozen in (False, True):
        model = tensorize(nn.Sequential(copy.deepcopy(dense)), [Rule("0", LowRank(3))])
        model[0].bias.requires_grad_(not frozen)
        refit_layers(model, nn.Sequential(dense), [(((x,), {}), ((x,), {}), None)], 0)
        assert torch.equal(model[0].bias, dense.bias) == frozen
        with torch.no_grad():
            means = (model(x) - dense(x)).mean(0).abs().max()
        assert (float(means) < 1e-4) != frozen


def test_an_activation_in_place_spoils_no_output() -> None:
    """Factors that can make every weight make the dense one's outputs again, whatever is written into these later."""
    torch.manual_seed(6)
    dense = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True))
    model = tensorize(copy.deepcopy(dense), [Rule("0", LowRank(12))])
    with torch.no_grad():
        for factor in model[0].factors.values():
            factor += 0.2 * torch.randn_like(factor)
    x = torch.randn(32, 4, 8, 8)
    refit_layers(model, dense, [(((x,), {}), ((x,), {}), None)], 0)
    with torch.no_grad():
        wanted = dense[0](x)
        assert float((model[0](x) - wanted).norm() / wanted.norm()) < 0.02


def test_sixteen_bits_are_enough_for_the_data() -> None:
    """Sums of squares that no float16 holds, and a bfloat16 model under autocast."""
    torch.manual_seed(7)
    dense = nn.Linear(24, 16, bias=False)
    x = 30 * torch.randn(4096, 24) @ torch.randn(24, 24)
    moments = [_moments(dense, each, dense(x).detach().to(each.dtype)) for each in (x, x.bfloat16(), (x / 4).half())]
    for some in moments:
        assert all(torch.isfinite(value).all() for value in some.second(centred=True))
    exact, rounded = (some.second(centred=False)[0] for some in moments[:2])
    assert float((exact - rounded).norm() / exact.norm()) < 0.01


def test_healing_in_closed_form_trains_nothing_and_takes_statistics_anew() -> None:
    torch.manual_seed(5)
    conv = nn.Conv2d(6, 6, 3, padding=1, bias=False)
    dense = nn.Sequential(nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU()), nn.Sequential(nn.Conv2d(6, 4, 1)))
    for _ in range(50):
        dense(torch.rand(16, 6, 8, 8))  # statistics of such pictures
    model = tensorize(copy.deepcopy(dense.eval()), [Rule("*", LowRank(3))])
    batches = [torch.rand(16, 6, 8, 8) for _ in range(4)]
    found = heal(model, dense, batches, steps=0)
    assert [one.name for one in found] == ["0.0..2", "1.0"]
    assert all(one.after == one.refitted < one.before for one in found)
    assert torch.equal(model[0][1].weight, dense[0][1].weight)
    assert not torch.equal(model[0][1].running_mean, dense[0][1].running_mean)
    assert model[0][1].momentum == dense[0][1].momentum
    assert not model.training
