"""The networks: names, shapes, published weights, and what a wrong name or option says."""

import re
import sys
from fnmatch import fnmatchcase
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules.data import Folders
from lightning_modules.nets import NETS, build, build_net
from lightning_modules.nets.cnn4 import CNN4
from lightning_modules.nets.garipov import SameMaxPool
from lightning_modules.nets.resnet_cifar import CIFARResNet

CASES: list[tuple[str, tuple[int, int, int], dict[str, Any]]] = [
    ("cnn4", (1, 8, 8), {}),
    ("cnn4", (3, 32, 32), {"widths": [8, 8, 16, 16], "hidden": 24}),
    ("cnn4", (2, 1, 5), {}),
    ("cnn4", (1, 1, 1), {}),
    ("resnet20", (3, 32, 32), {}),
    ("resnet20", (1, 28, 28), {}),
    ("resnet32", (3, 7, 9), {}),
    ("resnet44", (3, 8, 8), {}),
    ("resnet56", (3, 8, 8), {}),
    ("resnet50_cifar", (1, 8, 8), {}),
    ("vgg16_cifar", (3, 32, 32), {}),
    ("vgg16_cifar", (1, 33, 70), {}),
    ("garipov_conv", (3, 32, 32), {}),
    ("garipov_conv", (1, 17, 22), {}),
    ("garipov_conv_fc", (3, 16, 16), {}),
    ("garipov_conv_fc", (1, 1, 7), {}),
    ("tai_cnn", (3, 32, 32), {}),
    ("tai_cnn", (2, 1, 9), {"batch_norm": False}),
    ("tai_nin", (3, 32, 32), {}),
    ("tai_nin", (1, 4, 7), {"batch_norm": False}),
    ("caffenet", (1, 39, 50), {}),
    ("torchvision/resnet18", (3, 32, 32), {"width_per_group": 64}),
    ("timm/resnet18", (1, 32, 32), {"drop_rate": 0.1}),
]


@pytest.mark.parametrize(("name", "input_shape", "options"), CASES)
def test_builds_and_runs(name: str, input_shape: tuple[int, int, int], options: dict[str, Any]) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    net = build_net(name, num_classes=7, input_shape=input_shape, **options)
    logits = net(torch.randn(2, *input_shape))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize(
    ("name", "size", "reads"),
    [
        ("torchvision/alexnet", 8, 64),
        ("torchvision/vgg11", 8, 32),
        ("torchvision/vit_b_16", 32, 224),
        ("timm/vgg11", 8, 32),
        ("timm/vit_tiny_patch16_224", 8, 224),
    ],
)
def test_pictures_that_a_net_cannot_read(name: str, size: int, reads: int) -> None:
    """It is said before anything is trained, without a computation that large pictures would make long."""
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    message = (
        rf"net '{name}' cannot read pictures of {size}x{size} \(.+\): it reads {reads}x{reads}, .* --data.image_size"
    )
    with pytest.raises(ValueError, match=message):
        build_net(name, num_classes=2, input_shape=(3, size, size))


@pytest.mark.parametrize("name", ["cnn4", "timm/vit_tiny_patch16_224"])
def test_trying_a_net_leaves_no_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where it is only traced nor where it is run: random numbers, statistics and modes are as they would be."""
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    built = []
    for tried in ([], ["meta"], ["cpu"]):
        torch.manual_seed(0)
        with monkeypatch.context() as patch:
            if tried != ["meta"]:
                patch.setattr(
                    build, "_refusal", lambda *args, tried=tried, run=build._refusal: tried and run(*args[:2], "cpu")
                )
            net = build_net(name, num_classes=2, input_shape=(3, 224, 224))
        built.append((net.state_dict(), torch.get_rng_state(), [module.training for module in net.modules()]))
    for found in built[1:]:
        torch.testing.assert_close(found, built[0], rtol=0, atol=0)


def test_every_own_net_is_a_case() -> None:
    assert {name for name, _, _ in CASES if "/" not in name} == set(NETS)


def on_meta(name: str, input_shape: tuple[int, int, int], **options: Any) -> nn.Module:
    """The network without its weights: free, however large it is."""
    with torch.device("meta"):
        return build_net(name, num_classes=10, input_shape=input_shape, **options)


# He et al.'s table 6 rounds the residual ones to 0.27 M, 0.46 M, 0.66 M and 0.85 M.
@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("garipov_conv", 557_248),
        ("garipov_conv_fc", 13_934_538),
    ],
)
def test_cifar_nets_have_the_papers_sizes(name: str, num_parameters: int) -> None:
    net = on_meta(name, (3, 32, 32))
    assert sum(parameter.numel() for parameter in net.parameters()) == num_parameters


@pytest.mark.parametrize(
    ("name", "size", "num_weights"), [("caffenet", 227, 2_332_704), ("torchvision/vgg16", 224, 14_710_464)]
)
def test_imagenet_nets_have_the_papers_convolutions(name: str, size: int, num_weights: int) -> None:
    convs = [module for module in on_meta(name, (3, size, size)).modules() if isinstance(module, nn.Conv2d)]
    assert sum(conv.weight.numel() for conv in convs) == num_weights


@pytest.mark.parametrize(
    ("name", "size", "inputs"),
    [
        ("garipov_conv", 32, {"conv2_1": (64, 16, 16), "conv3_1": (128, 8, 8), "average": (128, 4, 4), "fc": (128,)}),
        ("garipov_conv_fc", 32, {"conv3_2": (128, 8, 8), "fc1": (8192,), "fc2": (1536,), "fc3": (512,)}),
        ("tai_cnn", 32, {"conv2": (96, 16, 16), "pointwise": (256, 4, 4), "fc1": (1024,), "fc2": (256,)}),
        ("tai_nin", 32, {"mlp1_2": (160, 32, 32), "conv2": (96, 16, 16), "conv3": (192, 8, 8), "average": (10, 8, 8)}),
        ("vgg16_cifar", 32, {"features.40": (512, 2, 2), "fc1": (512,), "fc2": (4096,), "fc3": (4096,)}),
        ("caffenet", 227, {"pool1": (96, 55, 55), "conv2": (96, 27, 27), "conv3": (256, 13, 13), "fc6": (9216,)}),
    ],
)
def test_layers_see_what_the_papers_say(name: str, size: int, inputs: dict[str, tuple[int, ...]]) -> None:
    net = on_meta(name, (3, size, size))
    seen: dict[str, tuple[int, ...]] = {}
    for layer in inputs:
        net.get_submodule(layer).register_forward_pre_hook(
            lambda module, args, layer=layer: seen.update({layer: tuple(args[0].shape[1:])})
        )
    assert net(torch.empty(2, 3, size, size, device="meta")).shape == (2, 10)
    assert seen == inputs


@pytest.mark.parametrize(
    ("name", "pattern", "layers"),
    [
        ("garipov_conv", "conv*", ["conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1", "conv3_2"]),
        ("garipov_conv", "fc*", ["fc"]),
        ("garipov_conv_fc", "conv?_?", ["conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1", "conv3_2"]),
        ("garipov_conv_fc", "fc*", ["fc1", "fc2", "fc3"]),
        ("tai_cnn", "conv?", ["conv1", "conv2", "conv3"]),
        ("tai_cnn", "fc*", ["fc1", "fc2"]),
        ("tai_nin", "conv*", ["conv1", "conv2", "conv3"]),
        ("tai_nin", "mlp*", ["mlp1_1", "mlp1_2", "mlp2_1", "mlp2_2", "mlp3_1", "mlp3_2"]),
        ("vgg16_cifar", "fc*", ["fc1", "fc2", "fc3"]),
        ("caffenet", "conv?", ["conv1", "conv2", "conv3", "conv4", "conv5"]),
        ("caffenet", "fc*", ["fc6", "fc7", "fc8"]),
    ],
)
def test_patterns_find_their_layers(name: str, pattern: str, layers: list[str]) -> None:
    assert [layer for layer, _ in on_meta(name, (3, 64, 64)).named_modules() if fnmatchcase(layer, pattern)] == layers


def test_vgg16_cifar_has_linear_layers_of_powers_of_two() -> None:
    net = on_meta("vgg16_cifar", (3, 32, 32))
    assert [net.get_parameter(f"fc{i}.weight").numel() for i in (1, 2)] == [2**21, 2**24]


@pytest.mark.parametrize("name", ["tai_cnn", "tai_nin"])
def test_batch_norm_takes_the_place_of_the_bias(name: str) -> None:
    for batch_norm in (True, False):
        layers = dict(on_meta(name, (3, 32, 32), batch_norm=batch_norm).named_children())
        assert [layer for layer in layers if layer.startswith("bn")] == ["bn1", "bn2", "bn3"] * batch_norm
        assert all((layers[f"conv{i}"].bias is None) == batch_norm for i in (1, 2, 3))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 8), (7, 10), (5, 3), (1, 2)])
def test_same_max_pool_pads_as_tensorflow(height: int, width: int) -> None:
    # TensorFlow's definition: ceil(size / 2) windows, and of the pixels that they lack the smaller half in front.
    lacking = [max(2 * ((size + 1) // 2 - 1) + 3 - size, 0) for size in (width, height)]
    padding = [pixels for total in lacking for pixels in (total // 2, total - total // 2)]
    x = torch.randn(2, 3, height, width) - 5
    expected = F.max_pool2d(F.pad(x, padding, value=-inf), 3, stride=2)
    torch.testing.assert_close(SameMaxPool()(x), expected, rtol=0, atol=0)


def test_garipov_conv_fc_flattens_rows_columns_channels() -> None:
    net = build_net("garipov_conv_fc", num_classes=10, input_shape=(3, 8, 12))
    seen: dict[str, torch.Tensor] = {}
    for layer in ("relu3_2", "flatten"):
        net.get_submodule(layer).register_forward_hook(lambda module, args, out, layer=layer: seen.update({layer: out}))
    net(torch.randn(2, 3, 8, 12))
    features, flat = seen["relu3_2"], seen["flatten"].reshape(2, 2, 3, 128)
    torch.testing.assert_close(flat, features.movedim(1, -1), rtol=0, atol=0)


def test_shortcut_drops_pixels_and_surrounds_channels_with_zeros() -> None:
    net = CIFARResNet(num_classes=10, input_shape=(3, 32, 32))
    x = torch.randn(2, 16, 6, 6)
    shortcut = net.get_submodule("layer2.0").shortcut(x)  # type: ignore[operator]
    assert shortcut.shape == (2, 32, 3, 3)
    torch.testing.assert_close(shortcut[:, 8:24], x[:, :, ::2, ::2], rtol=0, atol=0)
    assert shortcut[:, :8].count_nonzero() == shortcut[:, 24:].count_nonzero() == 0


def test_cifar_resnet_starts_from_he_weights() -> None:
    weight = CIFARResNet(num_classes=10, input_shape=(3, 32, 32)).get_parameter("layer3.1.conv1.weight")
    torch.testing.assert_close(weight.std().item(), (2 / (64 * 9)) ** 0.5, rtol=0.03, atol=0)


def test_resnet50_cifar_keeps_the_resolution_in_its_stem() -> None:
    net = build_net("resnet50_cifar", num_classes=10, input_shape=(3, 32, 32))
    assert isinstance(net.conv1, nn.Conv2d)
    assert net.conv1.weight.shape == (64, 3, 3, 3)
    assert isinstance(net.maxpool, nn.Identity)
    shapes = []
    net.get_submodule("layer1").register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0].shape))
    net.eval()(torch.randn(1, 3, 32, 32))
    assert shapes == [(1, 64, 32, 32)]


def test_cnn4_names_its_layers() -> None:
    names = [name for name, _ in CNN4(num_classes=10, input_shape=(1, 8, 8)).named_children()]
    layers = [f"{kind}{i}" for i in range(1, 5) for kind in ("conv", "bn")]
    assert [name for name in names if name not in ("relu", "halve", "average")] == [*layers, "fc1", "fc2"]


@pytest.mark.parametrize("name", ["cnn4", "resnet20", "garipov_conv_fc", "tai_nin"])
def test_compiles_whole_and_exports(name: str) -> None:
    net = build_net(name, num_classes=10, input_shape=(3, 16, 16)).eval()
    x = torch.randn(3, 3, 16, 16)
    expected = net(x)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    dynamic = [{0: torch.export.Dim("batch")}]
    exported = torch.export.export(net, (torch.randn(2, 3, 16, 16),), dynamic_shapes=dynamic).module()
    torch.testing.assert_close(exported(x), expected)


@pytest.mark.data
def test_published_resnet20_scores_as_published(resnet20_checkpoint: Path, cifar10_png: Path) -> None:
    net = build_net("resnet20", num_classes=10, input_shape=(3, 32, 32)).eval()
    published = torch.load(resnet20_checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    net.load_state_dict({key.removeprefix("module."): value for key, value in published.items()})
    data = Folders(str(cifar10_png))
    data.setup("test")
    with torch.no_grad():
        batches = [data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader()]
        correct = sum(int((net(pictures).argmax(1) == labels).sum()) for pictures, labels in batches)
    assert sum(len(labels) for _, labels in batches) == 1017
    # 932 as measured; kernels that round otherwise may tip one picture either way.
    assert 931 <= correct <= 933


@pytest.mark.parametrize(
    ("name", "input_shape", "options", "message"),
    [
        ("resnet21", (3, 8, 8), {}, "unknown net 'resnet21': did you mean .*resnet20.*one of cnn4, resnet20, .*timm/"),
        ("resnet18", (3, 8, 8), {}, "unknown net 'resnet18': did you mean torchvision/resnet18"),
        ("qqq", (3, 8, 8), {}, "unknown net 'qqq': expected one of cnn4, resnet20, "),
        (
            "torchvision/resnet19",
            (3, 8, 8),
            {},
            "unknown net 'torchvision/resnet19': did you mean torchvision/resnet18",
        ),
        ("torchvision/fcn_resnet50", (3, 8, 8), {}, "unknown net 'torchvision/fcn_resnet50'"),
        ("torchvision/resnet18", (1, 8, 8), {}, "3 channels but these have 1: take 'timm/resnet18'"),
        ("torchvision/resnet18", (3, 8, 8), {"grups": 1}, "'torchvision/resnet18'.*'grups'.*options are groups, norm"),
        ("torchvision/resnet18", (3, 8, 8), {"weights": "DEFAULT"}, "multiple values for .*'weights'"),
        ("cnn4", (3, 8, 8), {"width": 4}, "net 'cnn4'.*'width'.*its options are hidden, widths$"),
        ("resnet20", (3, 8, 8), {"depth": 32}, "net 'resnet20'.*'depth'.*its options are none$"),
        ("cnn4", (3, 8, 8), {"widths": [4, 4]}, r"widths is \[4, 4\], but cnn4 has four .*give four positive"),
        ("tai_nin", (3, 8, 8), {"bn": True}, "net 'tai_nin'.*'bn'.*its options are batch_norm$"),
        ("garipov_conv", (3, 16, 32), {}, r"input_shape is \(3, 16, 32\), but garipov_conv needs .* at least 17x17"),
        ("tai_nin", (3, 8, 3), {}, r"input_shape is \(3, 8, 3\), but tai_nin needs .* at least 4x4"),
        ("vgg16_cifar", (3, 31, 32), {}, r"input_shape is \(3, 31, 32\), but vgg16_cifar needs .* at least 32x32"),
        ("caffenet", (3, 227, 38), {}, r"input_shape is \(3, 227, 38\), but caffenet needs .* at least 39x39"),
        ("cnn4", (0, 8, 8), {}, r"input_shape is \(0, 8, 8\) .*needs three positive sizes"),
    ],
)
def test_errors_name_the_value_and_the_fix(
    name: str, input_shape: tuple[int, int, int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_net(name, num_classes=10, input_shape=input_shape, **options)


def test_depth_must_fit_the_paper() -> None:
    with pytest.raises(ValueError, match=r"depth is 21, but .* 6 n \+ 2 layers: give 20"):
        CIFARResNet(num_classes=10, input_shape=(3, 8, 8), depth=21)


def test_timm_errors() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="unknown net 'timm/resnet19': did you mean timm/resnet18"):
        build_net("timm/resnet19", num_classes=10, input_shape=(3, 8, 8))
    with pytest.raises(ValueError, match=r"'timm/resnet18'.*'drop'.*its options are .*drop_rate"):
        build_net("timm/resnet18", num_classes=10, input_shape=(3, 8, 8), drop=0.1)


def test_missing_timm_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=re.escape("needs timm: pip install 'tnlayers[timm]'")):
        build_net("timm/resnet18", num_classes=10, input_shape=(3, 8, 8))
