"""What evaluation keeps is never stale, and no graph that is made in evaluation contracts factors."""

import copy
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cases import CASES, Case
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT64
from tnlayers import ADTN, SVD, FactorizedLayer, MacsKept, Rule, TTLinear, Tucker, TuckerConv2d, tensorize

pytestmark = pytest.mark.filterwarnings("ignore:ADTN. .* leave a relative error")
every_layer = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

# ---- never stale

Event = Callable[["Scene"], Any]
Form = Callable[[nn.Module, Tensor], tuple[Tensor, list[str]]]


class Scene:
    """A layer, what it gets, and an optimizer; what happens to it may come in any order."""

    def __init__(self, case: Case, rng: random.Random) -> None:
        self.x = case.input()
        self.layer = case.convert(case.dense(), case.rank).eval()
        self.layer.set_plan(rng.choice(("dense", "factors")))
        self.new_optimizer(rng.choice(({"fused": True}, {"foreach": True}, {"foreach": False})))

    def new_optimizer(self, how: dict[str, bool]) -> None:
        self.optimizer = torch.optim.Adam(self.layer.parameters(), lr=0.1, **how)

    def look(self, context: Callable[[], Any] = torch.no_grad) -> Tensor:
        with context():
            return self.layer(self.x)

    def assert_present(self) -> None:
        """Against the dense layer of the factors as they are now."""
        dense = self.layer.to_dense()
        for context in (torch.no_grad, torch.inference_mode):
            pairs = [(self.look(context), dense(self.x)), (self.read(context), dense.weight)]
            for found, expected in pairs:
                scale = expected.norm() + 1
                torch.testing.assert_close(found.clone() / scale, expected.detach() / scale, **FLOAT64)

    def read(self, context: Callable[[], Any] = torch.no_grad) -> Tensor:
        with context():
            return self.layer.weight

    def backward(self) -> None:
        self.layer(self.x).square().mean().backward()

    def gradients_by_hand(self) -> None:
        for parameter in self.layer.parameters():
            parameter.grad = torch.randn_like(parameter)

    def twin(self) -> None:
        """It shares the parameters, and is what gets the gradient."""
        copy.copy(self.layer)(self.x).square().mean().backward()

    def write(self) -> None:
        with torch.no_grad():
            next(iter(self.layer.factors.values())).mul_(-1.5)

    def write_data(self) -> None:
        """Uncounted, so `eval()` follows."""
        next(iter(self.layer.factors.values())).data.mul_(-1.5)
        self.layer.eval()

    def write_to_the_weight(self) -> None:
        """It is the layer's factors that make it, whatever becomes of one that was read."""
        self.read().mul_(-1.5)

    def exchange(self) -> None:
        factor = next(iter(self.layer.factors.values()))
        factor.data = torch.randn_like(factor)

    def replace(self) -> None:
        name, factor = next(iter(self.layer.factors.items()))
        self.layer.factors[name] = nn.Parameter(torch.randn_like(factor))
        self.new_optimizer({})

    def load(self) -> None:
        self.layer.load_state_dict({name: -value for name, value in self.layer.state_dict().items()})

    def prune(self) -> None:
        """It keeps the parameter under another name, and back under its own."""
        name = list(self.layer.factors)[-1]
        prune.random_unstructured(self.layer.factors, name, amount=0.5)
        self.assert_present()
        prune.remove(self.layer.factors, name)
        self.new_optimizer({})

    def there_and_back(self) -> None:
        self.layer.to(torch.bfloat16)
        with torch.no_grad():
            self.layer(self.x.bfloat16())
        self.layer.to(torch.float64)

    def copied(self) -> None:
        self.layer = copy.deepcopy(self.layer)
        self.new_optimizer({})


EVENTS: tuple[Event, ...] = (
    lambda scene: scene.layer.train(),
    lambda scene: scene.layer.eval(),
    lambda scene: scene.look(),
    lambda scene: scene.look(torch.inference_mode),
    Scene.read,
    Scene.write_to_the_weight,
    Scene.backward,
    Scene.backward,
    Scene.gradients_by_hand,
    Scene.twin,
    lambda scene: scene.optimizer.step(),
    lambda scene: scene.optimizer.step(),
    lambda scene: scene.optimizer.zero_grad(),
    lambda scene: scene.optimizer.zero_grad(set_to_none=False),
    Scene.write,
    Scene.write_data,
    Scene.exchange,
    Scene.replace,
    Scene.load,
    Scene.prune,
    Scene.there_and_back,
    Scene.copied,
)


@pytest.mark.parametrize("seed", range(4))
@every_layer
def test_whatever_happens_evaluation_is_of_the_present_factors(case: Case, seed: int) -> None:
    rng = random.Random(seed)
    scene = Scene(case, rng)
    for _ in range(30):
        rng.choice(EVENTS)(scene)
        if rng.random() < 0.5:
            scene.assert_present()
    scene.assert_present()


def test_a_look_before_a_fused_step() -> None:
    layer, x = TTLinear(30, 28, rank=4).eval(), torch.randn(4, 30)
    layer(x).square().sum().backward()
    with torch.no_grad():
        layer(x)
    torch.optim.Adam(layer.parameters(), lr=1.0, fused=True).step()
    for gradients in (True, False):
        if not gradients:
            layer.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), layer.to_dense()(x), **FLOAT32)


def test_a_step_is_seen_whoever_got_the_gradient() -> None:
    """Two layers of one generator: a fused step after a gradient through the first changes the second."""
    net, x = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)).eval(), torch.randn(2, 8, 9, 9)
    tensorize(net, [Rule("*", ADTN(2, joint="all"))], init="random")
    first, second = net
    with torch.no_grad():
        second(x)
    first(x).square().mean().backward()
    step = torch.optim.Adam(net.parameters(), lr=0.1, fused=True).step
    for take in (step, torch.compile(step, backend="eager")):
        take()
        with torch.no_grad():
            torch.testing.assert_close(second(x), second.to_dense()(x), **FLOAT32)


def test_averages_that_are_exchanged_after_eval_are_seen() -> None:
    layer, x = TTLinear(30, 28, rank=4), torch.randn(4, 30)
    layer.eval()
    for factor in layer.parameters():
        factor.data.copy_(torch.randn_like(factor))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.to_dense()(x), **FLOAT32)


def test_a_mode_that_is_set_by_hand_is_seen() -> None:
    layer, x = TTLinear(30, 28, rank=4).eval(), torch.randn(4, 30)
    step = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    with torch.no_grad():
        layer(x)
    layer.training = True
    layer(x).square().sum().backward()
    step.step()
    layer.training = False
    layer.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.to_dense()(x), **FLOAT32)


def test_memory_that_is_read_in_another_way_is_seen() -> None:
    layer, x = TTLinear(27, 27, rank=3).eval(), torch.randn(4, 27)
    with torch.no_grad():
        layer(x)
        factor = layer.factors["core1"]
        factor.data = factor.data.transpose(0, 1)
        torch.testing.assert_close(layer(x), layer.to_dense()(x), **FLOAT32)


def test_parameters_that_are_elsewhere_or_cannot_be_multiplied_are_left_alone() -> None:
    """Sharded strategies leave nothing in a parameter between two calls; 8-bit floats are there to be stored."""
    layer = TTLinear(30, 28, rank=4)
    whole = layer.factors["core1"].data
    layer.factors["core1"].data = torch.empty(0)
    layer.eval()
    layer.factors["core1"].data = whole
    with torch.no_grad():
        torch.testing.assert_close(layer(torch.ones(1, 30)), layer.to_dense()(torch.ones(1, 30)), **FLOAT32)
    assert layer.to(torch.float8_e4m3fn).factors["core1"].dtype is torch.float8_e4m3fn


# ---- graphs


class Operations(TorchDispatchMode):
    """The names of all operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def as_it_is(net: nn.Module, x: Tensor) -> tuple[Tensor, list[str]]:
    net(x)  # what follows a change of the mode is looked at once
    with Operations() as seen:
        return net(x), seen.names


def compiled(net: nn.Module, x: Tensor) -> tuple[Tensor, list[str]]:
    torch.compiler.reset()
    graphs = EagerAndRecordGraphs()
    out = torch.compile(net, backend=graphs, fullgraph=True)(x)
    (graph,) = graphs.graphs
    return out, _targets(graph)


def exported(net: nn.Module, x: Tensor) -> tuple[Tensor, list[str]]:
    program = torch.export.export(net, (x,))
    return program.module()(x), _targets(program.graph_module)


def strictly_exported(net: nn.Module, x: Tensor) -> tuple[Tensor, list[str]]:
    program = torch.export.export(net, (x,), strict=True)
    return program.module()(x), _targets(program.graph_module)


def traced(net: nn.Module, x: Tensor) -> tuple[Tensor, list[str]]:
    graph = torch.jit.trace(net, x)
    return graph(x), [node.kind().split("::")[-1] for node in graph.inlined_graph.nodes()]


def _targets(graph: torch.fx.GraphModule) -> list[str]:
    called = [node.target for node in graph.graph.nodes if node.op in ("call_function", "call_method")]
    return [str(getattr(target, "__name__", target)).split(".")[0] for target in called]


FORMS = (as_it_is, compiled, exported, strictly_exported, traced)
every_form = pytest.mark.parametrize("form", FORMS)
ignores_deprecation = pytest.mark.filterwarnings("ignore:.torch.jit.trace.*")
CONTRACTIONS = {"bmm", "baddbmm", "mm", "einsum", "matmul", "mul", "addmm", "linear"}  # many steps are like these


@pytest.fixture(scope="module")
def resnet18() -> tuple[nn.Module, Tensor]:
    """Half of the multiply-accumulates, in evaluation; its last linear is dense, and its matmul the only one."""
    torch.manual_seed(0)
    net, x = torchvision.models.resnet18(num_classes=10).eval(), torch.randn(1, 3, 64, 64)
    return tensorize(net, [Rule("layer*", Tucker(MacsKept(0.5)))], example_input=x), x


def contractions(names: list[str]) -> int:
    return sum(name in CONTRACTIONS for name in names)


def multiplying(layer: FactorizedLayer) -> int:
    """The steps of the plan that are matmuls."""
    return sum(step.operation != "convolution" for step in layer.plan.steps)


@ignores_deprecation
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@every_form
def test_a_graph_of_evaluation_contracts_no_weights(
    resnet18: tuple[nn.Module, Tensor], form: Form, context: Callable[[], Any]
) -> None:
    net, x = resnet18
    with context():
        out, names = form(net, x)
        torch.testing.assert_close(out, net(x), **FLOAT32)
    layers = [module for module in net.modules() if isinstance(module, FactorizedLayer)]
    steps, matmuls = sum(len(layer.plan.steps) for layer in layers), sum(map(multiplying, layers))
    dense = sum(isinstance(module, nn.Conv2d) for module in net.modules())
    assert sum(name in ("conv2d", "convolution", "_convolution") for name in names) == steps - matmuls + dense
    assert contractions(names) == matmuls + 1, names  # the dense linear


@ignores_deprecation
@every_form
@every_layer
def test_every_layer_is_a_constant_in_evaluation(case: Case, form: Form) -> None:
    """There are as many matmuls as the plan has, and none more."""
    layer, x = case.convert(case.dense(dtype=torch.float32), case.rank).eval(), case.input(dtype=torch.float32)
    with torch.no_grad():
        out, names = form(layer, x)
        torch.testing.assert_close(out, layer(x), **FLOAT32)
    assert contractions(names) == multiplying(layer), names


class ReadsWeights(nn.Module):
    """Reads the dtype of a weight, as Hugging Face's T5, ViT and CLIP do, and gives the weight to a function, as Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(30, 28)
        tensorize(self, [Rule("*", SVD(4), plan="factors")]).eval()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x.to(self.layer.weight.dtype)), self.layer.weight.t())


@ignores_deprecation
@every_form
def test_a_weight_that_is_read_is_a_constant_in_evaluation(form: Form) -> None:
    """Once it was read, without gradients; the layer has two products of its own, and the function one."""
    net, x = ReadsWeights(), torch.randn(4, 30)
    with torch.no_grad():
        expected = net(x)
        out, names = form(net, x)
    torch.testing.assert_close(out, expected, **FLOAT32)
    assert contractions(names) == 3, names
    net.layer.load_state_dict({name: -value for name, value in net.layer.state_dict().items()})
    with torch.no_grad():
        out, names = form(net, x)
        torch.testing.assert_close(out, F.linear(net.layer(x), net.layer.to_dense().weight.t()), **FLOAT32)
    assert contractions(names) == 3, names


def test_a_weight_is_kept_where_it_is_read() -> None:
    layer = TTLinear(30, 28, rank=4).eval()
    with torch.no_grad():
        layer(torch.randn(4, 30))
        assert layer._whole is None
        assert layer.weight is layer.weight
    assert layer.weight.requires_grad
    assert layer.train()._whole is None
    with torch.no_grad():
        assert layer.weight is not layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.weight.dtype is layer.eval().weight.dtype is torch.float32


def test_built_in_inference_mode_weights_are_kept() -> None:
    with torch.inference_mode():
        net, x = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)).eval(), torch.randn(2, 8, 9, 9)
        tensorize(net, [Rule("*", Tucker(4), plan="dense")])
        net(x)
        out, names = as_it_is(net, x)
    assert contractions(names) == 0
    with torch.no_grad():
        torch.testing.assert_close(out.clone(), net(x.clone()), **FLOAT32)
        next(iter(net[0].factors.values())).zero_()  # type: ignore[union-attr,operator]
        assert not torch.allclose(net(x.clone()), out)


def test_a_compiled_net_follows_what_happens_to_its_weights() -> None:
    """Also what happens in evaluation: a load, a move, a step after a gradient."""
    torch.compiler.reset()
    layer, x = TTLinear(30, 28, rank=4).eval(), torch.randn(4, 30)
    graphs = EagerAndRecordGraphs()
    net = torch.compile(layer, backend=graphs, fullgraph=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)

    def check(tolerance: dict[str, float] = FLOAT32) -> None:
        with torch.no_grad():
            torch.testing.assert_close(net(x).float(), layer.to_dense()(x).float(), **tolerance)

    check()
    layer.load_state_dict({name: -value for name, value in layer.state_dict().items()})
    check()
    for _ in range(2):
        net(x).square().sum().backward()
        graphs.graphs.clear()
        check()  # nothing is contracted while gradients wait
        assert all(contractions(_targets(graph)) == len(layer.plan.steps) for graph in graphs.graphs)
        optimizer.step()
        check()
        optimizer.zero_grad()
        check()
    for _ in range(3):
        layer.train()
        with torch.no_grad():
            for factor in layer.parameters():
                factor.mul_(1.1)
        layer.eval()
        check()
    x = x.bfloat16()
    layer.to(torch.bfloat16)
    check(BFLOAT16)


@ignores_deprecation
@pytest.mark.parametrize("form", [exported, strictly_exported, traced])
def test_a_look_with_gradients_leaves_constants(form: Form) -> None:
    layer, x = TuckerConv2d(8, 8, 3, rank=3, plan="dense").eval(), torch.randn(2, 8, 9, 9)
    expected = layer(x)
    out, names = form(layer, x)
    torch.testing.assert_close(out, expected, **FLOAT32)
    assert contractions(names) == 0


@ignores_deprecation
def test_another_parameter_is_in_a_trace() -> None:
    layer, x = TTLinear(30, 28, rank=4).eval(), torch.randn(4, 30)
    layer.factors["core1"] = nn.Parameter(torch.randn_like(layer.factors["core1"]))
    torch.testing.assert_close(traced(layer, x)[0], layer(x), **FLOAT32)


@ignores_deprecation
def test_a_write_before_an_export_is_in_it() -> None:
    layer, x = TTLinear(30, 28, rank=4).eval(), torch.randn(4, 30)
    with torch.no_grad():
        for factor in layer.parameters():
            factor.mul_(1.1)
    for form in (exported, traced):
        torch.testing.assert_close(form(layer, x)[0], layer(x), **FLOAT32)


@ignores_deprecation
@pytest.mark.parametrize("fused", [False, True])
@every_form
def test_a_step_before_a_graph_is_in_it(form: Form, fused: bool) -> None:
    layer, x = TTLinear(30, 28, rank=4).eval(), torch.randn(4, 30)
    layer(x).square().mean().backward()
    torch.optim.Adam(layer.parameters(), lr=0.3, fused=fused).step()
    with torch.no_grad():
        torch.testing.assert_close(form(layer, x)[0], layer.to_dense()(x), **FLOAT32)


def test_steps_are_taken_while_other_threads_evaluate() -> None:
    """What is told of a step may grow meanwhile."""
    nets = [TTLinear(12, 12, rank=2) for _ in range(200)]
    done = threading.Event()

    def evaluate() -> None:
        while not done.is_set():
            for net in nets:
                net.train().eval()

    before, other = sys.getswitchinterval(), threading.Thread(target=evaluate)
    sys.setswitchinterval(1e-6)
    other.start()
    try:
        layer = nn.Linear(3, 3)
        start, optimizer = layer.bias.detach().clone(), torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            layer(torch.ones(3)).sum().backward()
            optimizer.step()
        torch.testing.assert_close(layer.bias, start - 200 * 0.1, **FLOAT32)
    finally:
        done.set()
        other.join()
        sys.setswitchinterval(before)


# ---- copies


@every_layer
def test_a_shallow_copy_takes_on_ranks_alone(case: Case) -> None:
    layer, x = case.convert(case.dense(), case.rank), case.input()
    before, ranks = layer(x), layer.ranks
    smaller = copy.deepcopy(layer)
    smaller.truncate(case.smaller_rank)
    twin = copy.copy(layer)
    with pytest.warns(UserWarning, match="adopted from the loaded state"):
        twin.load_state_dict(smaller.state_dict())
    assert layer.ranks == ranks != twin.ranks
    torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(twin(x), smaller(x))
    del layer
    twin.load_state_dict(smaller.state_dict())
    assert isinstance(twin, FactorizedLayer)
