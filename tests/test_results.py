"""The experiments' runner and tables, on the digits, and the tables that are in results/README.md."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from lightning_modules import build_net
from lightning_modules.locks import try_lock
from results import healing
from results import run as runner
from results.experiments import EXPERIMENTS, Experiment, Variant
from results.tables import section, tables
from tests.commands import QUIET

ROOT = Path(__file__).parents[1]
TINY = Experiment("digits", "scikit-learn's digits", (Variant("low rank", seeds=2),))
LOW_RANK = ROOT / "configs/rules/lowrank.yaml"


def run_tiny(folder: Path) -> Path:
    """Seed 0 of the tiny experiment, one epoch of it; the path of its JSON."""
    (variant,) = TINY.variants
    variant = Variant(variant.name, ("-c", str(LOW_RANK)), variant.seeds)
    handed = ["--trainer.max_epochs", "1", *QUIET]
    runner.run(TINY, variant, 0, where=[], handed=handed, results=folder / "results", runs=folder / "runs")
    return folder / "results/digits/low_rank_seed0.json"


def test_a_run_leaves_its_json_and_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = run_tiny(tmp_path)
    result = json.loads(path.read_text())
    assert (result["variant"], result["seed"], result["data"]) == ("low rank", 0, "scikit-learn's digits")
    given = f"-c experiment/digits -c {LOW_RANK} --seed_everything 0 --trainer.max_epochs 1"
    assert result["command"] == " ".join(["tnlayers fit", given, *QUIET])
    assert result["epochs"] == len(result["train"]) == 1
    assert 0 < result["test"]["accuracy"] < 1
    assert "torch" in result["environment"]
    widths = [(3 * 3 * 1, 32), (3 * 3 * 32, 64), (3 * 3 * 64, 64), (3 * 3 * 64, 128)]
    assert result["convolutions"]["dense_weights"] == sum(rows * columns for rows, columns in widths)
    layers = {layer["name"]: layer for layer in result["layers"]}
    (rank,) = layers["conv4"]["rank"]
    assert layers["conv4"]["weights"] == rank * 3 * (64 + 128)
    assert layers["fc1"]["weights"] == layers["fc1"]["dense_weights"] == 4 * 128 * 128  # biases aside

    monkeypatch.setattr(subprocess, "run", pytest.fail)
    assert run_tiny(tmp_path) == path

    other = result | {"seed": 1, "test": {"loss": 0.0, "accuracy": result["test"]["accuracy"] + 0.02}}
    path.with_name("low_rank_seed1.json").write_text(json.dumps(other))
    times = tmp_path / "epoch_time.json"
    measured = {"variants": [{"variant": "low rank", "epoch_seconds": 12.3, "over_dense": 0.456}]}
    times.write_text(json.dumps({"digits": measured}))
    *_, row, _ = section(TINY, tmp_path / "results", times).split("\n")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    totals, convolutions = result["totals"], result["convolutions"]
    assert cells[0] == "low rank"
    assert float(cells[1].rstrip(" %")) == pytest.approx(
        100 * convolutions["weights"] / convolutions["dense_weights"], abs=0.05
    )
    assert cells[3] == f"{totals['params']:,}"
    assert cells[6] == "12 s, 0.46x"
    mean, spread = map(float, cells[8].split(" ± "))
    assert mean == pytest.approx(100 * result["test"]["accuracy"] + 1, abs=0.006)
    assert spread == pytest.approx(2**0.5, abs=0.006)  # of two values two points apart
    assert cells[-1] == "2"

    without = [layer for layer in result["layers"] if not layer["name"].startswith("fc")]
    path.write_text(json.dumps(result | {"layers": without}))
    *_, row, _ = section(TINY, tmp_path / "results", times).split("\n")
    assert row.split("|")[3].strip() == ""  # of linears


def test_variants_are_compared_with_what_was_trained_as_long(tmp_path: Path) -> None:
    short = ("--trainer.max_epochs", "1")
    variants = (
        Variant("dense"),
        Variant("low rank"),
        Variant("dense, short", short, against="dense, short"),
        Variant("low rank, short", short, against="dense, short"),
        Variant("of a dense net that has no run", against="another"),
    )
    experiment = Experiment("tiny", "", variants)
    run = json.loads((ROOT / "results/cnn4_from_scratch/dense_seed0.json").read_text())
    for variant, accuracy in zip(variants, (0.7, 0.7, 0.5, 0.45, 0.4), strict=True):
        path = runner.result_path(tmp_path, experiment, variant, 0)
        runner.write(path, run | {"test": {"loss": 0.0, "accuracy": accuracy}})
    rows = [line.split("|") for line in section(experiment, tmp_path).splitlines() if line.startswith("| ")][2:]
    assert [cells[10].strip() for cells in rows] == ["", "+0.00", "", "-5.00", ""]


def test_a_run_that_another_process_is_at_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", pytest.fail)
    with try_lock(tmp_path / "runs/digits/low_rank_seed0/lock") as lock:
        assert lock
        assert not run_tiny(tmp_path).exists()


def test_training_that_outlives_its_runner_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start(command: list[str], check: bool, pass_fds: list[int]) -> None:
        started.append(subprocess.Popen(["sleep", "60"], pass_fds=pass_fds))

    monkeypatch.setattr(subprocess, "run", start)
    with try_lock(tmp_path / "lock") as lock:
        assert lock
        runner.tnlayers("fit", lock=lock)
    with try_lock(tmp_path / "lock") as lock:
        assert lock is None
    started[0].kill()
    started[0].wait()
    with try_lock(tmp_path / "lock") as lock:
        assert lock


def test_the_most_telling_runs_come_first() -> None:
    experiment = Experiment("digits", "", (Variant("a", seeds=2), Variant("b"), Variant("c", seeds=2)))
    order = [(variant.name, seed) for variant, seed in experiment.runs()]
    assert order == [("a", 0), ("c", 0), ("b", 0), ("a", 1), ("c", 1)]


def test_the_tables_are_those_of_the_json_files() -> None:
    text = (ROOT / "results/README.md").read_text()
    assert tables(text, ROOT / "results") == text
    assert all(f"<!-- runs of {name} -->" in text for name in EXPERIMENTS)


def test_the_page_of_healing_is_that_of_the_measured_runs() -> None:
    found = json.loads(healing.JSON.read_text())
    page = healing.PAGE.read_text()
    assert healing.with_table(page, found) == page
    seeds = {(name, budget): 0 for name in healing.METHODS for budget in healing.BUDGETS}
    for one in found["runs"]:
        seeds[one["method"], one["budget"]] += 1
        assert set(one["accuracy"]) == set(healing.STAGES)
    assert all(count == healing.SEEDS[name] for (name, _), count in seeds.items())


def test_a_row_of_healing_has_every_stage() -> None:
    """On pictures of noise and a net that nobody has trained; only the figures' being there counts."""

    class Noise:
        def calibration_batches(self, n: int) -> list[torch.Tensor]:
            return [torch.randn(8, 3, 8, 8) for _ in range(n)]

        def test_batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
            return [(torch.randn(8, 3, 8, 8), torch.arange(8))]

    torch.manual_seed(0)
    dense = build_net("resnet20", num_classes=10, input_shape=(3, 32, 32)).eval()
    row = healing.measure(Noise(), dense, "LowRank", 0.5, 0)  # type: ignore[arg-type]
    assert set(row["accuracy"]) == set(healing.STAGES)
    assert len(row["errors, healed"]) == 9
    assert row["seconds"].keys() == {"compress", "closed form", "healed"}
    json.dumps(row)
