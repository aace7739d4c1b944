"""Whether layers compute on the device what they do on the CPU in float64, in every form in which they are used.

Each row counts its checks and lists those that went wrong.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import hypothesis
import torch
from torch import Tensor, nn

from benchmarks.device import captured, captured_step
from benchmarks.rows import Row, Setting
from tests.cases import CASES, Case
from tests.drawn_layers import METHODS, Drawn, cases, drawn_layers, wrong
from tnlayers import (
    MPS,
    TT,
    Factorization,
    FactorizedLayer,
    LowRank,
    LowRankEmbedding,
    Rule,
    TTEmbedding,
    Tucker,
    tensorize,
)

__all__ = ["rows"]

PASSES, DRAWN = 5, 12
"""How often each method is drawn, and how many layers of it then."""
# Of the norm of the float64 result: roundings of the inputs, the factors and each step's activation.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
COMPILED: dict[str, tuple[nn.Module, Factorization, tuple[int, ...]]] = {
    "Tucker": (nn.Conv2d(16, 32, 3, padding=1), Tucker(8), (16, 12, 12)),
    "LowRank": (nn.Conv2d(16, 32, 3, padding=1), LowRank(8), (16, 12, 12)),
    "MPS": (nn.Conv2d(16, 32, 3, padding=1), MPS(8), (16, 12, 12)),
    "TT": (nn.Linear(64, 96), TT(4), (64,)),
}


class Checks:
    """How many comparisons were made, and what differs in those that went wrong."""

    def __init__(self) -> None:
        self.made, self.wrong = 0, []

    def near(self, what: str, found: Tensor, right: Tensor, tolerance: float) -> None:
        """Compares in the norm, where NaN is never near."""
        self.made += 1
        found, right = found.detach().cpu().double(), right.detach().cpu().double()
        error = float((found - right).norm() / right.norm().clamp_min(1e-300))
        if found.shape != right.shape or not error <= tolerance:
            self.wrong.append(f"{what} differs by {error:.1e}")

    def row(self) -> dict[str, Any]:
        return {"checks": self.made, "wrong": self.wrong}


def rows(setting: Setting) -> Iterator[Row]:
    """Yields every method on every kind of layer, every layer of the suite in its forms, and what a compiler and a graph make."""
    device = setting.device
    yield from drawn_rows(0, setting)
    for case in CASES[:1] + CASES[-1:] if setting.tiny else CASES:
        yield Row(f"forms {case.name}", 1.0, partial(forms, case, device))
    yield Row("embeddings", 1.0, partial(embeddings, device))
    yield Row("captured training", 1.0, partial(captured_training, device))
    for name in list(COMPILED)[:1] if setting.tiny else COMPILED:
        yield Row(f"compiled {name}", 6.0, partial(compiled, name, device, "eager" if setting.tiny else "inductor"))
    for number in range(1, 1 if setting.tiny else PASSES):
        yield from drawn_rows(number, setting)


def drawn_rows(number: int, setting: Setting) -> Iterator[Row]:
    for method in METHODS[:1] if setting.tiny else METHODS:
        yield Row(f"drawn {method.__name__}, pass {number}", 2.0, partial(drawn, method, number, setting.device))


def drawn(method: type[Factorization], number: int, device: torch.device) -> dict[str, Any]:
    """Compares drawn layers in all plans and layouts, each in a drawn dtype: output and gradients."""
    layers, found = 0, []

    @hypothesis.seed(number)
    @cases(DRAWN)
    @hypothesis.given(drawn_layers((method,)))
    def compare(layer: Drawn) -> None:
        nonlocal layers
        layers += 1
        try:
            found.extend([f"{layer}: {problem}" for problem in wrong(layer, str(device))][:3])
        except RuntimeError as error:
            found.append(f"{layer}: raises {error}")

    compare()
    return {"checks": layers, "wrong": found}


def forms(case: Case, device: torch.device) -> dict[str, Any]:
    """Compares a layer under autocast, in evaluation in each dtype, and replayed as a graph, with itself in float64 on the CPU."""
    torch.manual_seed(0)
    checks = Checks()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # brick walls leave a relative error
        exact = case.convert(case.dense(), case.rank)
    x = case.input().float().double()
    exact = exact.float().double()
    right = outputs(exact, x)
    layer = copy.deepcopy(exact).float().to(device)
    given = x.float().to(device)
    for name, value, want in zip(names(layer), outputs(layer, given), right, strict=True):
        checks.near(f"float32 {name}", value, want, TOLERANCES[torch.float32])
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device.type, dtype):
            found = outputs(layer, given)
        for name, value, want in zip(names(layer), found, right, strict=True):
            checks.near(f"autocast {dtype} {name}", value, want, TOLERANCES[dtype])
    layer.eval()
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            checks.near(f"evaluation in {dtype}", layer.to(dtype)(given.to(dtype)), right[0], TOLERANCES[dtype])
    check_graph(checks, layer.float(), given, case.input().float().to(device))
    return checks.row()


def outputs(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns the output and the gradients of a weighted sum of it."""
    x = x.detach().requires_grad_()
    out = layer(x)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])]


def names(layer: nn.Module) -> list[str]:
    return ["output", "input's gradient", *(f"gradient of {name}" for name, _ in layer.named_parameters())]


def check_graph(checks: Checks, layer: nn.Module, first: Tensor, second: Tensor) -> None:
    """Captures an evaluation with one input, and compares its replay on another with an eager call."""
    static = first.clone()
    replay, out = captured(lambda: layer(static), static.device)
    with torch.no_grad():
        static.copy_(second)
        replay()
        checks.near("replayed graph", out, layer(second), TOLERANCES[torch.float32])


def embeddings(device: torch.device) -> dict[str, Any]:
    checks, rows_looked_up = Checks(), torch.randint(60, (4, 5))
    for kind in (LowRankEmbedding, TTEmbedding):
        exact = kind(60, 24, rank=3, dtype=torch.float64)
        layer = copy.deepcopy(exact).float().to(device)
        for mode in (True, False):
            found, right = layer.train(mode)(rows_looked_up.to(device)), exact.train(mode)(rows_looked_up)
            checks.near(f"{kind.__name__}, training {mode}", found, right, TOLERANCES[torch.float32])
    return checks.row()


def captured_training(device: torch.device) -> dict[str, Any]:
    """Compares evaluation after replayed training steps, which no hook of torch's tells of, with the dense layer of the factors."""
    checks = Checks()
    for name in COMPILED:
        layer, x = small_layer(name, device)
        layer.eval()
        with torch.no_grad():
            layer(x)
        layer.train()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=torch.tensor(0.01, device=device), **capturable(device))

        def step(layer: nn.Module = layer, x: Tensor = x, optimizer: torch.optim.Optimizer = optimizer) -> None:
            layer(x).square().mean().backward()
            optimizer.step()

        before = [parameter.detach().clone() for parameter in layer.parameters()]
        replay = captured_step(step, layer.parameters(), device)
        replay()
        replay()
        layer.eval()
        with torch.no_grad():
            checks.near(name, layer(x), layer.to_dense()(x), TOLERANCES[torch.float32])
        checks.made += 1
        if any(torch.equal(old, new) for old, new in zip(before, layer.parameters(), strict=True)):
            checks.wrong.append(f"{name}: a parameter does not move")
    return checks.row()


def compiled(name: str, device: torch.device, backend: str) -> dict[str, Any]:
    """Compares one compiled graph with eager calls, in evaluation and in training, and refuses to compile for a second batch."""
    checks = Checks()
    torch.compiler.reset()
    layer, x = small_layer(name, device)
    other = torch.randn_like(x)
    call: Callable[[Tensor], Tensor] = torch.compile(layer, fullgraph=True, backend=backend)
    layer.eval()
    with torch.no_grad():
        checks.near("evaluation", call(x), layer(x), TOLERANCES[torch.float32])
        with torch.compiler.set_stance("fail_on_recompile"):
            checks.near("evaluation of a second batch", call(other), layer(other), TOLERANCES[torch.float32])
    layer.train()
    trained = [torch.autograd.grad(f(x).square().sum(), list(layer.parameters())) for f in (call, layer)]
    for (parameter, _), found, right in zip(layer.named_parameters(), *trained, strict=True):
        checks.near(f"gradient of {parameter}", found, right, 1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        checks.near("training on a second batch", call(other), layer(other), TOLERANCES[torch.float32])
    return checks.row()


def small_layer(name: str, device: torch.device) -> tuple[FactorizedLayer, Tensor]:
    dense, method, shape = COMPILED[name]
    torch.manual_seed(0)
    (layer,) = tensorize(nn.Sequential(copy.deepcopy(dense)).to(device), [Rule("0", method)], init="random")
    assert isinstance(layer, FactorizedLayer)
    return layer, torch.randn(4, *shape, device=device)


def capturable(device: torch.device) -> dict[str, bool]:
    """Returns what an optimizer needs for a graph."""
    return {"capturable": True} if device.type == "cuda" else {}
