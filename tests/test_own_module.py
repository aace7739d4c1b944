"""LightningModules of a user's own, which know nothing of `ImageClassifier`: callbacks, checkpoints and commands work with them."""

import copy
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_modules.callbacks import EMA, CompressionLog, Freeze, RankSchedule
from lightning_modules.callbacks.rank_steps import steps_of
from lightning_modules.callbacks.replaced_parameters import follow_optimizers
from lightning_modules.tensorized import TensorizedCheckpoint, copied, example_input
from tests.commands import QUIET, tnlayers, weights
from tests.own_module import EPOCHS, RANKS, STEPS, Rivals, UNet, shapes
from tests.processes import Forks, Watch, finish, start
from tests.test_wandb import read_file
from tests.tolerances import EXACT
from tnlayers import CheckpointError, FactorizedLayer, Rule, Tucker, UserError, rules_of, tensorize, to_dense, truncate

KILLED = 2 * STEPS + 2  # the second epoch's checkpoint is there by then, and some steps of the third are logged


def wandb_environment(folder: Path) -> dict[str, str]:
    """Keeps what W&B writes beside a run to a folder."""
    names = ("HOME", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")
    return {name: str(folder) for name in names} | {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}


def same_runs(whole: Path, cut: Path, log: str) -> None:
    """Checks that a run that was killed and went on has the log of one that was not, line by line, in W&B as well."""
    assert (cut / log).read_text() == (whole / log).read_text()
    with open(whole / log, newline="") as file:
        logged = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in logged if row["train/loss_epoch"]] == list(range(EPOCHS))
    kept = {round(float(row["compress/params_kept"]), 4) for row in logged if row["compress/params_kept"]}
    assert len(kept) == 3  # at first, and after each truncation
    (uncut,) = (logged_losses(path) for path in whole.rglob("offline-run-*/*.wandb"))
    before, after = map(logged_losses, sorted(cut.rglob("offline-run-*/*.wandb")))
    assert (uncut[: len(before)], uncut[2:]) == (before, after)  # the file of a killed process may lack its last second


def logged_losses(path: Path) -> list[float]:
    return read_file(path)[1].get("val/loss", [])


# ---- the U-Net, killed and resumed


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a run through the trainer in Python: `whole`, and `cut`, which was killed and went on."""
    folder = tmp_path_factory.mktemp("trained")
    runs = {name: [sys.executable, "-m", "tests.own_module", folder / name] for name in ("whole", "cut")}
    environment = wandb_environment(folder)
    whole = start(runs["whole"], folder, **environment)
    assert finish(start([*runs["cut"], KILLED], folder, **environment))[0] == -9
    code, said = finish(start(runs["cut"], folder, **environment))
    assert code == 0, said
    assert "Restored all states" in said
    assert finish(whole)[0] == 0
    return folder


def test_killed_and_resumed_in_python(trained: Path) -> None:
    same_runs(trained / "whole", trained / "cut", "logs/metrics.csv")
    states = [torch.load(trained / name / "last.ckpt", weights_only=True) for name in ("whole", "cut")]
    assert states[1]["tensorization"] == states[0]["tensorization"]
    for key in ("state_dict", "current_model_state", "optimizer_states"):
        torch.testing.assert_close(states[1][key], states[0][key], **EXACT)


def test_it_is_reloaded_in_another_process(trained: Path) -> None:
    """With the layers that the truncations left, one of which the first budget had left dense."""
    module = UNet.load_from_checkpoint(trained / "whole/last.ckpt").eval()
    ranks = [{rule.pattern: rule.factorization.rank for rule in rules_of(net)} for net in (UNet(), module)]  # type: ignore[union-attr]
    assert ranks[0].keys() < ranks[1].keys()
    assert all(sum(ranks[1][name]) < sum(ranks[0][name]) for name in ranks[0])
    with torch.no_grad():
        predictions = module(shapes(16, 1).tensors[0]).sigmoid()
    # It ran in batches of 8 there.
    torch.testing.assert_close(predictions, torch.load(trained / "whole/predictions.pt"), rtol=1e-5, atol=1e-6)


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    """The options of the U-Net for commands, as a configuration."""
    loggers = [
        {"class_path": "lightning_modules.loggers.CSV", "init_args": {"save_dir": "runs", "name": "logs"}},
        {"class_path": "lightning_modules.loggers.WandB", "init_args": {"save_dir": "runs", "offline": True}},
    ]
    trainer = {"max_epochs": EPOCHS, "log_every_n_steps": 1, "logger": loggers}
    options = {
        "model": {"class_path": "tests.own_module.UNet", "init_args": {"width": 8}},
        "data": "tests.own_module.Discs",
        "trainer": trainer,
        "rank_schedule": {"ranks": RANKS},
        "autotune": {"enabled": False},  # each of two runs would measure something else
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(options))
    average = ["--trainer.callbacks+=lightning_modules.callbacks.EMA", "--trainer.callbacks.decay", "0.8"]
    return ["-c", str(tmp_path / "job.yaml"), *QUIET, *average]


def test_killed_and_resumed_by_command(job: list[str], forks: Forks, tmp_path: Path) -> None:
    fit, environment = ["fit", *job, "--ckpt_path", "last"], wandb_environment(tmp_path)
    kill = ["--trainer.callbacks+=tests.processes.Signalled", "--trainer.callbacks.name", "SIGKILL"]
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    assert forks.start(fit, tmp_path / "whole", **environment).wait() == 0
    killed = [*fit, *kill, "--trainer.callbacks.step", str(KILLED)]
    assert forks.start(killed, tmp_path / "cut", **environment).wait() == -9
    again = forks.start(fit, tmp_path / "cut", **environment)
    assert again.wait() == 0
    assert "Restored all states from the checkpoint at runs/logs/version_0" in again.said
    run = "runs/logs/version_0"
    same_runs(tmp_path / "whole", tmp_path / "cut", f"{run}/metrics.csv")
    last = [weights(tmp_path / name / run / "checkpoints/last.ckpt") for name in ("whole", "cut")]
    torch.testing.assert_close(last[1], last[0], **EXACT)

    for command in ("test", "validate", "predict"):
        ran = forks.start([command, *job, "--ckpt_path", "last"], tmp_path / "cut", **environment)
        assert ran.wait() == 0, ran.said
    assert "written     runs/logs/version_3/predictions.pt" in ran.said
    predictions = torch.load(tmp_path / "cut/runs/logs/version_3/predictions.pt", weights_only=True)
    assert [places for places, _ in predictions] == [[*range(8)], [*range(8, 16)]]
    module = UNet.load_from_checkpoint(tmp_path / "cut" / run / "checkpoints/last.ckpt").eval()
    with torch.no_grad():
        expected = torch.cat([module(part) for part in shapes(16, 1).tensors[0].split(8)]).sigmoid()
    torch.testing.assert_close(torch.cat([values for _, values in predictions]), expected, **EXACT)


# ---- what a module may say, and what is said where it has to


def trainer_of(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **({"max_epochs": 2} | quiet | options))


class Moved(Watch):
    """Checks the optimizers of both nets."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer, net in zip(trainer.optimizers, (pl_module.generator, pl_module.critic), strict=True):
            held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            assert [id(parameter) for parameter in held] == [id(parameter) for parameter in net.parameters()]  # type: ignore[union-attr]
            assert {id(parameter) for parameter in optimizer.state} <= {id(parameter) for parameter in held}
        now = dict(pl_module.named_parameters())
        self.still[trainer.current_epoch] = [name for name in now if torch.equal(now[name], self.before[name])]


@pytest.mark.filterwarnings("ignore:checkpoints of Rivals will not say")
def test_one_of_two_nets_with_an_optimizer_each(tmp_path: Path) -> None:
    moved, module = Moved(str(tmp_path)), Rivals()
    trainer_of(tmp_path, RankSchedule({1: 3}), EMA(decay=0.5), CompressionLog(), moved).fit(module)
    assert moved.still == {0: [], 1: []}
    assert {rule.pattern: rule.factorization.rank for rule in rules_of(module.generator)} == {"3": (3, 2)}  # type: ignore[union-attr]


def test_several_optimizers_steps_are_one_batch_of_the_log(tmp_path: Path) -> None:
    """A log is cut where a run goes on, by batches and not by the steps that both optimizers make of each."""
    job = ["--model", "tests.own_module.Rivals", "--trainer.default_root_dir", str(tmp_path), *QUIET]
    rows = []
    for epochs in ("2", "3"):
        steps = ["--trainer.log_every_n_steps", "1", "--trainer.max_epochs", epochs, "--ckpt_path", "last"]
        assert (
            tnlayers("fit", *job, *steps, *(["--model_checkpoint.every_n_epochs", "2"] if epochs == "2" else [])) == 0
        )
        (log,) = tmp_path.rglob("metrics.csv")
        with open(log, newline="") as file:
            rows.append([row["step"] for row in csv.DictReader(file) if row["train/loss_step"]])
        if epochs == "2":  # as if it had been killed in a third epoch
            log.write_text(log.read_text() + log.read_text().splitlines()[-1].replace(",9", f",{2 * STEPS}") + "\n")
    assert rows == [[str(step) for step in range(STEPS * epochs)] for epochs in (2, 3)]


class Plain(LightningModule):
    """It has factorized layers and says nothing about them."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3))
        tensorize(self, [Rule("convs.*", Tucker(4))], init="random")
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.convs(pictures)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(shapes(8, 0), batch_size=8)


@pytest.mark.parametrize(
    ("attributes", "callbacks", "message"),
    [
        ({}, [CompressionLog()], "Plain.example_input_array is None, and multiply-accumulates are counted with it"),
        ({}, [RankSchedule({1: 2})], "RankSchedule at epoch 1: Plain.example_input_array is None"),
        ({"example_input": [1]}, [CompressionLog()], "is a list, .* expected a tensor or a tuple of tensors"),
        ({"tensorized": "net"}, [CompressionLog()], "Plain.tensorized is 'net', .* such as one of convs"),
        (
            {"example_input": torch.zeros(1, 1, 9, 9)},
            [RankSchedule({1: "AccuracyDrop(0.1)"})],
            r"Plain does not say: define accuracy_of\(self, net\)",
        ),
        ({}, [Freeze(["nothing"])], "no module is called 'nothing'; expected one of convs, convs.0"),
    ],
    ids=["no example", "no example for a schedule", "odd example", "no such net", "no accuracy", "nothing to freeze"],
)
@pytest.mark.filterwarnings("ignore:checkpoints of Plain will not say")
def test_what_a_module_has_to_say(
    attributes: dict[str, Any], callbacks: list[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, *callbacks).fit(Plain(**attributes))


def test_checkpoints_that_do_not_say_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="checkpoints of Plain will not say .*TensorizedCheckpoint the first of its"):
        trainer_of(tmp_path, RankSchedule({1: 2})).fit(Plain(example_input_array=torch.zeros(1, 1, 16, 16)))
    module = type("Told", (TensorizedCheckpoint, Plain), {})()
    trainer = trainer_of(tmp_path)
    trainer.fit(module)
    to_dense(module)
    tensorize(module, [Rule("convs.1", Tucker((3, 2)))])
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    found = type(module).load_from_checkpoint(tmp_path / "other.ckpt")
    assert [(rule.pattern, rule.factorization.rank) for rule in rules_of(found)] == [("convs.1", (3, 2))]  # type: ignore[union-attr]
    content = torch.load(tmp_path / "other.ckpt", weights_only=True)
    content["tensorization"]["layers"][0]["pattern"] = "elsewhere"
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="'elsewhere' matches no layer"):
        type(module).load_from_checkpoint(tmp_path / "other.ckpt")


def test_an_error_in_a_property_is_not_taken_for_a_default() -> None:
    kind = type("Propertied", (Plain,), {"example_input": property(lambda self: self.width)})
    with pytest.raises(AttributeError, match="no attribute 'width'"):
        example_input(kind(example_input_array=torch.zeros(1, 1, 9, 9)))


def test_a_metric_is_not_asked_for_a_nets_accuracy() -> None:
    (step,) = steps_of({0: "AccuracyDrop(0.1)"}).values()
    module = Plain(example_input=torch.zeros(1, 1, 9, 9), validation_accuracy=MulticlassAccuracy(2))
    with pytest.raises(UserError, match=r"define accuracy_of\(self, net\)"):
        step.check(module, "*")


def test_examples_come_in_the_modules_precision() -> None:
    module = Plain(example_input=(torch.zeros(1, 1, 9, 9), torch.ones(2, dtype=torch.long))).double()
    assert [value.dtype for value in example_input(module)] == [torch.float64, torch.int64]


def test_a_copy_shares_what_a_step_has_left() -> None:
    module = Plain()
    module.loss = module.convs(torch.ones(1, 1, 9, 9)).sum()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(module)
    again = copied(module)
    assert again.loss is module.loss
    assert not {id(value) for value in module.parameters()} & {id(value) for value in again.parameters()}


def test_optimizers_may_hold_what_is_not_the_modules() -> None:
    """The weights of a loss stay where they are, with their state; names in the groups follow."""
    module, loss = Plain(), nn.Linear(3, 2)
    optimizers = [
        torch.optim.Adam([*module.parameters(), *loss.parameters()]),
        torch.optim.Adam(module.named_parameters()),
    ]
    for parameter in (*module.parameters(), *loss.parameters()):
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    before = dict(module.named_parameters())
    layer = module.convs[1]
    assert isinstance(layer, FactorizedLayer)
    layer.truncate(2)
    after = dict(module.named_parameters())
    follow_optimizers(optimizers, before, after, {name for name in after if name.startswith("convs.1.factors")})
    assert list(map(id, optimizers[0].param_groups[0]["params"])) == list(
        map(id, [*after.values(), *loss.parameters()])
    )
    assert loss.weight in optimizers[0].state
    assert optimizers[1].param_groups[0]["param_names"] == list(after)


ORDERS: dict[str, Callable[[nn.Module, nn.Module], list[list[nn.Parameter]]]] = {
    "the module's": lambda net, loss: [list(net.parameters())],
    "layers from last to first": lambda net, loss: [[each for layer in reversed(net) for each in layer.parameters()]],  # type: ignore[call-overload]
    "a loss first": lambda net, loss: [[*loss.parameters(), *net.parameters()]],
    "biases apart": lambda net, loss: [
        [each for each in net.parameters() if each.dim() > 1],
        [each for each in net.parameters() if each.dim() == 1],
    ],
}


@pytest.mark.parametrize("order", ORDERS)
def test_optimizers_keep_the_order_of_whoever_made_them(order: str) -> None:
    """A checkpoint tells an optimizer's parameters by their places, in the order of one that is made anew when it is restored."""
    net, loss = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)), nn.Linear(3, 2)
    tensorize(net, [Rule("[01]", Tucker(3))])
    optimizer = torch.optim.SGD([{"params": group} for group in ORDERS[order](net, loss)], lr=0.1)
    before = dict(net.named_parameters())
    tensorize(net, [Rule("2", Tucker(2))])
    truncate(net, [Rule("0", Tucker((2, 2)))])
    follow_optimizers([optimizer], before, dict(net.named_parameters()), set())
    made = [[id(each) for each in group["params"]] for group in optimizer.param_groups]
    assert made == [list(map(id, group)) for group in ORDERS[order](net, loss)]


@pytest.mark.parametrize("command", ["compress", "study"])
def test_jobs_of_image_classifiers_say_so(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["--model", "tests.own_module.UNet", "--data", "tests.own_module.Discs", "--checkpoint", "x.pt", *QUIET]
    assert tnlayers(command, *job, "--trainer.default_root_dir", str(tmp_path)) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"tnlayers: error: {command} takes the nets of ImageClassifier, and --model is tests.own_module.UNet"
    )


def test_a_checkpoint_of_another_module_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = [
        "--trainer.default_root_dir",
        str(tmp_path),
        *QUIET,
        "--trainer.max_epochs",
        "1",
        "--trainer.limit_train_batches",
        "1",
    ]
    assert tnlayers("fit", "--model", "tests.own_module.Rivals", *few) == 0
    (last,) = tmp_path.rglob("last.ckpt")
    other = ["--model=tests.own_module.UNet", "--data=tests.own_module.Discs", "--ckpt_path", str(last)]
    assert tnlayers("fit", *few, *other) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"tnlayers: error: {last} cannot be resumed (RuntimeError: Error(s) in loading state_dict for UNet"
    )


@pytest.mark.parametrize(("command", "hook"), [("test", "test_step"), ("fit", "configure_optimizers")])
def test_a_bug_in_a_hook_is_no_fault_of_the_checkpoint(
    command: str, hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("loading state_dict of a teacher")

    job = ["--model=tests.own_module.UNet", "--data=tests.own_module.Discs", *QUIET]
    job += ["--trainer.default_root_dir", str(tmp_path), "--trainer.limit_train_batches", "1"]
    assert tnlayers("fit", *job, "--trainer.max_epochs", "1") == 0
    (last,) = tmp_path.rglob("last.ckpt")
    monkeypatch.setattr(UNet, hook, fails)
    with pytest.raises(RuntimeError, match="loading state_dict of a teacher"):
        tnlayers(command, *job, "--trainer.max_epochs", "2", "--ckpt_path", last)


@pytest.mark.parametrize("accuracy", [87.0, float("nan"), -0.1])
def test_an_accuracy_is_a_fraction(accuracy: float) -> None:
    (step,) = steps_of({0: "AccuracyDrop(0.1)"}).values()
    module = Plain(example_input=torch.zeros(1, 1, 9, 9), accuracy_of=lambda net: accuracy)
    with pytest.raises(UserError, match=r"Plain\.accuracy_of returned .*; expected a fraction from 0 to 1"):
        step.resolve(module, "*")


def test_a_buffer_may_be_infinite_and_lbfgs_is_refused() -> None:
    module = type("Kept", (TensorizedCheckpoint, Plain), {})(example_input=torch.zeros(1, 1, 9, 9))
    module.register_buffer("mask", torch.full((2, 2), -torch.inf))
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(2, 1, 9, 9)))
    options: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 2}
    Trainer(callbacks=[RankSchedule({1: 2})], **options).fit(module, batches)
    assert {layer.ranks for layer in module.modules() if isinstance(layer, FactorizedLayer)} == {(2, 1), (2, 2)}
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())  # type: ignore[method-assign]
    with pytest.raises(UserError, match="RankSchedule cannot change ranks under LBFGS"):
        Trainer(callbacks=[RankSchedule({1: 2})], **options).fit(module, batches)


def test_a_step_asks_the_module(tmp_path: Path) -> None:
    """A drop that allows everything goes as far as the search does, and one that allows nothing nowhere."""
    module = UNet()
    module.accuracy_of = lambda net: 0.5  # type: ignore[method-assign]
    (step,) = steps_of({0: "AccuracyDrop(0.1)"}).values()
    assert {rule.factorization.rank for rule in step.resolve(module, "*")} == {(1, 1)}  # type: ignore[union-attr]
    scores = iter([0.9] + [0.1] * 20)
    module.accuracy_of = lambda net: next(scores)  # type: ignore[method-assign]
    assert step.resolve(module, "*") == []
