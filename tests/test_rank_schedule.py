"""Ranks that fall during training: everything follows, and a run that is cut anywhere goes on as if it had not been."""

import copy
import itertools
from contextlib import nullcontext
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch._dynamo.utils import counters
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_modules.callbacks.compression_log import CompressionLog
from lightning_modules.callbacks.ema import EMA
from lightning_modules.callbacks.rank_schedule import RankSchedule
from lightning_modules.callbacks.rank_steps import steps_of
from lightning_modules.callbacks.replaced_parameters import check_replicas, check_strategy, reset_scores
from lightning_modules.classifier import ImageClassifier
from lightning_modules.data import Digits
from tests.commands import DIGITS, QUIET, tnlayers
from tests.processes import Watch
from tests.test_training import METHODS, rules
from tests.tolerances import FLOAT32
from tnlayers import CheckpointError, FactorizedLayer, ParamsKept, fraction_kept

pytestmark = pytest.mark.filterwarnings("ignore:ADTN. .* leave a relative error")
RULES = [
    {"pattern": "conv2", "method": "CP", "rank": "ParamsKept(1.0)"},  # dense, until a truncation wants it otherwise
    {"pattern": "conv3", "method": "Tucker", "rank": 24},
    {"pattern": "conv4", "method": "LowRank", "rank": 24},
    {"pattern": "fc1", "method": "TT", "rank": 8},
]
OPTIMIZERS = {
    "Adam": lambda parameters: torch.optim.AdamW(parameters, lr=2e-3),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
}


def classifier(optimizer: str = "Adam", **options: Any) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(**({"rules": RULES, "init": "random", "optimizer": OPTIMIZERS[optimizer]} | options))


def trainer_of(folder: Path, *callbacks: Callback, epochs: int = 4, **options: Any) -> Trainer:
    few = {"limit_train_batches": 3, "limit_val_batches": 1, "max_epochs": epochs}
    quiet = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return Trainer(
        default_root_dir=folder, callbacks=list(callbacks), enable_checkpointing=saves, **(few | quiet | options)
    )


def fitted(
    folder: Path,
    *callbacks: Callback,
    model: ImageClassifier | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> ImageClassifier:
    model = model or classifier()
    trainer_of(folder, *callbacks, **options).fit(
        model, datamodule=Digits(batch_size=64, augment="none"), ckpt_path=ckpt_path, weights_only=True
    )
    return model


def ranks(model: ImageClassifier) -> dict[str, Any]:
    return {name: layer.rank for name, layer in model.net.named_modules() if isinstance(layer, FactorizedLayer)}


# ---- everything follows


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("method", "layers", "rank"), METHODS, ids=[method for method, *_ in METHODS])
def test_every_parameter_moves_after_a_truncation(
    method: str, layers: tuple[str, ...], rank: int, optimizer: str, tmp_path: Path
) -> None:
    watch, model = Watch(str(tmp_path)), classifier(optimizer, rules=rules(method, layers, rank))
    fitted(tmp_path, RankSchedule({1: rank // 2 or 1}), watch, model=model, epochs=2)
    assert watch.still == {0: [], 1: []}
    assert all(max(layer.ranks) <= rank // 2 for layer in model.net.modules() if isinstance(layer, FactorizedLayer))


def test_a_layer_that_was_left_dense_takes_part(tmp_path: Path) -> None:
    watch = Watch(str(tmp_path))
    model = fitted(tmp_path, RankSchedule({1: "ParamsKept(0.1)"}), watch, epochs=2)
    assert "conv2" in ranks(model)
    assert watch.still == {0: [], 1: []}


def test_other_parameters_keep_their_moments(tmp_path: Path) -> None:
    class Steps(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            state = trainer.optimizers[0].state
            self.steps = {name: int(state[p]["step"]) for name, p in pl_module.named_parameters()}

    steps = Steps()
    fitted(tmp_path, RankSchedule({1: ParamsKept(0.1)}, pattern="conv3"), steps, epochs=2)  # type: ignore[dict-item]
    fresh = {name for name, count in steps.steps.items() if count == 3}
    assert fresh == {f"net.conv3.factors.{name}" for name in ("input", "core", "output")}
    assert all(count == 6 for name, count in steps.steps.items() if name not in fresh)


OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16-mixed"},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 0.1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("ema", [False, True], ids=["plain", "EMA"])
def test_truncation_among_the_trainers_options(options: dict[str, Any], ema: bool, tmp_path: Path) -> None:
    watch = Watch(str(tmp_path))
    callbacks = [RankSchedule({1: "ParamsKept(0.2)"}), *([EMA(decay=0.5)] if ema else []), watch]
    model = fitted(tmp_path, *callbacks, epochs=2, **options)
    assert watch.still == {0: [], 1: []}
    assert fraction_kept(model.net, ParamsKept) <= 0.2
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_compiled_nets_recompile_once_for_each_truncation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    class Count(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            graphs.append(counters["stats"]["unique_graphs"])

    # The machine code that inductor makes of a graph takes long, and is not what this is about.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    watch, model = Watch(str(tmp_path)), classifier(compile=True)
    fitted(tmp_path, RankSchedule({2: 4}), Count(), watch, model=model, limit_val_batches=0)
    torch._dynamo.reset()
    assert graphs == [1, 1, 2, 2]
    assert watch.still == {epoch: [] for epoch in range(4)}
    assert not any("_orig_mod" in name for name in model.state_dict())


def test_the_average_begins_anew(tmp_path: Path) -> None:
    """Directly after a truncation averaged and live weights are the same; before it they were not."""
    differences: list[float] = []

    class Compare(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            average = ema._average_model.module.state_dict()  # type: ignore[union-attr]
            live = pl_module.state_dict()
            if trainer.current_epoch == 1:
                assert {n: p.shape for n, p in average.items()} == {n: p.shape for n, p in live.items()}
                differences.append(max(float((live[name] - average[name]).double().norm()) for name in live))

    ema = EMA(decay=0.9)
    model = fitted(tmp_path, RankSchedule({1: 4}, pattern="conv3"), ema, Compare(), epochs=2)
    assert [value == 0 for value in differences] == [True, False, False]
    # What training ends with is the average.
    average = ema._average_model.module.state_dict()  # type: ignore[union-attr]
    torch.testing.assert_close(model.state_dict(), average, rtol=0, atol=0)


def test_a_compiled_net_is_validated_with_its_averages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Compare(Callback):
        seen = 0

        def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
            with torch.compiler.set_stance("force_eager"):
                expected = copy.deepcopy(pl_module)(batch[0])
            torch.testing.assert_close(pl_module(batch[0]), expected, **FLOAT32)
            self.seen += 1

        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            """The weights are those of training again."""
            x = torch.rand(2, 1, 8, 8)
            with torch.compiler.set_stance("force_eager"):
                expected, eager = copy.deepcopy(pl_module)(x), pl_module(x)
            torch.testing.assert_close((eager, pl_module(x)), (expected, expected), **FLOAT32)
            self.seen += 1

    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    compare = Compare()
    model = classifier(compile=True)
    fitted(tmp_path, EMA(decay=0.9), compare, model=model, epochs=3, num_sanity_val_steps=0)
    assert compare.seen == 6


def test_what_was_best_before_is_forgotten() -> None:
    best = ModelCheckpoint(monitor="val/accuracy", mode="max")
    best.best_model_path, best.best_model_score = "old.ckpt", torch.tensor(0.9)
    best.best_k_models, best.kth_best_model_path = {"old.ckpt": torch.tensor(0.9)}, "old.ckpt"
    last = ModelCheckpoint()
    last.best_model_path = "latest.ckpt"
    stop = EarlyStopping(monitor="val/loss")
    stop.wait_count, stop.best_score = 2, torch.tensor(0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    plateau = ReduceLROnPlateau(optimizer)
    plateau.step(0.1)
    plateau.step(0.2)
    trainer: Any = SimpleNamespace(
        callbacks=[best, last, stop], lr_scheduler_configs=[SimpleNamespace(scheduler=plateau)]
    )
    reset_scores(trainer)
    assert best.best_model_path == ""
    assert best.best_k_models == {}
    assert best.check_monitor_top_k(trainer, torch.tensor(0.5))
    assert last.best_model_path == "latest.ckpt"  # it is not the best of anything, and is replaced by the next
    assert (stop.wait_count, stop.best_score) == (0, float("inf"))
    assert (plateau.num_bad_epochs, plateau.best) == (0, float("inf"))


def test_a_truncation_begins_a_new_record_and_is_reported(tmp_path: Path) -> None:
    """In a real run: the best of before does not stay the best, patience begins anew, and the folder has the report."""

    best = ModelCheckpoint(dirpath=tmp_path / "run/checkpoints", monitor="val/accuracy", mode="max", filename="{epoch}")
    stop = EarlyStopping(monitor="val/accuracy", mode="max", patience=1)
    schedule = RankSchedule({3: "ParamsKept(0.006)"})  # after which hardly anything is recognised
    model = fitted(tmp_path, schedule, CompressionLog(), best, stop, epochs=4)
    assert Path(best.best_model_path).name == "epoch=3.ckpt"
    assert "epoch=2.ckpt" in {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert (stop.stopped_epoch, model.trainer.current_epoch) == (0, 4)
    written = {path.name for path in (tmp_path / "truncations/epoch=3").iterdir()}
    assert {"report.md", "report.json", "layers.png", "spectra.png", "spectra.json"} <= written


@pytest.mark.parametrize("same", [True, False])
def test_replicas_that_differ_are_an_error(same: bool) -> None:
    """Another process's digest, which here is made up."""
    net = torch.nn.Linear(3, 2)
    strategy = SimpleNamespace(
        broadcast=lambda digest: digest if same else "0" * 64, reduce_boolean_decision=lambda value, all: value
    )
    trainer: Any = SimpleNamespace(strategy=strategy)
    with nullcontext() if same else pytest.raises(RuntimeError, match="different weights after a truncation"):
        check_replicas(trainer, net)


# ---- a run that is cut


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("ema", [False, True], ids=["plain", "EMA"])
def test_a_resumed_run_equals_the_uninterrupted_one(optimizer: str, ema: bool, tmp_path: Path) -> None:
    """From before a truncation, from right before it, from right after it, and from amid a gradual one."""

    def callbacks(folder: Path) -> list[Callback]:
        saved = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, save_last=True)
        schedule = RankSchedule({2: "ParamsKept(0.3)", "4-5": "ParamsKept(0.1)"})
        return [schedule, saved, *([EMA(decay=0.8)] if ema else [])]

    whole = fitted(tmp_path, *callbacks(tmp_path / "whole"), model=classifier(optimizer), epochs=7)
    for epoch in (0, 1, 2, 4):
        folder = tmp_path / f"from{epoch}"
        rest = fitted(
            tmp_path,
            *callbacks(folder),
            model=classifier(optimizer, init="decompose"),
            epochs=7,
            ckpt_path=tmp_path / f"whole/epoch={epoch}.ckpt",
        )
        assert ranks(rest) == ranks(whole)
        torch.testing.assert_close(rest.state_dict(), whole.state_dict(), rtol=0, atol=0)
        ends = [torch.load(path / "last.ckpt", weights_only=True) for path in (tmp_path / "whole", folder)]
        assert ends[0]["global_step"] == ends[1]["global_step"]
        torch.testing.assert_close(ends[1]["state_dict"], ends[0]["state_dict"], rtol=0, atol=0)
        torch.testing.assert_close(
            ends[1]["optimizer_states"][0]["state"], ends[0]["optimizer_states"][0]["state"], rtol=0, atol=0
        )


# ---- a training that diverges


class Diverge(Callback):
    """From an epoch on nothing is finite any more."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            with torch.no_grad():
                pl_module.net.conv3.factors["core"].fill_(float("nan"))


@pytest.mark.parametrize("rank", [4, "RelativeError(0.2)", "AccuracyDrop(0.01)"])
def test_the_last_good_checkpoint_is_named(rank: Any, tmp_path: Path) -> None:
    saved = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_last=True)
    with pytest.raises(ValueError, match=r"RankSchedule at epoch 2: \w+: the values of its \w+ are not finite") as said:
        fitted(tmp_path, Diverge(1), saved, RankSchedule({2: rank}), epochs=3)
    assert f"go on from {tmp_path / 'kept/epoch=0.ckpt'}, the newest checkpoint whose weights are finite" in str(
        said.value
    )
    assert "\n" not in str(said.value)


def test_an_error_without_words_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any, **options: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("lightning_modules.callbacks.rank_steps.resolve_truncation", silent)
    with pytest.raises(AssertionError):
        fitted(tmp_path, RankSchedule({1: 4}), epochs=2)


def test_where_no_good_checkpoint_was_kept_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"are not finite .* no checkpoint whose weights are finite was kept, so begin anew"
    ):
        fitted(tmp_path, Diverge(0), RankSchedule({1: 4}), epochs=2)


@pytest.mark.parametrize("command", ["compress", "fit"])
@pytest.mark.parametrize("rank", ["8", "ParamsKept(0.3)", "RelativeError(0.2)"])
def test_commands_name_the_layer_whose_weight_is_not_finite(
    command: str, rank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = classifier(rules=[]).net
    with torch.no_grad():
        net.conv3.weight[0, 0, 0, 0] = float("inf")  # type: ignore[union-attr, operator, index]
    torch.save(net.state_dict(), tmp_path / "spoilt.pt")
    source = ["--checkpoint", str(tmp_path / "spoilt.pt"), "--out", str(tmp_path / "out")]
    if command == "fit":
        source = ["--model.init_from", str(tmp_path / "spoilt.pt"), "--trainer.max_epochs", "1"]
    where = ["--trainer.logger", "false", "--trainer.default_root_dir", str(tmp_path), *QUIET]
    rules = ["--model.rules", f"[{{pattern: 'conv[34]', method: LowRank, rank: {rank}}}]"]
    assert tnlayers(command, *DIGITS, *where, *source, *rules) == 2
    *_, line = capsys.readouterr().err.splitlines()  # Lightning says first what it runs on
    assert line.startswith("tnlayers: error: conv3: 1 of the ")
    assert "not finite" in line
    assert not (tmp_path / "out").exists()


def test_a_schedule_in_a_checkpoint_may_be_anything() -> None:
    schedule = RankSchedule({1: 8})
    for state in ({}, {"applied": 3}, {"applied": {"x" * 10_000: 1}}, {"applied": {1: {}, None: 2}}):
        with pytest.raises(CheckpointError, match="has a rank schedule that is not understood") as said:
            schedule.load_state_dict(state)
        assert len(str(said.value)) < 600


# ---- how far


def test_a_range_goes_down_by_equal_factors(tmp_path: Path) -> None:
    kept = []

    class Kept(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            kept.append(fraction_kept(pl_module.net, ParamsKept, rules=pl_module.rules))

    fitted(tmp_path, RankSchedule({"1-3": "ParamsKept(0.1)"}), Kept(), epochs=4)
    steps = [later / earlier for earlier, later in itertools.pairwise(kept)]
    assert kept[3] == pytest.approx(0.1, rel=0.1)
    assert kept[3] <= 0.1
    assert steps == pytest.approx([(kept[3] / kept[0]) ** (1 / 3)] * 3, rel=0.1)


@pytest.mark.parametrize("drop", [0.02, 0.2])
def test_accuracy_drop_goes_as_far_as_allowed(drop: float, tmp_path: Path) -> None:
    """Against a count of its own; and a good deal further would be too far."""
    model = fitted(tmp_path, epochs=3)
    data = Digits(batch_size=64, augment="none")

    def accuracy(net: torch.nn.Module) -> float:
        data.setup("fit")
        pictures, labels = map(torch.cat, zip(*data.val_dataloader(), strict=True))
        x = (pictures.float() / 255 - data.mean[0]) / data.std[0]
        with torch.no_grad():
            return float((net.eval()(x).argmax(dim=1) == labels).float().mean())

    before = copy.deepcopy(model)
    (step,) = steps_of({0: f"AccuracyDrop({drop})"}).values()
    from tnlayers import truncate

    model.trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    truncate(model.net, step.resolve(model, "*"))
    found = fraction_kept(model.net, ParamsKept)
    assert accuracy(before.net) - accuracy(model.net) <= drop
    further = copy.deepcopy(before)
    (step,) = steps_of({0: f"ParamsKept({0.6 * found})"}).values()
    truncate(further.net, step.resolve(further, "*"))
    assert accuracy(before.net) - accuracy(further.net) > drop


# ---- mistakes

WRONG: list[tuple[dict[Any, Any], str]] = [
    ({"two": 4}, r"ranks \{two: 4\}: 'two' is no epoch; expected a number from 0 on, or a range such as 4-8"),
    ({-1: 4}, "-1 is no epoch"),
    ({"5-2": "ParamsKept(0.5)"}, "'5-2' ends before it begins"),
    ({"2-4": 8}, "a range of epochs goes down to a budget"),
    ({"2-4": "RelativeError(0.1)"}, "a range of epochs goes down to a budget"),
    ({"2-4": "ParamsKept(0.5)", 3: 4}, "epoch 3 has a rank already"),
    ({2: 0.5}, "bare float"),
    ({2: "ParamsKept(2)"}, "above 0 and at most 1"),
    ({2: "AccuracyDrop(2)"}, r"AccuracyDrop\(2.0\): expected a number from 0 to below 1"),
    ({2: "AccuracyDrop(x)"}, "could not convert|not a number"),
    ({2: "Params(0.5)"}, "not understood"),
]


@pytest.mark.parametrize(("schedule", "message"), WRONG, ids=[str(schedule) for schedule, _ in WRONG])
def test_wrong_schedules(schedule: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankSchedule(schedule)


def test_an_epoch_that_never_comes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="RankSchedule has epoch 9, and training ends before it: max_epochs 2"):
        fitted(tmp_path, RankSchedule({9: 4}), epochs=2)


def test_what_is_past_cannot_be_changed(tmp_path: Path) -> None:
    saved = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    fitted(tmp_path, RankSchedule({1: 8}), saved, epochs=3)
    for ranks, had in (({1: 4}, "having had 8 there"), ({0: 4, 1: 8}, "having had no truncation there")):
        with pytest.raises(ValueError, match=f"this run is at epoch 3, {had}"):
            fitted(tmp_path, RankSchedule(ranks), epochs=5, ckpt_path=tmp_path / "epoch=2.ckpt")
    later = fitted(tmp_path, RankSchedule({1: 8, 4: 4}), epochs=5, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert max(layer.ranks[0] for layer in later.net.modules() if isinstance(layer, FactorizedLayer)) == 4


@pytest.mark.parametrize(
    ("rank", "pattern", "message"),
    [(8, "nope", "matches no factorized layer"), ("AccuracyDrop(0.1)", "*", "no validation pictures")],
)
def test_mistakes_are_said_before_training(rank: Any, pattern: str, message: str, tmp_path: Path) -> None:
    class Steps(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            pytest.fail("it trained first")

    trainer = trainer_of(tmp_path, RankSchedule({1: rank}, pattern=pattern), Steps(), epochs=2)
    with pytest.raises(ValueError, match=f"RankSchedule at epoch 1: .*{message}"):
        trainer.fit(classifier(), datamodule=Digits(val_fraction=0))


def test_a_budget_out_of_reach_names_the_epoch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"RankSchedule at epoch 1: .* cannot be reached"):
        fitted(tmp_path, RankSchedule({1: "ParamsKept(0.0001)"}), epochs=2)


def test_accuracy_drop_needs_validation_pictures() -> None:
    (step,) = steps_of({0: "AccuracyDrop(0.1)"}).values()
    model = classifier()
    model.setup("validate")
    model.trainer = SimpleNamespace(datamodule=Digits(val_fraction=0))  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"no validation pictures; hold some out: --data.val_fraction"):
        step.resolve(model, "*")


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            SimpleNamespace(strategy=FSDPStrategy(), callbacks=[]),
            "under FSDPStrategy, which shards .*--trainer.strategy ddp",
        ),
        (
            # Its constructor asks for the package deepspeed.
            SimpleNamespace(strategy=DeepSpeedStrategy.__new__(DeepSpeedStrategy), callbacks=[]),
            "under DeepSpeedStrategy, which shards .*--trainer.strategy ddp",
        ),
        (None, "under StochasticWeightAveraging; average by"),
    ],
)
def test_what_ranks_cannot_change_under(trainer: Any, message: str, tmp_path: Path) -> None:
    trainer = trainer or trainer_of(tmp_path, StochasticWeightAveraging(swa_lrs=0.1))
    with pytest.raises(ValueError, match=message):
        check_strategy(trainer, "RankSchedule")


def test_lightnings_own_average_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"EMAWeightAveraging copies the net before .*lightning_modules.callbacks.EMA"):
        fitted(tmp_path, EMAWeightAveraging(), epochs=1)
