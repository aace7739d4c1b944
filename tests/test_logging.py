"""What a run leaves for people: metrics that go on, the factorized layers over time, and a report of every truncation."""

import copy
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from lightning_modules.callbacks.compression_log import CompressionLog
from lightning_modules.callbacks.ema import EMA
from lightning_modules.classifier import ImageClassifier
from lightning_modules.data import Digits
from lightning_modules.loggers import CSV
from lightning_modules.plots import Spectrum, plot_spectra
from tests.commands import CONFIGS, DIGITS, QUIET, tnlayers
from tnlayers import FactorizedLayer, summarize
from tnlayers.linalg import effective_rank

RULES = [{"pattern": "conv[34]", "method": "Tucker", "rank": 8}, {"pattern": "fc1", "method": "TT", "rank": 4}]


def rows(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.rglob("metrics.csv")
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- effective rank


def orthogonal(n: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q


def test_effective_rank_of_what_is_known() -> None:
    assert effective_rank(orthogonal(7)) == pytest.approx(7)
    assert effective_rank(orthogonal(7)[:, :3]) == pytest.approx(3)
    assert effective_rank(torch.outer(torch.randn(5), torch.randn(9)).double()) == pytest.approx(1)
    assert effective_rank(torch.zeros(3, 4)) == 0
    assert np.isnan(effective_rank(torch.tensor([[1.0, float("nan")]])))
    shares = np.array([9, 4, 1]) / 14
    assert effective_rank(torch.diag(torch.tensor([3.0, 2.0, 1.0]))) == pytest.approx(
        np.exp(-(shares * np.log(shares)).sum())
    )


@pytest.mark.parametrize("scale", [1e-200, 1e-3, 1e200])
def test_effective_rank_depends_on_proportions_alone(scale: float) -> None:
    matrix = torch.randn(6, 20, dtype=torch.float64)
    rank = effective_rank(matrix)
    assert 1 < rank < 6
    assert effective_rank(scale * orthogonal(6) @ matrix @ orthogonal(20)) == pytest.approx(rank)
    assert effective_rank(matrix.mT) == pytest.approx(rank)


# ---- CSV


def csv_logger(folder: Path) -> CSV:
    return CSV(folder, name="run", version=0)


def test_csv_goes_on(tmp_path: Path) -> None:
    logger = csv_logger(tmp_path)
    for step in range(4):
        logger.log_metrics({"loss": 1.0 / (step + 1)}, step=step)
        logger.save()
    path = tmp_path / "run/version_0/metrics.csv"
    path.write_text(path.read_text() + "0.1,")  # a process was killed here

    again = csv_logger(tmp_path)
    again.rewind(3)
    again.log_metrics({"loss": 0.25, "accuracy": 0.5}, step=3)
    again.save()
    assert [(row["step"], row["loss"], row["accuracy"]) for row in rows(tmp_path)] == [
        ("0", "1.0", ""),
        ("1", "0.5", ""),
        ("2", str(1 / 3), ""),
        ("3", "0.25", "0.5"),
    ]
    assert [each.name for each in path.parent.iterdir()] == ["metrics.csv"]


def test_csv_from_the_beginning(tmp_path: Path) -> None:
    """Nothing of before is kept, not even its columns; a file without a whole line is none."""
    for content in ("old,step\n1,5\n", "old,st"):
        path = tmp_path / "run/version_0/metrics.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        logger = csv_logger(tmp_path)
        logger.rewind(0)
        logger.log_metrics({"loss": 2.0}, step=0)
        logger.save()
        assert rows(tmp_path) == [{"loss": "2.0", "step": "0"}]


# ---- the factorized layers


def fitted(
    folder: Path, rules: list[dict[str, Any]], logger: Any, *callbacks: Callback, **options: Any
) -> ImageClassifier:
    """A classifier that was trained for two short epochs, with the log among its callbacks."""
    data, model = Digits(batch_size=64), ImageClassifier(rules=rules, **options)
    trainer = Trainer(
        max_epochs=2,
        limit_train_batches=3,
        logger=logger,
        callbacks=[CompressionLog(), *callbacks],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=folder,
    )
    trainer.fit(model, datamodule=data)
    return model


def spread(layer: FactorizedLayer) -> float:
    """The effective rank, by numpy's singular values."""
    values = np.linalg.svd(layer.weight.detach().double().flatten(1).numpy(), compute_uv=False)
    shares = values[values > 0] ** 2 / (values**2).sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def test_an_epoch_ends_with_the_weights_that_train_on(tmp_path: Path) -> None:
    """Validation has averaged ones, which follow the log's callback here."""

    class Live(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            self.spread = spread(pl_module.net.conv3)

    live = Live()
    fitted(tmp_path, RULES, CSV(tmp_path, name="run"), EMA(decay=0.5), live)
    *_, averaged, last = [float(row[name]) for row in rows(tmp_path) if row[name := "compress/conv3/effective_rank"]]
    assert last == pytest.approx(live.spread, rel=1e-6)
    assert averaged != pytest.approx(live.spread, rel=1e-6)


@pytest.mark.parametrize("logger", [CSV, CSVLogger])
def test_every_epoch_is_logged(logger: type[CSVLogger], tmp_path: Path) -> None:
    model = fitted(tmp_path, RULES, logger(tmp_path, name="run"))
    totals = summarize(model.net, model.example_input, measure=False).totals
    logged = rows(tmp_path)
    names = [name for name in logged[0] if name.startswith("compress/")]
    first, *later = [row for row in logged if row["compress/macs_kept"]]
    assert float(first["compress/conv3/error"]) > 0
    assert len(later) == 4  # after validation and at the end of each epoch
    for row in later:
        assert row["val/accuracy"] or row["train/accuracy"]
        assert float(row["compress/params_kept"]) == pytest.approx(totals.params_kept)
        assert float(row["compress/macs_kept"]) == pytest.approx(totals.macs_kept)
        assert not row["compress/conv3/error"]  # it was of the beginning
    assert {name: later[-1][name] for name in names if "rank" in name and "effective" not in name} == {
        **{f"compress/conv{n}/rank{bond}": "8.0" for n in (3, 4) for bond in (0, 1)},
        **{f"compress/fc1/rank{bond}": "4.0" for bond in (0, 1)},
    }
    for name in ("conv3", "conv4", "fc1"):
        layer = model.net.get_submodule(name)
        assert isinstance(layer, FactorizedLayer)
        assert float(later[-1][f"compress/{name}/effective_rank"]) == pytest.approx(spread(layer), rel=1e-4)
        assert later[0][f"compress/{name}/effective_rank"] != later[-1][f"compress/{name}/effective_rank"]


def test_a_plain_net_logs_nothing(tmp_path: Path) -> None:
    fitted(tmp_path, [], CSV(tmp_path, name="run"))
    assert not [name for name in rows(tmp_path)[0] if name.startswith("compress/")]


def test_joint_layers_are_logged(tmp_path: Path) -> None:
    rules = [{"pattern": "conv[34]", "method": "ADTN", "rank": 2, "joint": "one"}]
    model = fitted(tmp_path, rules, CSV(tmp_path, name="run"), init="random")
    last = rows(tmp_path)[-1]
    kept = summarize(model.net, model.example_input, measure=False).totals.params_kept
    assert float(last["compress/params_kept"]) == pytest.approx(kept)
    for name in ("conv3", "conv4"):
        assert float(last[f"compress/{name}/rank0"]) == 2
        assert float(last[f"compress/{name}/effective_rank"]) > 1


# ---- truncations


def events(folder: Path) -> Any:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulators.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return found.Reload()


def test_a_truncation_is_reported_everywhere(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    model = fitted(tmp_path / "fit", RULES, False)
    before = copy.deepcopy(model.net)
    for name, rank in (("conv3", 5), ("fc1", 2)):
        model.net.get_submodule(name).truncate(rank)  # type: ignore[operator]
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    loggers = [CSV(tmp_path, name="run"), TensorBoardLogger(tmp_path, name="board")]
    trainer = Trainer(logger=loggers, enable_checkpointing=False, default_root_dir=tmp_path)
    CompressionLog().truncated(trainer, model, before, epoch=4)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    folder = tmp_path / "run/version_0/truncations/epoch=4"
    assert {path.name for path in folder.iterdir()} == {
        *("layers.png", "report.json", "report.md", "spectra.json", "spectra.png")
    }
    spectra = json.loads((folder / "spectra.json").read_text())
    assert list(spectra) == sorted(("conv3", "fc1"), key=lambda name: -spectra[name]["error"])
    errors = {layer["name"]: layer["error"] for layer in json.loads((folder / "report.json").read_text())["layers"]}
    for name in ("conv3", "fc1"):
        old, new = (net.get_submodule(name).weight.detach().double().flatten(1).numpy() for net in (before, model.net))
        values = np.linalg.svd(old, compute_uv=False)
        assert spectra[name]["values"] == pytest.approx(values / values[0], abs=1e-6)
        left = np.linalg.svd(new.reshape(len(new), -1), compute_uv=False)
        assert spectra[name]["left"] == pytest.approx(left / values[0], abs=1e-6)
        assert errors[name] == pytest.approx(np.linalg.norm(old - new) / np.linalg.norm(old), rel=1e-5)
    assert (spectra["conv3"]["before"], spectra["conv3"]["after"]) == ([8, 8], [5, 5])
    assert errors["conv4"] == pytest.approx(0, abs=1e-6)

    (row,) = rows(tmp_path / "run")
    assert float(row["compress/conv3/error"]) == pytest.approx(errors["conv3"])
    board = events(tmp_path / "board/version_0")
    assert board.Scalars("compress/conv3/error")[0].value == pytest.approx(errors["conv3"])
    assert set(board.Tags()["images"]) == {"compress/plots/layers", "compress/plots/spectra"}
    table = board.Tensors("compress/layers/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| whole model |" in table


def test_many_spectra_fit_a_page(tmp_path: Path) -> None:
    values = tuple(0.8**n for n in range(40)) + (0.0,) * 8
    spectra = [Spectrum(f"layer{n}", values, values[:20], (48, 30), (20, 15), 0.1) for n in range(20)]
    figure = plot_spectra(spectra)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title().split("\n")[0] for axes in panels] == [f"layer{n}" for n in range(16)]
    assert all([len(line.get_xdata()) for line in axes.lines] == [40, 20] for axes in panels)  # zeros are not drawn
    figure.savefig(tmp_path / "spectra.png")
    with Image.open(tmp_path / "spectra.png") as picture:
        picture.load()
    plot_spectra([Spectrum("zero", (0.0, 0.0), (0.0, 0.0), (), (1,), 0.0)]).savefig(tmp_path / "zero.png")


# ---- TensorBoard


def test_tensorboard(tmp_path: Path) -> None:
    """One folder, in which a run goes on; the configuration is in it and on the board."""
    pytest.importorskip("tensorboard")
    rules = ["--model.rules", json.dumps(RULES)]
    root = ["--trainer.default_root_dir", str(tmp_path), *QUIET]
    command = ["fit", *DIGITS, *rules, "-c", str(CONFIGS / "logger/tensorboard.yaml"), *root, "--ckpt_path", "last"]
    every = ["--model_checkpoint.save_top_k", "-1"]
    assert tnlayers(*command, *every, "--trainer.max_epochs", "2") == 0
    (folder,) = (tmp_path / "logs").iterdir()
    for name in ("last", "epoch=1-step=42"):  # as if it had been killed in the second epoch
        (folder / f"checkpoints/{name}.ckpt").unlink()
    assert tnlayers(*command, "--trainer.max_epochs", "3") == 0
    assert list((tmp_path / "logs").iterdir()) == [folder]
    board = events(folder)
    assert [event.step for event in board.Scalars("train/loss")] == [20, 41, 62]
    assert board.Scalars("compress/conv3/rank0")[0].value == 8
    assert {"cli/text_summary", "cli-resumed-1/text_summary"} <= set(board.Tags()["tensors"])
    assert "max_epochs: 2" in (folder / "config.yaml").read_text()
    assert "max_epochs: 3" in (folder / "config-resumed-1.yaml").read_text()
