"""Convolutions drawn at random, converted and computed by every plan in every layout: forward and all gradients.

    python -W ignore -m tests.drawn_layers --cases 20000 --seed 0

The oracle is torch's convolution in float64, in the default layout, of the weight that the factors make.
"""

import argparse
import random
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.cases import CASES
from tnlayers import FactorizedLayer
from tnlayers.plan import partitions

__all__ = ["Drawn", "draw", "wrong"]

METHODS = tuple(dict.fromkeys(case.layer for case in CASES if case.is_conv and case.exact and not case.own))
# Of the same computation on absolute values, so that what cancels does not count: a few roundings for each step.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}
LAYOUTS = ("contiguous", "channels_last")
ODD_LAYOUTS = ("sliced", "expanded")


@dataclass(frozen=True)
class Drawn:
    """A dense convolution, what it becomes, and what it gets."""

    method: type[FactorizedLayer]
    rank: int
    geometry: Mapping[str, Any]
    dtype: torch.dtype
    shape: tuple[int, ...]
    channels_last_module: bool
    seed: int


def draw(rng: random.Random) -> Drawn:
    """Small sizes, ones among them: there strides are ambiguous."""
    while True:
        groups = rng.choice((1, 1, 1, 2, 3))
        kernel = (rng.choice((1, 2, 3)), rng.choice((1, 2, 3)))
        mode = rng.choice(("zeros", "zeros", "zeros", "reflect", "replicate", "circular"))
        stride = (rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 3)))
        padding: Any = (rng.choice((0, 1, 2)), rng.choice((0, 1, 2)))
        if max(stride) == 1 and rng.random() < 0.2:
            padding = rng.choice(("same", "valid"))
        geometry = {
            "in_channels": groups * rng.choice((1, 1, 2, 3, 4)),
            "out_channels": groups * rng.choice((1, 1, 2, 4, 6)),
            "kernel_size": kernel,
            "stride": stride,
            "padding": padding,
            "dilation": (rng.choice((1, 1, 2)), rng.choice((1, 1, 2))),
            "groups": groups,
            "bias": rng.random() < 0.5,
            "padding_mode": mode,
        }
        size = (rng.randint(1, 9), rng.randint(1, 9))
        batch = rng.choice(((), (1,), (1,), (2,), (3,)))
        drawn = Drawn(
            method=rng.choice(METHODS),
            rank=rng.choice((1, 1, 2, 3, 99)),
            geometry=geometry,
            dtype=rng.choice(tuple(TOLERANCES)),
            shape=(*batch, geometry["in_channels"], *size),
            channels_last_module=rng.random() < 0.5,
            seed=rng.getrandbits(32),
        )
        if _fits(drawn):
            return drawn


def _fits(drawn: Drawn) -> bool:
    """Whether torch takes the input: nothing negative, and no more padding than a mode can make."""
    try:
        nn.Conv2d(**drawn.geometry)(torch.zeros(drawn.shape))
    except RuntimeError:
        return False
    return True


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "channels_last":
        moved = x.movedim(-3, -1).reshape(-1).view(*x.shape[:-3], *x.shape[-2:], x.shape[-3])
        return moved.movedim(-1, -3)
    if layout == "sliced":
        wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    return x.clone()


def wrong(drawn: Drawn) -> Iterator[str]:
    """What differs from torch's convolution; nothing, if all is well."""
    torch.manual_seed(drawn.seed)
    dense = nn.Conv2d(**drawn.geometry, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ranks above the attainable
        layer = drawn.method.from_dense(dense, rank=drawn.rank)
    if drawn.rank == 99:
        error = float(((layer.weight - dense.weight).norm() / dense.weight.norm()).detach())
        if error > 1e-10:
            yield f"full rank has error {error:.1e}"
    layer = layer.to(drawn.dtype)
    if drawn.channels_last_module:
        layer = layer.to(memory_format=torch.channels_last)
    x = torch.randn(drawn.shape).to(drawn.dtype)
    expected, scales = _reference(layer, x)
    rng = random.Random(drawn.seed)
    for plan in partitions(tuple(layer.spec.network.factors)):
        layer.set_plan(plan)
        for layout in (*LAYOUTS, *rng.choices((None, *ODD_LAYOUTS), weights=(4, 1, 1))):
            if layout is None:
                continue
            given = laid_out(x, layout).requires_grad_()
            out = layer(given)
            if layout == "channels_last" and not _keeps(given, out):
                yield f"{plan} loses channels_last: {out.shape} {out.stride()}"
            # A sum gives a gradient without strides of its own; any other has the output's.
            loss = out.sum() if layout == "expanded" else (out * laid_out(torch.ones_like(out), layout)).sum()
            parts = [given, *layer.parameters()]
            found = [out, *torch.autograd.grad(loss, parts)]
            names = ["output", "input's gradient", *(f"gradient of {name}" for name, _ in layer.named_parameters())]
            for name, value, right, scale in zip(names, found, expected, scales, strict=True):
                error = float((value.detach().double() - right).norm() / scale.norm().clamp_min(1e-300))
                if not error <= TOLERANCES[drawn.dtype]:
                    yield f"{plan} {layout}: {name} differs by {error:.1e}"


def _keeps(x: Tensor, out: Tensor) -> bool:
    four = (x if x.dim() == 4 else x[None]), (out if out.dim() == 4 else out[None])
    return all(part.is_contiguous(memory_format=torch.channels_last) for part in four) or four[0].is_contiguous()


def _reference(layer: FactorizedLayer, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The output and all gradients of its sum in float64, and the same on absolute values, as a scale of rounding."""
    both = []
    for transform in (Tensor.double, lambda value: value.double().abs()):
        factors = {name: transform(factor.detach()).requires_grad_() for name, factor in layer.factors.items()}
        given = transform(x).requires_grad_()
        bias = None if layer.bias is None else transform(layer.bias.detach()).requires_grad_()
        weight = layer.spec.network.reconstruct(factors)
        dense = nn.Conv2d(**_geometry(layer), dtype=torch.float64)
        out = torch.func.functional_call(dense, {"weight": weight} | ({} if bias is None else {"bias": bias}), (given,))
        parts = [given, *([] if bias is None else [bias]), *factors.values()]
        both.append([out.detach(), *torch.autograd.grad(out.sum(), parts)])
    return both[0], both[1]


def _geometry(layer: FactorizedLayer) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, found = random.Random(given.seed), 0
    for number in range(1, given.cases + 1):
        drawn = draw(rng)
        try:
            problems = list(wrong(drawn))
        except RuntimeError as error:
            problems = [f"raises {error}"]
        found += bool(problems)
        for problem in problems[:3]:
            print(f"{drawn}\n    {problem}", flush=True)
        if number % 1000 == 0:
            print(f"{number} cases, {found} of them wrong", flush=True)
    print(f"{given.cases} cases from seed {given.seed}, {found} of them wrong")
    return min(found, 1)


if __name__ == "__main__":
    sys.exit(main())
