"""Layers of every kind drawn at random, converted and computed by plans of any operations in every layout: forward and all gradients.

    python -W ignore -m tests.drawn_layers --cases 20000 --seed 0

stops at the first that is wrong and shows the simplest of its kind.

The oracle is torch's own layer in float64, in the default layout, with the weight that the factors make.
"""

import argparse
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis
import hypothesis.strategies as st
import torch
from torch import Tensor, nn

from tnlayers import Factorization, FactorizedLayer, LayerSpec, Rule, Schedule, tensorize
from tnlayers.geometry import DENSE, arguments
from tnlayers.method import known_methods
from tnlayers.roles import roles_of
from tnlayers.steps import possible_operations

__all__ = ["Drawn", "cases", "drawn_layers", "wrong"]

METHODS = tuple(method for name, method in known_methods().items() if "." not in name and name != "ADTN")
KINDS = (nn.Conv2d,) * 4 + tuple(kind for kind in DENSE if kind is not nn.Embedding)
# Of the same computation on absolute values, so that what cancels does not count: a few roundings for each step.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_MOST_PLANS = 16
LAYOUTS = ("contiguous", "channels_last")
ODD_LAYOUTS = ("sliced", "expanded")


@dataclass(frozen=True)
class Drawn:
    """A dense layer, what it becomes, and what it gets."""

    kind: type[nn.Module]
    method: type[Factorization]
    rank: int
    geometry: Mapping[str, Any]
    dtype: torch.dtype
    shape: tuple[int, ...]
    channels_last_module: bool
    seed: int


def cases(number: int, **options: Any) -> hypothesis.settings:
    """As many cases, nothing of earlier runs, and no limit of time: the machine may be busy."""
    slow = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much]
    return hypothesis.settings(
        max_examples=number, database=None, deadline=None, suppress_health_check=slow, print_blob=False, **options
    )


@st.composite
def drawn_layers(draw: st.DrawFn, methods: Sequence[type[Factorization]] = METHODS) -> Drawn:
    """Small sizes, ones among them: there strides are ambiguous."""

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    kind = one_of(*(kind for kind in KINDS if any(kind.__name__ in method.replaces for method in methods)))
    geometry = _linear(one_of) if kind is nn.Linear else _convolution(one_of, kind)
    if kind is nn.Linear:
        shape = (*one_of((), (1,), (3,), (2, 3), (0,)), geometry["in_features"])
    else:
        size = tuple(draw(st.integers(1, 9)) for _ in geometry["kernel_size"])
        shape = (*one_of((), (1,), (1,), (2,), (3,)), geometry["in_channels"], *size)
    drawn = Drawn(
        kind=kind,
        method=one_of(*(method for method in methods if kind.__name__ in method.replaces)),
        rank=one_of(1, 1, 2, 3, 99),
        geometry=geometry,
        dtype=one_of(*TOLERANCES),
        shape=shape,
        channels_last_module=kind is nn.Conv2d and one_of(False, True),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    hypothesis.assume(_fits(drawn))
    return drawn


def _linear(one_of: Callable[..., Any]) -> dict[str, Any]:
    sizes = (1, 2, 3, 4, 6, 7, 12)
    return {"in_features": one_of(*sizes), "out_features": one_of(*sizes), "bias": one_of(False, True)}


def _convolution(one_of: Callable[..., Any], kind: type[nn.Module]) -> dict[str, Any]:
    groups, axes = one_of(1, 1, 1, 2, 3), range(int(kind.__name__[-2]))

    def each(*values: int) -> tuple[int, ...]:
        return tuple(one_of(*values) for _ in axes)

    geometry: dict[str, Any] = {
        "in_channels": groups * one_of(1, 1, 2, 3, 4),
        "out_channels": groups * one_of(1, 1, 2, 4, 6),
        "kernel_size": each(1, 2, 3),
        "stride": each(1, 1, 2, 3),
        "padding": each(0, 1, 2),
        "dilation": each(1, 1, 2),
        "groups": groups,
        "bias": one_of(False, True),
    }
    if "Transpose" in kind.__name__:
        return geometry | {"output_padding": each(0, 0, 1)}
    if max(geometry["stride"]) == 1:
        geometry["padding"] = one_of(*[geometry["padding"]] * 4, "same", "valid")
    return geometry | {"padding_mode": one_of("zeros", "zeros", "zeros", "reflect", "replicate", "circular")}


def _fits(drawn: Drawn) -> bool:
    """Whether torch takes the input: nothing negative, and no more padding than a mode can make."""
    try:
        drawn.kind(**drawn.geometry, dtype=torch.float64)(torch.zeros(drawn.shape, dtype=torch.float64))
    except RuntimeError:
        return False
    return True


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "channels_last":
        moved = x.movedim(-3, -1).reshape(-1).view(*x.shape[:-3], *x.shape[-2:], x.shape[-3])
        return moved.movedim(-1, -3)
    if layout == "sliced":
        wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype, device=x.device)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    return x.clone()


def wrong(drawn: Drawn, device: str = "cpu") -> Iterator[str]:
    """What differs on the device from torch's convolution on the CPU; nothing, if all is well."""
    torch.manual_seed(drawn.seed)
    net = nn.Sequential(drawn.kind(**drawn.geometry, dtype=torch.float64))
    weight = net[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ranks above the attainable, and more parameters than the dense layer has
        layer = tensorize(net, [Rule("0", drawn.method(drawn.rank))])[0]
    assert isinstance(layer, FactorizedLayer)
    if drawn.rank == 99:
        error = float(((layer.weight - weight).norm() / weight.norm()).detach())  # type: ignore[operator]
        if error > 1e-10:
            yield f"full rank has error {error:.1e}"
    layer = layer.to(drawn.dtype)
    if drawn.channels_last_module:
        layer = layer.to(memory_format=torch.channels_last)
    x = torch.randn(drawn.shape).to(drawn.dtype)
    expected, scales = _reference(layer, x)
    layer, x = layer.to(device), x.to(device)
    rng = random.Random(drawn.seed)
    layouts = LAYOUTS if drawn.kind is nn.Conv2d else LAYOUTS[:1]
    for plan in _schedules(layer.spec, rng):
        layer.set_plan(plan)
        for layout in (*layouts, *rng.choices((None, *ODD_LAYOUTS), weights=(4, 1, 1))):
            if layout is None:
                continue
            given = laid_out(x, layout).requires_grad_()
            out = layer(given)
            kept = _keeps(given, out) or (layer.plan.is_one_operation and _as_torch(layer, given, out))
            if layout == "channels_last" and not kept:
                yield f"{plan} loses channels_last: {out.shape} {out.stride()}"
            with torch.no_grad():
                alone = layer.eval()(laid_out(x, layout))
            layer.train()
            # A sum gives a gradient without strides of its own; any other has the output's.
            loss = out.sum() if layout == "expanded" else (out * laid_out(torch.ones_like(out), layout)).sum()
            parts = [given, *layer.parameters()]
            found = [out, *torch.autograd.grad(loss, parts), alone]
            names = ["output", "input's gradient", *(f"gradient of {name}" for name, _ in layer.named_parameters())]
            names.append("output in evaluation")
            rights, sizes = [*expected, expected[0]], [*scales, scales[0]]
            for name, value, right, scale in zip(names, found, rights, sizes, strict=True):
                error = float((value.detach().cpu().double() - right).norm() / scale.norm().clamp_min(1e-300))
                if not error <= TOLERANCES[drawn.dtype]:
                    yield f"{plan} {layout}: {name} differs by {error:.1e}"


def _schedules(spec: LayerSpec, rng: random.Random) -> Iterator[Schedule]:
    """Some of the partitions, with any of the operations that compute their groups."""
    for groups in rng.sample(spec.plans, min(_MOST_PLANS, len(spec.plans))):
        roles = roles_of(spec.network, groups)
        possible = [possible_operations(each, spec.geometry.axes, spec.sizes) for each in roles]
        yield Schedule(groups, tuple(map(rng.choice, possible)))


def _keeps(x: Tensor, out: Tensor) -> bool:
    four = (x if x.dim() == 4 else x[None]), (out if out.dim() == 4 else out[None])
    return all(part.is_contiguous(memory_format=torch.channels_last) for part in four) or four[0].is_contiguous()


def _as_torch(layer: FactorizedLayer, x: Tensor, out: Tensor) -> bool:
    """Whether the output lies as that of the dense layer; where a size is 1, its stride may be any."""
    dense = layer.to_dense().to(x.device)(x)
    return all(a == b for a, b, size in zip(out.stride(), dense.stride(), out.shape, strict=True) if size > 1)


def _reference(layer: FactorizedLayer, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The output and all gradients of its sum in float64, and the same on absolute values, as a scale of rounding."""
    both = []
    for transform in (Tensor.double, lambda value: value.double().abs()):
        factors = {name: transform(factor.detach()).requires_grad_() for name, factor in layer.factors.items()}
        given = transform(x).requires_grad_()
        bias = None if layer.bias is None else transform(layer.bias.detach()).requires_grad_()
        weight = layer.spec.geometry.exchanged(layer.spec.network.reconstruct(factors))
        dense = layer.dense_type(**arguments(layer), dtype=torch.float64)
        out = torch.func.functional_call(dense, {"weight": weight} | ({} if bias is None else {"bias": bias}), (given,))
        parts = [given, *([] if bias is None else [bias]), *factors.values()]
        both.append([out.detach(), *torch.autograd.grad(out.sum(), parts)])
    return both[0], both[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()

    @hypothesis.seed(given.seed)
    @cases(given.cases)
    @hypothesis.given(drawn_layers())
    def run(drawn: Drawn) -> None:
        assert not list(wrong(drawn, given.device))

    run()
    print(f"{given.cases} cases from seed {given.seed}, none of them wrong")


if __name__ == "__main__":
    main()
