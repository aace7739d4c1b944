"""Files that others wrote: every usual nesting and prefix, those of former versions, the broken and the hostile ones."""

import copy
import json
import os
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_modules import load_net
from tests.cases import CASES, Case
from tests.fixtures.make import FOLDER, RULES, example
from tnlayers import ADTN, CP, CheckpointError, Rule, Tucker, load_checkpoint, save_safetensors, tensorize
from tnlayers.checkpoints import read_checkpoint

FIXTURES = sorted([*FOLDER.glob("*.ckpt"), *FOLDER.glob("*.safetensors")])


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def prefixed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".ckpt", ".safetensors"])
@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "model.", "net.", "_orig_mod.", "model._orig_mod.", "module.model.", "ema_model.", "module.ema_model.module.",
     "backbone."],
)  # fmt: skip
def test_prefixes_and_formats(tmp_path: Path, suffix: str, prefix: str) -> None:
    source, target, path = net(), net(), tmp_path / f"weights{suffix}"
    state = prefixed(source.state_dict(), prefix)
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    report = load_checkpoint(path, target)
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)
    assert report.prefix == prefix
    assert len(report.matched) == len(state)


@pytest.mark.parametrize(
    "keys",
    [("state_dict",), ("model_state_dict",), ("model",), ("net",), ("model", "state_dict"), ("state_dict_ema",), ("model_ema",),
     ("ema",), ("ema_model", "state_dict")],
)  # fmt: skip
def test_nesting(tmp_path: Path, keys: tuple[str, ...]) -> None:
    source, target = net(), net()
    content: Any = source.state_dict()
    for key in keys:
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "a.pt")
    load_checkpoint(tmp_path / "a.pt", target)
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_another_architecture_names_the_keys_and_changes_nothing(tmp_path: Path) -> None:
    target = net()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    other = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4, 2))
    torch.save(other.state_dict(), tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=r"2 missing \(2.weight, 2.bias\), 2 unexpected \(3.weight, 3.bias\)"
    ) as error:
        load_checkpoint(tmp_path / "a.pt", target)
    assert "0.weight: (5, 3, 3, 3) in the file, (4, 3, 3, 3) in the model" in str(error.value)
    torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0)
    report = load_checkpoint(tmp_path / "a.pt", target, strict=False)
    assert report.missing == ("2.weight", "2.bias")
    assert "1.weight" in report.matched


def test_averaged_weights_are_taken_where_there_are_no_others(tmp_path: Path) -> None:
    """torch's AveragedModel counts beside them; where both are there the plain ones are taken, and the report says so."""
    plain, averaged = net(), torch.optim.swa_utils.AveragedModel(net())
    torch.save({"model_ema": averaged.state_dict()}, tmp_path / "a.pt")
    target = net()
    assert str(load_checkpoint(tmp_path / "a.pt", target)) == "9 entries matched, prefix 'module.' taken off"
    torch.testing.assert_close(target.state_dict(), averaged.module.state_dict(), rtol=0, atol=0)
    for content in (
        {"state_dict": plain.state_dict(), "state_dict_ema": averaged.state_dict()},
        plain.state_dict() | {"state_dict_ema": averaged.state_dict()},
    ):
        torch.save(content, tmp_path / "b.pt")
        report = load_checkpoint(tmp_path / "b.pt", target)
        assert "plain weights taken and the averaged ones under 'state_dict_ema' left" in str(report)
        torch.testing.assert_close(target.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "beside",
    [
        {"step": torch.tensor(3)},
        {"rng_state": torch.get_rng_state()},
        {"class_weights": torch.ones(100, 2), "bias": torch.zeros(3)},
        {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "a": torch.zeros(3)}},
        {"optimizers": [{"state": torch.zeros(3)}]},
        {"model_state_dict": {}},
        {"model": {"name": "resnet18", "scale": torch.tensor(2.0)}},
        {"net": "resnet18"},
        {"ema_state_dict": {"decay": torch.tensor(0.9)}},
        {"model": {"other.weight": torch.zeros(3)}},
    ],
    ids=lambda beside: ", ".join(beside),
)  # fmt: skip
def test_tensors_beside_the_weights_do_not_hide_them(beside: dict[str, Any], tmp_path: Path) -> None:
    """Wherever the weights are, and in whichever order the entries come."""
    source, target = net(), net()
    state = source.state_dict()
    places = [{"model_ema": state}, {"state_dict": prefixed(state, "module.")}, {"weights": state}, state]
    for place in places:
        for content in (beside | place, place | beside):
            for value in target.state_dict().values():
                value.zero_()
            torch.save(content, tmp_path / "a.pt")
            report = load_checkpoint(tmp_path / "a.pt", target, strict=place is not state)
            assert set(report.matched) == state.keys()
            torch.testing.assert_close(target.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("made", "names"),
    [
        (lambda a, b: prefixed(a, "student.") | prefixed(b, "teacher."), "'student.', 'teacher.'"),
        (lambda a, b: prefixed(a, "module.encoder_q.") | prefixed(b, "module.encoder_k."),
         "'module.encoder_q.', 'module.encoder_k.'"),
        (lambda a, b: a | prefixed(b, "module."), "'', 'module.'"),
        (lambda a, b: {"state_dict": prefixed(a, "g.") | prefixed(b, "d.")}, "'state_dict.g.', 'state_dict.d.'"),
        (lambda a, b: {"student": a, "teacher": prefixed(b, "module.")}, "'student.', 'teacher.module.'"),
        (lambda a, b: {"model": a, "net": b}, "'model.', 'net.'"),
        (lambda a, b: a | {"model": b}, "'', 'model.'"),
        (lambda a, b: {"model_ema": a, "state_dict_ema": b}, "'model_ema.', 'state_dict_ema.'"),
    ],
    ids=range(8),
)  # fmt: skip
def test_copies_that_only_their_names_tell_apart_are_named(made: Any, names: str, tmp_path: Path) -> None:
    """Whether or not all has to match: which one is meant cannot be known."""
    target = net()
    before = copy.deepcopy(target.state_dict())
    torch.save(made(net().state_dict(), net().state_dict()), tmp_path / "a.pt")
    for strict in (True, False):
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(tmp_path / "a.pt", target, strict=strict)
        assert str(error.value).endswith(
            f"; it holds these weights 2 times, under the prefixes {names}; save those that you mean alone"
        )
        torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("plain", "other", "left"),
    [("model.", "ema_model.", True), ("", "ema.", True), ("model.", "ema_model.module.", True), ("online.", "model_ema.", True),
     ("net.", "teacher.", False), ("", "teacher.", False)],
)  # fmt: skip
def test_plain_weights_in_the_usual_place_are_taken_where_not_all_has_to_match(
    plain: str, other: str, left: bool, tmp_path: Path
) -> None:
    source, target = net(), net()
    states = prefixed(source.state_dict(), plain), prefixed(net().state_dict(), other)
    for first, second in (states, states[::-1]):
        torch.save(first | second, tmp_path / "a.pt")
        choice = f"save those that you mean alone, or load with strict=False, which takes '{plain}'"
        with pytest.raises(CheckpointError, match=choice):
            load_checkpoint(tmp_path / "a.pt", target)
        report = load_checkpoint(tmp_path / "a.pt", target, strict=False)
        torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)
        assert report.prefix == plain
        assert report.unexpected == tuple(states[1])
        assert report.left == ((other,) if left else ())
        assert (f"plain weights taken and the averaged ones under '{other}' left" in str(report)) == left


def test_the_weights_of_lightning_s_own_averages_are_taken(tmp_path: Path) -> None:
    """Its WeightAveraging saves those in training beside the averages, under a name of its own."""
    averages, target = net(), net()
    training = {"current_model_state": prefixed(net().state_dict(), "net."), "averaging_state": {"n": torch.tensor(3)}}
    torch.save(training | {"state_dict": prefixed(averages.state_dict(), "net.")}, tmp_path / "a.ckpt")
    load_checkpoint(tmp_path / "a.ckpt", target)
    torch.testing.assert_close(target.state_dict(), averages.state_dict(), rtol=0, atol=0)


TUCKER = [Rule("0", Tucker((3, 2)))]


@pytest.mark.parametrize(
    ("state", "rules", "message"),
    [
        (lambda: prefixed(net().state_dict(), "a.") | prefixed(net().state_dict(), "b."), [],
         r"holds these weights 2 times, under the prefixes 'a.', 'b.'; save those that you mean alone"),
        (lambda: prefixed(net().state_dict(), "online_model.") | prefixed(net().state_dict(), "ema_model."), [],
         "holds these weights 2 times, under the prefixes 'online_model.', 'ema_model.'"),
        (lambda: prefixed({k: v for k, v in net().state_dict().items() if k != "2.bias"}, "body."), [],
         r"7 of its keys are the model's after the prefix 'body.': take it off"),
        (lambda: nn.Sequential(*net()[:2], nn.Linear(4, 1000)).state_dict(), [],
         "its head '2' has 1000 classes and the model's 2: build the model with num_classes 1000, or load with strict=False"),
        (lambda: nn.Sequential(*net()[:2], nn.Linear(5, 2)).state_dict(), [], "most of it fits: build the model with the options"),
        (lambda: net().state_dict() | {"2.weight": torch.zeros(2, 4, dtype=torch.int8)}, [], "most of it fits: build the model"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4)).state_dict(), [], "another architecture"),
        (lambda: net().state_dict(), TUCKER, "its layers are dense and the model's are factorized: load it before you tensorize"),
        (lambda: tensorize(net(), TUCKER).state_dict(), [], "holds factorized layers: tensorize the model by the same rules"),
        (lambda: tensorize(net(), [Rule("0", CP(3))]).state_dict(), TUCKER, "holds factorized layers|of another method"),
        (lambda: tensorize(net(), [Rule("0", Tucker(3))]).state_dict() | {"0.factors.core": torch.zeros(9, 9, 3, 3)}, TUCKER,
         "its factorized layers are of another method or shape"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_apart(state: Any, rules: list[Rule], message: str, tmp_path: Path) -> None:
    target = tensorize(net(), rules)
    before = copy.deepcopy(target.state_dict())
    torch.save(state(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=f"a.pt does not fit Sequential: .*({message})"):
        load_checkpoint(tmp_path / "a.pt", target)
    torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0)


def test_a_bug_of_a_method_is_not_told_as_the_fault_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ranks_from(*_: Any) -> None:
        raise ValueError("a bug")

    target = tensorize(net(), TUCKER)
    torch.save(target.state_dict(), tmp_path / "a.pt")
    monkeypatch.setattr(Tucker, "ranks_from", ranks_from)
    with pytest.raises(ValueError, match=r"^a bug$"):
        load_checkpoint(tmp_path / "a.pt", target)


@pytest.mark.filterwarnings("ignore:.*adopted from the loaded state")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_other_ranks_are_adopted_as_load_state_dict_does(case: Case, tmp_path: Path) -> None:
    """Of a file that says nothing of its structure; both ways, and behind a prefix."""
    ranks = [case.rank, case.smaller_rank]
    for theirs, ours in (ranks, ranks[::-1]):
        source, target = (
            tensorize(nn.Sequential(case.dense()), [Rule("0", case.method(rank))], init="random")
            for rank in (theirs, ours)
        )
        torch.save(prefixed(source.state_dict(), "module."), tmp_path / "a.pt")
        report = load_checkpoint(tmp_path / "a.pt", target)
        assert target[0].rank == source[0].rank
        assert set(report.matched) == source.state_dict().keys()
        torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("method", [Tucker, CP, ADTN])
@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (Tensor.long, " integer"),
        (lambda value: value.to(torch.complex64), " complex"),
        (Tensor.to_sparse, " sparse"),
        (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), " quantized"),
        (lambda value: value.to("meta"), " without data"),
    ],
    ids=["integer", "complex", "sparse", "quantized", "meta"],
)
@pytest.mark.filterwarnings("ignore:.*quantize", "ignore:.* of rank .* has .* parameters and the dense weight")
def test_a_layer_of_which_one_factor_is_spoilt_keeps_its_own(
    spoil: Any, kind: str, method: Any, tmp_path: Path
) -> None:
    """Its rank too, whether it is the file's or another."""
    for ranks in ((3, 2), (2, 3), (3, 3)):
        source, target = (tensorize(net(), [Rule("0", method(rank))], init="random") for rank in ranks)
        state, before, rank = source.state_dict(), copy.deepcopy(target.state_dict()), target[0].rank
        last = [key for key in state if key.startswith("0.factors.")][-1]
        torch.save(state | {last: spoil(state[last])}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=re.escape(last)):
            load_checkpoint(tmp_path / "a.pt", target)
        assert target[0].rank == rank
        torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0)
        report = load_checkpoint(tmp_path / "a.pt", target, strict=False)
        found = {key: theirs for key, theirs, _ in report.mismatched}
        assert last in report.unexpected or found[last] == f"{tuple(state[last].shape)}{kind}"
        assert not any("factors" in key for key in report.matched)
        assert target[0].rank == rank
        expected = {key: before[key] if "factors" in key else state[key] for key in before}
        torch.testing.assert_close(target.state_dict(), expected, rtol=0, atol=0)


def spoilt(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict of which one to three entries are of another kind, layout or shape, or missing, or too many."""
    made = dict(state)
    for key in random.sample(list(state), random.choice([1, 1, 2, 3])):
        value = state[key]
        match random.randrange(9):
            case 0:
                made[key] = value.long()
            case 1:
                made[key] = value.to(torch.complex64)
            case 2:
                made[key] = value.to_sparse() if value.dim() else value
            case 3:
                made[key] = value.to("meta")
            case 4:
                made[key] = value.unsqueeze(0)
            case 5:
                made[key] = value[:-1] if value.dim() else value
            case 6:
                del made[key]
            case 7:
                made[f"{key}1"] = value
            case 8:
                made[key] = torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8)
    return made


class Twice(nn.Module):
    """A layer that two names share, and one beside it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.first, self.beside = case.dense(), nn.Linear(3, 3)
        self.again = self.first


@pytest.mark.filterwarnings("ignore:.*adopted from the loaded state", "ignore:.*quantized", "ignore:.*Sparse")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_drawn_factors_are_loaded_together_or_not_at_all(case: Case, tmp_path: Path) -> None:
    """A load that raises leaves the model as it was, and one that does not what it says did not match."""
    random.seed(case.name)
    raised = 0
    for _ in range(12):
        source, target = (
            tensorize(Twice(case), [Rule("first", case.method(rank))], init="random")
            for rank in random.choices([case.rank, case.smaller_rank], k=2)
        )
        before, rank, state = copy.deepcopy(target.state_dict()), target.first.rank, spoilt(source.state_dict())
        torch.save(state, tmp_path / "a.pt")
        try:
            report = load_checkpoint(tmp_path / "a.pt", target, strict=random.random() < 0.2)
        except CheckpointError:
            raised += 1
            assert target.first.rank == rank
            torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0)
            continue
        after, matched = target.state_dict(), {key.replace("again.", "first.") for key in report.matched}
        factors = {key for key in after if key.startswith("first.factors.")}
        assert not factors & matched or factors <= matched
        expected = {key: state[key] if key in report.matched else before.get(key) for key in after}
        for key, value in after.items():
            given = [expected[key] for key in (key, key.replace("first.", "again."), key.replace("again.", "first."))]
            assert any(other is not None and torch.equal(value, other) for other in given), key
        assert target.first.rank == rank or factors <= matched
    assert raised < 12


def test_a_rank_that_no_layer_has_is_not_allocated(tmp_path: Path) -> None:
    """Shapes that take no space in the file, and would agree with each other."""
    target = tensorize(net(), TUCKER)
    state = target.state_dict()
    one = torch.zeros(1)
    state |= {"0.factors.input": one.expand(10**12, 3), "0.factors.core": one.expand(3, 10**12, 3, 3)}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="does not fit Sequential"):
        load_checkpoint(tmp_path / "a.pt", target)
    assert target[0].rank == (3, 2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        target.load_state_dict(state)
    assert target[0].rank == (3, 2)


@pytest.mark.parametrize("number", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_counters_may_be_of_any_number(tmp_path: Path, number: torch.dtype) -> None:
    """`half()` of all that a state dict holds; torch's own load takes it."""
    source, target = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(2))
    source(torch.randn(2, 3, 4, 4))
    torch.save({key: value.to(number) for key, value in source.state_dict().items()}, tmp_path / "a.pt")
    load_checkpoint(tmp_path / "a.pt", target)
    assert target[1].num_batches_tracked == 1


def test_what_is_not_of_the_net_is_left(tmp_path: Path) -> None:
    """Lightning's files hold a loss's weights and metrics' counts beside the net's."""
    source = net()
    state = {f"model.{key}": value for key, value in source.state_dict().items()}
    torch.save(
        {"state_dict": state | {"criterion.weight": torch.ones(3), "val_f1.tp": torch.ones(2)}}, tmp_path / "a.pt"
    )
    report = load_checkpoint(tmp_path / "a.pt", net())
    assert report.outside == ("criterion.weight", "val_f1.tp")
    assert "2 without it left (criterion.weight, val_f1.tp)" in str(report)
    torch.save(source.state_dict() | {"total_ops": torch.ones(1)}, tmp_path / "b.pt")
    with pytest.raises(
        CheckpointError,
        match=r"1 unexpected \(total_ops\); all of the model's entries are there: load with strict=False",
    ):
        load_checkpoint(tmp_path / "b.pt", net())


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapper_is_named(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.save(net().state_dict(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"the model is a wrapper .*give the net inside of it"):
        load_checkpoint(tmp_path / "a.pt", wrap(net()))


def test_numbers_that_torch_cannot_convert_change_nothing(tmp_path: Path) -> None:
    target = tensorize(net(), TUCKER)
    before = copy.deepcopy(target.state_dict())
    packed = {key: torch.empty(value.shape, dtype=torch.float4_e2m1fn_x2) for key, value in before.items()}
    mixed = before | {list(before)[-1]: packed[list(before)[-1]]}
    for state in (packed, mixed):
        torch.save(state, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=r"float4_e2m1fn_x2 in the file"):
            load_checkpoint(tmp_path / "a.pt", target)
        torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0)


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


class Call:
    def __init__(self, function: Any, argument: str) -> None:
        self.call = (function, (argument,))

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def test_odd_state_dicts_are_named(tmp_path: Path) -> None:
    state = net().state_dict()
    loop: dict[str, Any] = {}
    loop["model"] = loop
    odd = {
        "integer keys": {1: state["0.weight"]},
        "bytes keys": {b"0.weight": state["0.weight"]},
        "a loop": loop,
        "sparse": state | {"2.weight": state["2.weight"].to_sparse()},
        "integers": state | {"2.weight": state["2.weight"].int()},
        "complex": state | {"2.weight": state["2.weight"].to(torch.complex64)},
    }
    for kind, content in odd.items():
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=r"does not fit|holds no state dict"):
            load_checkpoint(tmp_path / "a.pt", net())
        assert kind


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    torch.save({"state_dict": net().state_dict(), "extra": Hostile(trap)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"was refused: .* could run code; save the state_dict alone"):
        load_checkpoint(tmp_path / "a.pt", net())
    for function in (os.system, print, exec):
        torch.save({"state_dict": net().state_dict(), "extra": Call(function, f"touch {trap}")}, tmp_path / "b.pt")
        with pytest.raises(CheckpointError, match="was refused"):
            load_checkpoint(tmp_path / "b.pt", net())
    assert not trap.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_torn_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".pt":
        torch.save(net().state_dict(), path)
    else:
        save_file(net().state_dict(), path)
    whole = path.read_bytes()
    for size in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=rf"{path} (is not a checkpoint, or it is truncated|holds)"):
            load_checkpoint(path, net())


@pytest.mark.parametrize("content", [b"not a checkpoint at all\n", b"PK\x03\x04 zip?", b"\x80\x04."])
def test_other_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a.pt is not a checkpoint"):
        load_checkpoint(tmp_path / "a.pt", net())


def test_files_without_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*missing.pt"):
        load_checkpoint(tmp_path / "missing.pt", net())
    for content, message in [({"epoch": 1}, "holds no state dict"), ([1, 2], "holds a list; expected a state dict")]:
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / "a.pt", net())


@pytest.mark.data
def test_the_published_resnet20_loads(resnet20_checkpoint: Path) -> None:
    from lightning_modules.nets import build_net

    report = load_checkpoint(resnet20_checkpoint, build_net("resnet20", num_classes=10, input_shape=(3, 32, 32)))
    assert str(report) == "97 entries matched, prefix 'module.' taken off"


# ---- files of this and former versions


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_files_of_every_version_load(path: Path) -> None:
    """If this fails, users' files do not load any more: mend the reading, never the fixture."""
    net, shape = load_net(path)
    expected = json.loads((FOLDER / "outputs.json").read_text())[path.stem]
    assert shape == (1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(example()), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_the_fixtures_have_every_method() -> None:
    assert {path.name for path in FIXTURES} >= {
        f"{name}.{suffix}" for name in RULES for suffix in ("ckpt", "safetensors")
    }
    layers = [layer for path in FIXTURES for layer in read_checkpoint(path)["tensorization"]["layers"]]
    assert {layer["method"] for layer in layers} == {rule["method"] for rules in RULES.values() for rule in rules}
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 100_000


# ---- broken files


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_files_torn_anywhere_are_refused(path: Path, tmp_path: Path) -> None:
    whole, torn = path.read_bytes(), tmp_path / path.name
    for size in random.sample(range(len(whole)), 20):
        torn.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="is not a checkpoint, or it is truncated or damaged"):
            load_net(torn)
        assert torn.read_bytes() == whole[:size]


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_flipped_bits_are_refused_or_do_not_matter(path: Path, tmp_path: Path) -> None:
    """A .ckpt has check sums: what is loaded of it is what was saved."""
    whole, flipped, expected = path.read_bytes(), tmp_path / path.name, read_checkpoint(path)["state_dict"]
    refused = 0
    for place in random.sample(range(len(whole)), 20) + random.sample(range(3000), 10):  # headers are at the start
        content = bytearray(whole)
        content[place] ^= 1 << random.randrange(8)
        flipped.write_bytes(content)
        try:
            load_net(flipped)
            if path.suffix == ".ckpt":
                torch.testing.assert_close(read_checkpoint(flipped)["state_dict"], expected, rtol=0, atol=0)
        except CheckpointError:
            refused += 1
        assert flipped.read_bytes() == content
    assert 0 < refused < 30


def test_files_without_check_sums_load(tmp_path: Path) -> None:
    source, target = net(), net()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(source.state_dict(), tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    load_checkpoint(tmp_path / "a.pt", target)
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "memory.ckpt").symlink_to("/proc/self/mem")  # opens, and fails to read, also for root
    with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(10**7))
    for name, message in (
        ("folder", "folder.ckpt is a folder"),
        ("memory", "memory.ckpt cannot be read: Input/output error"),
        ("bomb", "bomb.ckpt is not a checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / f"{name}.ckpt", net())


def test_tensors_that_are_not_there_or_not_real(tmp_path: Path) -> None:
    """Shapes that take no space in the file must take none in memory; each leaves the model as it was."""
    state, target = net().state_dict(), net()
    before = copy.deepcopy(target.state_dict())
    odd = {
        "wide": torch.zeros(1).expand(10**12),
        "meta": torch.zeros(2, 4, device="meta"),
        "of another rank": torch.zeros(2, 4, 1),
    }
    for kind, value in odd.items():
        torch.save(state | {"2.weight": value}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=r"does not fit Sequential: .*2.weight"):
            load_checkpoint(tmp_path / "a.pt", target)
        torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0, msg=kind)


@pytest.mark.parametrize("key", ["x" * 100_000, "0." * 50_000, "\x1b[31m" * 10_000, "a\nb" * 1000], ids=len)
def test_what_a_file_says_is_bounded_in_messages(key: str, tmp_path: Path) -> None:
    state = net().state_dict()
    for content in (
        {**state, key: state["2.bias"]},
        {key: state["2.bias"]},
        prefixed(state, f"{key}."),
        {f"model.{key}.{name}{place}": value for name, value in state.items() for place in range(9)},
        {**state, "2.weight": torch.zeros((1,) * 60)},
        {**state, "tensorization": {"version": 1, "layers": [{"pattern": key, "method": "Tucker", "rank": 1}]}},
        {**state, "tensorization": {"version": key, "layers": []}},
    ):
        torch.save(content, tmp_path / "a.pt")
        try:
            said = str(load_checkpoint(tmp_path / "a.pt", net()))
        except CheckpointError as error:
            said = str(error)
        assert len(said) < 1000
        assert said.isprintable()


def damaged(content: bytes) -> bytes:
    """Bits flipped, parts cut out, doubled, overwritten or swapped."""
    torn, size = bytearray(content), len(content)
    for _ in range(random.choice([1, 1, 3, 20])):
        first, length = random.randrange(size), random.choice([1, 4, 64, 1000])
        part = torn[first : first + length]
        match random.randrange(6):
            case 0:
                torn[first] = torn[first] ^ (1 << random.randrange(8)) if first < len(torn) else 0
            case 1:
                del torn[first : first + length]
            case 2:
                torn[first:first] = part
            case 3:
                torn[first : first + length] = random.randbytes(len(part))
            case 4:
                torn[first : first + length] = bytes(len(part))
            case 5:
                torn = torn[first:] + torn[:first]
        torn.extend(b"\0" * max(0, size - len(torn)) if random.random() < 0.5 or not torn else b"")
        size = len(torn)
    return bytes(torn)


def odd_state(state: dict[str, Any], trap: Path) -> Any:
    """A state dict of which something is of another kind."""
    odd: list[Any] = [
        None, "text", 3, [1], {"a": {}}, float("nan"), torch.zeros(()), torch.zeros(0), torch.zeros(2, 2, dtype=torch.bool),
        torch.zeros(3, device="meta"), torch.zeros(1).expand(10**12), torch.full((4, 3, 3, 3), float("nan")), Hostile(trap),
        torch.zeros(2, 4).to_sparse(), "x" * 100_000,
    ]  # fmt: skip
    keys: list[Any] = [
        *state,
        "state_dict",
        "model",
        "ema",
        "tensorization",
        "hyper_parameters",
        "x" * 100_000,
        7,
        ("a",),
        b"0.weight",
    ]
    made: dict[Any, Any] = dict(state)
    for _ in range(random.choice([1, 1, 3])):
        made[random.choice(keys)] = random.choice([*odd, *state.values()])
        made.pop(random.choice(keys), None)
    for key in random.sample(["state_dict", "model", "ema", "state_dict_ema", "other"], random.choice([0, 0, 1, 2])):
        made = {key: made}
    return made


@pytest.mark.filterwarnings("ignore:.*adopted from the loaded state")
@pytest.mark.parametrize("seed", range(3))
def test_drawn_damage_runs_nothing_and_changes_nothing(seed: int, tmp_path: Path) -> None:
    """120 files each, of every kind; whatever is wrong is one short line, and the model is then what it was."""
    random.seed(seed)
    trap, target, path = tmp_path / "ran", tensorize(net(), TUCKER), tmp_path / "a.pt"
    source, refused = tensorize(net(), [Rule("0", Tucker((3, 3)))]), 0
    save_safetensors(source, tmp_path / "whole.safetensors")
    torch.save(source.state_dict(), tmp_path / "whole.pt")
    torch.save({"state_dict": source.state_dict(), "a": Hostile(trap)}, tmp_path / "hostile.pt")
    for _ in range(120):
        before = copy.deepcopy(target.state_dict())
        if random.random() < 0.4:
            torch.save(odd_state(source.state_dict(), trap), path)
        else:
            whole = tmp_path / random.choice(["whole.safetensors", "whole.pt", "hostile.pt"])
            path = tmp_path / f"a{whole.suffix}"
            path.write_bytes(damaged(whole.read_bytes()))
        content = path.read_bytes()
        said = ""
        try:
            load_checkpoint(path, target, strict=random.random() < 0.8)
        except CheckpointError as error:
            said = str(error)
        if said:
            refused += 1
            assert len(said) <= 1000
            assert said.isprintable()
            torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0, equal_nan=True)
        assert path.read_bytes() == content
        path = tmp_path / "a.pt"
    assert refused > 80
    assert not trap.exists()


# ---- hostile descriptions: of the net, and in the metadata of .safetensors


def described(path: Path, description: str) -> Path:
    save_file(net().state_dict(), path, {"tnlayers": description})
    return path


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("not JSON", "description that is not understood: Expecting value"),
        ("", "not understood: Expecting value"),
        ("{", "not understood: Expecting property name"),
        ("[]", "expected a mapping"),
        ("NaN", "expected a mapping"),
        ("null", "expected a mapping"),
        ("[" * 10_000 + "]" * 10_000, "nested too deeply|levels deep"),
        (json.dumps({"tensorization": [0] * 200_000}), "more than 100000 values"),
        ("9" * 10_000, "Exceeds the limit"),
        ('{"shared": 3}', "names tensors of the file"),
        ('{"shared": {"x": "none"}}', "names tensors of the file"),
        ('{"shared": {"x": ["0.weight"]}}', "names tensors of the file"),
        ('{"shared": {"x": "0.weight"}}', r"1 unexpected \(x\)"),
        ('{"tensorization": 3}', "structure that is not understood"),
        ('{"tensorization": {"version": NaN, "layers": []}}', "version nan"),
        ('{"tensorization": {"version": 1, "layers": [{"pattern": "0", "method": "CP", "rank": 1000000000}]}}',
         "rank 1000000000: a weight of shape"),
        ('{"tensorization": {"version": 1, "layers": [{"pattern": "0", "method": "CP", "rank": Infinity}]}}', "bare float"),
    ],
)  # fmt: skip
def test_hostile_metadata_is_refused(description: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(described(tmp_path / "a.safetensors", description), net())


def test_metadata_of_others_is_left_alone(tmp_path: Path) -> None:
    source, target = net(), net()
    save_file(source.state_dict(), tmp_path / "a.safetensors", {"format": "pt", "tensorization": "theirs"})
    load_checkpoint(tmp_path / "a.safetensors", target)
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("net", "os.system", "unknown net 'os.system'"),
        ("net", ["cnn4"], "cannot be built"),
        ("net", None, "cannot be built"),
        ("num_classes", "ten", "cannot be built"),
        ("num_classes", 11, "fc2: out_features is 10 in the file and 11 in the model"),
        ("num_classes", 10**12, "it would have"),
        ("num_classes", -1, "at least one class"),
        ("input_shape", [1, 8], "three positive sizes"),
        ("input_shape", "183", "cannot be built"),
        ("input_shape", 3, "cannot be built"),
        ("input_shape", torch.zeros(3), "holds a Tensor"),
        ("input_shape", [10**12, 8, 8], "it would have"),
        ("net_options", [1], "cannot be built"),
        ("net_options", {"hiden": 3}, "its options are hidden, widths"),
        ("net_options", {"hidden": 10**10}, "it would have"),
        ("net_options", {"hidden": -3}, "cannot be built"),
        ("net_options", {"widths": [10**6] * 4}, "it would have"),
        ("net_options", {"num_classes": 3}, "multiple values|is no option of a net"),
        ("net_options", {"hidden": json.loads("[" * 50 + "]" * 50)}, "levels deep"),
    ],
)
def test_hostile_nets_are_refused(key: str, value: Any, message: str, tmp_path: Path) -> None:
    content = torch.load(FOLDER / "v1.ckpt", weights_only=True)
    content["hyper_parameters"][key] = value
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=message) as error:
        load_net(tmp_path / "a.ckpt")
    assert len(str(error.value)) < 600


def test_a_net_brings_no_weights_of_its_own(tmp_path: Path) -> None:
    """timm's own option would load another file, which older versions of it did as any pickle."""
    content = torch.load(FOLDER / "v1.ckpt", weights_only=True)
    content["hyper_parameters"] |= {"net": "timm/resnet18", "net_options": {"checkpoint_path": str(tmp_path / "b.pt")}}
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="'checkpoint_path' is not taken"):
        load_net(tmp_path / "a.ckpt")
