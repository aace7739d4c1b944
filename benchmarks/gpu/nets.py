"""Times of whole nets at half of the multiply-accumulates, channels last, next to the dense nets."""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.counted import counted
from benchmarks.device import captured, parameter_bytes, peak_bytes
from benchmarks.gpu.layers import ROUNDS
from benchmarks.rows import Row, Setting
from benchmarks.timing import medians
from lightning_modules.nets import NETS, build_net
from tnlayers import Factorization, FactorizedLayer, LowRank, MacsKept, Rule, Tucker, resolve, tensorize

__all__ = ["rows"]

STEMS = {"resnet18": "conv1", "resnet50": "conv1", "vgg16": "features.0", "mobilenet_v3_small": "features.0.*"}
STEMS |= {"convnext_tiny": "features.0.*", "vit_b_16": "conv_proj", "cnn4": "conv1"}
"""What stays dense: the layer that reads the pictures."""
METHODS: Mapping[str, Factorization] = {"Tucker": Tucker(MacsKept(0.5)), "LowRank": LowRank(MacsKept(0.5))}
ORDER = (
    ("resnet18", "Tucker"),
    ("resnet50", "Tucker"),
    ("vgg16", "Tucker"),
    ("vit_b_16", "LowRank"),
    ("convnext_tiny", "LowRank"),
    ("mobilenet_v3_small", "Tucker"),
    ("resnet18", "LowRank"),
    ("resnet50", "LowRank"),
    ("vgg16", "LowRank"),
    ("mobilenet_v3_small", "LowRank"),
)
COMPILED = (("resnet18", "Tucker"), ("resnet50", "Tucker"))
TINY = (("cnn4", "Tucker"),)


def rows(setting: Setting) -> Iterator[Row]:
    """Yields nets in eager mode, then a few compiled, which takes longer than all that is measured."""
    for name, method in TINY if setting.tiny else ORDER:
        yield Row(f"{name}, {method}", 8.0, partial(row, name, method, setting))
    for name, method in TINY if setting.tiny else COMPILED:
        yield Row(f"{name}, {method}, compiled", 30.0, partial(compiled_row, name, method, setting))


def row(name: str, method: str, setting: Setting) -> dict[str, Any]:
    nets, about = pair(name, method, setting)
    one, many = pictures(setting, 1), pictures(setting, 2 if setting.tiny else 64)
    of: dict[str, dict[str, Any]] = {kind: {} for kind in nets}

    def note(form: str, seconds: Mapping[str, float]) -> None:
        for kind, value in seconds.items():
            of[kind][form] = value

    low = {kind: copy.deepcopy(net).bfloat16().eval() for kind, net in nets.items()}
    timed = partial(medians, rounds=1 if setting.tiny else ROUNDS, device=setting.device)
    with torch.no_grad():
        for x in (one, many):
            note(f"inference, batch {len(x)}", timed({kind: partial(net, x) for kind, net in low.items()}))
            replays = {kind: captured(partial(net, x), setting.device)[0] for kind, net in low.items()}
            note(f"inference, batch {len(x)}, graph", timed(replays))
            del replays
    del low
    steps = {kind: partial(training_step, net.train(), many) for kind, net in nets.items()}
    note(f"training, batch {len(many)}", timed(steps))
    for kind, step in steps.items():
        of[kind]["training peak bytes"] = peak_bytes(step, setting.device) + parameter_bytes(nets[kind])
    return about | {"of": of}


def compiled_row(name: str, method: str, setting: Setting) -> dict[str, Any]:
    """Times inference of the compiled nets."""
    torch.compiler.reset()
    nets, about = pair(name, method, setting)
    backend = "eager" if setting.tiny else "inductor"
    x = pictures(setting, 2 if setting.tiny else 64)
    calls: dict[str, Callable[[], Tensor]] = {
        kind: partial(torch.compile(net.bfloat16().eval(), backend=backend), x) for kind, net in nets.items()
    }
    timed = partial(medians, rounds=1 if setting.tiny else ROUNDS, device=setting.device)
    with torch.no_grad():
        seconds = timed(calls)
    return about | {"of": {kind: {f"inference, batch {len(x)}, compiled": value} for kind, value in seconds.items()}}


def pair(name: str, method: str, setting: Setting) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Returns the dense net and the other one, and what that one keeps by torch's count; the weights of both are random."""
    torch.manual_seed(0)
    full = name if name in NETS else f"torchvision/{name}"
    dense = build_net(full, num_classes=1000, input_shape=(3, 224, 224))
    dense = dense.to(setting.device, memory_format=torch.channels_last)
    rules = [Rule(STEMS[name], None), Rule("*", METHODS[method])]
    example = pictures(setting, 2 if setting.tiny else 64).float()
    small = copy.deepcopy(dense)
    small = tensorize(small, resolve(small, rules, example, init="random"), init="random")
    nets: dict[str, nn.Module] = {"dense": dense, method: small}
    macs = [counted(net, example[:1]) for net in nets.values()]
    sizes = [sum(parameter.numel() for parameter in net.parameters()) for net in nets.values()]
    layers = sum(isinstance(module, FactorizedLayer) for module in small.modules())
    return nets, {"parameters_kept": sizes[1] / sizes[0], "macs_kept": macs[1] / macs[0], "layers": layers}


def pictures(setting: Setting, batch: int) -> Tensor:
    side = 32 if setting.tiny else 224
    x = torch.randn(batch, 3, side, side, device=setting.device, dtype=torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last)


def training_step(net: nn.Module, x: Tensor) -> None:
    """Takes the gradients of all parameters in float32, the operations in bfloat16 by autocast, and lets them go."""
    with torch.autocast(x.device.type, torch.bfloat16):
        out = net(x)
    out.float().square().mean().backward()
    net.zero_grad()
