"""The benchmark of speed, tiny, and the table that it computes from hand-written rows. No time is asserted."""

import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorly
import torch
from torch import nn

from benchmarks.rows import Setting, deadlines
from benchmarks.speed import __main__ as script
from benchmarks.speed import layers, nets
from benchmarks.speed.cases import CONVS, STANDARD_CONV, STANDARD_LINEAR, Case, Conv, cases
from benchmarks.speed.contenders import Contender, in_layouts, measure
from benchmarks.speed.ours import macs_kept
from benchmarks.speed.tables import plot, tables
from benchmarks.speed.targets import best, choice, repeated, speed, targets
from benchmarks.speed.tltorch_layers import tltorch_layers
from tests.tolerances import EXACT
from tnlayers import CP, MPS, TT, FactorizedLayer, LowRank, Rule, Tucker, tensorize

ROOT = Path(__file__).parents[1]
TINY = Setting(torch.device("cpu"), tiny=True)


@pytest.fixture(autouse=True)
def tensorly_backend() -> Iterator[None]:
    """Importing tltorch sets it for the process."""
    before = tensorly.get_backend()
    yield
    tensorly.set_backend(before)


# ---- the whole script


@pytest.mark.slow
def test_the_whole_script_tiny(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    given = ["--tiny", "--out", str(out), "--commit", "one"]
    assert script.main(given) == 0
    result = json.loads(out.read_text())
    assert {row["part"] for row in result["rows"]} == set(script.PARTS)
    assert not [row for row in result["rows"] if "error" in row]
    assert not result["left_out"]
    assert {target["what"] for target in result["targets"]} == {target.what for target in targets([])}
    assert "| quickstart: time left |" in capsys.readouterr().out
    written = tables(result)
    assert all(f"\n## {title}\n" in written for title in ("Targets", "Layers", "Nets", "Forms"))
    assert len(plot(result["rows"]).axes) == 2

    assert script.main(given) == 0  # a later run finds all of them
    assert json.loads(out.read_text())["rows"] == result["rows"]
    assert f"{len(result['rows'])} rows were there, 0 are new" in capsys.readouterr().out

    assert script.main([*given[:-1], "two", "--seconds", "0.001"]) == 0  # which are not those of another commit
    assert "are of commit one, and are measured anew" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"] == []


def test_a_part_ends_later_where_others_are_left_out() -> None:
    assert deadlines({"a": 0.1, "b": 0.3, "c": 0.4}, 80) == pytest.approx({"a": 10, "b": 40, "c": 80})
    assert deadlines({"b": 0.3, "c": 0.1}, 80) == pytest.approx({"b": 60, "c": 80})
    assert sum(share for _, share in script.PARTS.values()) == pytest.approx(1)


# ---- what is measured


def test_standard_rows_come_first_and_all_can_be_built() -> None:
    found = list(cases(tiny=False))
    assert len({case.name for case in found}) == len(found)
    first = [case for case in found if (case.method, case.divisor, case.batch) in (STANDARD_CONV, STANDARD_LINEAR)]
    assert found[: len(first)] == first
    assert {case.layer for case in first} >= {conv for conv in CONVS if conv.groups == 1}
    for case in found:
        if case.batch == 1:
            with torch.device("meta"):
                assert case.dense()(torch.zeros(case.input_shape)).shape[0] == 1
        case.factorization()


def test_other_methods_keep_as_much_as_tucker() -> None:
    """At a quarter of 64 channels: 2 * 16 * 64 + 9 * 16 * 16 of 9 * 64 * 64."""
    other = Case(Conv(64, 64, 56), "MPS", 4, 8).factorization()
    assert other.rank.fraction == pytest.approx(4352 / 36864)
    assert Case(Conv(64, 128, 56), "Tucker", 4, 8).factorization() == Tucker((32, 16))
    assert (
        Case(Conv(256, 64, 56, kernel=1), "MPS", 2, 8).factorization().rank.fraction == 0.5
    )  # Tucker keeps more than all


@pytest.mark.parametrize(
    ("dense", "method", "shape"),
    [
        (nn.Conv2d(8, 12, 3, stride=2, padding=1), Tucker((3, 4)), (2, 8, 6, 6)),
        (nn.Conv2d(8, 12, 3, stride=2, padding=1), CP(5), (2, 8, 6, 6)),
        (nn.Conv2d(8, 12, 3, stride=2, padding=1), MPS((3, 4, 5)), (2, 8, 6, 6)),
        (nn.Linear(24, 60), TT(3, in_shape=(2, 3, 4), out_shape=(3, 4, 5)), (2, 24)),
    ],
    ids=["Tucker", "CP", "MPS", "TT"],
)
def test_tltorch_has_the_same_sizes_and_ranks(dense: nn.Module, method: Any, shape: tuple[int, ...]) -> None:
    (layer,) = tensorize(nn.Sequential(dense), [Rule("0", method)], init="random")
    assert isinstance(layer, FactorizedLayer)
    found = tltorch_layers(dense, layer)
    assert isinstance(found, dict)
    x = torch.randn(shape)
    for other in found.values():
        assert other(x).shape == layer(x).shape == dense(x).shape
        sizes = sorted(value.numel() for name, value in other.named_parameters() if "bias" not in name)
        ours = sorted(value.numel() for value in layer.factors.values())
        # Its Tucker has a square factor for each side of the window, and its CP a weight for each component.
        own = {Tucker: [9, 9], CP: [5]}.get(type(method), [])
        assert sizes == sorted(ours + own)


def test_what_tltorch_lacks_is_said() -> None:
    depthwise, conv = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3)
    (grouped,) = tensorize(nn.Sequential(depthwise), [Rule("0", CP(1))], init="random")
    (lowrank,) = tensorize(nn.Sequential(conv), [Rule("0", LowRank(2))], init="random")
    assert tltorch_layers(depthwise, grouped) == "tltorch has no groups"
    assert tltorch_layers(conv, lowrank) == "tltorch has no LowRank of a Conv2d"


def test_what_contends_gets_its_layout_and_computes_the_same() -> None:
    net, x = nn.Sequential(nn.Conv2d(4, 4, 3)), torch.randn(2, 4, 5, 5)
    default, last = in_layouts("dense", "", net, x)
    assert default.x.is_contiguous()
    assert last.x.is_contiguous(memory_format=torch.channels_last)
    assert last.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert net[0].weight.is_contiguous()
    torch.testing.assert_close(last.x, default.x, **EXACT)
    measured = measure([default, last, Contender("plan", "a | b", "default", net, x)], TINY)
    assert [one["layout"] for one in measured] == ["default", "channels last", "default"]
    assert all(one["inference"] > 0 and one["training"] > 0 for one in measured)
    assert ["training peak bytes" in one for one in measured] == [True, True, False]


def test_a_layer_contends_under_each_plan_of_its_own() -> None:
    (layer,) = tensorize(nn.Sequential(nn.Conv2d(8, 8, 3)), [Rule("0", Tucker(2))], init="random")
    x = torch.zeros(1, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    found = layers.under_plans(layer, x)
    names = [one.how for one in found]
    assert len(set(names)) == len(names) == 7
    assert {"input: linear | core: convolution | output: linear", "input core output: convolution"} <= {*names}
    assert {one.model.plan.groups for one in found} == {*layer.spec.plans}


def test_a_layer_that_no_rank_makes_cheaper_is_a_row_with_its_reason() -> None:
    row = layers.row(Case(Conv(8, 8, 6), "SVD", 8, 2), TINY)
    assert "cannot be reached" in row["left"]


def test_the_ranks_of_the_paper_are_of_all_convolutions_of_the_net() -> None:
    with torch.device("meta"):
        net = nets.NETS["VGG-16"].build()
    convs = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d)}
    rules = nets.rules(nets.NETS["VGG-16"], nets.TAI)
    assert [rule.pattern for rule in rules] == list(convs)
    kept = sum(
        3 * rule.factorization.rank * (conv.in_channels + conv.out_channels)
        for rule, conv in zip(rules, convs.values(), strict=True)
    )
    assert 14_710_464 / kept == pytest.approx(2.75, abs=0.01)  # as the paper's table has it


# ---- the table of targets


def one(
    what: str, inference: float, training: float, layout: str = "default", how: str = "", peak: int = 100
) -> dict[str, Any]:
    return {
        "what": what,
        "how": how,
        "layout": layout,
        "inference": inference,
        "training": training,
        "training peak bytes": peak,
    }


ROW = {
    **{"part": "layers", "name": "a", "method": "Tucker", "divisor": 4, "batch": 8, "kind": "conv", "kernel": 3},
    **{"channels": 64, "macs_kept": 0.25},
    "model": {"inference": "input | core | output", "training": "input core output"},
    "measured": [
        one("dense", 8.0, 16.0),
        one("dense", 6.0, 20.0, "channels last", peak=80),
        one("ours", 4.0, 10.0, peak=120),
        one("ours", 2.0, 8.0, "channels last", peak=100),
        one("plan", 1.9, 4.0, "channels last", "input | core | output"),
        one("plan", 9.0, 9.0, "channels last", "input core output"),
        one("tltorch", 5.0, 40.0, how="factorized"),
        one("tltorch", 7.0, 24.0, "channels last", "reconstructed"),
    ],
}


def test_each_is_taken_in_its_best_layout() -> None:
    assert best(ROW, "dense", "training") == 16
    assert best(ROW, "dense", "inference", layout="default") == 8
    assert best(ROW, "chains", "inference") is None
    assert speed(ROW, "inference") == 6 / 2
    assert speed(ROW, "training", "tltorch") == 24 / 8
    assert speed(ROW, "training", "chains") is None
    assert choice(ROW, "inference") == 1
    assert choice(ROW, "training") == 9 / 4


def test_the_table_says_what_is_met_and_of_how_many_rows() -> None:
    slow = ROW | {"name": "b", "batch": 1, "measured": [one("dense", 1.0, 1.0), one("ours", 2.0, 0.5)]}
    left = {"part": "layers", "name": "c", "left": "dense, since no rank is cheaper"}
    raised = {"part": "layers", "name": "d", "error": "ValueError"}
    forms = [{"part": "forms", "name": form, "form": form, "batch": 1} for form in ("eager", "compiled")]
    for row, seconds in zip(forms, (0.9, 1.1), strict=True):
        row["measured"] = [{"what": "dense", "inference": 1.0}, {"what": "ours", "inference": seconds}]
    net = {
        "part": "nets",
        "name": "ResNet-18",
        "net": "ResNet-18",
        "measured": [one("dense", 2.0, 2.0), one("ours", 1.0, 2.0)],
    }
    tai = {"part": "nets", "name": "VGG-16", "net": "VGG-16", "method": nets.TAI}
    tai["measured"] = [one("dense", 3.0, 1.0), one("ours", 1.0, 1.0), one("chains", 1.5, 1.0)]
    start = {"part": "start", "name": "import", "seconds_to_import": {"torch": 2.0, "tnlayers": 2.25}}
    found = {
        row.what: row for row in targets([ROW, slow, left, raised, *forms, net | {"method": "Tucker"}, tai, start])
    }

    def told(what: str) -> tuple[str, bool | None]:
        (name,) = [name for name in found if name.startswith(what)]
        return found[name].measured, found[name].met

    assert told("any layer against the faster dense layout, inference") == (
        "0.50 at least (b); below in 1 of 2; under the best plan 3.16 at least (a); below in 0 of 1",
        False,
    )
    assert told("any layer against the faster dense layout, training") == (
        "2.00 at least (a); below in 0 of 2; under the best plan 4.00 at least (a); below in 0 of 1",
        True,
    )
    assert told("peak memory") == ("1.25 at most (a); above 1 in 1 of 2", False)
    quarter = "Tucker at a quarter of 64 channels and more, 3x3 and 5x5, batch 8: speed-up over MAC reduction, "
    assert told(f"{quarter}inference") == ("0.75, 0.75 to 0.75 in 1 rows; under the best plan 0.79", False)
    assert told(f"{quarter}training") == ("0.50, 0.50 to 0.50 in 1 rows; under the best plan 1.00", True)
    assert told("the same layers against tltorch's better path, inference") == (
        "2.50, 2.50 to 2.50 in 1 rows; under the best plan 2.63",
        True,
    )
    assert told("the cost model's plan within 5 % of the best one, inference") == ("100% of 1", True)
    assert told("ResNet-18 (64x64) at half the MACs, batch 1:") == ("eager 0.90, compiled 1.10", False)
    assert told("ResNet-18 (64x64) at half the MACs, batch 32:") == ("no rows", None)
    assert told("ResNet-18 at half the MACs, best method, inference") == ("2.00 (Tucker)", True)
    assert told("ResNet-18 at half the MACs, best method, training") == ("1.00 (Tucker)", False)
    assert told("VGG-16 with Tai") == ("3.00; plain convolutions 2.00", True)
    assert told("VGG-16 at half the MACs, best method, inference") == ("no rows", None)
    assert told("import tnlayers") == ("0.25 s over 2.00 s", True)
    assert told("quickstart") == ("no rows", None)


def test_floors_are_told_next_to_what_is_missed() -> None:
    halves = {"a": [1.0, 1.2], "b": [1.1, 1.0]}
    plans = [one("plan", 1.0, 1.0, how=how) | {"inference halves": both} for how, both in halves.items()]
    row = ROW | {
        "measured": [*ROW["measured"][:4], one("lean", 3.0, 9.0, peak=60), *plans],
        "model": {"inference": "b"},
    }
    assert repeated(row, "inference") == [(1.1, 1.1), (1.0, 1.2)]
    assert repeated(row, "training") == []
    net = {"part": "nets", "name": "ResNet-18", "net": "ResNet-18", "method": "CP", "proportional": 1.9}
    net["measured"] = [one("dense", 3.0, 2.0), one("ours", 2.0, 2.0)]
    found = {target.what: target.measured for target in targets([row, net])}
    assert found["peak memory of a training step over dense's, layers"].endswith(
        "of 1 that keep more than dense for the backward pass, above 1 in 1, tuned with lean=True in 0, in 1.12 times the time"
    )
    assert found["the cost model's plan within 5 % of the best one, inference"].endswith(
        "by half of the rounds: 50%, and the other half's fastest plan 0%"
    )
    assert found["ResNet-18 at half the MACs, best method, inference"] == "1.50 (CP; in proportion to the MACs 1.90)"


def test_a_net_in_proportion_to_its_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a clock that counts how often it is asked: a layer takes one of the three ticks of the whole net."""
    dense = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
    small = tensorize(copy.deepcopy(dense), [Rule("0", Tucker(4))])
    x = torch.randn(1, 8, 6, 6)
    monkeypatch.setattr(nets.time, "perf_counter", itertools.count().__next__)
    kept = macs_kept(small[0], x.shape)
    assert kept == pytest.approx((32 * 36 + 144 * 16 + 32 * 16) / (576 * 16))
    assert nets.proportional(dense, small, x) == pytest.approx(1 / (1 - (1 - kept) / 3))
    assert nets.proportional(nn.ReLU(), small, x) is None


@pytest.mark.parametrize("path", sorted((ROOT / "results/speed").glob("*.json")), ids=lambda path: path.stem)
def test_the_page_is_that_of_the_results(path: Path) -> None:
    assert (ROOT / "docs/speed.md").read_text() == tables(json.loads(path.read_text()))
