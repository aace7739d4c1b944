"""Times of whole nets at half of the multiply-accumulates, and of VGG-16 at Tai et al.'s ranks."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.counted import counted
from benchmarks.rows import Row, Setting
from benchmarks.speed.contenders import in_layouts, measure
from benchmarks.speed.ours import macs_kept, ours
from lightning_modules.nets import build_net
from tnlayers import CP, MPS, FactorizedLayer, LowRank, MacsKept, Rule, Tucker, to_chains, to_dense

__all__ = ["TAI", "rows"]

METHODS = {"Tucker": Tucker, "LowRank": LowRank, "MPS": MPS, "CP": CP}
TAI = "Tai's ranks"
_PASSES = 7  # of a net whose layers are timed
_VGG16 = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_TAI_RANKS = (5, 24, 48, 48, 64, 128, 160, 192, 192, 256, 320, 320, 320)
"""Of the convolutions of VGG-16: Tai et al. 2016, arXiv 1511.06067."""


@dataclass(frozen=True)
class Net:
    """A net and how it is used.

    Attributes:
        build: makes the dense net.
        shape: of its input, (n, c, h, w).
        stem: a pattern of the layer that reads the pictures, which stays dense.
        methods: the names of the methods, those that matter most first.
        seconds: a guess at how long a row takes.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]
    stem: str
    methods: tuple[str, ...]
    seconds: float


def imagenet(name: str) -> Callable[[], nn.Module]:
    return partial(build_net, f"torchvision/{name}", num_classes=1000, input_shape=(3, 224, 224))


def unet() -> nn.Module:
    from tests.own_module import UNet  # which brings all of Lightning with it

    return to_dense(UNet(width=32))


NETS = {
    "ResNet-18": Net(imagenet("resnet18"), (4, 3, 224, 224), "conv1", ("LowRank", "Tucker", "MPS", "CP"), 10),
    "VGG-16": Net(imagenet("vgg16"), (2, 3, 224, 224), "features.0", (TAI, "LowRank", "Tucker", "MPS"), 25),
    "ResNet-50": Net(imagenet("resnet50"), (4, 3, 224, 224), "conv1", ("Tucker", "LowRank", "MPS"), 20),
    "ResNet-20": Net(
        partial(build_net, "resnet20", num_classes=10, input_shape=(3, 32, 32)),
        (128, 3, 32, 32),
        "conv1",
        ("LowRank", "Tucker", "MPS", "CP"),
        9,
    ),
    "MobileNetV3-small": Net(
        imagenet("mobilenet_v3_small"), (8, 3, 224, 224), "features.0.*", ("LowRank", "Tucker", "MPS"), 7
    ),
    "U-Net": Net(unet, (4, 1, 128, 128), "down.0", ("Tucker", "LowRank"), 7),
    "ConvNeXt-Tiny": Net(imagenet("convnext_tiny"), (2, 3, 224, 224), "features.0.*", ("LowRank",), 15),
    "ViT-B/16": Net(imagenet("vit_b_16"), (2, 3, 224, 224), "conv_proj", ("LowRank",), 25),
}
TINY = {
    "CNN4": Net(
        partial(build_net, "cnn4", num_classes=10, input_shape=(3, 16, 16)), (2, 3, 16, 16), "conv1", ("Tucker",), 1
    )
}


def rows(setting: Setting) -> Iterator[Row]:
    """Yields every net with its first method, then with its second one, and so on."""
    nets = TINY if setting.tiny else NETS
    for place in range(max(len(net.methods) for net in nets.values())):
        for name, net in nets.items():
            for method in net.methods[place : place + 1]:
                seconds = net.seconds * (2 if method == "MPS" else 1)  # whose ranks take long to decide
                yield Row(f"{name}, {method}", seconds, partial(row, name, net, method, setting))


def row(name: str, net: Net, method: str, setting: Setting) -> dict[str, Any]:
    torch.manual_seed(0)
    dense = net.build().to(setting.device, setting.dtype)
    x = torch.randn(net.shape, device=setting.device, dtype=setting.dtype)
    example = x.contiguous(memory_format=torch.channels_last)
    small = ours(copy.deepcopy(dense).to(memory_format=torch.channels_last), rules(net, method), example)
    macs = [counted(model, example[:1]) for model in (dense, small)]
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (dense, small)]
    contenders = in_layouts("dense", "", dense, x) + in_layouts("ours", "", small, x)
    if method == TAI:
        contenders += in_layouts("chains", "", to_chains(copy.deepcopy(small)), x)
    return {
        "net": name,
        "method": method,
        "batch": len(x),
        "layers": sum(isinstance(module, FactorizedLayer) for module in small.modules()),
        "parameters_kept": sizes[1] / sizes[0],
        "macs_kept": macs[1] / macs[0],
        "proportional": proportional(dense, small, x) if setting.device.type == "cpu" else None,
        "measured": measure(contenders, setting),
    }


def proportional(dense: nn.Module, small: nn.Module, x: Tensor) -> float | None:
    """Returns how many times as fast as the dense net it would be if the time of what was replaced fell as its fewest operations do.

    All else takes as long as in the dense net, which is timed layer by layer in evaluation, in channels last. None where layers
    have been opened, so that the dense net has none of their names.
    """
    replaced = {name: layer for name, layer in small.named_modules() if isinstance(layer, FactorizedLayer)}
    dense = copy.deepcopy(dense).to(memory_format=torch.channels_last).eval()
    layers = dict(dense.named_modules())
    if not replaced.keys() <= layers.keys():
        return None
    shares = []
    with torch.no_grad():
        x = x.contiguous(memory_format=torch.channels_last)
        dense(x)
        for _ in range(_PASSES):
            with timed({name: layers[name] for name in replaced}) as taken:
                begun = time.perf_counter()
                dense(x)
                whole = time.perf_counter() - begun
            saved = sum(seconds * (1 - macs_kept(replaced[name], shape)) for name, seconds, shape in taken)
            shares.append(1 - saved / whole)
    return 1 / statistics.median(shares)


@contextmanager
def timed(layers: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, float, torch.Size]]]:
    """Notes the name of each call of these layers, its seconds and the shape of its input, in the order in which they end."""
    taken: list[tuple[str, float, torch.Size]] = []
    begun: dict[str, float] = {}

    def begins(name: str, *_: object) -> None:
        begun[name] = time.perf_counter()

    def ends(name: str, _: nn.Module, args: tuple[Tensor], __: Tensor) -> None:
        taken.append((name, time.perf_counter() - begun[name], args[0].shape))

    handles = [layer.register_forward_pre_hook(partial(begins, name)) for name, layer in layers.items()]
    handles += [layer.register_forward_hook(partial(ends, name)) for name, layer in layers.items()]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def rules(net: Net, method: str) -> list[Rule]:
    """Returns those of half of the multiply-accumulates of all layers that the method takes, or of the ranks of the paper."""
    if method == TAI:
        return [Rule(f"features.{place}", LowRank(rank)) for place, rank in zip(_VGG16, _TAI_RANKS, strict=True)]
    return [Rule(net.stem, None), Rule("*", METHODS[method](MacsKept(0.5, multiple=8)))]
