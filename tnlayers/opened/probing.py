"""How a subclass of torch's layers computes: which padding and which plain layer it amounts to, found out by calling it.

It is called on a few inputs while the one call of `F.conv2d` or `F.linear` that it has to end with is recorded in place of
being made. So nothing here knows any of the subclasses; and nothing here proves what one does to other inputs.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tnlayers.geometry import DENSE

__all__ = ["Padding", "base_of", "pad", "probe"]

Amounts = tuple[tuple[int, int], ...]
"""Zeros before and after each spatial axis."""

Padding = Amounts | Literal["same"]
"""Amounts, or those by which TensorFlow keeps a size: they depend on it where there is a stride."""

_PLACES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_FUNCTIONS: dict[Callable[..., Tensor], type[nn.Module]] = {
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv3d: nn.Conv3d,
    F.linear: nn.Linear,
}
_SCALES = (1.0, 0.01, 3e4, 30.0)
"""The largest value of each input that it is called on."""


def base_of(module: nn.Module) -> Any:
    """Returns the torch layer that a module is or is derived from; None for others."""
    return next((base for base in type(module).__mro__ if base in DENSE), None)


def pad(layer: Any, x: Tensor, padding: Padding) -> Tensor:
    """Puts zeros around an input (..., d, h, w), as far as it has these axes.

    Args:
        layer: has the window, stride and dilation.
        x: the input.
        padding: how many.
    """
    amounts = _same(layer, x) if padding == "same" else padding
    return F.pad(x, [amount for pair in reversed(amounts) for amount in pair]) if any(map(any, amounts)) else x


def _same(layer: Any, x: Tensor) -> Amounts:
    amounts = []
    axes = zip(x.shape[-len(layer.kernel_size) :], layer.kernel_size, layer.stride, layer.dilation, strict=True)
    for size, window, stride, dilation in axes:
        total = max((-(-size // stride) - 1) * stride + (window - 1) * dilation + 1 - size, 0)
        amounts.append((total // 2, total - total // 2))
    return tuple(amounts)


def probe(dense: Any) -> tuple[nn.Module, Padding] | None:
    """Returns the plain layer and the padding that a module computes by; None if it computes anything else.

    The layer holds the very Parameters of the module where these are what it multiplies by, and copies of what it makes of
    them otherwise.
    """
    if dense.weight.is_meta or base_of(dense) not in _FUNCTIONS.values():
        return None
    inputs = [_input(dense, place) for place in range(len(_SCALES))]
    try:  # the forward of somebody's module may raise anything when it is called like this
        module = copy.deepcopy(dense)  # and may change the module
        calls = [_recorded(module.train(place % 2 == 1), x) for place, x in enumerate(inputs)]
        found = [_zeros(dense, x, call.pop("input")) for x, call in zip(inputs, calls, strict=True)]
        layer = _layer(dense, module, **calls[0])
    except Exception:
        return None
    if vars(module).keys() != vars(dense).keys():
        return None  # it remembers what it was called with
    if (
        None in found
        or layer.weight.dtype != dense.weight.dtype
        or not all(_is_alike(calls[0], call) for call in calls)
    ):
        return None
    if len(set(found)) == 1:
        return layer, found[0] or ()
    return (layer, "same") if found == [_same(dense, x) for x in inputs] else None


class _Recorder(TorchFunctionMode):
    """Notes the calls of torch's layer functions in place of making them."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in _FUNCTIONS:
            return function(*args, **(kwargs or {}))
        call = dict(zip(_PLACES, args, strict=False)) | (kwargs or {})
        self.calls.append(call | {"kind": _FUNCTIONS[function], "output": torch.empty(0)})
        return self.calls[-1]["output"]


def _recorded(module: nn.Module, x: Tensor) -> dict[str, Any]:
    """Returns the arguments of the one call that a module ends with."""
    with torch.no_grad(), _Recorder() as recorder:
        y = module(x)
    (call,) = recorder.calls
    assert y is call.pop("output")
    return call


def _input(layer: Any, place: int) -> Tensor:
    """Makes an input of fractions of both signs without zeros; the sizes of axes differ, and so do those of the probes."""
    if isinstance(layer, nn.Linear):
        shape = [*range(2, 3 + place), layer.in_features]
    else:
        windows = enumerate(zip(layer.kernel_size, layer.dilation, strict=True))
        sizes = [(window - 1) * dilation + 1 + place + axis for axis, (window, dilation) in windows]
        shape = [2 + place % 2, layer.in_channels, *sizes]
    values = _SCALES[place] * torch.arange(1.0, 1 + math.prod(shape)).sin()  # no whole number but 0 has a sine of 0
    return values.view(shape).to(layer.weight.device, layer.weight.dtype)


def _zeros(layer: Any, x: Tensor, padded: Tensor) -> Amounts | None:
    """Returns by which zeros one tensor became the other; None if by anything else."""
    amounts = []
    for axis in range(x.dim() if isinstance(layer, nn.Linear) else 2, x.dim()):
        filled = padded.transpose(0, axis).flatten(1).any(dim=1).nonzero()
        before = int(filled[0])
        amounts.append((before, padded.shape[axis] - x.shape[axis] - before))
    return tuple(amounts) if torch.equal(pad(layer, x, tuple(amounts)), padded) else None


def _layer(dense: Any, module: Any, kind: Any, weight: Tensor, bias: Tensor | None = None, **options: Any) -> nn.Module:
    """Makes the plain layer of a recorded call, of a copy of the module."""
    inputs = weight.shape[1] * options.get("groups", 1)
    window = [] if kind is nn.Linear else [tuple(weight.shape[2:])]
    layer = kind(inputs, weight.shape[0], *window, **options, bias=bias is not None, device="meta")
    trains = any(parameter.requires_grad for parameter in dense.parameters())
    for name, value in {"weight": weight, "bias": bias}.items():
        own = getattr(dense, name)
        is_own = value is getattr(module, name) and (own is None or torch.equal(own, value))
        setattr(layer, name, own if value is None or is_own else nn.Parameter(value.detach().clone(), trains))
    return layer


def _is_alike(call: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tells whether two calls have equal arguments."""
    return call.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        for key, value in call.items()
    )
