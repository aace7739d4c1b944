"""Opened modules compute what torch's, transformers' and torchvision's do, and their linears are layers like any others."""

import contextlib
import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from tests.tolerances import EXACT, FLOAT32, FLOAT64
from tnlayers import (
    SVD,
    TT,
    FactorizedLinear,
    MacsKept,
    Rule,
    TTLinear,
    UserError,
    load_checkpoint,
    resolve,
    resolve_truncation,
    save_safetensors,
    summarize,
    tensorize,
    to_dense,
)
from tnlayers.opened import (
    Opened,
    close_in_place,
    open_in_place,
    open_module,
    opened_view,
    replace_layers,
)

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:UserWarning")
    for message in (
        "dropout option adds dropout",
        ".*is above what a weight of shape .* attains",
        "enable_nested_tensor is True, but self.use_nested_tensor is False",
        "The PyTorch API of nested tensors is in prototype stage",
    )
]
FULL = 10**6
E = 12


def factorized(opened: nn.Module, rank: int = FULL) -> nn.Module:
    """Exchanges every linear of the opened modules for a factorized layer; an opened child is exchanged in place."""
    holders = [module for module in opened.modules() if isinstance(module, Opened)]
    layers = {layer for holder in holders for layer in holder.linears.values()}
    return replace_layers(opened, {layer: TTLinear.from_dense(layer, rank=rank) for layer in layers})


def filled(module: nn.Module) -> nn.Module:
    """Gives every parameter values that matter: torch starts some of them with zeros."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def attention(**options: Any) -> nn.MultiheadAttention:
    return filled(nn.MultiheadAttention(E, 4, dtype=torch.float64, **options)).eval()  # type: ignore[return-value]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "attention": attention,
    "attention, no bias": lambda: attention(bias=False),
    "attention, kv bias, zero": lambda: attention(add_bias_kv=True, add_zero_attn=True),
    "attention, other widths": lambda: attention(kdim=6, vdim=8),
    "attention, other widths, no bias": lambda: attention(kdim=6, bias=False),
    "lstm": lambda: filled(nn.LSTM(6, 5, 2, bidirectional=True, dtype=torch.float64)).eval(),
    "lstm, projected": lambda: filled(nn.LSTM(6, 5, proj_size=3, dropout=0.5, dtype=torch.float64)).eval(),
    "gru": lambda: filled(nn.GRU(6, 5, 2, dropout=0.5, batch_first=True, dtype=torch.float64)).eval(),
    "rnn": lambda: filled(nn.RNN(6, 5, nonlinearity="relu", bias=False, dtype=torch.float64)).eval(),
    "lstm cell": lambda: filled(nn.LSTMCell(6, 5, dtype=torch.float64)).eval(),
    "gru cell": lambda: filled(nn.GRUCell(6, 5, bias=False, dtype=torch.float64)).eval(),
    "rnn cell": lambda: filled(nn.RNNCell(6, 5, nonlinearity="relu", dtype=torch.float64)).eval(),
}


def inputs(module: Any) -> tuple[Any, ...]:
    """What a dense module of the table takes."""
    if hasattr(module, "embed_dim"):
        return normal(7, 3, E), normal(5, 3, module.kdim), normal(5, 3, module.vdim)
    if "Cell" not in type(module).__name__:
        return (normal(4, 3, 6),)
    hidden = normal(3, 5)
    return normal(3, 6), ((hidden, normal(3, 5)) if isinstance(module, nn.LSTMCell) else hidden)


@pytest.fixture(params=MODULES)
def dense(request: pytest.FixtureRequest) -> nn.Module:
    return MODULES[request.param]()


def test_an_opened_module_computes_the_same_and_its_layers_hold_the_same_parameters(dense: nn.Module) -> None:
    dense.train()
    next(dense.parameters()).requires_grad_(False)
    state = torch.get_rng_state()
    opened = open_module(dense)
    closed = opened.closed()
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    assert opened.training
    assert closed.training
    assert all(type(layer) is nn.Linear for layer in opened.linears.values())
    assert opened.linears.keys() == dict(opened.named_children()).keys()
    x = inputs(dense)
    dense.eval(), opened.eval(), closed.eval()
    assert_close(opened(*x), dense(*x), **FLOAT64)
    assert_close(closed(*x), dense(*x), **EXACT)
    assert type(closed) is type(dense)
    assert repr(closed) == repr(dense)
    kinds = {key: (value.shape, value.requires_grad) for key, value in dense.named_parameters()}
    assert {key: (value.shape, value.requires_grad) for key, value in closed.named_parameters()} == kinds
    if getattr(dense, "_qkv_same_embed_dim", True):  # else the bias is kept in three
        own = {id(parameter) for parameter in dense.parameters()}
        assert {id(parameter) for parameter in opened.parameters()} == own
        assert {id(parameter) for parameter in closed.parameters()} == own


def test_an_opened_module_of_factors_computes_the_same_and_every_factor_gets_a_gradient(dense: nn.Module) -> None:
    opened = factorized(open_module(dense))
    assert all(isinstance(layer, FactorizedLinear) for layer in opened.linears.values())
    x = inputs(dense)
    outputs = opened(*x)
    assert_close(outputs, dense(*x), **FLOAT64)
    first = outputs if isinstance(outputs, Tensor) else outputs[0]
    first.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in opened.parameters())
    with pytest.raises(UserError, match=r"is a TTLinear, which no closed module holds: make it dense first"):
        opened.closed()


def test_an_opened_module_loads_the_state_of_a_closed_one_and_its_own(dense: nn.Module) -> None:
    first, second = open_module(filled(copy.deepcopy(dense))), open_module(filled(copy.deepcopy(dense)))
    state, x = dense.state_dict(), inputs(dense)
    assert first.load_state_dict(state) == nn.modules.module._IncompatibleKeys([], [])
    assert_close(first(*x), dense(*x), **FLOAT64)
    outer = nn.ModuleDict({"inner": nn.ModuleList([second])})
    outer.load_state_dict({f"inner.0.{key}": value for key, value in state.items()})
    assert_close(second(*x), dense(*x), **FLOAT64)
    own = first.state_dict()
    assert {key.partition(".")[0] for key in own} - {"bias_k", "bias_v"} == first.linears.keys()
    assert outer.state_dict().keys() == {f"inner.0.{key}" for key in own}
    file = io.BytesIO()
    torch.save(own, file)
    file.seek(0)
    third = open_module(filled(copy.deepcopy(dense)))
    third.load_state_dict(torch.load(file, weights_only=True))
    assert_close(third(*x), dense(*x), **FLOAT64)
    with pytest.raises(RuntimeError, match="Missing key"):
        third.load_state_dict({key: value for key, value in state.items() if "hh" not in key and "out" not in key})


def test_an_opened_module_is_copied_and_pickled(dense: nn.Module) -> None:
    opened, x = factorized(open_module(dense), 2), inputs(dense)
    for again in (copy.deepcopy(opened), pickle.loads(pickle.dumps(opened))):
        assert_close(again(*x), opened(*x), **EXACT)


# --- attention


def masks(batch: int, l: int, s: int, kind: torch.dtype) -> tuple[list[Tensor | None], list[Tensor | None]]:  # noqa: E741
    """Masks of every shape, and paddings."""
    flat, each = torch.rand(l, s) < 0.3, torch.rand(batch * 4, l, s) < 0.3
    padding = torch.rand(batch, s) < 0.3
    padding[1] = True  # nothing to attend to: not a number, as in torch
    made: list[Tensor | None] = [None, flat, each]
    if kind is not torch.bool:
        made = [None if mask is None else normal(*mask.shape) for mask in made]
        return made, [None, normal(batch, s)]
    return made, [None, padding]


@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("packed", [True, False])
def test_attention_with_masks_and_weights_in_every_combination(packed: bool, options: dict, kind: torch.dtype) -> None:
    dense = attention(**options)
    opened = type(open_module(dense)).of(dense, packed=packed)
    q, k = normal(7, 3, E), normal(5, 3, E)
    q, k = (q.transpose(0, 1), k.transpose(0, 1)) if options.get("batch_first") else (q, k)
    attn, padding = masks(3, 7, 5, kind)
    for mask, pad, need, average in itertools.product(attn, padding, (True, False), (True, False)):
        given = {"attn_mask": mask, "key_padding_mask": pad, "need_weights": need, "average_attn_weights": average}
        assert_close(opened(q, k, k, **given), dense(q, k, k, **given), equal_nan=True, **FLOAT64)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_without_a_batch_and_with_a_causal_mask(batch_first: bool, need_weights: bool) -> None:
    dense = attention(batch_first=batch_first)
    opened = open_module(dense)
    x, given = normal(6, E), {"need_weights": need_weights}
    assert_close(opened(x, x, x, **given), dense(x, x, x, **given), **FLOAT64)
    pad = torch.arange(6) > 3  # the key padding mask of one sequence
    assert_close(opened(x, x, x, pad, **given), dense(x, x, x, pad, **given), **FLOAT64)
    x = normal(6, 6, E)
    causal = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    for pads in (None, torch.zeros(6, 6, dtype=torch.float64)):
        given = {"attn_mask": causal, "is_causal": True, "need_weights": need_weights, "key_padding_mask": pads}
        assert_close(opened(x, x, x, **given), dense(x, x, x, **given), **FLOAT64)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_in_training_drops_what_torch_drops(need_weights: bool) -> None:
    dense = attention(dropout=0.5).train()
    opened, x = open_module(dense), normal(6, 3, E)
    torch.manual_seed(3)
    expected = dense(x, x, x, need_weights=need_weights)
    torch.manual_seed(3)
    assert_close(opened(x, x, x, need_weights=need_weights), expected, **FLOAT64)


DISTINCT = [("aaa", 1), ("abb", 2), ("aab", 2), ("aba", 2), ("abc", 3)]


@pytest.mark.parametrize(("which", "count"), DISTINCT)
def test_each_distinct_input_is_projected_once_by_factors_and_by_its_third_if_dense(which: str, count: int) -> None:
    dense, made = attention(), {name: normal(5, 3, E) for name in "abc"}
    given, taken = [made[name] for name in which], {}
    plain: Any = open_module(dense)
    for opened in (plain, factorized(open_module(dense))):
        calls: list[Any] = []
        opened.in_proj.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            assert_close(opened(*given), dense(*given), **FLOAT64)
        taken[opened] = counter.get_total_flops()
        assert len(calls) == (count if opened is not plain or count == 1 else 3)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        dense(*given)
    assert taken[plain] == 2 * counter.get_total_flops()
    plain(*given)[0].sum().backward()
    assert plain.in_proj.weight.grad is not None


class Detection(nn.Module):
    """Positions are added to queries and keys only, as in DETR."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.MultiheadAttention(64, 4, batch_first=True), nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        q = x + 1
        y = self.a(q, q, value=x)[0]
        return self.b(y, y, y)[0]


@pytest.mark.filterwarnings("ignore:.* parameters and the dense weight")
@pytest.mark.parametrize("of", ["rule", "model"])
def test_an_example_tells_which_attentions_get_different_inputs(of: Any, tmp_path: Any) -> None:
    net, x = Detection().eval(), torch.randn(1, 16, 64)
    dense, expected = copy.deepcopy(net), net(x)
    rules = [Rule("*", SVD(MacsKept(0.7, of=of)))]
    plan = resolve(net, rules, x)
    parts = ["q_proj", "k_proj", "v_proj", "out_proj"]
    assert [rule.pattern for rule in plan] == [*(f"a.{part}" for part in parts), "b.in_proj", "b.out_proj"]
    assert not any(module._forward_pre_hooks for module in net.modules())
    tensorize(net, plan)  # without the example: the names tell
    totals = summarize(net, x, rules=plan, measure=False).totals
    for model, macs in ((dense.train(), totals.dense_macs), (net, totals.macs)):  # no fused kernel in training
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(x)
        assert counter.get_total_flops() == 2 * macs
    assert 0.6 < totals.macs / totals.dense_macs <= (0.7 if of == "model" else 0.8)
    save_safetensors(net, tmp_path / "net.safetensors")
    again = Detection().eval()
    load_checkpoint(tmp_path / "net.safetensors", again)
    assert_close(again(x), net(x), **EXACT)
    assert "a.v_proj" in {rule.pattern for rule in resolve_truncation(dense, MacsKept(0.7, of=of), x, rules=rules)}
    assert summarize(net, x, reference=dense, measure=False).layers[0].name == "a.q_proj"
    assert "a.v_proj" in dict(tensorize(dense.eval(), [Rule("a.v_proj", TT(FULL))]).named_modules())
    assert_close(to_dense(dense)(x), expected, **FLOAT32)
    assert type(dense.a) is nn.MultiheadAttention


def test_attributes_that_others_read() -> None:
    for options in ({}, {"kdim": 6}, {"bias": False}):
        dense = attention(**options)
        for opened in (open_module(dense), factorized(open_module(dense))):
            names = ("embed_dim", "num_heads", "head_dim", "kdim", "vdim", "dropout", "batch_first", "add_zero_attn")
            assert all(getattr(opened, name) == getattr(dense, name) for name in names)
            assert_close(opened.in_proj_weight, dense.in_proj_weight, **FLOAT64) if "kdim" not in options else None
            assert (opened.in_proj_weight is None) == (dense.in_proj_weight is None)
            assert_close(opened.in_proj_bias, dense.in_proj_bias, **FLOAT64) if "bias" not in options else None
            assert (opened.in_proj_bias is None) == (dense.in_proj_bias is None)
            assert_close(opened.out_proj.weight, dense.out_proj.weight, **FLOAT64)


def test_what_an_attention_refuses() -> None:
    opened, x = open_module(attention()), normal(5, 3, E)
    nested = torch.nested.nested_tensor([normal(5, E), normal(4, E)])
    for given, options, message in (
        ((nested, nested, nested), {}, "an opened attention takes no nested tensors: give padded ones"),
        ((x, x[:, 0], x[:, 0]), {}, r"have \(3, 2, 2\) dimensions; expected 3 each, or 2 each"),
        ((x, x, x), {"is_causal": True}, "is_causal=True is a hint about attn_mask: give the causal mask too"),
        ((x, x, x), {"attn_mask": normal(1, 5)}, r"attn_mask has shape \(1, 5\); expected \(5, 5\)"),
        ((x, x, x), {"attn_mask": normal(4, 5, 5)}, r"attn_mask has shape \(4, 5, 5\); expected \(5, 5\), or"),
        (
            (x, x, x),
            {"attn_mask": torch.zeros(5, 5).long()},
            r"attn_mask is of type torch.int64; expected torch.bool or",
        ),
        (
            (x, x, x),
            {"key_padding_mask": torch.zeros(3, 5).int()},
            r"key_padding_mask is of type torch.int32; expected",
        ),
        ((x, x, x), {"key_padding_mask": normal(5, 3)}, r"key_padding_mask has shape \(5, 3\); expected \(3, 5\)"),
        ((x[:, 0],) * 3, {"key_padding_mask": normal(1, 5)}, r"key_padding_mask has shape \(1, 5\); expected \(5,\)"),
        ((x, x, normal(4, 3, E)), {"need_weights": False}, r"key and value have shapes .*; expected equal ones up to"),
        ((x, x[:, :1], x[:, :1]), {"need_weights": False}, r"query and key have shapes .*; expected the same batch"),
    ):
        with pytest.raises((RuntimeError, AssertionError, ValueError)):
            attention()(*given, **options)
        with pytest.raises(UserError, match=message):
            opened(*given, **options)


def test_attention_is_compiled_and_exported() -> None:
    opened = factorized(open_module(attention(batch_first=True)), 3)
    x = normal(2, 5, E)
    pad = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = opened(x, x, x, pad)
        compiled = torch.compile(opened, fullgraph=True, backend="eager")
        assert_close(compiled(x, x, x, pad), expected, **FLOAT64)
        program = torch.export.export(opened, (x, x, x, pad), strict=False)
        assert_close(program.module()(x, x, x, pad), expected, **FLOAT64)
    torch.compiler.reset()
    plain, y = open_module(attention(batch_first=True)), normal(2, 4, E)
    expected = plain(x, y, y)  # by thirds of a dense weight
    assert_close(torch.compile(plain, fullgraph=True, backend="eager")(x, y, y), expected, **FLOAT64)
    assert_close(torch.export.export(plain, (x, y, y)).module()(x, y, y), expected, **FLOAT64)


# --- torch's transformers


def encoder(layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(E, 4, 20, batch_first=True, dtype=torch.float64, **options)
    return filled(nn.TransformerEncoder(layer, layers)).eval()  # type: ignore[return-value]


def calls_of(model: nn.Module, layers: list[nn.Module], *given: Any, **options: Any) -> tuple[Any, int]:
    """Runs a model without gradients, and counts the calls of layers. A hook would itself turn the fused kernel off."""
    calls = 0

    def counting(layer: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return type(layer).forward(layer, *args)

        return forward

    for layer in layers:
        layer.forward = counting(layer)  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            return model(*given, **options), calls
    finally:
        for layer in layers:
            del layer.forward


PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


@pytest.mark.parametrize("padding", [None, PADDED])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", ["linear1", "linear2", "self_attn.in_proj", "self_attn.out_proj"])
def test_the_fused_encoder_runs_no_factorized_layer(name: str, place: int, padding: Tensor | None) -> None:
    dense, model = encoder(), None
    model = copy.deepcopy(dense)
    name = f"layers.{place}.{name}"
    assert open_in_place(model, [name]) is model
    layer = model.get_submodule(name)
    ours = TTLinear.from_dense(layer, rank=FULL)
    replace_layers(model, {layer: ours})
    x = normal(2, 5, E)
    with torch.no_grad():
        expected = dense(x, src_key_padding_mask=padding)
    output, calls = calls_of(model, [ours], x, src_key_padding_mask=padding)
    assert calls == 1
    shown = slice(None) if padding is None else ~padding  # torch's nested tensors leave zeros where there is padding
    assert_close(output[shown], expected[shown], **FLOAT64)

    replace_layers(model, {ours: ours.to_dense()})
    close_in_place(model)
    linears = [model.layers[0].linear1, model.layers[1].linear2]
    output, calls = calls_of(model, linears, x, src_key_padding_mask=padding)
    assert calls == 0, "the dense model is as fast as it was"
    assert_close(output, expected, **FLOAT64)
    assert model.state_dict().keys() == dense.state_dict().keys()


@pytest.mark.parametrize("name", ["layers.1.linear1", "layers.0.linear2", "layers.1.self_attn.in_proj"])
def test_a_nested_tensor_is_refused_by_whatever_is_factorized(name: str) -> None:
    nested = torch.nested.nested_tensor([normal(5, E), normal(4, E)])
    model = tensorize(encoder(), [Rule(name, TT(2))])
    with torch.no_grad(), pytest.raises(UserError, match=r"takes no nested tensors: .* set use_nested_tensor = False"):
        model(nested)


class OtherFeedForward(nn.TransformerEncoderLayer):
    def __init__(self) -> None:
        super().__init__(E, 4, 20, batch_first=True, dtype=torch.float64)
        del self.linear1, self.linear2
        self.inner = nn.Linear(E, E, dtype=torch.float64)

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.filterwarnings("ignore:.* parameters and the dense weight")
def test_an_encoder_layer_without_the_linears_of_torchs() -> None:
    dense, x = OtherFeedForward(), normal(2, 5, E)  # torch's own evaluation needs the linears
    model = tensorize(nn.ModuleList([copy.deepcopy(dense)]), [Rule("*", TT(FULL))])[0]
    assert isinstance(model.inner, FactorizedLinear)
    assert isinstance(model.self_attn, Opened)
    for module in (dense, model):
        module.dropout1.p = module.dropout2.p = module.self_attn.dropout = 0.0
    assert_close(model(x), dense(x), **FLOAT64)


def test_an_opened_attention_that_was_put_in_by_hand_is_called() -> None:
    dense = encoder()
    model, x = copy.deepcopy(dense), normal(2, 5, E)
    model.layers[1].self_attn = opened = open_module(model.layers[1].self_attn)
    output, calls = calls_of(model, [opened.in_proj], x)
    assert calls == 1
    assert_close(output, dense(x), **FLOAT64)
    with torch.no_grad(), pytest.raises(UserError, match="set use_nested_tensor = False"):
        model(x, src_key_padding_mask=PADDED)


def test_the_fused_kernel_stays_off_where_it_was_off() -> None:
    model = encoder()
    model.layers[0].activation_relu_or_gelu, model.use_nested_tensor = 0, False
    open_in_place(model, ["layers.0.self_attn.in_proj"])
    close_in_place(model)
    assert (model.layers[0].activation_relu_or_gelu, model.use_nested_tensor) == (0, False)
    assert model.layers[1].activation_relu_or_gelu == 1


def test_a_whole_transformer_and_a_decoder_that_looks_at_another_sequence() -> None:
    dense = filled(nn.Transformer(E, 4, 1, 1, 20, dropout=0.0, dtype=torch.float64))
    model = opened_view(dense)
    cross: Any = model.decoder.layers[0].multihead_attn
    assert list(cross.linears) == ["q_proj", "k_proj", "v_proj", "out_proj"]
    assert list(model.decoder.layers[0].self_attn.linears) == ["in_proj", "out_proj"]
    x, y = normal(5, 2, E), normal(4, 2, E)
    for mode in (True, False):
        dense.train(mode), model.train(mode)
        assert_close(model(x, y), dense(x, y), **FLOAT64)
    again = filled(copy.deepcopy(model))
    again.load_state_dict(dense.state_dict())
    assert_close(again(x, y), dense(x, y), **FLOAT64)
    assert_close(factorized(again)(x, y), dense(x, y), **FLOAT64)
    assert_close(close_in_place(model)(x, y), dense(x, y), **FLOAT64)
    assert model.state_dict().keys() == dense.state_dict().keys()


# --- the tree


def test_a_view_shares_all_and_changes_nothing() -> None:
    shared = attention()
    model: Any = nn.ModuleDict(
        {"a": shared, "deep": nn.Sequential(nn.Linear(3, 3), nn.ModuleList([shared])), "b": encoder(1)}
    )
    model["deep"].register_buffer("kept", torch.zeros(2))
    names, modules = [name for name, _ in model.named_modules()], set(model.modules())
    view: Any = opened_view(model)
    assert [name for name, _ in model.named_modules()] == names
    assert set(model.modules()) == modules
    assert view["a"] is view["deep"][1][0]
    assert isinstance(view["a"], Opened)
    assert view["deep"][0] is model["deep"][0]
    assert {id(p) for p in view.parameters()} == {id(p) for p in model.parameters()}
    assert view["deep"].kept is model["deep"].kept
    assert view["b"].use_nested_tensor is False
    assert model["b"].use_nested_tensor is True
    assert opened_view(model["deep"][0]) is model["deep"][0]

    names = ["deep.1.0.in_proj", "deep.0", "b.layers.0.linear1"]
    assert open_in_place(model, names) is model
    assert isinstance(model["a"], Opened)
    assert model["a"] is model["deep"][1][0]
    assert type(model["b"].layers[0].self_attn) is nn.MultiheadAttention
    lstm = nn.LSTM(3, 4)
    opened = open_in_place(lstm, ["ih_l0"])
    assert isinstance(opened, Opened)
    assert type(close_in_place(opened)) is nn.LSTM
    assert open_in_place(lstm, ["other", "no.such.layer", ""]) is lstm


class Speech(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.lstm, self.head = encoder(1), nn.LSTM(E, 16, dtype=torch.float64), nn.Linear(16, 24).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.encoder(x))[0])


def test_rules_reach_the_layers_inside() -> None:
    model, x = Speech().eval(), normal(2, 5, E)
    names = ["encoder.layers.0.self_attn.in_proj", "lstm.ih_l0", "lstm.hh_l0"]
    plan = resolve(model, [Rule(name, TT(MacsKept(0.5))) for name in names], x)
    assert [rule.pattern for rule in plan if rule.factorization] == names
    with torch.no_grad(), FlopCounterMode(display=False) as before:
        open_in_place(copy.deepcopy(model), names)(x)
    tensorize(model, plan)
    with torch.no_grad(), FlopCounterMode(display=False) as after:
        model(x)
    inside = 2 * 10 * (E * 3 * E + E * 64 + 16 * 64)
    assert 0.4 * inside < before.get_total_flops() - after.get_total_flops() < 0.7 * inside
    to_dense(model)
    assert type(model.lstm) is nn.LSTM


@pytest.mark.parametrize("training", [True, False])
def test_torchs_counter_sees_in_an_opened_view_what_fused_kernels_hide(training: bool) -> None:
    """The counter knows no fused attention, encoder or LSTM: it gives those no operations at all."""
    view, t, n, e, h = opened_view(Speech().train(training)), 5, 2, E, 16
    attention = n * t * 4 * e * e + 2 * n * t * t * e
    rest = n * t * (2 * e * 20 + 4 * h * (e + h) + h * 24)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        view(normal(n, t, e))  # nor does it know the CPU's own kernel for the products of an attention
    assert counter.get_total_flops() == 2 * (attention + rest)


def test_what_is_not_opened() -> None:
    class Mine(nn.LSTM):
        pass

    hooked, parametrized, normed = attention(), attention(), nn.LSTM(3, 4)
    hooked.register_forward_hook(lambda *_: None)
    nn.utils.parametrizations.weight_norm(parametrized.out_proj)
    nn.utils.parametrizations.weight_norm(normed, "weight_hh_l0")
    for module in (Mine(3, 4), hooked, parametrized, normed, nn.Linear(3, 4), nn.Sequential()):
        assert open_module(module) is None


def test_a_module_that_is_not_opened_is_listed_with_the_reason() -> None:
    net = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.MultiheadAttention(4, 2), "c": attention(), "d": nn.Linear(8, 8)})
    net["a"].register_forward_hook(lambda *_: None)
    nn.utils.prune.random_unstructured(net["b"], "in_proj_weight", 0.5)
    net["c"].forward = lambda x: x
    reasons = {rule.pattern: rule.reason for rule in resolve(net, [Rule("*", SVD(2))])}
    assert reasons["a"] == reasons["b"] == "it has hooks, which a replacement would lose"
    assert reasons["c"] == "its forward was replaced by another"
    for pattern in ("a.hh*", "*.ih_l0"):
        with pytest.raises(UserError, match=r"matches no layer, and LSTM 'a' is not opened: it has hooks"):
            resolve(net, [Rule(pattern, SVD(2))])


def _viewed(dense: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(dense.detach().t())


def _tied_decoder() -> Any:
    net: Any = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, 2, 20), 2)
    net.layers[1].multihead_attn.in_proj_weight = net.layers[0].multihead_attn.in_proj_weight
    return net, "layers.0.multihead_attn", "layers.1.multihead_attn.in_proj_weight"


def _tied_gpt2(*, view: bool) -> Any:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    net: Any = nn.Sequential(conv1d(E, E), conv1d(E, E))
    net[1].weight = _viewed(net[0].weight) if view else net[0].weight
    return net, "0", "1.weight"


def _tied_standardized() -> Any:
    kind = pytest.importorskip("timm.layers").StdConv2d
    net: Any = nn.Sequential(kind(E, E, 3), kind(E, E, 3))
    net[1].weight = net[0].weight
    return net, "0", "1.weight"


def _tied_to_a_parent() -> Any:
    net: Any = nn.ModuleDict({"lstm": nn.LSTM(E, E)})
    net.register_parameter("kept", net["lstm"].weight_hh_l0)
    return net, "lstm", "kept"


TIED = {
    "decoder": _tied_decoder,
    "gpt2": lambda: _tied_gpt2(view=False),
    "gpt2, a view": lambda: _tied_gpt2(view=True),
    "standardized": _tied_standardized,
    "parent": _tied_to_a_parent,
}


@pytest.mark.parametrize("tied", TIED)
def test_what_is_tied_stays_tied(tied: str) -> None:
    net, name, other = TIED[tied]()
    net.append(nn.Linear(E, E)) if isinstance(net, nn.Sequential) else net.add_module("head", nn.Linear(E, E))
    before, size = set(net.parameters()), sum(parameter.numel() for parameter in net.parameters())
    reasons = {rule.pattern: rule.reason for rule in resolve(net, [Rule("*", SVD(2))])}
    assert reasons[name] == f"it is tied to {other!r}"
    holder = net.get_submodule(name)
    assert tensorize(net, [Rule("*", SVD(2))]).get_submodule(name) is holder
    assert set(holder.parameters()) <= before
    open_in_place(net, [f"{name}.{part}" for part in ("linear", "conv", "in_proj", "q_proj", "hh_l0")])
    assert net.get_submodule(name) is holder
    assert sum(parameter.numel() for parameter in net.parameters()) < size


# --- recurrent


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_recurrent_layers_with_states_and_every_form_of_input(
    kind: Any, bidirectional: bool, batch_first: bool, full: bool
) -> None:
    options = {"bidirectional": bidirectional, "batch_first": batch_first, "dtype": torch.float64}
    for more in ({"num_layers": 2}, {"bias": False}, *([{"proj_size": 3, "num_layers": 2}] if kind is nn.LSTM else [])):
        dense = filled(kind(6, 5, **options, **more)).eval()
        opened = factorized(open_module(dense)) if full else open_module(dense)
        lengths = [3, 7, 1, 7]
        sequences = [normal(length, 6) for length in lengths]
        padded = normal(4, 7, 6) if batch_first else normal(7, 4, 6)
        forms = [
            padded,
            pack_sequence(sequences, enforce_sorted=False),
            pack_sequence(sorted(sequences, key=len, reverse=True)),
            pack_padded_sequence(padded, torch.tensor(lengths), batch_first, enforce_sorted=False),
        ]
        rows = dense.num_layers * (1 + bidirectional)
        h, c = normal(rows, 4, getattr(dense, "proj_size", 0) or 5), normal(rows, 4, 5)
        state, one = ((h, c), (h[:, 0], c[:, 0])) if kind is nn.LSTM else (h, h[:, 0])
        for given in [*forms, *((form, state) for form in forms), normal(7, 6), (normal(7, 6), one)]:
            args = (given,) if isinstance(given, (Tensor, PackedSequence)) else given
            assert_close(opened(*args), dense(*args), **FLOAT64)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_drop_between_layers_what_torch_drops(kind: Any) -> None:
    dense = filled(kind(6, 5, 3, dropout=0.5, dtype=torch.float64))
    opened, x = open_module(dense), normal(7, 4, 6)
    torch.manual_seed(3)
    expected = dense(x)
    torch.manual_seed(3)
    assert_close(opened(x), expected, **FLOAT64)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("shape", [(4,), ()])
def test_cells_with_a_state_and_without_a_batch(kind: Any, shape: tuple[int, ...]) -> None:
    dense = filled(kind(6, 5, dtype=torch.float64))
    opened, x, h = open_module(dense), normal(*shape, 6), normal(*shape, 5)
    state = (h, normal(*shape, 5)) if kind is nn.LSTMCell else h
    assert_close(opened(x), dense(x), **FLOAT64)
    assert_close(opened(x, state), dense(x, state), **FLOAT64)


def test_inputs_are_multiplied_once_and_states_step_by_step() -> None:
    opened: Any = factorized(open_module(nn.GRU(6, 5, dtype=torch.float64)))
    assert calls_of(opened, [opened.ih_l0], normal(7, 3, 6))[1] == 1
    assert calls_of(opened, [opened.hh_l0], normal(7, 3, 6))[1] == 7
    opened.flatten_parameters()
    for given, message in (
        ((normal(7, 3, 5),), r"the input has shape \(7, 3, 5\); expected 2 or 3 axes, the last of 6"),
        ((normal(7, 3, 6), normal(1, 2, 5)), r"hx has shapes \[\(1, 2, 5\)\]; expected \[\(1, 3, 5\)\]"),
    ):
        with pytest.raises(UserError, match=message):
            opened(*given)
    with pytest.raises(UserError, match=r"the input has shape \(2, 3, 6\); expected 1 or 2 axes, the last of 6"):
        open_module(nn.GRUCell(6, 5))(torch.zeros(2, 3, 6))
    for kind, state in ((nn.GRUCell, torch.zeros(1, 5)), (nn.LSTMCell, (torch.zeros(4, 5), torch.zeros(1, 5)))):
        with pytest.raises(UserError, match=r"hx has shapes \[.*\(1, 5\)\]; expected \(4, 5\) each"):
            open_module(kind(6, 5))(torch.zeros(4, 6), state)


def test_factors_are_merged_once_for_all_steps_and_get_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Any = factorized(open_module(nn.LSTM(6, 5, proj_size=3, dtype=torch.float64)), 2)
    x, merges, merge = normal(7, 3, 6), [], FactorizedLinear._make
    monkeypatch.setattr(FactorizedLinear, "_make", lambda layer, *given: merges.append(layer) or merge(layer, *given))

    def gradients() -> dict[str, Tensor]:
        opened.zero_grad()
        opened(x)[0].square().sum().backward()
        return {name: parameter.grad for name, parameter in opened.named_parameters()}

    once = gradients()
    assert sorted(map(id, merges)) == sorted(map(id, opened.linears.values()))
    monkeypatch.setattr(FactorizedLinear, "merged_once", contextlib.nullcontext)
    assert_close(gradients(), once, **FLOAT64)
    assert len(merges) == 3 + 1 + 7 + 7


@pytest.mark.parametrize("training", [True, False])
def test_recurrent_layers_are_compiled_and_exported(training: bool) -> None:
    opened = factorized(open_module(nn.LSTM(6, 5, dtype=torch.float64)), 2).train(training)
    x = normal(2, 3, 6)
    expected = opened(x)
    assert_close(torch.compile(opened, fullgraph=True, backend="eager")(x), expected, **FLOAT64)
    assert_close(torch.export.export(opened, (x,)).module()(x), expected, **FLOAT64)


# --- other libraries


def test_a_small_gpt2_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_inner=24, vocab_size=11, n_positions=8)
    dense = transformers.GPT2LMHeadModel(config).eval()
    view = opened_view(dense)
    tokens = torch.arange(8).view(1, 8)
    opened = {name: module for name, module in view.named_modules() if isinstance(module, Opened)}
    assert len(opened) == 4
    assert_close(view(tokens).logits, dense(tokens).logits, **FLOAT32)
    model = filled(copy.deepcopy(dense))
    open_in_place(model, [f"{name}.linear" for name in opened])
    model.load_state_dict(dense.state_dict())  # the square projection's weight is transposed too
    assert_close(model(tokens).logits, dense(tokens).logits, **FLOAT32)
    expected = dict(dense.state_dict())
    conv = dense.transformer.h[0].mlp.c_fc
    again = open_module(conv)
    assert again.linear.weight.data_ptr() == conv.weight.data_ptr() == again.closed().weight.data_ptr()
    assert_close(again.weight, conv.weight, **EXACT)
    with torch.no_grad():
        conv.weight[0, 0] = 5
    assert again.linear.weight[0, 0] == 5
    close_in_place(model)
    assert_close(
        dict(model.state_dict()),
        expected | {"transformer.h.0.mlp.c_fc.weight": model.transformer.h[0].mlp.c_fc.weight},
        **EXACT,
    )
    assert all(value.is_contiguous() for value in model.state_dict().values())
    assert_close(factorized(view)(tokens).logits, dense(tokens).logits, **FLOAT32)
    assert view.generate(tokens[:, :2], max_new_tokens=2, do_sample=False).shape == (1, 4)


@pytest.mark.parametrize("version", ["", "V2"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_attention_of_torchvisions_swin_runs_the_factors(version: str, bias: bool) -> None:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    kind = getattr(swin, f"ShiftedWindowAttention{version}")
    dense = filled(kind(8, [4, 4], [2, 2], 2, qkv_bias=bias, proj_bias=bias).double())
    opened: Any = open_module(dense)
    assert opened.state_dict().keys() == dense.state_dict().keys()
    assert opened.qkv is dense.qkv
    x = normal(2, 7, 9, 8)
    assert_close(opened(x), dense(x), **FLOAT64)
    assert_close(opened.closed()(x), dense(x), **EXACT)
    opened = factorized(opened)
    output, calls = calls_of(opened, [opened.qkv, opened.proj], x)
    assert calls == 2
    assert_close(output, dense(x), **FLOAT64)
    assert type(dense.qkv) is nn.Linear
    opened(x).sum().backward()
    assert all(factor.grad is not None for factor in opened.qkv.factors.values())
    compiled = torch.compile(opened.eval(), fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_close(compiled(x), output, **FLOAT64)
    for again in (copy.deepcopy(opened), pickle.loads(pickle.dumps(opened))):
        assert_close(again(x), opened(x), **EXACT)
