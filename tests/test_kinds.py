"""Every method on every kind of layer that it replaces: what it costs, how it starts, and what only some kinds have."""

import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.cases import FULL
from tests.tolerances import FLOAT64
from tnlayers import (
    SVD,
    TT,
    Factorization,
    FactorizedConvTranspose2d,
    FactorizedEmbedding,
    FactorizedLayer,
    LayerSpec,
    LowRank,
    LowRankEmbedding,
    Rule,
    TTEmbedding,
    UnsupportedLayer,
    load_checkpoint,
    save_safetensors,
    tensorize,
)
from tnlayers.geometry import DENSE, Geometry, arguments
from tnlayers.layers import layer_type
from tnlayers.method import known_methods

pytestmark = pytest.mark.filterwarnings("ignore:.*above what a weight", "ignore:.* parameters and the dense weight")

PAIRS = [
    (method, kind)
    for name, method in known_methods().items()
    for kind in DENSE
    if "." not in name and name != "ADTN" and kind.__name__ in method.replaces
]
every_pair = pytest.mark.parametrize(("method", "kind"), PAIRS, ids=[f"{m.__name__}-{k.__name__}" for m, k in PAIRS])


def drawn(rng: random.Random, kind: type[nn.Module]) -> nn.Module:
    """A dense layer of some size, which gets at least as many positions as its window has."""
    if kind is nn.Linear:
        return nn.Linear(rng.choice((24, 36, 60)), rng.choice((24, 30, 64)))
    if kind is nn.Embedding:
        return nn.Embedding(rng.choice((60, 96)), rng.choice((24, 30)))
    axes, groups = range(int(kind.__name__[-2])), rng.choice((1, 1, 2))
    return kind(
        in_channels=groups * rng.choice((8, 12)),
        out_channels=groups * rng.choice((8, 12, 18)),
        kernel_size=tuple(rng.choice((1, 2, 3)) for _ in axes),
        stride=tuple(rng.choice((1, 2)) for _ in axes),
        padding=tuple(rng.choice((0, 1)) for _ in axes),
        groups=groups,
    )


def input_of(layer: nn.Module, batch: int = 3) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.randint(layer.num_embeddings, (batch, 5))
    if isinstance(layer, nn.Linear):
        return torch.randn(batch, layer.in_features)
    return torch.randn(batch, layer.in_channels, *(5 for _ in layer.kernel_size))


def converted(dense: nn.Module, method: Factorization) -> FactorizedLayer:
    (layer,) = tensorize(nn.Sequential(dense), [Rule("0", method)])
    assert isinstance(layer, FactorizedLayer)
    return layer


def counted(layer: nn.Module, x: Tensor) -> int:
    """The multiply-accumulates that torch counts, once merged weights are kept."""
    with torch.no_grad():
        layer.eval()(x)
        with FlopCounterMode(display=False) as counter:
            layer(x)
    return counter.get_total_flops() // 2


@every_pair
def test_costs_are_what_torch_counts(method: type[Factorization], kind: type[nn.Module]) -> None:
    rng = random.Random(0)
    for _ in range(3):
        dense = drawn(rng, kind)
        x = input_of(dense)
        calls = [Geometry.of(dense).call(x)]
        assert Geometry.of(dense).macs(calls) == counted(dense, x)
        layer = converted(dense, method(rng.choice((1, 2, 4))))
        for plan in rng.sample(layer.spec.plans, min(4, len(layer.spec.plans))):
            layer.set_plan(plan)
            assert layer.spec.macs(calls, plan) == counted(layer, x), plan
            lower = layer.spec.at(tuple(max(1, rank // 2) for rank in layer.spec.ranks))
            for spec in (layer.spec, lower):
                assert layer.spec.macs_of_ranks(calls, plan)(spec.ranks) == spec.macs(calls, plan), plan
        assert layer.spec.params == sum(factor.numel() for factor in layer.factors.values())


@every_pair
def test_from_scratch_a_layer_answers_as_loudly_as_a_dense_one(
    method: type[Factorization], kind: type[nn.Module]
) -> None:
    """For fifty layers the output has the standard deviation that white inputs give on average over all weights, within 10 %."""
    rng = random.Random(1)
    for _ in range(50):
        dense = drawn(rng, kind)
        own = method(rng.choice((1, 2, 3, 5)))
        layer: Any = layer_type(own, kind)
        names = {"rank": own.rank} if hasattr(layer, "method") else {"method": own}
        made = layer(**arguments(dense), **names)
        rms = made.weight.double().square().mean().sqrt()
        assert rms.item() == pytest.approx(made.spec.geometry.init_std, rel=0.1), (dense, own)


@every_pair
def test_every_factor_learns(method: type[Factorization], kind: type[nn.Module]) -> None:
    dense = drawn(random.Random(2), kind)
    layer, x = converted(dense, method(2)), input_of(dense)
    before = {name: value.detach().clone() for name, value in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in layer.named_parameters())


@every_pair
def test_a_saved_layer_is_read_into_a_dense_model(
    method: type[Factorization], kind: type[nn.Module], tmp_path: Any
) -> None:
    dense = drawn(random.Random(3), kind)
    net, fresh = nn.Sequential(converted(dense, method(2))), nn.Sequential(kind(**arguments(dense)))
    save_safetensors(net, tmp_path / "net.safetensors")
    load_checkpoint(tmp_path / "net.safetensors", fresh)
    x = input_of(dense)
    assert type(fresh[0]) is type(net[0])
    torch.testing.assert_close(fresh(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(9, 9), (10, 9), (2, 8, 10, 10)], ids=str)
def test_a_transposed_convolution_gives_the_output_size_that_is_asked_for(size: tuple[int, ...]) -> None:
    dense = nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1, dtype=torch.float64)
    layer, x = converted(dense, SVD(FULL)), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert isinstance(layer, FactorizedConvTranspose2d)
    torch.testing.assert_close(layer(x, output_size=size), dense(x, output_size=list(size)), **FLOAT64)
    with pytest.raises(ValueError, match=r"output_size \(11, 9\)"):
        layer(x, output_size=(11, 9))


EMBEDDINGS = {"LowRank": (LowRank, {}), "TT": (TT, {}), "TT of two": (TT, {"in_shape": (6, 10), "out_shape": (8, 3)})}


@pytest.mark.parametrize(("method", "options"), EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_an_embedding_looks_rows_up(method: type[Factorization], options: dict[str, Any]) -> None:
    dense = nn.Embedding(60, 24, padding_idx=7, dtype=torch.float64)
    layer = converted(dense, method(FULL, **options))
    for shape in ((), (1,), (4, 5), (0,), (2, 3, 2)):
        rows = torch.randint(60, shape)
        torch.testing.assert_close(layer(rows), dense(rows), **FLOAT64)
    every = torch.arange(60)
    torch.testing.assert_close(layer(every), layer.weight, **FLOAT64)
    torch.testing.assert_close(layer.to_dense()(every), dense(every), **FLOAT64)
    small = converted(dense, method(2, **options))
    assert not small(torch.tensor([7])).any()
    torch.testing.assert_close(small(every), small.weight, **FLOAT64)
    for row in (60, 61, 600, -1, -60):
        with pytest.raises(IndexError):
            layer(torch.tensor([row]))


@pytest.mark.parametrize(
    ("options", "word"),
    [({"max_norm": 1.0}, "max_norm"), ({"sparse": True}, "sparse"), ({"scale_grad_by_freq": True}, "freq")],
)
def test_an_embedding_says_what_it_has_not(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UnsupportedLayer, match=word):
        LowRankEmbedding.from_dense(nn.Embedding(8, 4, **options), rank=2)
    with pytest.raises(UnsupportedLayer, match=word):
        FactorizedEmbedding(8, 4, **options, method=LowRank(2))


def test_a_row_of_padding_that_is_not_zero_is_refused() -> None:
    dense = nn.Embedding(8, 4, padding_idx=0)
    nn.init.normal_(dense.weight)
    with pytest.raises(UnsupportedLayer, match="padding_idx=0 of a row that is not zero"):
        LowRankEmbedding.from_dense(dense, rank=2)


def test_a_row_of_a_large_table_needs_little_memory() -> None:
    """The table of 2^20 rows and 256 entries would take 1 GiB; nothing larger than 64 MiB is allocated on the way."""
    with torch.profiler.profile(profile_memory=True) as profile:
        layer = TTEmbedding(2**20, 256, rank=16)
        rows = torch.randint(2**20, (64,))
        layer(rows).sum().backward()
        layer.eval()(rows)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 2**26
    assert layer(rows).std().item() == pytest.approx(1, rel=0.3)
    assert sum(factor.numel() for factor in layer.factors.values()) < 10**6


def test_a_specification_of_a_look_up_has_one_plan() -> None:
    spec = LayerSpec(Geometry.of(nn.Embedding(60, 24)), LowRank(3))
    assert spec.plans == [("input", "output")] or len(spec.plans) == 1
    assert (
        spec.macs([Geometry.of(nn.Embedding(60, 24)).call(torch.zeros(5, dtype=torch.long))], spec.plans[0])
        == 5 * 3 * 24
    )


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        yield
