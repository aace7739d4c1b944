"""Measured plans: they change no value and touch nothing else, hold where they were measured, and travel with the layers."""

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from benchmarks import constants
from lightning_modules import ImageClassifier, TensorizedCheckpoint
from lightning_modules.callbacks import Autotune
from lightning_modules.data import Digits
from lightning_modules.timing_report import timed
from lightning_modules.tuning import tune
from tests.cases import CASES, Case
from tests.tolerances import EXACT, FLOAT64
from tnlayers import (
    ByMode,
    LowRank,
    Rule,
    Schedule,
    Tucker,
    TuckerConv2d,
    UserError,
    autotune,
    load_checkpoint,
    rules_from_plain,
    rules_of,
    save_safetensors,
    tensorize,
    tuning,
)
from tnlayers.cost import schedules
from tnlayers.schedule import check_plan, is_measured, plain_plan
from tnlayers.tuning import Timing, Tuned

pytestmark = pytest.mark.filterwarnings("ignore:ADTN. .* leave a relative error")
APART = Schedule((("input",), ("core",), ("output",)), ("convolution",) * 3)
DENSE = Schedule((("input", "core", "output"),), ("convolution",))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Schedule | None], float]], list[Any]]:
    """Lets a function say how long each schedule takes, None for the dense layer; each is called once all the same."""

    def set_clock(seconds: Callable[[Schedule | None], float]) -> list[Any]:
        asked: list[Any] = []

        def measured(calls: dict[Schedule | None, Callable[[], Any]], _: torch.device) -> dict[Schedule | None, float]:
            asked.append(calls)
            return {schedule: (call(), seconds(schedule))[1] for schedule, call in calls.items()}

        monkeypatch.setattr(tuning, "_seconds", measured)
        return asked

    return set_clock


def computed(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs and gradients in training, and the output of an evaluation."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    layer.train()
    y = layer(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    layer.eval()
    with torch.no_grad():
        return [y.detach(), *gradients, layer(x)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_value_changes(case: Case, clock: Any) -> None:
    layer, rng = case.convert(case.dense(), case.rank), random.Random(case.name)
    clock(lambda _: rng.random())
    x = case.input()
    inputs = [x, x.contiguous(memory_format=torch.channels_last)] if x.dim() == 4 else [x]
    for given in inputs:
        expected = computed(layer, given)
        for _ in range(3):
            (found,) = autotune(layer, given).values()
            torch.testing.assert_close(computed(layer, given), expected, **FLOAT64, msg=str(layer.plan_choice))
            assert layer.plan.schedule == found.inference.schedule  # type: ignore[union-attr]
            assert layer.training_plan.schedule == found.training.schedule  # type: ignore[union-attr]


@pytest.mark.parametrize("fastest", [APART, DENSE], ids=["apart", "dense"])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_the_fastest_is_chosen_for_its_mode(
    mode: str, fastest: Schedule, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = TuckerConv2d(64, 64, 3, rank=4)
    slow = Schedule((("input", "core"), ("output",)), ("convolution",) * 2)
    stepped, modes = tuning._stepped, []
    monkeypatch.setattr(tuning, "_stepped", lambda *given: modes.append("training") or stepped(*given))

    def seconds(schedule: Schedule | None) -> float:
        now = modes[-1] if modes else "inference"
        return 1.0 if schedule is None else 0.5 if schedule.groups == (fastest if now == mode else slow).groups else 2.0

    clock(seconds)
    (found,) = autotune(layer, torch.randn(2, 64, 16, 16)).values()
    timing = getattr(found, mode)
    assert timing.schedule.groups == fastest.groups
    assert (timing.seconds, timing.dense_seconds) == (0.5, 1.0)
    assert (timing.speedup, timing.is_dense) == (2.0, fastest == DENSE)
    plans = {"inference": layer.plan, "training": layer.training_plan}
    assert plans.pop(mode).schedule == timing.schedule  # type: ignore[union-attr]
    assert plans.popitem()[1].groups == slow.groups


def test_equal_layers_are_measured_once(clock: Any) -> None:
    net = nn.Sequential(*(TuckerConv2d(8, 8, 3, rank=rank, padding=1) for rank in (4, 4, 3)))
    net.append(net[0])  # called twice
    asked, told = clock(lambda _: 1.0), []
    found = autotune(net, torch.randn(2, 8, 9, 9), progress=lambda *given: told.append(given))
    assert len(asked) == 2 * 2
    assert {name: tuned.num_calls for name, tuned in found.items()} == {"0": 2, "1": 1, "2": 1}
    assert told == [("timing 0", 0, 3), ("timing 1", 1, 3), ("timing 2", 2, 3), ("timing layers", 3, 3)]


def test_nothing_else_is_touched() -> None:
    """With the real clock: modes, parameters, gradients, statistics and random numbers are what they were."""
    net = nn.Sequential(
        TuckerConv2d(4, 4, 3, rank=2), nn.BatchNorm2d(4), nn.Dropout(), TuckerConv2d(4, 4, 3, rank=2, bias=False)
    )
    net[1].eval()
    net[3].factors["core"].requires_grad_(False)
    x = torch.randn(2, 4, 9, 9)
    net(x).square().sum().backward()

    def state() -> dict[str, Any]:
        parameters = dict(net.named_parameters())
        return {
            "state": copy.deepcopy(net.state_dict()),
            "gradients": {name: copy.deepcopy(value.grad) for name, value in parameters.items()},
            "trains": {name: torch.tensor(value.requires_grad) for name, value in parameters.items()},
            "modes": {name: torch.tensor(module.training) for name, module in net.named_modules()},
            "random": torch.get_rng_state(),
        }

    before, kept = state(), list(map(id, net.parameters()))
    found = autotune(net, x)
    torch.testing.assert_close(state(), before, **EXACT)
    assert list(map(id, net.parameters())) == kept
    assert all(timing.seconds > 0 for tuned in found.values() for timing in (tuned.inference, tuned.training) if timing)


def test_where_it_was_measured_is_said(clock: Any) -> None:
    net = nn.Sequential(TuckerConv2d(4, 4, 3, rank=2), TuckerConv2d(4, 6, 3, rank=2))
    clock(lambda _: 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        autotune(net, torch.randn(2, 4, 9, 9))
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    for layer, form in zip(net, ("2x4x9x9 float32", "2x4x7x7 bfloat16"), strict=True):
        assert layer.plan_choice.measured_on.endswith(f"{threads}, {form}")


def test_embeddings_have_one_plan(clock: Any) -> None:
    net = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 16))
    tensorize(net, [Rule("*", LowRank(4))])
    clock(lambda _: 1.0)
    assert autotune(net, torch.zeros(3, dtype=torch.long)).keys() == {"1"}
    assert autotune(net[0], torch.zeros(3, dtype=torch.long)) == {}


LAYER, PICTURES = TuckerConv2d(4, 4, 3, rank=2), torch.zeros(2, 4, 9, 9)


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (LAYER, None, "example_input None: layers are timed on what reaches them"),
        (LAYER, PICTURES.to("meta"), "the meta device has no values"),
        (copy.deepcopy(LAYER).to("meta"), PICTURES, "the meta device has no values"),
        (nn.Conv2d(4, 4, 3), PICTURES, "no factorized layer to time"),
    ],
)
def test_what_cannot_be_timed_is_said(model: nn.Module, example: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        autotune(model, example)


def test_tensorize_tunes_what_its_rules_take(clock: Any) -> None:
    net = nn.Sequential(TuckerConv2d(8, 8, 3, rank=4), nn.Conv2d(8, 8, 3))
    with pytest.raises(UserError, match="example_input None"):
        tensorize(net, [Rule("1", Tucker(4))], tune=True)
    assert type(net[1]) is nn.Conv2d
    clock(lambda _: 1.0)
    tensorize(net, [Rule("1", Tucker(4))], example_input=torch.zeros(2, 8, 9, 9), tune=True)
    assert [is_measured(layer.plan_choice) for layer in net] == [False, True]


# ---- how plans travel


class Module(TensorizedCheckpoint, LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = dense()


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(6, 6, 1))


def drawn(seed: int) -> nn.Sequential:
    """Layers with any schedules for the two modes, as if they had been measured."""
    rng, net = random.Random(seed), dense()
    for layer in tensorize(net, [Rule("*", Tucker(2))]):
        possible = list(schedules(layer.spec.network, layer.spec.sizes, layer.spec.geometry.axes, layer.spec.plans))
        layer.set_plan(ByMode(rng.choice(possible), rng.choice(possible), rng.choice(["", "a machine"])))
    return net


def by_rules(net: nn.Module, folder: Path) -> nn.Module:
    plain = yaml.safe_load(yaml.safe_dump([rule.to_plain() for rule in rules_of(net)]))
    again = tensorize(dense(), rules_from_plain(plain))
    again.load_state_dict(net.state_dict())
    return again


def by_safetensors(net: nn.Module, folder: Path) -> nn.Module:
    save_safetensors(net, folder / "net.safetensors")
    load_checkpoint(folder / "net.safetensors", again := dense())
    return again


def by_checkpoint(net: nn.Module, folder: Path) -> nn.Module:
    module = Module()
    module.net = net
    trainer = Trainer(default_root_dir=folder, logger=False, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "module.ckpt", weights_only=True)
    return Module.load_from_checkpoint(folder / "module.ckpt", weights_only=True).net


@pytest.mark.parametrize(
    "travel",
    [
        by_rules,
        by_safetensors,
        by_checkpoint,
        lambda net, _: copy.deepcopy(net),
        lambda net, _: pickle.loads(pickle.dumps(net)),
    ],
    ids=["rules", "safetensors", "checkpoint", "deepcopy", "pickle"],
)
@pytest.mark.parametrize("seed", range(4))
def test_plans_travel(seed: int, travel: Callable[[nn.Module, Path], nn.Sequential], tmp_path: Path) -> None:
    net = drawn(seed).eval()
    again = travel(net, tmp_path).eval()
    for layer, other in zip(net, again, strict=True):
        assert layer.plan_choice == other.plan_choice
        assert (layer.plan, layer.training_plan) == (other.plan, other.training_plan)
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(again(x), net(x), **EXACT)


@pytest.mark.parametrize("measured_on", ["", "a machine"], ids=["asked for", "measured"])
@pytest.mark.filterwarnings("ignore:TuckerConv2d. rank .* adopted")
def test_a_measured_plan_ends_with_its_ranks(measured_on: str) -> None:
    plan = ByMode(APART, DENSE, measured_on)
    layer = TuckerConv2d(8, 8, 3, rank=4, plan=plan)
    loaded, asked = copy.deepcopy(layer), "auto" if measured_on else plan
    layer.truncate(4)
    assert layer.plan_choice == plan
    layer.truncate(3)
    assert layer.plan_choice == asked
    loaded.load_state_dict(layer.state_dict())
    assert loaded.plan_choice == asked


@pytest.mark.parametrize("measured_on", [3, None, ["x"]])
def test_a_machine_has_a_name(measured_on: Any) -> None:
    with pytest.raises(UserError, match="expected the name of a machine"):
        Rule.from_plain(
            {
                "pattern": "*",
                "method": "Tucker",
                "rank": 2,
                "plan": {"inference": "auto", "training": "dense", "measured_on": measured_on},
            }
        )


# ---- in a run


class Process:
    """A trainer, as far as plans are concerned: one process of several, and what the first one said."""

    progress_bar_callback = None
    precision_plugin = SimpleNamespace(forward_context=torch.no_grad)

    def __init__(self, *, first: bool, said: Any = None) -> None:
        self.is_global_zero, self.said = first, said
        self.strategy = SimpleNamespace(broadcast=self.broadcast)

    def broadcast(self, value: Any) -> Any:
        self.said = value if self.is_global_zero else self.said
        return self.said


def test_the_first_process_decides_for_all(clock: Any) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(TuckerConv2d(8, 8, 3, rank=4), TuckerConv2d(8, 8, 3, rank=4, plan="factors"))

    rules, x = [Rule("1", Tucker(4), plan="factors"), Rule("*", Tucker(4))], torch.randn(2, 8, 9, 9)
    clock(lambda schedule: 0.5 if schedule == APART else 1.0)
    one, two, first = net(), net(), Process(first=True)
    assert tune(first, one, rules, x).keys() == {"0"}  # type: ignore[arg-type]
    assert tune(Process(first=False, said=first.said), two, rules, x) == {}  # type: ignore[arg-type]
    assert [layer.plan_choice for layer in one] == [layer.plan_choice for layer in two]
    assert is_measured(one[0].plan_choice)
    assert one[1].plan_choice == "factors"
    with pytest.raises(UserError, match="the meta device"):
        tune(first, net().to("meta"), rules, x)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the meta device"):
        tune(Process(first=False, said=first.said), two, rules, x)  # type: ignore[arg-type]


def test_fit_tunes_where_it_begins(clock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its batch, in its precision; what is resumed goes on as it was, and a deterministic run measures nothing."""
    asked = clock(lambda _: 1.0)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as `deterministic` sets it

    def fit(ckpt_path: Path | None = None, epochs: int = 1, enabled: bool = True, **options: Any) -> list[Any]:
        module = ImageClassifier(rules=[{"pattern": "conv[34]", "method": "Tucker", "rank": 4}])
        few = {"limit_train_batches": 1, "limit_val_batches": 0, "logger": False, "max_epochs": epochs}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = Trainer(
            **few, **quiet, **options, accelerator="cpu", default_root_dir=tmp_path, callbacks=[Autotune(enabled)]
        )
        trainer.fit(module, datamodule=Digits(batch_size=48), ckpt_path=ckpt_path, weights_only=True)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return [rule.plan for rule in rules_of(module.net)]

    plans = fit(precision="bf16-mixed")
    assert [plan.measured_on.split(", ")[-1] for plan in plans] == ["48x64x4x4 bfloat16", "48x64x4x4 bfloat16"]
    asked.clear()
    assert fit(tmp_path / "last.ckpt", 2) == plans
    assert not any(map(is_measured, fit(enabled=False)))
    try:
        assert not any(map(is_measured, fit(deterministic=True)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not asked


def test_what_was_measured_is_said_in_one_line() -> None:
    fast, slow, like_dense = Timing(APART, 1.0, 3.0), Timing(APART, 2.0, 1.0), Timing(DENSE, 1.0, 0.94)
    tuned = {"a": Tuned(fast, slow, 2), "b": Tuned(like_dense, fast)}
    assert timed(tuned) == (
        "inference 2.31x, training 1.00x as fast as dense, in 2 layers; 1 compute like dense in inference, since nothing is "
        "faster: b (0.94x); slower than dense in training: a (0.50x)"
    )
    assert timed({"a": Tuned(fast, fast)}) == "inference 3.00x, training 3.00x as fast as dense, in 1 layers"


class Broadcast(nn.Module):
    """Gives its layer one vector for all rows, without a copy, as class tokens and queries are given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x[:1].expand(8, 32))
        return out


def test_expanded_inputs_are_timed() -> None:
    net, x = Broadcast(), torch.randn(2, 32)
    tensorize(net, [Rule("layer", LowRank(4))], example_input=x, tune=True)
    assert is_measured(net.layer.plan_choice)  # type: ignore[arg-type]


def test_a_frozen_layer_is_compared_with_a_frozen_one(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = nn.Sequential(nn.Linear(32, 32)).requires_grad_(False), torch.randn(2, 32)
    tensorize(net, [Rule("0", LowRank(4))])
    asked: list[int] = []
    monkeypatch.setattr(tuning, "_stepped", lambda _, parameters, __: asked.append(len(parameters)) or (lambda: None))
    autotune(net, x)
    assert {*asked} == {0}


@pytest.mark.parametrize("layers", ["10", ["typo"]])
def test_names_of_no_layers_are_refused(layers: Any) -> None:
    net = nn.Sequential(TuckerConv2d(8, 8, 3, rank=2), TuckerConv2d(8, 8, 3, rank=2))
    with pytest.raises(UserError, match="expected names of factorized layers"):
        autotune(net, torch.randn(1, 8, 9, 9), layers=layers)


def test_plans_by_mode_do_not_nest() -> None:
    nested: Any = "dense"
    for _ in range(5000):
        nested = {"inference": nested, "training": "dense"}
    with pytest.raises(UserError, match="expected one plan"):
        check_plan(nested)


def test_the_constants_of_the_cost_model_can_be_measured() -> None:
    layer = TuckerConv2d(8, 8, 3, rank=2)
    x = torch.randn(1, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    for training in (False, True):
        found = constants.measured(layer, x, training=training)
        assert len(found) == 7
        assert all(seconds > 0 for seconds in found.values())


def test_a_plan_of_a_rule_has_a_plain_form() -> None:
    assert plain_plan(ByMode(APART, "dense", "here")) == {
        "inference": {"groups": [["input"], ["core"], ["output"]], "operations": ["convolution"] * 3},
        "training": "dense",
        "measured_on": "here",
    }
