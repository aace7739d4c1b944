"""Tools that other people wrote, on nets that hold layers of every kind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from tests.tolerances import EXACT, FLOAT32
from tnlayers import (
    CP,
    FactorizedConv1d,
    FactorizedConvTranspose2d,
    LowRank,
    LowRankEmbedding,
    LowRankLinear,
    Rule,
    Tucker,
    TuckerConv2d,
    tensorize,
)

assert_close = torch.testing.assert_close


class Attention(nn.Module):
    """Self-attention (n, l, 16) with factorized projections."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        tensorize(self, [Rule("*", LowRank(rank=4))])

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv2d": (lambda: TuckerConv2d(8, 12, 3, padding=1, rank=4), (2, 8, 9, 7)),
    "Conv1d": (lambda: FactorizedConv1d(8, 12, 3, stride=2, method=CP(rank=6)), (2, 8, 9)),
    "ConvTranspose2d": (lambda: FactorizedConvTranspose2d(8, 12, 3, stride=2, method=Tucker(rank=4)), (2, 8, 5, 4)),
    "Linear": (lambda: LowRankLinear(30, 28, rank=4), (2, 30)),
    "Embedding": (lambda: LowRankEmbedding(50, 16, padding_idx=0, rank=4), (2, 7)),
    "MultiheadAttention": (Attention, (2, 5, 16)),
}
every_net = pytest.mark.parametrize("kind", NETS)
DYNAMIC = ({0: torch.export.Dim("batch")},)


def built(kind: str, batch: int = 2) -> tuple[nn.Module, Tensor]:
    """Returns a net in evaluation whose one layer is of a kind, and an input for it."""
    torch.manual_seed(0)
    make, (_, *shape) = NETS[kind]
    net = nn.Sequential(make()).eval()
    x = torch.randint(0, 50, (batch, *shape)) if kind == "Embedding" else torch.randn(batch, *shape)
    return net, x


# ---- graphs


@pytest.mark.parametrize("kind", ["Embedding", "MultiheadAttention"])  # the other kinds are in the suite of layers
def test_compiles_and_exports_for_every_batch(kind: str) -> None:
    net, x = built(kind)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager", dynamic=True)
    exported = torch.export.export(net, (x,), dynamic_shapes=DYNAMIC).module()
    for batch in (2, 3, 5):
        _, x = built(kind, batch)
        assert_close(compiled(x), net(x), **FLOAT32)
        assert_close(exported(x), net(x), **FLOAT32)


@every_net
def test_a_runtime_computes_the_same(kind: str) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net, x = built(kind)
    program = torch.onnx.export(net, (x,), dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    assert program is not None
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    _, x = built(kind, batch=5)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(found), net(x).detach(), **FLOAT32)


@every_net
@pytest.mark.parametrize("training", [False, True])
def test_fx_takes_a_layer_as_one_operation(kind: str, training: bool) -> None:
    net, x = built(kind)
    graph = torch.fx.symbolic_trace(net.train(training))
    assert [node.op for node in graph.graph.nodes].count("call_module") == 1
    assert_close(graph(x), net(x), **EXACT)
    assert dict(graph.named_parameters()).keys() <= dict(net.named_parameters()).keys()


def test_fx_takes_keyword_arguments() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = FactorizedConvTranspose2d(8, 12, 3, stride=2, method=Tucker(rank=4))

        def forward(self, x: Tensor) -> Tensor:
            return self.up(input=x, output_size=(12, 10))

    net, x = Net(), torch.randn(2, 8, 5, 4)
    assert_close(torch.fx.symbolic_trace(net)(x), net(x), **EXACT)


@every_net
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.filterwarnings("ignore:.torch.jit.trace.*")
def test_jit_traces_for_every_batch(kind: str, mode: Any) -> None:
    net, x = built(kind)
    _, more = built(kind, batch=5)
    with mode():
        graph = torch.jit.trace(net, x)
        assert_close(graph(more), net(more), **FLOAT32)
    assert_close(graph(more), net(more), **FLOAT32)


# ---- functions of the parameters


@every_net
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_sample(kind: str) -> None:
    net, x = built(kind)
    parameters = dict(net.named_parameters())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(net, parameters, (sample[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for place, sample in enumerate(x):
        gradients = torch.autograd.grad(loss(parameters, sample), list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            assert_close(found[name][place], gradient, **FLOAT32)


def test_a_fusing_pass_leaves_factorized_layers_alone() -> None:
    net = nn.Sequential(TuckerConv2d(3, 8, 3, rank=2), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(4, 3, 9, 9)
    net(x)
    expected = net.eval()(x)
    assert_close(fuse(net)(x), expected, **FLOAT32)
