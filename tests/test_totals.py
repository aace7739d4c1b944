"""Totals are true on nets that people have: counted by torch itself, with a row for every weight that was left and why."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models as vision
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vgg import make_layers

from lightning_modules.callbacks.rank_steps import steps_of
from tests.cases import CASES, GEOMETRIES, Case
from tests.processes import HANGING
from tnlayers import (
    CP,
    SVD,
    TT,
    FactorizedLayer,
    LayerSpec,
    LowRank,
    MacsKept,
    ParamsKept,
    RelativeError,
    Rule,
    Summary,
    Tucker,
    TuckerConv2d,
    UserError,
    fraction_kept,
    resolve,
    resolve_truncation,
    rules_from_plain,
    rules_of,
    summarize,
    tensorize,
    to_dense,
    truncate,
)
from tnlayers.counting import count_macs
from tnlayers.geometry import Geometry
from tnlayers.tracing import Example, arguments_of, calls_of

PICTURE = torch.randn(2, 3, 32, 32)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.up, self.last = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(32, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        return self.last(torch.cat([y, self.up(self.deep(y).relu())], 1))


class Audio(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(16, 16, 5))
        self.body = nn.Sequential(nn.Conv1d(1, 16, 9, 4), nn.ReLU(), normed, nn.ReLU())
        self.head = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(-1))


class Speech(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.lstm = nn.LSTM(12, 10, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(20, 20)

    def forward(self, tokens: Tensor, *, scale: Tensor) -> dict[str, Any]:
        states, last = self.lstm(self.embedding(tokens) * scale)
        return {"logits": [self.head(states)], "last": last}


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 1)

    def forward(self, pictures: list[Tensor], targets: Any = None) -> list[dict[str, Tensor]]:
        return [{"boxes": self.head(self.conv(x[None]))} for x in pictures]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def _double(net: nn.Module) -> nn.Module:
    """In float64 torch computes recurrent layers by products that its counter sees."""
    return net.double()


WORDS = {"tokens": torch.randint(0, 20, (3, 7)), "scale": torch.ones((), dtype=torch.float64)}
NETS: dict[str, tuple[Callable[[], nn.Module], Example]] = {
    "resnet18": (lambda: vision.resnet18(num_classes=10), PICTURE),
    "mobilenet_v3_small": (lambda: vision.mobilenet_v3_small(num_classes=10), PICTURE),
    "convnext": (lambda: ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=9), PICTURE),
    "swin": (lambda: SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=9), PICTURE),
    "vit": (lambda: vision.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=9), PICTURE),
    "densenet": (lambda: DenseNet(8, (2, 2), 16, num_classes=9), PICTURE),
    "vgg": (lambda: nn.Sequential(make_layers([16, "M", 32, "M"]), nn.Flatten(), nn.Linear(2048, 9)), PICTURE),
    "r3d_18": (lambda: vision.video.r3d_18(num_classes=9), torch.randn(1, 3, 2, 8, 8)),
    "BiT": (lambda: ResNetV2([1, 1], (128, 256), num_classes=9, stem_chs=32), PICTURE),
    "NFNet": (lambda: timm.create_model("test_nfnet", num_classes=9), PICTURE),
    "tf_efficientnet": (lambda: timm.create_model("test_efficientnet", num_classes=9, pad_type="same"), PICTURE),
    "U-Net": (UNet, PICTURE),
    "audio": (Audio, torch.randn(2, 1, 100)),
    "speech": (lambda: _double(Speech()), WORDS),
    "detector": (Detector, [PICTURE[0], PICTURE[1, :, :20]]),
    "transformer": (Encoder, (torch.randn(2, 5, 16),)),
}


@contextmanager
def plain_attention() -> Iterator[None]:
    """By products that torch's counter sees."""
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.backends.mha.set_fastpath_enabled(True)


def torch_counts(net: nn.Module, example: Example) -> int:
    args, kwargs = arguments_of(example)
    net = copy.deepcopy(net).eval()
    with torch.no_grad(), plain_attention():
        net(*args, **kwargs)
        with FlopCounterMode(display=False) as counter:
            net(*args, **kwargs)
    return counter.get_total_flops() // 2


def half(net: nn.Module) -> list[Rule]:
    kinds = {type(module).__name__ for module in net.modules()}
    methods = [Tucker(ParamsKept(0.5)), TT(ParamsKept(0.5))]
    return [Rule("*", method) for method in methods if not kinds.isdisjoint(method.replaces)]


def with_weights(net: nn.Module) -> dict[str, nn.Module]:
    """Modules with a parameter of two dimensions or more of their own, parametrized or not."""
    found = {}
    for name, module in net.named_modules():
        whole = module.parametrizations.parameters() if nn.utils.parametrize.is_parametrized(module) else ()
        if ".parametrizations." not in name and any(p.dim() > 1 for p in (*module.parameters(recurse=False), *whole)):
            found[name] = module
    return found


def check_rows(summary: Summary) -> None:
    for key in ("params", "dense_params", "macs", "dense_macs"):
        rows = [getattr(row, key) for row in (*summary.layers, summary.other)]
        assert min(rows) >= 0
        assert sum(rows) == getattr(summary.totals, key), key


@pytest.mark.filterwarnings("ignore:.*lower the rank or leave the layer dense")
@pytest.mark.parametrize("name", NETS)
def test_totals_are_what_torch_counts(name: str) -> None:
    build, example = NETS[name]
    net = build().eval()
    dense, weights = copy.deepcopy(net), with_weights(net)
    rules = resolve(net, half(net), example, init="random")
    again = rules_from_plain([rule.to_plain() for rule in rules])
    assert resolve(net, again, example, init="random") == rules == again
    tensorize(net, again, init="random")
    assert any(isinstance(layer, FactorizedLayer) for layer in net.modules()) == bool(half(dense))
    summary = summarize(net, example, rules=rules, measure=False)
    batch = summary.batch
    assert batch == (1 if name == "r3d_18" else 3 if name == "speech" else 2)
    assert summary.totals.macs == torch_counts(net, example) // batch
    assert summary.totals.dense_macs == torch_counts(dense, example) // batch
    assert summary.totals.params == sum(parameter.numel() for parameter in net.parameters())
    assert summary.totals.dense_params == sum(parameter.numel() for parameter in dense.parameters())
    assert not summary.unknown
    check_rows(summary)
    rows, reasons = {row.name: row for row in summary.layers}, {rule.pattern: rule.reason for rule in rules}
    for row in rows:  # those of an opened module stand in its place
        assert row in weights or row.rpartition(".")[0] in weights
    for layer, module in weights.items():
        assert layer in rows or any(row.startswith(f"{layer}.") for row in rows)
        if layer in rows and rows[layer].method == "dense":
            assert type(module).__name__.removeprefix("NonDynamicallyQuantizable") in rows[layer].kind
            within = {reason for at, reason in reasons.items() if f"{at}.".startswith(f"{layer}.")}
            assert rows[layer].note == reasons.get(layer, "; ".join(sorted(within - {""}))) != ""
            assert rows[layer].weight_shape


@pytest.mark.filterwarnings("ignore:.*above what a weight")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_a_method_says_of_its_macs_is_what_torch_counts(case: Case) -> None:
    """For every way of computing it; budgets are made of these numbers."""
    x = case.input()
    for options in GEOMETRIES if case.is_conv else ({}, {"bias": False}):
        dense = case.dense(**options)
        spec = LayerSpec(Geometry.of(dense), case.method(case.smaller_rank))
        layer = case.layer._empty(dense, spec, "auto", dtype=torch.float64, device="cpu")
        (call,) = calls_of(spec.geometry, [x])
        for plan in layer.spec.plans:
            layer.set_plan(plan)
            assert count_macs(layer, x).total == layer.spec.macs([call], plan)
        assert count_macs(dense, x).total == spec.geometry.macs([call])


# ---- what torch's counter does not know


class Calls(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class Token(nn.Module):
    """Gives a view of a parameter to a module, as Hugging Face's Perceiver does."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.linear = nn.Parameter(torch.zeros(1, 4)), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.token.expand(len(x), -1))


class Force(nn.Module):
    """Returns the gradient of an energy with respect to positions."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x)[0]


S, Q = torch.randn(3, 5, 6), torch.randn(2, 4, 5, 8)
ATTENTION = 2 * 4 * 5 * 5 * (8 + 8)
ENCODER = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
OPERATIONS: dict[str, tuple[nn.Module, Example, int]] = {
    "LSTM": (nn.LSTM(6, 8, 2, bidirectional=True), S, 2 * 15 * 32 * (6 + 8 + 16 + 8)),
    "LSTM with a projection": (nn.LSTM(6, 8, proj_size=4), S, 15 * (32 * (6 + 4) + 8 * 4)),
    "GRU": (nn.GRU(6, 8, 2), S, 15 * 24 * (6 + 8 + 8 + 8)),
    "RNN": (nn.RNN(6, 8), S, 15 * 8 * (6 + 8)),
    "LSTMCell": (nn.LSTMCell(6, 8), S[0], 5 * 32 * 14),
    "attention": (Calls(F.scaled_dot_product_attention), (Q, Q, Q), ATTENTION),
    "attention with a mask": (
        Calls(F.scaled_dot_product_attention),
        {"query": Q, "key": Q, "value": Q, "attn_mask": torch.ones(5, 5, dtype=torch.bool)},
        ATTENTION,
    ),
    "attention of groups": (
        Calls(F.scaled_dot_product_attention),
        {"query": Q, "key": Q[:, :2], "value": Q[:, :2], "enable_gqa": True},
        ATTENTION,
    ),
    "MultiheadAttention": (nn.MultiheadAttention(8, 2), (S.new_ones(5, 2, 8),) * 3, 10 * 4 * 64 + 2 * 2 * 25 * 8),
    "TransformerEncoder with a mask": (
        ENCODER,
        {"src": torch.randn(2, 5, 8), "src_key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)},
        2 * (10 * 4 * 64 + 2 * 2 * 25 * 8 + 2 * 10 * 8 * 16),
    ),
    "Bilinear": (nn.Bilinear(4, 5, 3), (torch.randn(2, 4), torch.randn(2, 5)), 2 * 3 * (20 + 5)),
    "matrix times vector": (Calls(torch.matmul), (torch.randn(2, 3, 4), torch.randn(4)), 24),
    "addmv": (Calls(torch.addmv), (torch.randn(3), torch.randn(3, 4), torch.randn(4)), 12),
    "dot": (Calls(torch.dot), (torch.randn(4), torch.randn(4)), 4),
    "einsum": (Calls(lambda x, w: torch.einsum("nchw,oc->nohw", x, w)), (PICTURE, torch.randn(5, 3)), 2 * 1024 * 15),
    "a function": (Calls(lambda x: F.conv2d(x, torch.ones(4, 3, 3, 3))), PICTURE, 2 * 30 * 30 * 4 * 27),
    "grouped and transposed": (
        nn.ConvTranspose2d(4, 6, 3, 2, groups=2),
        torch.randn(1, 4, 8, 8),
        64 * 4 * 3 * 9,
    ),
    "a view of a parameter": (Token(), torch.randn(3, 4), 3 * 20),
    "a gradient": (Force(), torch.randn(3, 4), 2 * 3 * (20 + 5)),
    "interpolation": (nn.Upsample(scale_factor=2, mode="bilinear"), PICTURE, 0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_counts(name: str) -> None:
    module, example, macs = OPERATIONS[name]
    counted = count_macs(module, example)
    assert (counted.total, counted.unknown) == (macs, ())
    assert torch.backends.mha.get_fastpath_enabled()
    assert module.training


OWN_OPERATOR = """
import torch
from torch import nn
from tnlayers import summarize

@torch.library.custom_op("tnlayers_tests::scaled", mutates_args=())
def scaled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.T

class Own(nn.Linear):
    def forward(self, x):
        return scaled(x, self.weight)

summary = summarize(nn.Sequential(nn.Linear(6, 6), Own(6, 6)), torch.randn(2, 6), measure=False)
print(summary.unknown, summary.totals.macs)
print(summary.layers[1].note)
print(summary)
"""


def test_what_no_formula_is_known_for_is_said() -> None:
    """In a process of its own, whose operators are not those of other tests' libraries."""
    told = subprocess.run(
        [sys.executable, "-c", OWN_OPERATOR], capture_output=True, text=True, timeout=HANGING, check=True
    )
    counts, note, *table = told.stdout.splitlines()
    assert counts == "('tnlayers_tests.scaled',) 36"
    assert note == "Own is a subclass of Linear with a forward of its own"
    assert any("not counted, for want of a formula: tnlayers_tests.scaled" in line for line in table)


# ---- what is left


def _parametrized(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(layer)


def _bare(layer: nn.Module) -> nn.Module:
    weight = layer.weight
    del layer.weight
    layer.weight = weight.detach()
    return layer


class Wide(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(8, 8, dtype=torch.complex64), "its weight is complex"),
        (nn.Bilinear(8, 8, 8), "no method replaces Bilinear"),
        (Wide(8, 8), "Wide is a subclass of Linear with a forward of its own"),
        (_parametrized(nn.Linear(8, 8)), "its weight is parametrized"),
        (_bare(nn.Linear(8, 8)), "its weight is not a parameter of its own"),
        (nn.Linear(8, 8).to(torch.float8_e4m3fn), "its weight is of type float8_e4m3fn"),
        (nn.Conv2d(8, 8, 3), "TT has nothing for Conv2d"),
    ],
    ids=str,
)
def test_a_layer_that_is_left_is_listed_with_the_reason(layer: nn.Module, reason: str) -> None:
    net = nn.ModuleDict({"fine": nn.Linear(8, 8), "odd": layer, "apart": nn.Linear(8, 8)})
    rules = {rule.pattern: rule for rule in resolve(net, [Rule("[fo]*", TT(2))])}
    assert list(rules) == ["fine", "odd", "apart"]
    assert rules["odd"].factorization is None
    assert reason in rules["odd"].reason
    assert rules["apart"].reason == "no rule takes it"
    assert rules["fine"].factorization == TT((2, 2))
    assert resolve(net, list(rules.values())) == list(rules.values())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("odd", "matches only layers that no method takes, such as 'odd': Wide is a subclass of Linear"),
        ("block", r"matches Sequential 'block', which holds layers and has no weight itself; write 'block\.\*'"),
        ("norm", "matches BatchNorm2d 'norm', which has no weight that could be factorized"),
        ("conv", "matches only Conv2d layers such as 'conv', and TT replaces Linear"),
    ],
)
def test_no_layer_that_is_there_is_denied(pattern: str, message: str) -> None:
    layers = {"odd": Wide(8, 8), "block": nn.Sequential(nn.Linear(8, 8)), "norm": nn.BatchNorm2d(8)}
    with pytest.raises(UserError, match=message):
        resolve(nn.ModuleDict(layers | {"conv": nn.Conv2d(8, 8, 3)}), [Rule(pattern, TT(2))])


@pytest.mark.parametrize("rank", [ParamsKept(0.5), MacsKept(0.5), RelativeError(0.1), ParamsKept(0.5, of="model")])
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, torch.qint8], ids=lambda dtype: str(dtype)
)
@pytest.mark.filterwarnings("ignore:.*quantize")
def test_a_budget_over_no_real_numbers_names_the_layer(dtype: torch.dtype, rank: Any) -> None:
    net = nn.ModuleDict({"fine": nn.Linear(8, 8), "odd": nn.Linear(8, 8)})
    weight = torch.ones(8, 8)
    odd = torch.quantize_per_tensor(weight, 0.1, 0, dtype) if dtype is torch.qint8 else weight.to(dtype)
    net["odd"].weight = nn.Parameter(odd, requires_grad=False)
    with pytest.raises(
        UserError, match=r"odd: its weight is .*, and .* needs floating-point numbers; leave .*Rule\('odd', None\)"
    ):
        resolve(net, [Rule("*", TT(rank))])


class Reads(nn.Module):
    """Uses the weight of a layer, which it never calls, as torchvision's Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(F.linear(x, self.read.weight, self.read.bias))


def test_macs_of_a_layer_that_is_never_called_are_not_known() -> None:
    net, x = Reads(), torch.randn(3, 16)
    read, called = resolve(net, [Rule("*", TT(MacsKept(0.5)))], x)
    assert read.reason == "MacsKept(0.5): the example input never calls it, so what it costs is not known"
    assert called.factorization is not None
    summary = summarize(net, x, measure=False)
    assert [row.macs for row in summary.layers] == [0, 256]
    assert (summary.other.macs, summary.totals.macs) == (256, 512)
    with pytest.raises(UserError, match="give an example_input that reaches 'read'"):
        resolve(net, [Rule("read", TT(MacsKept(0.5)))], x)


class Listed(nn.Module):
    """Calls its layers through something that is no module."""

    def __init__(self, hold: Callable[[nn.Module, nn.Module], Any], take: Callable[[Any], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.LSTM(16, 16)
        self.held, self.take = hold(self.first, self.second), take

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.take(self.held)
        return second(first(x))[0]


HOLDERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "list": (lambda *layers: [*layers], list),
    "tuple": (lambda *layers: layers, list),
    "dict": (lambda *layers: dict(zip("ab", layers, strict=True)), lambda held: held.values()),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_layers_in_plain_lists_are_replaced(holder: str) -> None:
    net, x = Listed(*HOLDERS[holder]), torch.randn(3, 2, 16)
    dense = torch_counts(net.double(), x.double())
    tensorize(net, [Rule("*", SVD(2), plan="factors")])
    assert torch_counts(net, x.double()) < dense / 2
    summary = summarize(net, x.double(), measure=False)
    assert (summary.totals.dense_macs, summary.other.macs) == (dense // 3, 0)
    assert not any(row.note for row in summary.layers)
    to_dense(net)
    assert torch_counts(net, x.double()) == dense


def test_a_layer_that_is_called_behind_the_back_of_the_model_is_said_never_to_be() -> None:
    net, x = Listed(lambda *layers: lambda: layers, lambda held: held()), torch.randn(3, 2, 16)
    first, *others = summarize(tensorize(net, [Rule("first", SVD(2))]), x, measure=False).layers
    assert (first.method, first.macs, first.note) == ("SVD", 0, "the example input never calls it")
    assert others[-1].macs > 0


# ---- budgets of the whole model


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 80, 3, padding=1)
        self.plain, self.norm = nn.Conv2d(80, 80, 3, padding=1), nn.BatchNorm2d(80)
        self.attention, self.head = nn.MultiheadAttention(80, 2, batch_first=True), nn.Linear(80, 120)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.plain(self.wide(self.stem(x)))).flatten(2).mT
        return self.head(self.attention(x, x, x)[0])


X = torch.randn(2, 3, 8, 8)
SHARED: dict[str, Callable[[Any], list[Rule]]] = {
    "one rule": lambda rank: [Rule("*", Tucker(rank))],
    "two methods": lambda rank: [
        Rule("stem", None),
        Rule("wide", LowRank(rank)),
        Rule("*", Tucker(rank)),
        Rule("*", TT(rank)),
    ],
    "beside fixed ranks": lambda rank: [Rule("wide", Tucker((40, 30))), Rule("plain", Tucker(rank))],
    "beside a budget": lambda rank: [Rule("wide", LowRank(MacsKept(0.9))), Rule("p*", Tucker(rank))],
}


@pytest.mark.parametrize("fraction", [0.6, 0.75])
@pytest.mark.parametrize("rules", SHARED)
@pytest.mark.parametrize("budget", [ParamsKept, MacsKept])
def test_a_budget_of_the_whole_model_is_what_torch_counts(budget: Any, rules: str, fraction: float) -> None:
    """All else counts as kept; several rules share it."""
    dense = Mixed().eval()
    net, rank = copy.deepcopy(dense), budget(fraction, of="model")
    tensorize(net, SHARED[rules](rank), example_input=X)
    params = [sum(parameter.numel() for parameter in each.parameters()) for each in (net, dense)]
    macs = [torch_counts(each, X) for each in (net, dense)]
    now, full = params if budget is ParamsKept else macs
    assert 0.99 * fraction <= now / full <= fraction
    assert fraction_kept(net, budget, X, of="model") == now / full
    smaller = budget(0.9 * fraction, of="model")
    truncate(net, resolve_truncation(net, smaller, X, pattern="[pw]*"))
    assert 0.98 * smaller.fraction <= fraction_kept(net, budget, X, of="model") <= smaller.fraction
    tensorize(net, [Rule("[wp]*", Tucker(budget(0.5, of="model")))], example_input=X)
    assert 0.98 * 0.5 <= fraction_kept(net, budget, X, of="model") <= 0.5


class ReadsWeights(nn.Module):
    """Reads dtypes of weights, as Hugging Face's T5, ViT and CLIP do, and gives a weight to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x.to(self.wide.weight.dtype)).relu()
        return F.linear(self.back(x.to(self.back.weight.dtype)), self.back.weight.t())


@pytest.mark.parametrize("fraction", [0.5, 0.7, 0.9])
def test_weights_that_are_read_do_not_overdraw_a_budget(fraction: float) -> None:
    dense, x = ReadsWeights(), torch.randn(32, 64)
    net = tensorize(copy.deepcopy(dense), [Rule("*", SVD(MacsKept(fraction, of="model")))], example_input=x)
    assert 0.99 * fraction <= torch_counts(net, x) / torch_counts(dense, x) <= fraction


def test_whole_models_that_cannot_be_had() -> None:
    net, half = Mixed(), ParamsKept(0.1, of="model")
    with pytest.raises(
        UserError,
        match=r"rule 'wide': .*rank 1 in .* keeps 0\.\d+ of the whole model; what no such rule may touch is .*%",
    ):
        resolve(net, [Rule("wide", Tucker(half))], X)
    with pytest.raises(UserError, match=r"are one for all rules, and these are .*0.1, of=model"):
        resolve(net, [Rule("wide", Tucker(half)), Rule("plain", Tucker(ParamsKept(0.5, of="model")))], X)
    with pytest.raises(UserError, match="give an example_input"):
        resolve(net, [Rule("head", TT(MacsKept(0.5, of="model")))])
    with pytest.raises(UserError, match=r"is a budget of a model, and this is one layer; give ParamsKept\(0.1\)"):
        TuckerConv2d.from_dense(net.wide, rank=half)
    with pytest.raises(UserError, match=r"expected of='rule' or of='model'"):
        MacsKept(0.5, of="net")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["MacsKept(0.5, of=model)", "MacsKept( 0.5 ,of = 'model' )", 'MacsKept(fraction=0.5, of="model")']
)
def test_a_budget_of_the_whole_model_is_text(text: str) -> None:
    rule = Rule.from_plain({"pattern": "*", "method": "Tucker", "rank": text})
    assert rule.factorization == Tucker(MacsKept(0.5, of="model"))
    assert rule.to_plain()["rank"] == str(MacsKept(0.5, of="model")) == "MacsKept(0.5, of=model)"
    assert steps_of({"2-4": text})[3].rank == MacsKept(0.5, of="model")
    for wrong in ("RelativeError(0.5, of=model)", "MacsKept(0.5, of=net)"):
        with pytest.raises(UserError, match="of="):
            Rule.from_plain({"pattern": "*", "method": "Tucker", "rank": wrong})


# ---- truncations by patterns


def test_truncate_takes_patterns() -> None:
    net = tensorize(Mixed(), [Rule("[wp]*", Tucker((20, 20))), Rule("head", TT(6))])
    before = {rule.pattern: rule.factorization for rule in rules_of(net)}
    assert truncate(net, [Rule("wide", Tucker((9, 7)))]).keys() == {"wide"}
    errors = truncate(net, [Rule("p*", Tucker(ParamsKept(0.05)))])
    assert errors.keys() == {"plain"}
    assert truncate(net, [Rule("wi*", Tucker(4)), Rule("h*", TT(3))]).keys() == {"wide", "head"}
    after = {rule.pattern: rule.factorization for rule in rules_of(net)}
    assert after["wide"] == Tucker((4, 4))
    assert after["head"] == TT((3, 3))
    assert before.keys() == after.keys()
    with pytest.raises(UserError, match="'plain' is Tucker, and a truncation keeps the method"):
        truncate(net, [Rule("pl*", CP(ParamsKept(0.02)))])
    with pytest.raises(UserError, match=r"pattern 'none\.\*' matches no factorized layer"):
        truncate(net, [Rule("none.*", Tucker(2))])
