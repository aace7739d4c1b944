"""Tools that other people wrote, on nets that hold layers of every kind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from tests.cases import CASES, GEOMETRIES, Case
from tests.processes import TORCHRUN, finish, start
from tests.tolerances import EXACT, FLOAT32, FLOAT64
from tnlayers import (
    CP,
    TT,
    CPMatrix,
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedConvTranspose2d,
    FactorizedLayer,
    FullTucker,
    Kronecker,
    LowRank,
    LowRankEmbedding,
    LowRankLinear,
    Rule,
    TensorRing,
    TTConv,
    TTEmbedding,
    Tucker,
    TuckerConv2d,
    TuckerMatrix,
    UserError,
    tensorize,
    to_chains,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*above what a weight", "ignore:ADTN. .* leave a relative error")
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
    "TTEmbedding": (lambda: TTEmbedding(50, 16, rank=3), (2, 7)),
    "MultiheadAttention": (Attention, (2, 5, 16)),
}
every_layer = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_net = pytest.mark.parametrize("kind", NETS)
DYNAMIC = ({0: torch.export.Dim("batch")},)


def built(kind: str, batch: int = 2) -> tuple[nn.Module, Tensor]:
    """Returns a net in evaluation whose one layer is of a kind, and an input for it."""
    torch.manual_seed(0)
    make, (_, *shape) = NETS[kind]
    net = nn.Sequential(make()).eval()
    x = torch.randint(0, 50, (batch, *shape)) if "Embedding" in kind else torch.randn(batch, *shape)
    return net, x


# ---- graphs


@pytest.mark.parametrize(
    "kind", ["Embedding", "TTEmbedding", "MultiheadAttention"]
)  # the other kinds are in the suite of layers
def test_compiles_and_exports_for_every_batch(kind: str) -> None:
    net, x = built(kind)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager", dynamic=True)
    exported = torch.export.export(net, (x,), dynamic_shapes=DYNAMIC).module()
    for batch in (2, 3, 5):
        _, x = built(kind, batch)
        assert_close(compiled(x), net(x), **FLOAT32)
        assert_close(exported(x), net(x), **FLOAT32)


class Every(nn.Module):
    """A net with layers of all kinds side by side."""

    def __init__(self, nets: list[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [net(x) for net, x in zip(self.nets, inputs, strict=True)]


def test_an_onnx_runtime_computes_the_same() -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    nets, inputs = zip(*map(built, NETS), strict=True)
    net = Every(list(nets)).eval()
    dynamic = ([DYNAMIC[0]] * len(nets),)
    program = torch.onnx.export(net, (list(inputs),), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    assert program is not None
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    more = [built(kind, batch=5)[1] for kind in NETS]
    names = [given.name for given in session.get_inputs()]
    found = session.run(None, {name: x.numpy() for name, x in zip(names, more, strict=True)})
    for value, expected in zip(found, net(more), strict=True):
        assert_close(torch.from_numpy(value), expected.detach(), **FLOAT32)


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


@pytest.mark.parametrize("plan", ["factors", "dense"])
@every_layer
def test_layers_of_many_inputs_at_once(case: Case, plan: str) -> None:
    """Also of pictures whose channels lie last."""
    layer = case.convert(case.dense(), case.rank)
    layer.set_plan(plan)
    x = torch.stack([case.input(), case.input().flip(0)])
    layouts = [x, x.movedim(2, -1).contiguous().movedim(-1, 2)] if x.dim() == 5 else [x]
    for mode in (torch.enable_grad, torch.no_grad):
        layer.train(mode is torch.enable_grad)
        for each in layouts:
            with mode():
                assert_close(torch.vmap(layer)(each), torch.stack([layer(part) for part in each]), **FLOAT64)


@pytest.mark.parametrize("plan", ["factors", "dense"])
@every_layer
def test_an_ensemble_of_parameters(case: Case, plan: str) -> None:
    """Also of a layer that was moved to channels last, which torch cannot ask about under vmap."""
    layer = case.convert(case.dense(), case.rank)
    layer.set_plan(plan)
    x, parameters = case.input(), {name: torch.stack([value, -value]) for name, value in layer.named_parameters()}

    def call(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,))

    for form in (torch.contiguous_format, torch.channels_last):
        layer.to(memory_format=form)
        each = [call({name: value[place] for name, value in parameters.items()}) for place in (0, 1)]
        assert_close(torch.vmap(call)(parameters), torch.stack(each), **FLOAT64)


# ---- tools that know only torch's own layers


@pytest.mark.parametrize("plan", ["auto", "factors"])
@every_layer
def test_chains_compute_the_same(case: Case, plan: Any) -> None:
    for geometry in GEOMETRIES if case.is_conv else ({},):
        layer = case.layer.from_dense(case.dense(**geometry), **case.given(case.rank), plan=plan)
        net, x = nn.Sequential(layer), case.input()
        if not layer.plan.is_chain:
            with pytest.raises(UserError, match=f"^0: no chain of torch's layers computes this {type(layer).__name__}"):
                to_chains(net)
            assert net[0] is layer
            continue
        to_chains(net)
        assert all(type(part).__module__.startswith("torch.nn") for part in net.modules())
        assert_close(net(x), layer(x), **FLOAT64)
        assert_close(net(x[0]), layer(x[0]), **FLOAT64)


def test_every_method_that_is_steps_of_torch_has_chains() -> None:
    """The others mix the channels' parts between two steps."""
    without = {Kronecker, TTConv, TT, FullTucker, TensorRing, TuckerMatrix, CPMatrix}
    for case in CASES:
        layer = case.convert(case.dense(), case.rank)
        layer.set_plan("factors")
        own = isinstance(layer, FactorizedConv2d) and (case.own or case.options.get("order") == "h w i o")
        assert layer.plan.is_chain is not (type(layer.spec.method) in without or bool(own)), case.name


def test_chains_have_the_factors_of_the_layer() -> None:
    layer = TuckerConv2d(8, 12, 3, padding="same", padding_mode="reflect", rank=(5, 4), plan="factors").double().eval()
    layer.requires_grad_(False)
    (chain,) = to_chains(nn.Sequential(layer))
    assert [name for name, _ in chain.named_children()] == ["input", "core_pad", "core", "output"]
    assert sum(value.numel() for value in chain.parameters()) == sum(value.numel() for value in layer.parameters())
    assert not any(module.training for module in chain.modules())
    assert {(value.dtype, value.requires_grad) for value in chain.parameters()} == {(torch.float64, False)}
    assert_close(chain.output.weight.flatten(1), layer.factors["output"], **EXACT)
    with torch.no_grad():
        chain.output.weight.zero_()
        chain.output.bias.zero_()
    assert layer.factors["output"].any()
    assert layer.bias.any()


def test_chains_of_a_whole_net() -> None:
    net = Attention().eval()
    x = torch.randn(2, 5, 16)
    expected = net(x)
    to_chains(net, [Rule("*.in_proj", None)])
    assert isinstance(net.attention.in_proj, nn.Sequential)
    assert isinstance(net.attention.out_proj, FactorizedLayer)
    assert to_chains(net) is net
    assert_close(net(x), expected, **FLOAT32)
    with pytest.raises(UserError, match=r"^0: no chain of torch's layers computes this LowRankEmbedding"):
        to_chains(built("Embedding")[0])
    assert isinstance(to_chains(LowRankLinear(30, 28, rank=4)), nn.Sequential)


NORMS = {
    "Conv2d": nn.BatchNorm2d,
    "Conv1d": nn.BatchNorm1d,
    "ConvTranspose2d": nn.BatchNorm2d,
    "Linear": nn.BatchNorm1d,
}


@pytest.mark.parametrize("kind", NORMS)
def test_batch_norms_are_folded_into_chains(kind: str) -> None:
    net, x = built(kind)
    layer = net[0]
    norm = NORMS[kind](layer.bias.numel())
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
        norm(layer(x))
    expected = norm.eval()(layer(x))

    def fold(into: nn.Module) -> nn.Module:
        if kind == "Linear":
            return fuse_linear_bn_eval(into, norm)  # type: ignore[type-var]
        return fuse_conv_bn_eval(into, norm, transpose="Transpose" in type(into).__name__)  # type: ignore[type-var]

    with pytest.raises(UserError, match=r"has no weight to set, it has factors; tnlayers\.to_chains"):
        fold(layer)
    chain = to_chains(layer)
    chain[-1] = fold(chain[-1])
    assert_close(chain(x), expected, **FLOAT32)


def test_a_fusing_pass_leaves_factorized_layers_alone() -> None:
    net = nn.Sequential(TuckerConv2d(3, 8, 3, rank=2), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(4, 3, 9, 9)
    net(x)
    expected = net.eval()(x)
    assert_close(fuse(net)(x), expected, **FLOAT32)


def some_linears() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(LowRankLinear(32, 32, rank=8, plan="factors"), nn.Linear(32, 32)).eval()


@pytest.mark.filterwarnings("ignore")
def test_factors_are_quantized_to_eight_bits() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantize_, config, x = quantization.quantize_, quantization.Int8WeightOnlyConfig(), torch.randn(5, 32)
    net = some_linears()
    expected = net(x)
    quantize_(net, config)
    assert type(net[1].weight) is not nn.Parameter
    assert {type(value) for value in net[0].parameters()} == {nn.Parameter}
    with pytest.raises(UserError, match=r"has no weight to set, it has factors; tnlayers\.to_chains"):
        quantize_(net, config, lambda module, _: isinstance(module, FactorizedLayer))
    net = to_chains(some_linears())
    quantize_(net, config)
    assert not {type(module.weight) for module in net.modules() if type(module) is nn.Linear} & {nn.Parameter}
    assert_close(net(x), expected, rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore")
def test_adapters_beside_factorized_layers_and_on_chains() -> None:
    peft = pytest.importorskip("peft")
    x, expected = torch.randn(5, 32), some_linears()

    def adapted(net: nn.Module, targets: Any) -> Any:
        return peft.get_peft_model(net, peft.LoraConfig(target_modules=targets, init_lora_weights=False))

    beside = adapted(some_linears(), "all-linear")
    assert {name.split(".")[3] for name, value in beside.named_parameters() if value.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    assert isinstance(beside.base_model.model[0], FactorizedLayer)
    with pytest.raises(ValueError, match=r"Target module LowRankLinear[\s\S]*is not supported"):
        adapted(some_linears(), ["0"])
    on = adapted(to_chains(some_linears()), ["0.input", "0.output"]).eval()
    with on.disable_adapter():
        assert_close(on(x), expected(x), **FLOAT32)
    found = on(x)
    assert not torch.allclose(found, expected(x))
    assert_close(on.merge_and_unload()(x), found, **FLOAT32)


# ---- shards


def test_a_sharded_net_evaluates_trains_and_is_saved_whole(tmp_path: Path) -> None:
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "tests.sharded", tmp_path / "net.safetensors"]
    code, said = finish(start(command, tmp_path))
    assert code == 0, said
    assert said.count("15 entries matched") == 2
