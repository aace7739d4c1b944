"""The truncation study: what it measures is what a net that was truncated by hand has, and a killed one goes on."""

import copy
import json
import math
import re
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_modules import ImageClassifier, build_net
from lightning_modules.classifier import load_net
from lightning_modules.compression import calibration_batches, recalibrate_if_better
from lightning_modules.data import Digits
from lightning_modules.data.pictures import Pictures, PictureSet
from lightning_modules.locks import FolderInUse, try_lock
from lightning_modules.study.factorizations import LINEAR, REALISED, cuts_of_method, recommend, spec_of
from lightning_modules.study.findings import Findings
from lightning_modules.study.journal import Journal, read_rows, study_folder
from lightning_modules.study.measurement import subject as subjects
from lightning_modules.study.measurement.evaluation import Score
from lightning_modules.study.measurement.forward import FromLayer
from lightning_modules.study.measurement.kernels import Kernel
from lightning_modules.study.measurement.retraining import training_options
from lightning_modules.study.measurement.run import run_study
from lightning_modules.study.measurement.subject import Subject
from lightning_modules.study.rows import (
    CUT_SETS,
    Joint,
    Layer,
    Protocol,
    Recommendation,
    Retrained,
    Row,
    Single,
    Study,
    row_from_plain,
    row_to_plain,
)
from tests.commands import CONFIGS, QUIET, tnlayers
from tests.processes import Forks
from tests.tolerances import EXACT, FLOAT64
from tnlayers import MPS, TT, LowRank, load_checkpoint, tensorize
from tnlayers.files import write_files
from tnlayers.geometry import Call
from tnlayers.rules import Rule

SMALL = {"losses": "[0.3, 0.6]", "retrain": "[0.6]", "epochs": "1", "pictures": "120", "layers": "[cf]*[124]"}


def study(dense: Path, out: Path, **protocol: str) -> list[str]:
    """The command of a small study on the digits."""
    options = [part for name, value in (SMALL | protocol).items() for part in (f"--protocol.{name}", value)]
    config = str(CONFIGS / "experiment/digits_study.yaml")
    few = ["--trainer.limit_train_batches", "3", *QUIET]
    return ["study", "-c", config, "--checkpoint", str(dense), "--out", str(out), *few, *options]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a trained four-layer CNN."""
    folder = tmp_path_factory.mktemp("dense")
    experiment = ["-c", CONFIGS / "experiment/digits.yaml", "-c", CONFIGS / "rules/dense.yaml"]
    assert tnlayers("fit", *experiment, "--trainer.max_epochs", "4", "--trainer.default_root_dir", folder, *QUIET) == 0
    (path,) = folder.rglob("last.ckpt")
    return path


@pytest.fixture(scope="module")
def whole(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that nothing interrupted, in a process of its own."""
    folder = tmp_path_factory.mktemp("whole")
    with Forks() as forks:
        fork = forks.start(study(dense, folder / "out"), folder)
        assert fork.wait() == 0, fork.said
    return folder / "out"


@pytest.fixture(scope="module")
def rows(whole: Path) -> list[Row]:
    return read_rows(whole / "study.jsonl")


# ---- a forward pass that goes on from a layer


class Twice(nn.Module):
    """Calls one layer twice, works in place on what the layer was given, and branches around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.act, self.head = nn.Hardswish(inplace=True), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.twice(x) + self.act(x)
        x = self.twice(x) + x
        return self.head(x.mean((2, 3)))


class Inside(nn.Module):
    """Has layers inside of a module that torch.fx does not look into."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 10)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        return self.head(self.encoder(x).mean(1))


class Tied(nn.Module):
    """Uses the weight of a layer before it calls it: in another layer and on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight, self.head = self.first.weight, nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x.mean((2, 3)), self.third.weight)
        return self.head(self.third(self.second(self.first(x).relu()).relu()))


class Views(nn.Module):
    """Works in place on a tensor of which it has views."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side, self.body = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(4, 4, 1)
        self.act, self.head = nn.SiLU(inplace=True), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, b = x.chunk(2, 1)
        side = self.side(x).mean((2, 3))
        self.act(x)
        return self.head(torch.cat([a.mean((2, 3)), self.body(b).mean((2, 3)), side], 1))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        return self.head(-x if x.sum() > 0 else x)


NETS = [
    ("resnet20", True),
    ("torchvision/mobilenet_v3_small", True),
    ("torchvision/densenet121", True),
    (Twice, True),
    (Inside, True),
    (Tied, True),
    (Views, True),
    (Untraceable, False),
]


@pytest.mark.parametrize(("net", "splits"), NETS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_forward_goes_on_from_a_layer(net: str | type[nn.Module], splits: bool) -> None:
    """Also when the layer's weight was changed in between, and again from the same state."""
    shape = (3, 32, 32)
    built = build_net(net, num_classes=10, input_shape=shape) if isinstance(net, str) else net()
    built.eval()
    pictures = torch.randn(3, *shape)
    with torch.no_grad():
        forward = FromLayer(built, pictures)
        assert forward.splits == splits
        for name in {*forward.layers[:4], forward.layers[len(forward.layers) // 2], forward.layers[-1]}:
            before = forward.before(name, pictures)
            built.get_submodule(name).weight.mul_(0.5)
            for _ in range(2):
                torch.testing.assert_close(forward.after(before), built(pictures), **EXACT)


# ---- what is truncated


def test_trials_of_a_kernel() -> None:
    """Every cut and set of cuts, each bond dimension once, the smallest that loses at most as much; none that loses nothing."""
    module = nn.Conv2d(8, 6, 3)
    kernel, losses = Kernel("conv", module), (0.1, 0.5, 0.9)
    trials = kernel.trials(losses)
    assert len(set(trials)) == len(trials)
    assert {trial.cuts for trial in trials} == {
        ("o",),
        ("i",),
        ("h",),
        ("w",),
        ("oi",),
        ("ih",),
        ("iw",),
        *CUT_SETS.values(),
    }
    weight = module.weight.detach().double().numpy()
    values = np.linalg.svd(weight.reshape(6, -1), compute_uv=False)
    lost = [math.sqrt((values[bond:] ** 2).sum() / (values**2).sum()) for bond in range(7)]
    expected = {next(bond for bond in range(1, 7) if lost[bond] <= eps) for eps in losses} - {6}
    assert {trial.bonds[0] for trial in trials if trial.cuts == ("o",) and not trial.control} == expected
    assert {trial.control for trial in trials if trial.cuts == ("o",)} == {"", "random weight", "random error"}
    assert not [trial for trial in trials if trial.control and trial.cuts != ("o",)]


def test_controls_lose_as_much_norm() -> None:
    module = nn.Conv2d(8, 6, 3)
    kernel = Kernel("conv", module)
    for trial in kernel.trials((0.3, 0.6)):
        if trial.control:
            (cut,), (bond,) = trial.cuts, trial.bonds
            drawn, lost = kernel.attempt(trial, 0)
            again, _ = kernel.attempt(trial, 0)
            other, _ = kernel.attempt(trial, 1)
            torch.testing.assert_close(again, drawn, **EXACT)
            assert not torch.equal(other, drawn)
            assert lost.eps == pytest.approx(kernel.splits[cut].eps(bond), rel=1e-5)
            spectrum = torch.linalg.svdvals(drawn.flatten(1).double())
            if trial.control == "random weight":
                torch.testing.assert_close(spectrum[:bond], kernel.splits[cut].values[:bond], rtol=1e-5, atol=1e-6)
                assert spectrum[bond:].max() < 1e-5


@pytest.mark.parametrize("cuts", [*REALISED, LINEAR], ids=" ".join)
def test_factors_have_the_ranks_of_the_cuts(cuts: tuple[str, ...]) -> None:
    """A weight that is truncated there is represented exactly."""
    module = nn.Linear(12, 7).double() if cuts == ("i",) else nn.Conv2d(8, 6, 3).double()
    kernel = Kernel("layer", module)
    bonds = kernel.bonds(cuts, 0.5)
    weight = kernel.truncated(cuts, bonds)
    with torch.no_grad():
        module.weight.copy_(weight)
    spec = spec_of(module, cuts, bonds)
    assert spec is not None
    (made,) = tensorize(nn.Sequential(module), [Rule("0", spec.method)])
    torch.testing.assert_close(made.weight, weight, **FLOAT64)


def test_the_cuts_of_methods() -> None:
    """They are those of the bonds, in the order of the ranks, and an order of the train is one of its cuts."""
    assert {cuts: method.name() for cuts, method in REALISED.items()} == {
        CUT_SETS["Tucker-2"]: "Tucker",
        CUT_SETS["MPS"]: "MPS",
        ("ih",): "LowRank",
    }
    assert cuts_of_method(MPS(1, order="h w i o"), (5, 4, 3, 2)) == ("h", "oi", "o")
    assert LINEAR == ("i",)


def test_no_factors_for_cuts_of_no_method() -> None:
    assert spec_of(nn.Conv2d(8, 6, 3), ("h",), (1,)) is None
    assert spec_of(nn.Conv2d(8, 6, 3, groups=2), ("ih",), (2,)) is None


# ---- what is measured


def test_a_study_measures_what_a_net_truncated_by_hand_has(dense: Path, rows: list[Row]) -> None:
    """By whole forward passes, and singular values of numpy."""
    net = build_net("cnn4", num_classes=10, input_shape=(1, 8, 8))
    load_checkpoint(dense, net)
    net.eval()
    batches = list(Digits(batch_size=64, val_fraction=0).test_batches(120))

    def accuracy(of: nn.Module) -> float:
        with torch.no_grad():
            return sum(int((of(x).argmax(1) == y).sum()) for x, y in batches) / 120

    begun = rows[0]
    assert isinstance(begun, Study)
    assert begun.accuracy == accuracy(net)
    assert begun.pictures == 120
    by_hand = [row for row in rows if isinstance(row, Single) and row.cuts == ("o",) and not row.control]
    assert {row.layer for row in by_hand} == {"conv1", "conv2", "conv4"}
    for row in by_hand:
        changed = copy.deepcopy(net)
        weight = changed.get_submodule(row.layer).weight
        left, values, right = np.linalg.svd(weight.detach().double().flatten(1).numpy(), full_matrices=False)
        (bond,) = row.bonds
        kept = torch.as_tensor((left[:, :bond] * values[:bond]) @ right[:bond])
        with torch.no_grad():
            weight.copy_(kept.reshape(weight.shape))
        assert row.accuracy == pytest.approx(accuracy(changed), abs=1 / 120 + 1e-9)  # one picture may be on the edge
        assert row.eps == pytest.approx(math.sqrt((values[bond:] ** 2).sum() / (values**2).sum()), rel=1e-5)
        assert row.delta == pytest.approx(1 - math.sqrt(1 - row.eps**2), abs=1e-6)


def test_a_study_is_complete(rows: list[Row]) -> None:
    layers = [row.name for row in rows if isinstance(row, Layer)]
    assert layers == ["conv1", "conv2", "conv4", "fc1", "fc2"]
    joint = {(row.cuts, row.target) for row in rows if isinstance(row, Joint)}
    cuts = {("o",), ("i",), ("h",), ("w",), ("oi",), ("ih",), ("iw",), *CUT_SETS.values()}
    assert joint == {(each, eps) for each in cuts for eps in (0.3, 0.6)}
    retrained = {(row.cuts, row.weights): row for row in rows if isinstance(row, Retrained)}
    joined = {(each, weights) for each in REALISED for weights in ("dense", "factors")}
    assert set(retrained) == {((), "dense"), *joined}
    assert retrained[(), "dense"].accuracy[0] == rows[0].accuracy  # type: ignore[union-attr]
    for each in REALISED:  # the same net before it is trained, as it was measured among the joint truncations
        (measured,) = (row for row in rows if isinstance(row, Joint) and row.cuts == each and row.target == 0.6)
        for weights in ("dense", "factors"):
            accuracy = retrained[each, weights].accuracy
            assert len(accuracy) == 2
            assert accuracy[0] == pytest.approx(measured.accuracy, abs=1 / 120 + 1e-9)
    assert [row.tolerance for row in rows if isinstance(row, Recommendation)] == [0.01, 0.005, 0.0025, 0]
    assert [row_from_plain(json.loads(json.dumps(row_to_plain(row)))) for row in rows] == rows


def test_a_recommendation_rests_on_what_each_layer_tolerates(rows: list[Row]) -> None:
    """And on all milder truncations too; where the tolerance grows, the net does not."""
    begun = rows[0]
    assert isinstance(begun, Study)
    found = [row for row in rows if isinstance(row, Recommendation)]
    layers = {row.name: row for row in rows if isinstance(row, Layer)}
    rests_on = {method.name(): cuts for cuts, method in REALISED.items()}
    assert [row.macs_kept for row in found] == sorted(row.macs_kept for row in found)
    assert {rule["method"] for rule in found[0].rules} & {"Tucker", "MPS", "LowRank", "TT"}
    for recommended in found:
        assert [rule["pattern"] for rule in recommended.rules] == list(layers)
        for rule in recommended.rules:
            if rule["method"] != "dense":
                cuts = rests_on.get(rule["method"], ("i",))
                curve = [row for row in rows if isinstance(row, Single) and row.key[1:3] == (rule["pattern"], cuts)]
                (at,) = {row.eps for row in curve if row.bonds == tuple(rule["rank"]) and not row.control}
                kept = [row.accuracy for row in curve if row.eps <= at and not row.control]
                assert min(kept) >= begun.accuracy - recommended.tolerance - 1e-9


RECOMMENDED = [
    (nn.Conv2d(16, 16, 3), "ih", Call(1, (8, 8)), LowRank(rank=(20,))),
    (
        nn.Linear(64, 128),
        "i",
        Call(1, ()),
        TT(rank=(20,), in_shape=(64, 1), out_shape=(1, 128)),
    ),
]


@pytest.mark.parametrize(("module", "cut", "call", "expected"), RECOMMENDED)
def test_a_truncation_whose_milder_one_is_not_tolerated_is_not_recommended(
    module: nn.Conv2d | nn.Linear, cut: str, call: Call, expected: LowRank | TT
) -> None:
    study = Study("net", "", "", "", 100, 10, 0.9, 0.3, Protocol(), {})
    layer = Layer("layer", tuple(module.weight.shape), module.weight.numel(), 0, {cut: 48}, {})
    accuracies = {20: 0.9, 10: 0.8, 5: 0.9}
    singles = [Single("layer", (cut,), (bond,), "", 1 / bond, 0, of, 0.3) for bond, of in accuracies.items()]
    (rule,) = recommend(Findings([study, layer, *singles]), {"layer": module}, {"layer": [call]}, 0.01)
    assert rule.factorization == expected


def test_nothing_is_recommended_where_nothing_is_tolerated(rows: list[Row]) -> None:
    begun = rows[0]
    assert isinstance(begun, Study)
    net = build_net("cnn4", num_classes=10, input_shape=(1, 8, 8))
    modules = {row.name: net.get_submodule(row.name) for row in rows if isinstance(row, Layer)}
    calls = {name: [Call(1, (8, 8) if "conv" in name else ())] for name in modules}
    singles = [row for row in rows if not isinstance(row, Study)]
    for accuracy, some in ((begun.accuracy, True), (2.0, False)):  # which no row comes near
        rules = recommend(Findings([replace(begun, accuracy=accuracy), *singles]), modules, calls, 0.01)
        assert any(rule.factorization for rule in rules) == some


def test_compress_takes_the_recommendation(whole: Path, dense: Path, rows: list[Row], tmp_path: Path) -> None:
    options = ["-c", whole / "config.yaml", "--checkpoint", dense, "--out", tmp_path / "out", *QUIET]
    assert tnlayers("compress", *options) == 0
    last, report = Findings(rows).recommendation, json.loads((tmp_path / "out/report.json").read_text())
    assert last is not None
    asked = {rule["pattern"]: rule["method"] for rule in last.rules}
    assert {layer["name"]: layer["method"] for layer in report["layers"] if layer["name"] in asked} == asked
    assert report["totals"]["params"] / report["totals"]["dense_params"] == pytest.approx(last.params_kept)
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 1  # what the study retrained

    data, trainer = Digits(**config["data"]["init_args"]), Trainer(accelerator="cpu", logger=False)
    subject = Subject(ImageClassifier(), data, trainer, dense, Protocol(epochs=0))  # on all pictures, as `compress`
    measured = [row for row in rows if not isinstance(row, Recommendation)]
    again = subject.recommendation(measured, last.tolerance, lambda: None)
    assert again.accuracy == (pytest.approx(report["accuracy"]["right after"]),)


@pytest.mark.parametrize("held", [subjects._HELD, 1])
def test_progress_goes_on_to_the_end(held: int, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never back, never past the end, and as far for each layer as the next one starts; also where weights are measured one by one."""
    monkeypatch.setattr(subjects, "_HELD", held)
    data, trainer = Digits(batch_size=32, val_fraction=0), Trainer(accelerator="cpu", logger=False)
    protocol = Protocol(losses=(0.3, 0.6), retrain=(), epochs=0, pictures=64, layers="conv*")
    subject, told = Subject(ImageClassifier(), data, trainer, dense, protocol), list[float]()
    for _ in range(2):  # the second time all is measured
        run_study(subject, tmp_path / "study.jsonl", lambda _, done, total: told.append(done / total))
        assert told == pytest.approx(sorted(told))
        assert told[-1] == 1
        told.clear()


def test_what_cannot_be_studied_is_said_at_the_start(dense: Path, tmp_path: Path) -> None:
    data, trainer = Digits(), Trainer(accelerator="cpu", logger=False)
    model = ImageClassifier(lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(ValueError, match="ReduceLROnPlateau: a study retrains without validating"):
        Subject(model, data, trainer, dense, Protocol())
    model = ImageClassifier()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.net.get_submodule("conv2"))
    torch.save(model.net.state_dict(), tmp_path / "computed.pt")
    with pytest.raises(ValueError, match="the weight of conv2 is computed at each call"):
        Subject(model, data, trainer, tmp_path / "computed.pt", Protocol())


def test_degenerate_weights(dense: Path, tmp_path: Path) -> None:
    data, trainer = Digits(), Trainer(accelerator="cpu", logger=False)
    net = load_net(dense)[0]
    nn.init.zeros_(net.get_submodule("conv2").weight)  # type: ignore[arg-type]
    torch.save(net.state_dict(), tmp_path / "zeros.pt")
    subject = Subject(ImageClassifier(), data, trainer, tmp_path / "zeros.pt", Protocol(pictures=64, layers="conv2"))
    joint = subject.joint(("o", "i"), 0.3, lambda: None)
    assert (joint.bonds, joint.eps, joint.delta) == ({"conv2": (1, 1)}, 0, 0)
    net.get_submodule("conv3").weight.data[0, 0] = torch.nan  # type: ignore[index, union-attr]
    torch.save(net.state_dict(), tmp_path / "nan.pt")
    with pytest.raises(ValueError, match="the weight of conv3 has values that are not finite"):
        Subject(ImageClassifier(), data, trainer, tmp_path / "nan.pt", Protocol())


def test_linears_alone_are_retrained_too(dense: Path, tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, limit_train_batches=2)
    protocol = Protocol(losses=(0.5,), retrain=(0.6,), epochs=1, pictures=64, layers="fc*")
    subject = Subject(ImageClassifier(), Digits(val_fraction=0), trainer, dense, protocol)
    rows = run_study(subject, tmp_path / "study.jsonl")
    retrained = {(row.cuts, row.weights): row for row in rows if isinstance(row, Retrained)}
    assert set(retrained) == {((), "dense"), (("i",), "dense"), (("i",), "factors")}
    assert retrained[("i",), "factors"].params_kept < 1
    assert retrained[("i",), "factors"].accuracy[0] == pytest.approx(retrained[("i",), "dense"].accuracy[0], abs=1 / 64)


def test_no_grouped_convolution_is_factorized_and_the_reason_says_so() -> None:
    module, study = nn.Conv2d(16, 16, 3, groups=2), Study("net", "", "", "", 100, 10, 0.9, 0.3, Protocol(), {})
    layer = Layer("layer", tuple(module.weight.shape), module.weight.numel(), 0, {"ih": 24}, {})
    rows = [study, layer, Single("layer", ("ih",), (1,), "", 0.5, 0, 0.9, 0.3)]
    (rule,) = recommend(Findings(rows), {"layer": module}, {"layer": [Call(1, (8, 8))]}, 0.01)
    assert (rule.factorization, rule.reason) == (None, "a study factorizes no grouped convolution")


class Few(Digits):
    """The first pictures of the digits."""

    def __init__(self, num: int) -> None:
        super().__init__(val_fraction=0)
        self.num = num

    def load(self, part: Literal["train", "test"]) -> PictureSet:
        found = super().load(part)
        assert isinstance(found, Pictures)
        return Pictures(found.pictures[: self.num], found.labels[: self.num])


@pytest.mark.parametrize("num", [2, 3, 4, 12])
def test_batch_norm_is_estimated_from_no_picture_alone(num: int) -> None:
    """Of one picture in a batch BatchNorm1d has no variance."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    batches = calibration_batches(Few(num))
    assert sum(map(len, batches)) == num
    kept = recalibrate_if_better(net, copy.deepcopy(net), batches)
    assert not kept  # the outputs were the same before


def test_few_training_pictures_are_enough(dense: Path, rows: list[Row]) -> None:
    trainer = Trainer(accelerator="cpu", logger=False)
    subject = Subject(ImageClassifier(), Few(12), trainer, dense, Protocol(epochs=0))
    assert subject.training["pictures"] == 12
    measured = [row for row in rows if not isinstance(row, Recommendation)]
    assert len(subject.recommendation(measured, 0.01, lambda: None).accuracy) == 1


def test_schedules_that_differ_are_told_apart() -> None:
    def rates(*milestones: int) -> object:
        model = ImageClassifier(lr_scheduler=lambda of: torch.optim.lr_scheduler.MultiStepLR(of, milestones))
        return training_options(model, Digits(), Trainer(accelerator="cpu", logger=False), 3)["learning_rates"]

    assert rates(1, 2) == (pytest.approx(2e-3), pytest.approx(2e-4), pytest.approx(2e-5))
    assert rates(2) == (pytest.approx(2e-3), pytest.approx(2e-3), pytest.approx(2e-4))


def test_nan_is_no_class() -> None:
    found = Score()
    found.add(torch.tensor([[torch.nan, torch.nan], [1.0, 0.0]]), torch.tensor([0, 0]))
    assert found.correct == 1


def test_a_large_layer_is_measured_in_groups(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, trainer = Digits(batch_size=32, val_fraction=0), Trainer(accelerator="cpu", logger=False)
    subject = Subject(ImageClassifier(), data, trainer, dense, Protocol(pictures=64))
    trials, ticks = subject.kernels["conv2"].trials((0.3, 0.6)), list[int]()
    at_once = list(subject.singles("conv2", trials, lambda: None))
    monkeypatch.setattr(subjects, "_HELD", 4 * 3 * 64 * 32 * 9)  # bytes of three of its weights
    assert list(subject.singles("conv2", trials, lambda: ticks.append(1))) == at_once
    assert len(ticks) == subject.num_steps("conv2", len(trials)) == 2 * math.ceil(len(trials) / 3)


class Mislabelled(Digits):
    """Every training picture is a nought, its label says."""

    def load(self, part: Literal["train", "test"]) -> PictureSet:
        found = super().load(part)
        assert isinstance(found, Pictures)
        return Pictures(found.pictures, torch.zeros_like(found.labels)) if part == "train" else found


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_the_dense_net_teaches_what_is_retrained(weight: float, dense: Path) -> None:
    data, trainer = Mislabelled(val_fraction=0), Trainer(accelerator="cpu", logger=False)
    model = ImageClassifier(distill_weight=weight)
    subject = Subject(model, data, trainer, dense, Protocol(epochs=2, layers="conv[23]"))
    row = subject.retrained(("o", "i"), 0.7, "factors", lambda: None)
    if weight:
        assert row.accuracy[-1] > max(0.95, row.accuracy[0])  # labels do not matter
    else:
        assert row.accuracy[-1] < 0.2


# ---- the journal


def test_a_torn_line_is_cut_off(whole: Path, rows: list[Row], tmp_path: Path) -> None:
    path, begun = tmp_path / "study.jsonl", rows[0]
    assert isinstance(begun, Study)
    content = (whole / "study.jsonl").read_bytes()
    lines = content.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    journal = Journal(path, begun)
    assert journal.rows == rows[:5]
    for row in rows[5:]:
        journal.add(row)
    assert path.read_bytes() == content


def test_a_journal_that_another_process_writes_to_is_left_to_it(dense: Path, tmp_path: Path) -> None:
    data, trainer = Digits(val_fraction=0), Trainer(accelerator="cpu", logger=False)
    protocol = Protocol(losses=(0.5,), epochs=0, retrain=(), pictures=64, layers="fc2")
    subject, path = Subject(ImageClassifier(), data, trainer, dense, protocol), tmp_path / "study.jsonl"
    path.write_text('{"half')
    with try_lock(path), pytest.raises(ValueError, match="is being written by another study"):
        run_study(subject, path)
    assert path.read_text() == '{"half'
    assert [row.key for row in run_study(subject, path)] == [row.key for row in read_rows(path)]
    assert not any(isinstance(row, Retrained) for row in read_rows(path))  # in no epochs nothing is


def test_a_study_is_known_before_its_first_row(tmp_path: Path) -> None:
    """What a kill leaves goes on; what fails before anything is measured leaves nothing; other files are no study."""
    out = tmp_path / "out"
    with suppress(ZeroDivisionError), study_folder(out):
        assert (out / "study.jsonl").read_text() == ""
        (out / "config.yaml").touch()
        raise ZeroDivisionError
    assert not out.exists()
    for name in (".lock", "config.yaml"):
        write_files(out, {name: ""})
    with pytest.raises(FolderInUse, match="already holds a run"), study_folder(out):
        pass
    write_files(out, {"study.jsonl": ""})
    with study_folder(out), pytest.raises(FolderInUse, match="is being written by another job"), study_folder(out):
        pass
    assert (out / "config.yaml").is_file()


def test_a_journal_of_another_study_is_refused(rows: list[Row], tmp_path: Path) -> None:
    begun = rows[0]
    assert isinstance(begun, Study)
    path = tmp_path / "study.jsonl"
    Journal(path, begun)
    Journal(path, replace(begun, accuracy=1.001 * begun.accuracy, loss=1.001 * begun.loss))  # measured elsewhere
    for _ in range(2):  # a net that gives nan for a picture
        Journal(tmp_path / "nan.jsonl", replace(begun, loss=math.nan))
    with path.open("a") as file:
        file.write('{"kind": ')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"another study: its loss is .*, not .*; give another --out"):
        Journal(path, replace(begun, loss=1.1 * begun.loss))  # of other pictures
    with pytest.raises(
        ValueError,
        match=r"another study: its training\.batch_size is 64, not 32; its training\.precision is 32-true, not bf16-mixed;",
    ):
        Journal(path, replace(begun, training={**begun.training, "batch_size": 32, "precision": "bf16-mixed"}))
    with pytest.raises(ValueError, match=f"another study: its sha256 is {begun.sha256}, not ffff; give another --out"):
        Journal(path, replace(begun, sha256="ffff"))
    with pytest.raises(ValueError, match=r"its protocol\.losses is \(0\.3, 0\.6\), not \(0\.5,\);.* and 3 more; give"):
        Journal(path, replace(begun, protocol=Protocol(losses=(0.5,))))
    assert path.read_bytes() == before
    path.write_text('{"kind": "study"}\n{"kind": "nonsense"}\n')
    with pytest.raises(ValueError, match="line 1, is not a row of a study"):
        read_rows(path)


PROTOCOLS = [
    ({"losses": (0.3, 1.2)}, "losses [0.3, 1.2]: expected norm losses between 0 and 1"),
    ({"losses": ()}, "losses is empty"),
    ({"retrain": (0.0,)}, "retrain [0.0]: expected norm losses between 0 and 1"),
    ({"epochs": -1}, "epochs is -1; expected at least 0"),
    ({"pictures": 0}, "pictures is 0; expected at least 1"),
    ({"tolerance": 1}, "tolerance is 1; expected a fraction of the pictures below 1: 0.01 is one point"),
    ({"tolerance": math.nan}, "tolerance is nan; expected a fraction"),
]


@pytest.mark.parametrize(("values", "message"), PROTOCOLS, ids=lambda value: str(value)[:20])
def test_a_protocol_that_cannot_be(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Protocol(**values)  # type: ignore[arg-type]


MISTAKES = [
    ("--protocol.layers=nothing", "layers 'nothing' fits none of conv1, conv2"),
    ("--protocol.pictures=1000", "cannot draw 1000 test pictures: there are 360"),
    ("--protocol.losses=[2]", "losses [2"),
    ("--trainer.devices=2", "a study runs in one process and here are 2: give --trainer.devices 1"),
    ("--trainer.precision=bf16-true", "--trainer.precision is bf16-true: give one of 32-true, 16-mixed, bf16-mixed"),
    ("--out={run}", "already holds a run; give another --out"),
    ("--out=/proc/study", "/proc/study cannot be made: "),
]


@pytest.mark.parametrize(("option", "message"), MISTAKES, ids=lambda value: str(value)[:20])
def test_mistakes_are_one_line(
    option: str, message: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert tnlayers(*study(dense, tmp_path / "out"), option.format(run=dense.parents[1])) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tnlayers: error")]
    assert message in line


# ---- kill -9


@pytest.mark.parametrize(("kind", "by"), [("single", "SIGINT"), ("retrained", "SIGINT"), ("retrained", "SIGTERM")])
def test_interrupted(kind: str, by: str, dense: Path, tmp_path: Path) -> None:
    """In one line, also where it trains, and what was measured stands."""
    path = tmp_path / "out/study.jsonl"
    with Forks() as forks:
        fork = forks.start(study(dense, path.parent), tmp_path)
        fork.until(lambda: path.exists() and any(row.kind == kind for row in read_rows(path)[7:]))
        fork.kill(signal.Signals[by])
        assert fork.wait() == (130 if by == "SIGINT" else 143)
        assert "Traceback" not in fork.said
        if by == "SIGINT":
            assert fork.said.splitlines()[-1] == "tnlayers: interrupted"
            assert f"{path} has what was measured; the same command goes on" in fork.said
    assert len(read_rows(path)) >= 8


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on(dense: Path, whole: Path, tmp_path: Path) -> None:
    """Among the layers, among the joint truncations and while it retrains; then every file is the uninterrupted one's."""
    path, expected = tmp_path / "out/study.jsonl", (whole / "study.jsonl").read_bytes()
    kinds = [json.loads(line)["kind"] for line in expected.splitlines()]
    with Forks() as forks:
        for kind in ("single", "joint", "retrained"):
            place = kinds.index(kind) + 2
            fork = forks.start(study(dense, tmp_path / "out"), tmp_path)
            fork.until(lambda place=place: path.exists() and path.read_bytes().count(b"\n") >= place)
            fork.kill()
            assert fork.wait() == -9
            assert path.read_bytes() != expected
        fork = forks.start(study(dense, tmp_path / "out"), tmp_path)
        assert fork.wait() == 0, fork.said
    files = {path.name for path in whole.iterdir() if path.is_file()}
    assert {"study.jsonl", "report.md", "report.html", "rules.yaml"} < files
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes(), name
