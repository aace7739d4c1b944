"""Training: every method learns, from scratch and from dense; checkpoints, resuming, the teacher."""

from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from lightning_modules.callbacks import Freeze
from lightning_modules.classifier import ImageClassifier
from lightning_modules.data import Digits
from tests.cases import CASES
from tests.commands import CONFIGS, metric, output_to, tnlayers
from tnlayers import CheckpointError, FactorizedLayer, tensorize

pytestmark = pytest.mark.filterwarnings("ignore:ADTN. .* leave a relative error")
EXPERIMENT = ["-c", CONFIGS / "experiment/digits.yaml"]
CONVS = ("conv2", "conv3", "conv4")
SMALL = ("conv2", "fc2")  # an ADTN generates all of a weight in each step
# Method, the layers that it takes, and a rank for tests that only need some factors.
METHODS = [
    (case.layer.method.name(), (CONVS if case.is_conv else ("fc1",)) if case.exact else SMALL, case.trained)
    for case in CASES
    if case.trained
]
BUDGETS = {"ADTN": 3}  # its rank is a depth; the others get a share of the parameters
# Where training starts, and epochs enough to pass 0.97 with margin. What comes after a decomposition is the same for all.
DECOMPOSED = {"Tucker": 4, "CP": 4, "MPS": 4, "TT": 4, "ADTN": 12}  # ADTN keeps hardly anything of the dense weight
STARTS = [
    *((method, layers, "random", 12) for method, layers, _ in METHODS),
    *((method, layers, "decompose", DECOMPOSED[method]) for method, layers, _ in METHODS if method in DECOMPOSED),
]


def rules(method: str, layers: tuple[str, ...], rank: int | str) -> list[dict[str, object]]:
    """A budget of its own for each layer, so that none stays dense."""
    return [{"pattern": layer, "method": method, "rank": rank} for layer in layers]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cnn4, trained on the digits without any rule."""
    folder = tmp_path_factory.mktemp("dense")
    options = ["--model.rules", "[]", "--trainer.max_epochs", "6"]
    assert tnlayers("fit", *EXPERIMENT, *options, *output_to(folder)) == 0
    (path,) = folder.rglob("last.ckpt")
    return path


def fitted(
    folder: Path, model: ImageClassifier, *, epochs: int = 1, ckpt_path: Path | None = None, batches: int = 4
) -> ImageClassifier:
    """The model after a few batches of the digits, with last.ckpt in the folder."""
    trainer = Trainer(
        max_epochs=epochs,
        limit_train_batches=batches,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, datamodule=Digits(batch_size=64), ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / "last.ckpt")
    return model


@pytest.mark.parametrize(("method", "layers", "init", "epochs"), STARTS)
def test_every_method_learns(
    method: str, layers: tuple[str, ...], init: str, epochs: int, dense: Path, tmp_path: Path
) -> None:
    model: dict[str, object] = {"init": init, "rules": rules(method, layers, BUDGETS.get(method, "ParamsKept(0.4)"))}
    if init == "decompose":
        model["init_from"] = str(dense)
    config = tmp_path / "model.yaml"
    config.write_text(yaml.safe_dump({"model": model}))
    command = [*EXPERIMENT, "-c", config]
    assert tnlayers("fit", *command, *output_to(tmp_path / "fit"), "--trainer.max_epochs", str(epochs)) == 0
    (last,) = (tmp_path / "fit").rglob("last.ckpt")
    assert tnlayers("test", *command, *output_to(tmp_path / "test"), "--ckpt_path", last) == 0
    structure = torch.load(last, weights_only=True)["tensorization"]["layers"]
    assert [(rule["pattern"], rule["method"]) for rule in structure] == [(layer, method) for layer in layers]
    accuracy = metric(tmp_path / "test", "test/accuracy")
    print(f"{method} {init}: {accuracy:.4f} after {epochs} epochs")
    assert accuracy >= 0.97


@pytest.mark.parametrize("init", ["random", "decompose"])
@pytest.mark.parametrize(("method", "layers", "rank"), METHODS, ids=[method for method, *_ in METHODS])
def test_every_parameter_moves(
    method: str, layers: tuple[str, ...], rank: int, init: str, dense: Path, tmp_path: Path
) -> None:
    model = ImageClassifier(rules=rules(method, layers, rank), init=init, init_from=str(dense))
    model.load(dense)
    tensorize(model.net, model.resolve(init), init=init)  # type: ignore[arg-type]
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    after = dict(fitted(tmp_path, model).named_parameters())
    assert sum(".factors." in name for name in after) >= 2 * len(layers)
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_rules_that_are_not_the_checkpoints(dense: Path, tmp_path: Path) -> None:
    """The file is the truth, also about options that show in no shape; and a dense file is no factorized net."""
    given = {"pattern": "fc1", "method": "ADTN", "rank": 2, "activation": "leaky_relu"}
    model = ImageClassifier(rules=[given], init="random")
    fitted(tmp_path, model)
    other = ImageClassifier(rules=[given | {"activation": "none"}], init="random")
    trainer = Trainer(logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.validate(other, datamodule=Digits(batch_size=64), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(other.eval()(x), model.eval()(x), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"is of a dense net; to factorize it start from it: --model.init_from"):
        trainer.validate(ImageClassifier(rules=[given], init="random"), datamodule=Digits(), ckpt_path=dense)


def test_distillation_is_zero_when_the_student_is_the_teacher(dense: Path) -> None:
    model = ImageClassifier(teacher=str(dense))
    model.load(dense)
    teacher = model._build().eval()
    teacher.load_state_dict(model.net.state_dict())
    model._teacher = (teacher,)
    model.eval()
    x = torch.randn(8, 1, 8, 8)
    logits = model(x)
    torch.testing.assert_close(model._distillation(x, logits), torch.tensor(0.0), rtol=0, atol=1e-5)
    assert model._distillation(x, logits.roll(1, dims=1)) > 0.1


def test_distillation_keeps_the_gradients_scale(dense: Path) -> None:
    """T^2 KL tends to half the squared distance of the centred logits, over the classes, as T grows (Hinton et al., 2.1)."""
    model = ImageClassifier(teacher=str(dense), temperature=1e3).double()
    model._teacher = (torch.nn.Flatten(),)
    target, ours = torch.randn(5, 1, 1, 10).double(), torch.randn(5, 10).double()
    difference = ours - target.flatten(1)
    expected = 0.5 * difference.sub(difference.mean(dim=1, keepdim=True)).square().mean(dim=1).mean()
    torch.testing.assert_close(model._distillation(target, ours), expected, rtol=1e-2, atol=0)


def test_teacher_stays_as_it_is_and_out_of_the_checkpoint(dense: Path, tmp_path: Path) -> None:
    model = fitted(tmp_path, ImageClassifier(rules=rules(*METHODS[0]), init="random", teacher=str(dense)))
    (teacher,) = model._teacher
    assert not teacher.training
    published = torch.load(dense, weights_only=True)["state_dict"]
    torch.testing.assert_close(
        {f"net.{key}": value for key, value in teacher.state_dict().items()}, published, rtol=0, atol=0
    )
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == {f"net.{key}" for key in model.net.state_dict()}


@pytest.mark.parametrize("truncated", [False, True], ids=["as trained", "truncated"])
@pytest.mark.parametrize(("method", "layers", "rank"), METHODS, ids=[method for method, *_ in METHODS])
def test_checkpoint_round_trip(
    method: str, layers: tuple[str, ...], rank: int, truncated: bool, tmp_path: Path
) -> None:
    model = fitted(tmp_path, ImageClassifier(rules=rules(method, layers, rank), init="random"))
    if truncated:
        layer = model.net.get_submodule(layers[0])
        assert isinstance(layer, FactorizedLayer)
        layer.truncate(2)
        model.trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    again = ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(again(x), model.eval()(x), rtol=0, atol=0)
    ranks = [getattr(net.get_submodule(layers[0]), "ranks", None) for net in (model.net, again.net)]
    assert ranks[0] == ranks[1]
    assert not truncated or max(ranks[0]) == 2


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_resume_equals_the_uninterrupted_run(augment: str, dense: Path, tmp_path: Path) -> None:
    """The order of the pictures, and how they are shifted, have to go on where they stopped too."""
    teacher = ["--model.teacher", dense, "--data.augment", augment, "--trainer.max_epochs", "4"]
    options = [*EXPERIMENT, *teacher, "--model_checkpoint.save_top_k", "-1"]
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    assert tnlayers("fit", *options, *output_to(whole)) == 0
    (half,) = whole.rglob("epoch=1-*.ckpt")
    assert tnlayers("fit", *options, *output_to(rest), "--ckpt_path", half) == 0
    ends = [torch.load(next(folder.rglob("last.ckpt")), weights_only=True) for folder in (whole, rest)]
    assert [end["epoch"] for end in ends] == [3, 3]
    torch.testing.assert_close(ends[1]["state_dict"], ends[0]["state_dict"], rtol=0, atol=0)


def test_every_checkpoint_of_a_fit_is_plain(dense: Path) -> None:
    """Tensors and plain values: `weights_only` refuses all else."""
    checkpoints = sorted(dense.parent.glob("*.ckpt"))
    assert len(checkpoints) == 2
    for path in checkpoints:
        content = torch.load(path, weights_only=True)
        assert content["hyper_parameters"]["net"] == "cnn4"
        assert content["tensorization"]["version"] == 1


# ---- a part of the net


def test_frozen_modules_stay_as_they_are(tmp_path: Path) -> None:
    rules = ["--model.rules", "[{pattern: fc1, method: TT, rank: 4}]"]
    frozen = ["--trainer.callbacks+=lightning_modules.callbacks.Freeze", '--trainer.callbacks.patterns=["*1", "conv2"]']
    command = [*EXPERIMENT, *rules, *frozen, *output_to(tmp_path), "--trainer.limit_train_batches", "3"]
    states = []
    for steps in (2, 5):  # the second goes on with what the first saved in the middle of an epoch
        more = ["--trainer.max_steps", str(steps), "--model_checkpoint.every_n_train_steps", "1", "--ckpt_path", "last"]
        assert tnlayers("fit", *command, *more) == 0
        (last,) = tmp_path.rglob("last.ckpt")
        states.append(torch.load(last, weights_only=True)["state_dict"])
    for name in states[0]:
        moved = not torch.equal(states[0][name], states[1][name])
        assert moved == (name.split(".")[1] not in ("conv1", "bn1", "fc1", "conv2")), name


def test_freezing_what_is_not_there_says_what_is() -> None:
    model = ImageClassifier()
    with pytest.raises(ValueError, match="no module is called 'features'; expected one of conv1, bn1"):
        Freeze(["features"]).setup(Trainer(logger=False), model, "fit")
