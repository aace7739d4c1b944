"""The slices of a compressed net, parts that the dense net has too, and what reaches them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tnlayers.factorized import FactorizedLayer
from tnlayers.tracing import Example, arguments_of, evaluating, map_tensors

__all__ = ["at", "has_module", "held_elsewhere", "in_order", "module_of", "slices_of"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def slices_of(model: nn.Module, dense: nn.Module) -> list[str]:
    """Finds the slices of a compressed model that hold factorized layers, by the module tree.

    They are the elements of `nn.Sequential`, `nn.ModuleList` and `nn.ModuleDict` that are no such containers themselves, the
    outermost ones: residual blocks, transformer layers. A single layer of an `nn.Sequential` takes along the normalisations,
    activations and poolings that follow it, as in "features.0..2". Elsewhere slices are single layers, or the smallest module around
    them that the dense model has too.
    """
    found: list[str] = []

    def walk(name: str, module: nn.Module, *, element: bool) -> None:
        held = dict(module.named_children())
        factorized = {key for key, child in held.items() if _holds_factors(child)}
        missing = not all(has_module(dense, _joined(name, key)) for key in factorized)
        if isinstance(module, FactorizedLayer) or missing or (element and type(module) not in _CONTAINERS):
            found.append(name)
            return
        for place, key in enumerate(held):
            if key in factorized and type(module) is nn.Sequential and isinstance(held[key], FactorizedLayer):
                found.append(_joined(name, _run(list(held.items())[place:])))
            elif key in factorized:
                walk(_joined(name, key), held[key], element=type(module) in _CONTAINERS)

    if _holds_factors(model):
        walk("", model, element=False)
    return found


def _run(elements: Sequence[tuple[str, nn.Module]]) -> str:
    """Names the first element and those right behind it that only normalise, activate or pool."""
    (first, _), *others = elements
    last = first
    for key, module in others:
        if any(module.children()) or any(weight.dim() > 1 for weight in module.parameters()):
            break
        last = key
    return first if last == first else f"{first}..{last}"


def has_module(model: nn.Module, name: str) -> bool:
    """Tells whether a model has a module of this name, a shared one by each of its names, or the elements of a run."""
    known = {each for each, _ in model.named_modules(remove_duplicate=False)}
    return known >= set(_ends(name))


def _ends(name: str) -> tuple[str, str]:
    """Returns the names of the first and of the last module of a slice, which may be the same."""
    first, _, last = name.partition("..")
    return first, _joined(first.rpartition(".")[0], last) if last else first


def module_of(model: nn.Module, name: str) -> nn.Module:
    """Returns the module of a slice; of a run it is an `nn.Sequential` of the model's own modules, by their names there."""
    first, last = _ends(name)
    if first == last:
        return model.get_submodule(first)
    around = model.get_submodule(first.rpartition(".")[0])
    held = list(around.named_children())
    names = [key for key, _ in held]
    start, end = (names.index(each.rpartition(".")[2]) for each in (first, last))
    run = nn.Sequential()
    for key, module in held[start : end + 1]:
        run.add_module(key, module)
    run.training = around.training  # its own, not that of the modules
    return run


def held_elsewhere(model: nn.Module, name: str) -> set[nn.Parameter]:
    """Returns the parameters that a model holds outside of a slice, maybe within it too."""
    module = module_of(model, name)
    around = _ends(name)[0].rpartition(".")[0] if ".." in name else name
    inside = {_joined(around, key) for key, _ in module.named_parameters(remove_duplicate=False)}
    return {value for key, value in model.named_parameters(remove_duplicate=False) if key not in inside}


def in_order(model: nn.Module, names: Sequence[str], batch: Example) -> list[str]:
    """Returns the names of slices in the order in which the model calls them; those that it does not call are absent."""
    seen: dict[str, None] = {}
    handles = [
        model.get_submodule(_ends(name)[0]).register_forward_pre_hook(lambda *_, name=name: seen.setdefault(name))
        for name in names
    ]
    try:
        _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return list(seen)


def at(model: nn.Module, name: str, batch: Example, *, output: bool) -> tuple[Any, Any]:
    """Returns the arguments of a slice's first call on a batch, and with `output` what it returns, all of them copies."""
    found: list[Any] = [None, None]

    def enters(_: nn.Module, args: Any, kwargs: Any) -> None:
        if found[0] is None:
            found[0] = _copied((args, kwargs))
            if not output:
                raise _Reached

    def leaves(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if found[0] is None:  # a module that several slices share
            return
        found[1] = _copied(out)
        raise _Reached

    first, last = map(model.get_submodule, _ends(name))
    handles = [first.register_forward_pre_hook(enters, with_kwargs=True)]
    if output:
        handles.append(last.register_forward_hook(leaves, with_kwargs=True))
    try:
        _call(model, batch)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0], found[1]


class _Reached(BaseException):
    """Ends a forward pass from which nothing more is needed; no code that catches exceptions of its own takes it."""


def _call(model: nn.Module, batch: Example) -> None:
    device = next(model.parameters()).device
    args, kwargs = arguments_of(map_tensors(batch, lambda tensor: tensor.to(device)))
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        model(*args, **kwargs)


def _copied(value: Any) -> Any:
    return map_tensors(value, lambda tensor: tensor.detach().clone())


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _holds_factors(module: nn.Module) -> bool:
    return any(isinstance(each, FactorizedLayer) for each in module.modules())
