"""The report: files that agree with the summary, plots with a bar for each layer, a folder that must be new."""

import json
import re
import subprocess
import sys
from contextlib import suppress
from io import StringIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from lightning_modules.folders import whole_folder
from lightning_modules.locks import FolderInUse
from lightning_modules.nets import build_net
from lightning_modules.plots import plot_accuracy, plot_layers
from lightning_modules.report import Report
from tests.processes import HANGING
from tnlayers import LowRank, Rule, Summary, rules_from_plain, summarize, tensorize
from tnlayers.markdown import markdown_table

RULES = [
    {"pattern": "conv1", "method": "dense", "reason": "it is small"},
    {"pattern": "conv*", "method": "Tucker", "rank": 8},
    {"pattern": "fc1", "method": "TT", "rank": 4},
]
LAYERS = ["conv1", "conv2", "conv3", "conv4", "fc1", "fc2"]
STAGES = {"dense": 0.99, "right after": 0.5, "retrained": 0.98}


@pytest.fixture(scope="module")
def summary() -> Summary:
    net = build_net("cnn4", num_classes=10, input_shape=(1, 8, 8))
    rules = rules_from_plain(RULES)
    return summarize(tensorize(net, rules), torch.zeros(4, 1, 8, 8), rules=rules)


@pytest.mark.parametrize(
    ("stages", "plots"), [(0, ["layers.png"]), (1, ["layers.png"]), (3, ["accuracy.png", "layers.png"])]
)
def test_write(stages: int, plots: list[str], summary: Summary, tmp_path: Path) -> None:
    accuracy = dict(list(STAGES.items())[:stages])
    Report("cnn4", summary, accuracy, ("a note",)).write(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted([*plots, "report.json", "report.md"])
    for name in plots:
        with Image.open(tmp_path / "new" / name) as picture:
            picture.load()
            assert min(picture.size) > 200


def test_json_adds_up_and_agrees(summary: Summary, tmp_path: Path) -> None:
    Report("cnn4", summary, STAGES, ("a note",)).write(tmp_path)
    plain = json.loads((tmp_path / "report.json").read_text())
    assert (plain["title"], plain["accuracy"], plain["notes"]) == ("cnn4", STAGES, ["a note"])
    layers, totals = plain["layers"], plain["totals"]
    assert [layer["name"] for layer in layers] == LAYERS
    assert [layer["rank"] for layer in layers] == [list(layer.rank) for layer in summary.layers]
    norms = 2 * (32 + 64 + 64 + 128)  # BatchNorm's parameters
    assert plain["other"] == {"dense_params": norms, "params": norms, "dense_macs": 0, "macs": 0} | dict.fromkeys(
        ["dense_seconds", "seconds"]
    )
    for key in ("macs", "dense_macs", "params", "dense_params"):
        assert totals[key] == sum(layer[key] for layer in layers) + plain["other"][key] == getattr(summary.totals, key)
    assert totals["params_kept"] == totals["params"] / totals["dense_params"]
    assert torch.__version__.startswith(plain["environment"]["torch"])


def test_markdown_table() -> None:
    text = markdown_table(["name", "a|b"], [["x|y", 1]], numbers=[1])
    assert text == "| name | a\\|b |\n| --- | ---: |\n| x\\|y | 1 |"


def test_no_fraction_is_kept_of_nothing() -> None:
    """A look-up multiplies nothing, its factors do: that is not all of it."""
    net = tensorize(nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 16)), [Rule("0", LowRank(4))])
    summary = summarize(net, torch.zeros(2, 3, dtype=torch.long), measure=False)
    headings, (row, *_) = summary.table()
    place = headings.index("MACs")
    assert row[place : place + 2] == ["192", "-"]
    report, console = Report("net", summary, {}), Console(file=StringIO(), width=80)
    report.show(console)
    plot_accuracy(summarize(net[:1], torch.zeros(2, 3, dtype=torch.long), measure=False), STAGES)
    assert re.search(r"0 +LowRank 4 .* 0\.00M +- ", console.file.getvalue())  # type: ignore[attr-defined]


def test_markdown_agrees(summary: Summary, tmp_path: Path) -> None:
    Report("cnn4", summary, STAGES, ("a note",)).write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    params, macs = rows[0].index("params"), rows[0].index("MACs")
    entries = [*summary.layers, summary.other, summary.totals]
    assert [row[0] for row in rows[2:]] == [*LAYERS, "other operations", "whole model"]
    assert [(row[params], row[macs]) for row in rows[2:]] == [
        (f"{each.params:,}", f"{each.macs:,}") for each in entries
    ]
    assert "dense 99.00%, right after 50.00%, retrained 98.00%" in text
    assert "it is small" in text
    pictures = re.findall(r"\]\((.*?)\)", text)
    assert pictures == ["layers.png", "accuracy.png"]
    assert all((tmp_path / name).is_file() for name in pictures)


def test_table_fits_a_terminal(summary: Summary) -> None:
    console = Console(width=80, record=True, file=StringIO())
    Report("cnn4", summary, {}).show(console)
    table = console.export_text().split("parameters")[0].splitlines()
    assert max(map(len, table)) <= 80
    assert [line.split()[0] for line in table if line.strip() and line.split()[0] in LAYERS] == LAYERS


def test_plots_have_a_bar_for_everything(summary: Summary) -> None:
    panels = plot_layers(summary).axes
    num_factorized = sum(bool(layer.rank) for layer in summary.layers)
    assert num_factorized == 4
    # A layer trained from scratch, or dense, has no error to show.
    num_errors = sum(layer.error is not None for layer in summary.layers)
    assert [len(axes.patches) for axes in panels] == [2 * len(LAYERS) + 2, 2 * len(LAYERS) + 2, num_errors]
    assert [label.get_text().split()[0] for label in panels[0].get_yticklabels()] == [*LAYERS, "other"]
    left, right = plot_accuracy(summary, STAGES).axes
    assert [bar.get_height() for bar in left.patches] == pytest.approx([99, 50, 98])
    assert len(right.patches) == 3
    assert right.patches[0].get_height() == pytest.approx(100 * summary.totals.params_kept)


def test_plots_of_an_untimed_summary() -> None:
    net = build_net("cnn4", num_classes=10, input_shape=(1, 8, 8))
    summary = summarize(net, torch.zeros(1, 1, 8, 8), measure=False)
    assert len(plot_accuracy(summary, STAGES).axes[1].patches) == 2
    assert len(plot_layers(summary).axes[2].patches) == 0


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    """New, or empty; in a block that fails nothing is left, and what a killed process has left is begun anew."""
    out = tmp_path / "a" / "b"
    with suppress(ZeroDivisionError), whole_folder(out) as folder:
        (folder / "model.ckpt").write_text("half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    left = tmp_path / "a/.b.partial/logs/config.yaml"
    left.parent.mkdir(parents=True)
    left.touch()
    out.mkdir()
    with whole_folder(out) as folder:
        assert not list(out.iterdir())
        (folder / "model.ckpt").touch()
    assert [path.name for path in out.parent.iterdir()] == ["b"]
    assert [path.name for path in out.iterdir()] == ["model.ckpt"]
    for taken in (out, out / "model.ckpt"):
        message = f"{taken} already holds a run; give another --out"
        with pytest.raises(FolderInUse, match=re.escape(message)), whole_folder(taken):
            pass


def test_plots_leave_pyplot_alone() -> None:
    """pyplot keeps global state and picks a display."""
    code = "import sys, lightning_modules.report; print('matplotlib.figure' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGING, check=True)
    assert done.stdout.split() == ["True", "False"]
