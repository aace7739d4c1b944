"""Which modules share parameters with others: what opens one of them would make copies of what is one for both."""

from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["tied_modules"]


def tied_modules(model: nn.Module) -> dict[nn.Module, str]:
    """Returns the modules that hold a parameter which one outside of them holds too, or a view of it: module -> its name there."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for at, holder, place in _places(model):
        holders.setdefault(place, []).append((at, holder))
    shared = [found for found in holders.values() if len({holder for _, holder in found}) > 1]
    if not shared:
        return {}
    tied: dict[nn.Module, str] = {}
    for module in model.modules():
        inside = set(module.modules())
        for found in shared:
            outside = [at for at, holder in found if holder not in inside]
            if outside and len(outside) < len(found):
                tied.setdefault(module, outside[0])
    return tied


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Yields each parameter's name and module, and a number that it has in common with all that overlap with it in memory."""
    found = [
        (*_memory(value), f"{name}.{key}".lstrip("."), module)
        for name, module in model.named_modules()
        for key, value in module._parameters.items()
        if value is not None
    ]
    place, device, end = 0, "", 0
    for at, start, stop, name, module in sorted(found, key=lambda item: item[:3]):
        if at != device or start >= end:
            place, device, end = place + 1, at, stop
        end = max(end, stop)
        yield name, module, place


def _memory(value: nn.Parameter) -> tuple[str, int, int]:
    """Returns where the values of a parameter lie: a device, and from which address to which; itself where that is not known."""
    plain = type(value) is nn.Parameter and value.layout is torch.strided and not value.is_meta
    if not plain or not value.numel():
        return "", id(value), id(value) + 1
    span = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
    return str(value.device), value.data_ptr(), value.data_ptr() + span * value.element_size()
