"""The figures that the papers state, from their rank lists and our definitions of their networks."""

import math
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from lightning_modules import build_net
from tests.commands import CONFIGS
from tnlayers import ADTN, TT, LayerSpec, LowRank, LowRankConv2d, TTConv, TTConv2d, rules_from_plain, tensorize
from tnlayers.geometry import Geometry

# Garipov et al.: the modes of 64 and 128 channels, and of the features of the linears; the ranks of their configurations.
MODES = {64: (4, 4, 4), 128: (4, 8, 4), 8192: (8, 8, 8, 16), 1536: (4, 6, 8, 8), 512: (4, 4, 4, 8)}
TT_CONV = {
    "conv1_2": (22, 20, 20),
    "conv2_1": (27, 22, 22),
    **dict.fromkeys(("conv2_2", "conv3_1", "conv3_2"), (23, 23, 23)),
}
SMALL_TT_CONV = dict.fromkeys(TT_CONV, (16, 16, 16))


def on_meta(name: str, size: int = 32) -> nn.Module:
    with torch.device("meta"):
        return build_net(name, num_classes=10, input_shape=(3, size, size))


def num_params(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("name", "dense", "ranks", "times"),
    [
        ("garipov_conv", 557_248, TT_CONV, 3.2301),
        ("garipov_conv_fc", 13_934_538, SMALL_TT_CONV | {"fc1": (40,) * 3, "fc2": (30,) * 3}, 41.651),
        ("garipov_conv_fc", 13_934_538, SMALL_TT_CONV | {"fc1": (20,) * 3, "fc2": (20,) * 3}, 82.87),
    ],
)
def test_garipov_counts(name: str, dense: int, ranks: dict[str, Any], times: float) -> None:
    """Convolution and linear weights and BatchNorm's, dense over compressed. Their ranks are partly above the attainable."""
    net = on_meta(name)
    assert num_params(net) == dense
    saved = 0
    for layer, rank in ranks.items():
        shape = tuple(net.get_submodule(layer).weight.shape)
        method = (TTConv if len(shape) == 4 else TT)(rank, in_shape=MODES[shape[1]], out_shape=MODES[shape[0]])
        saved += math.prod(shape) - method.network(shape).num_params(method.sizes(shape, rank))
    assert dense / (dense - saved) == pytest.approx(times, rel=5e-5)


@pytest.mark.parametrize(
    ("config", "times"),
    [("garipov_conv_tt", 5.1125), ("garipov_conv_fc_tt", 46.548), ("garipov_conv_fc_tt_small", 88.814)],
)
def test_garipov_without_the_parameters_that_carry_nothing(config: str, times: float) -> None:
    model = yaml.safe_load((CONFIGS / f"rules/{config}.yaml").read_text())["model"]
    net = on_meta(model["net"])
    dense = num_params(net)
    tensorize(net, rules_from_plain(model["rules"]), init="random")
    assert dense / num_params(net) == pytest.approx(times, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*above what a weight")
@pytest.mark.parametrize("layer", TT_CONV)
def test_garipov_both_ways_to_run_are_equal(layer: str) -> None:
    net = build_net("garipov_conv", num_classes=10, input_shape=(3, 32, 32))
    dense = net.get_submodule(layer)
    assert isinstance(dense, nn.Conv2d)
    shapes = {"in_shape": MODES[dense.in_channels], "out_shape": MODES[dense.out_channels]}
    tensorized = TTConv2d.from_dense(dense, rank=TT_CONV[layer], **shapes)
    x = torch.randn(2, dense.in_channels, 16, 16)
    results = []
    for plan in ("factors", "dense"):
        tensorized.set_plan(plan)
        results.append(tensorized(x))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_garipov_formula() -> None:
    """K(x,y,c,s) = G0[x,y] G1[c1,s1] ... Gd[cd,sd], entry by entry, as a product of matrices."""
    layer = TTConv2d(12, 8, 3, rank=(3, 4, 2), in_shape=(2, 3, 2), out_shape=(2, 2, 2), dtype=torch.float64)
    cores = [layer.factors[name].detach() for name in ("core1", "core2", "core3")]
    for s, c, x, y in [(0, 0, 0, 0), (5, 7, 1, 2), (7, 11, 2, 0)]:
        (s1, s2, s3), (c1, c2, c3) = (s // 4, s // 2 % 2, s % 2), (c // 6, c // 2 % 3, c % 2)
        product = (
            layer.factors["spatial"].detach()[x, y] @ cores[0][:, c1, s1] @ cores[1][:, c2, s2] @ cores[2][:, c3, s3]
        )
        assert layer.weight[s, c, x, y].item() == pytest.approx(product.item(), rel=1e-12)


VGG16 = (5, 24, 48, 48, 64, 128, 160, 192, 192, 256, 320, 320, 320)


@pytest.mark.parametrize(
    ("name", "size", "dense", "low_rank", "times"),
    [("caffenet", 227, 2_332_704, 466_312, 5.00), ("torchvision/vgg16", 224, 14_710_464, 5_358_573, 2.75)],
)
def test_tai_counts(name: str, size: int, dense: int, low_rank: int, times: float) -> None:
    """Weights of the convolutions; the ranks are those of one group, the paper's divided by the groups."""
    net = on_meta(name, size)
    convs = {key: module for key, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    assert sum(conv.weight.numel() for conv in convs.values()) == dense
    if name == "caffenet":
        rules = yaml.safe_load((CONFIGS / "rules/caffenet_lowrank.yaml").read_text())["model"]["rules"]
    else:
        rules = [{"pattern": key, "method": "LowRank", "rank": rank} for key, rank in zip(convs, VGG16, strict=True)]
    tensorize(net, rules_from_plain(rules), init="random")
    layers = [module for module in net.modules() if isinstance(module, LowRankConv2d)]
    kept = sum(factor.numel() for layer in layers for factor in layer.factors.values())
    assert kept == low_rank
    assert dense / kept == pytest.approx(times, abs=0.005)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("tai_cnn", 10 * 5 * (3 + 96) + 51 * 5 * (96 + 128) + 51 * 5 * (128 + 256)),
        ("tai_nin", 10 * 5 * 195 + 51 * 5 * 288),
    ],
)
def test_tai_networks(name: str, params: int) -> None:
    """K d (C + N) for each pair, and one BatchNorm after it."""
    model = yaml.safe_load((CONFIGS / f"rules/{name}_lowrank.yaml").read_text())["model"]
    net = on_meta(model["net"])
    tensorize(net, rules_from_plain(model["rules"]), init="random")
    layers = {key: module for key, module in net.named_modules() if isinstance(module, LowRankConv2d)}
    assert sum(factor.numel() for layer in layers.values() for factor in layer.factors.values()) == params
    for key, layer in layers.items():
        assert net.get_submodule(key.replace("conv", "bn")).num_features == layer.out_channels
        assert layer.bias is None


def trained_kernel() -> Tensor:
    """A kernel with the spectrum of trained ones: singular values that fall like a power."""
    left, right = (torch.linalg.qr(torch.randn(size, 24, dtype=torch.float64)).Q for size in (24, 36))
    matrix = left * torch.arange(1, 25).double() ** -0.8 @ right.mT  # (i h, o w)
    return matrix.reshape(8, 3, 12, 3).permute(2, 0, 1, 3)


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_tai_optimum(rank: int) -> None:
    """The squared error is that of the discarded singular values, and alternating least squares finds nothing better."""
    weight = trained_kernel()
    _, error = LayerSpec(Geometry(1, tuple(weight.shape)), LowRank(rank)).decompose(weight)
    matrix = weight.permute(1, 2, 0, 3).reshape(24, 36)
    values = torch.linalg.svdvals(matrix).square()
    squared = error**2 * values.sum()
    assert squared.item() == pytest.approx(values[rank:].sum().item(), rel=1e-6)
    for seed in range(5):
        vertical = torch.randn(24, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for _ in range(200):
            horizontal = torch.linalg.lstsq(vertical, matrix).solution
            vertical = torch.linalg.lstsq(horizontal.mT, matrix.mT).solution.mT
        assert (matrix - vertical @ horizontal).square().sum() >= squared * (1 - 1e-9)


def test_tai_splits_stride_and_padding() -> None:
    dense = nn.Conv2d(6, 8, (5, 3), stride=(2, 1), padding=(2, 0), dtype=torch.float64)
    layer = LowRankConv2d.from_dense(dense, rank=7)
    layer.set_plan("factors")
    vertical, horizontal = layer.plan.steps
    assert (vertical.stride, vertical.padding) == ((2, 1), (2, 0))
    assert (horizontal.stride, horizontal.padding) == ((1, 1), (0, 0))


def explicit(layers: list[Tensor], num_bits: int, activation: Any) -> Tensor:
    """The brick wall as one einsum for each gate on a tensor with an axis for each index."""
    letters = "abcdefgh"[:num_bits]
    made = torch.zeros((2,) * num_bits, dtype=torch.float64)
    made[(0,) * num_bits] = 1
    for place, gates in enumerate(layers):
        if place:
            made = activation(made)
        pairs = [(q, q + 1) for q in range(0, num_bits - 1, 2)] + [(q, q + 1) for q in range(1, num_bits - 1, 2)]
        for gate, (first, second) in zip(gates, pairs, strict=True):
            out = letters.replace(letters[first], "x").replace(letters[second], "y")
            made = torch.einsum(f"xy{letters[first]}{letters[second]},{letters}->{out}", gate, made)
    return made


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("num_bits", range(2, 9))
def test_adtn_is_its_gates_contracted(num_bits: int, depth: int, activation: str) -> None:
    layers = [torch.randn(num_bits - 1, 2, 2, 2, 2, dtype=torch.float64) for _ in range(depth)]
    parameters = {f"layer{m}": gates for m, gates in enumerate(layers, 1)}
    made = ADTN(depth, activation=activation).factors(parameters, {"weight": (2**num_bits,)})["weight"]
    function = {"none": lambda x: x, "relu": torch.relu, "leaky_relu": torch.nn.functional.leaky_relu}[activation]
    torch.testing.assert_close(made, explicit(layers, num_bits, function).flatten(), rtol=1e-12, atol=1e-12)


def num_effective(num_bits: int, depth: int) -> int:
    """Entries of the gates that the constant boundary does not switch off: each gate of the first column has 4, for v x v.

    The paper states 424 parameters for Q = 21 and 24, M = 1, which is this count, 200 + 224. (For an odd Q, 8 entries of
    the last gate are off as well.)
    """
    return 16 * depth * (num_bits - 1) - 12 * (num_bits // 2)


def test_adtn_counts() -> None:
    """VGG-16's linears of 2^21 and 2^24 weights: 688 parameters, of which 424 count."""
    model = yaml.safe_load((CONFIGS / "rules/vgg16_cifar_adtn.yaml").read_text())["model"]
    net = on_meta(model["net"])
    sizes = [net.get_submodule(name).weight.numel() for name in ("fc1", "fc2")]
    assert sizes == [2**21, 2**24]
    tensorize(net, rules_from_plain(model["rules"]), init="random")
    gates = [parameter for key, parameter in net.named_parameters() if ".factors." in key]
    assert sum(gate.numel() for gate in gates) == 688
    assert num_effective(21, 1) + num_effective(24, 1) == 424


@pytest.mark.parametrize("num_bits", [5, 6, 8])
@pytest.mark.parametrize("depth", [1, 2])
def test_adtn_effective_parameters_are_those_with_a_gradient(num_bits: int, depth: int) -> None:
    shapes = {"weight": (2**num_bits,)}
    parameters = {f"layer{m}": torch.randn(num_bits - 1, 2, 2, 2, 2).requires_grad_() for m in range(1, depth + 1)}
    made = ADTN(depth, activation="none").factors(parameters, shapes)["weight"]
    made.square().sum().backward()
    used = sum(int((gates.grad != 0).sum()) for gates in parameters.values())
    assert used == num_effective(num_bits, depth) - (8 if num_bits % 2 else 0)


def test_adtn_of_one_tn_layer_has_at_most_rank_four_between_left_and_right() -> None:
    made = ADTN(1).factors({"layer1": torch.randn(9, 2, 2, 2, 2, dtype=torch.float64)}, {"weight": (1024,)})["weight"]
    for bits in range(1, 10):
        assert torch.linalg.matrix_rank(made.reshape(2**bits, -1)) <= 4
