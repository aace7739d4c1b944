"""What small nets learn in full schedules on CIFAR-10, dense and tensorized, from scratch and from a published net.

A training step is replayed as one graph: these nets are so small that launches would take most of the time.

Shapes: n pictures, c channels, h rows, w columns.
"""

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.counted import counted
from benchmarks.device import captured_step, synchronize, whole_step
from benchmarks.gpu.conformance import capturable
from benchmarks.gpu.pictures import Part, read
from benchmarks.rows import Row, Setting
from lightning_modules.nets import build_net
from tnlayers import (
    CP,
    MPS,
    FactorizedLayer,
    LowRank,
    MacsKept,
    ParamsKept,
    Rule,
    TTConv,
    Tucker,
    load_checkpoint,
    rules_of,
    tensorize,
)

__all__ = ["rows"]

BATCH, SEEDS = 256, 3
EPOCHS = {"cnn4": 20, "resnet20": 40}
SCRATCH_RATE, RETRAINING_RATE, DECAY = 2e-3, 1e-3, 0.05
WARM_UP = 0.05
"""The part of the steps in which the learning rate rises."""
SECONDS = {"cnn4": 5.0, "resnet20": 20.0}
METHODS = {"Tucker": Tucker, "CP": CP, "MPS": MPS, "TTConv": TTConv, "LowRank": LowRank}
HALVED = {"Tucker": Tucker(MacsKept(0.5)), "LowRank": LowRank(MacsKept(0.5)), "CP": CP(MacsKept(0.5))}
QUARTER = 0.245
"""Of the weights of all convolutions but the first, which stays dense: a quarter of all."""
STAY = {"cnn4": [Rule("conv1", None), Rule("fc*", None)], "resnet20": [Rule("conv1", None), Rule("linear", None)]}


def rows(setting: Setting) -> Iterator[Row]:
    """Yields the first seed of everything, then the others."""
    if setting.data is None:
        return
    data = read(setting.data, setting.device)
    for seed in range(1 if setting.tiny else SEEDS):
        for name in EPOCHS:
            if name == "resnet20" and seed == 0 and setting.checkpoint is not None:
                for method in ["dense", *HALVED][: 2 if setting.tiny else None]:
                    row = partial(retrained, method, data, setting)
                    yield Row(f"published resnet20, {method}", SECONDS[name], row)
            for method in ["dense", *METHODS][: 2 if setting.tiny else None]:
                row = partial(from_scratch, name, method, seed, data, setting)
                yield Row(f"{name} from scratch, {method}, seed {seed}", SECONDS[name], row)


def from_scratch(name: str, method: str, seed: int, data: dict[str, Part], setting: Setting) -> dict[str, Any]:
    """Trains a net whose convolutions are factors from the first step, at four times fewer weights."""
    torch.manual_seed(seed)
    net, x = fresh(name, data, setting), example(data)
    dense = counts(net, x)
    if method != "dense":
        tensorize(net, [*STAY[name], Rule("*", METHODS[method](ParamsKept(QUARTER)))], init="random", example_input=x)
    about = {"net": name, "method": method, "start": "scratch", "seed": seed} | kept(net, x, dense)
    return about | train(net, data, 1 if setting.tiny else EPOCHS[name], SCRATCH_RATE, seed, setting)


def retrained(method: str, data: dict[str, Part], setting: Setting) -> dict[str, Any]:
    """Compresses the published net to half of its multiply-accumulates, on the CPU, and trains it on; dense, only that."""
    torch.manual_seed(0)
    net = build_net("resnet20", num_classes=10, input_shape=(3, 32, 32))
    assert setting.checkpoint is not None
    load_checkpoint(setting.checkpoint, net)
    x = example(data)
    dense = counts(net, x.cpu())
    start = time.monotonic()
    if method != "dense":
        tensorize(net, [*STAY["resnet20"], Rule("*", HALVED[method])], example_input=x.cpu())
    seconds = time.monotonic() - start
    net.to(setting.device, memory_format=torch.channels_last)
    if method != "dense":  # the plans of this device
        tensorize(net, [Rule(rule.pattern, rule.factorization) for rule in rules_of(net)], example_input=x)
    about = {"net": "resnet20", "method": method, "start": "published", "seed": 0, "compress_seconds": seconds}
    about |= kept(net, x, dense) | {"right_after": accuracy(net, data["test"])}
    return about | train(net, data, 1 if setting.tiny else EPOCHS["resnet20"], RETRAINING_RATE, 0, setting)


def fresh(name: str, data: dict[str, Part], setting: Setting) -> nn.Module:
    net = build_net(name, num_classes=10, input_shape=tuple(data["train"].pictures.shape[1:]))
    return net.to(setting.device, memory_format=torch.channels_last)


def example(data: dict[str, Part]) -> Tensor:
    x, _ = next(data["test"].batches(BATCH))
    return x


def counts(net: nn.Module, x: Tensor) -> tuple[int, int, int]:
    """Returns the parameters, the weights of convolutions and the multiply-accumulates for one picture."""
    weights = 0
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            weights += module.weight.numel()
        elif isinstance(module, FactorizedLayer):
            weights += module.spec.params
    return sum(parameter.numel() for parameter in net.parameters()), weights, counted(net, x[:1])


def kept(net: nn.Module, x: Tensor, dense: tuple[int, int, int]) -> dict[str, Any]:
    parameters, weights, macs = counts(net, x)
    return {
        "parameters": parameters,
        "parameters_kept": parameters / dense[0],
        "convolution_weights_kept": weights / dense[1],
        "macs_kept": macs / dense[2],
    }


def train(
    net: nn.Module, data: dict[str, Part], epochs: int, rate: float, seed: int, setting: Setting
) -> dict[str, Any]:
    """Trains a net and measures it on all test pictures at the end.

    Returns:
        Its accuracy, the mean loss of each epoch, and the median seconds of one, the first aside.
    """
    device, size = setting.device, min(BATCH, len(data["train"].labels))
    generator = torch.Generator(device).manual_seed(seed)
    present_rate, total = torch.tensor(0.0, device=device), torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=present_rate, weight_decay=DECAY, **capturable(device))
    steps, at, losses, seconds = len(data["train"].labels) // size, 0, [], []
    net.train()
    x, y = data["train"].epoch(generator)
    static_x, static_y = x[:size].clone(memory_format=torch.channels_last), y[:size].clone()

    def step() -> None:
        # What autocast keeps would be of the weights at the time of the capture.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            loss = F.cross_entropy(net(static_x), static_y)
        loss.backward()
        optimizer.step()
        total.add_(loss.detach())

    optimizer.param_groups[0]["lr"].fill_(rate_at(0, epochs * steps, rate))
    try:
        replay, replayed = captured_step(step, net.parameters(), device), True
    except RuntimeError as error:  # this takes longer, but it learns the same
        print(f"no graph of a training step: {error}", flush=True)
        replay, replayed = whole_step(step, net.parameters()), False
    for _ in range(epochs):
        synchronize(device)
        start = time.monotonic()
        total.zero_()
        x, y = data["train"].epoch(generator)
        for first in range(0, steps * size, size):
            optimizer.param_groups[0]["lr"].fill_(rate_at(at, epochs * steps, rate))
            static_x.copy_(x[first : first + size])
            static_y.copy_(y[first : first + size])
            replay()
            at += 1
        losses.append(total.item() / steps)
        seconds.append(time.monotonic() - start)
    middle = sorted(seconds[1:] or seconds)[len(seconds[1:]) // 2]
    found = {"epochs": epochs, "batch": size, "losses": losses, "epoch_seconds": middle, "graph": replayed}
    return found | {"accuracy": accuracy(net, data["test"])}


def rate_at(step: int, steps: int, rate: float) -> float:
    """Returns the learning rate, which rises for some steps and then falls along a cosine to zero."""
    rising = max(1.0, WARM_UP * steps)
    if step < rising:
        return rate * (step + 1) / rising
    return rate * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising))) / 2


def accuracy(net: nn.Module, part: Part) -> float:
    """Returns the fraction of the pictures that are put into their class."""
    net.eval()  # which makes merged weights anew: nothing tells of replayed steps
    right = torch.zeros((), device=part.labels.device)
    with torch.no_grad(), torch.autocast(part.labels.device.type, torch.bfloat16):
        for x, y in part.batches(1000):
            right += (net(x).argmax(1) == y).sum()
    return right.item() / len(part.labels)
