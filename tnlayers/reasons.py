"""Which modules of a model hold weights, and why one of them has to stay as it is."""

import math
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from tnlayers.factorized import FactorizedLayer
from tnlayers.geometry import DENSE, dense_type_of
from tnlayers.joint import generator_of
from tnlayers.opened import Opened, is_hooked, unopened_reason

__all__ = ["kind_of", "kind_refusal", "refusal", "weight_owners", "weight_shape", "weight_type"]


def weight_owners(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules that hold a weight, a parameter of two or more dimensions, themselves; shared ones once.

    A factorized layer, and one whose weight is parametrized, are one module each, whatever their weight is made of. Quantized
    layers, which hide their weight behind a method, are among them.
    """
    inside: set[nn.Module] = set()
    owners = {}
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, FactorizedLayer):
            inside |= set(module.modules())
        elif is_parametrized(module):
            inside |= set(module.parametrizations.modules())
        elif not _weights(module) and (isinstance(module, Opened) or not weight_shape(module)):
            continue
        owners[name] = module
    return owners


def _weights(module: nn.Module) -> list[Tensor]:
    return [value for value in module.parameters(recurse=False) if is_lazy(value) or value.dim() > 1]


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Returns the shape of a module's weight, the first where it holds several; () where it has none yet."""
    weight: Any = getattr(module, "weight", None)
    weight = weight() if callable(weight) else weight
    if not isinstance(weight, Tensor) or (not is_lazy(weight) and weight.dim() < 2):
        weight = next(iter(_weights(module)), None)
    return () if weight is None or is_lazy(weight) else tuple(weight.shape)


def kind_of(module: nn.Module) -> str:
    """Returns the name of a module's type, or of the one that a factorized layer stands for; in full where it is not torch's own."""
    if isinstance(module, Opened):
        return module.kind
    kind = dense_type_of(module)
    clash = kind not in DENSE and kind.__name__ in {known.__name__ for known in DENSE}
    return f"{kind.__module__}.{kind.__qualname__}" if clash else kind.__name__


def kind_refusal(model: nn.Module, name: str) -> str:
    """Returns why no method takes layers of a module's kind; empty if there may be one that does."""
    module, kind = model.get_submodule(name), kind_of(model.get_submodule(name))
    if type(module) in DENSE or isinstance(module, FactorizedLayer):
        return ""
    if is_parametrized(module):
        return "its weight is parametrized, so that it is computed from others at every call"
    if reason := unopened_reason(model, module):
        return reason
    base = next((base for base in type(module).__mro__ if base in DENSE), None)
    if base is None:
        own = [key for key, value in module.named_parameters(recurse=False) if value.dim() > 1]
        return f"no method replaces {kind}" + (f", which holds {', '.join(own)}" if own and own != ["weight"] else "")
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        return f"{kind} is a subclass of {base.__name__} whose weight nn.MultiheadAttention uses itself"
    changed = any(
        getattr(type(module), name, None) is not getattr(base, name, None) for name in ("forward", "_conv_forward")
    )
    more = "with a forward of its own" if changed else "with methods, buffers or modules of its own"
    return f"{kind} is a subclass of {base.__name__} {more}"


def weight_type(module: nn.Module) -> str:
    """Returns what a weight is where it is no ordinary tensor of real floating-point numbers; else an empty string."""
    weight: Any = module.weight
    if isinstance(module, FactorizedLayer) or not isinstance(weight, Tensor):
        return ""
    if weight.is_quantized or not weight.is_floating_point() or (weight.dtype.itemsize == 1):
        return "complex" if weight.is_complex() else f"of type {str(weight.dtype).removeprefix('torch.')}"
    return "" if type(weight) in (Tensor, nn.Parameter) else f"a {type(weight).__name__}"


def refusal(model: nn.Module, name: str) -> str:
    """Returns why a layer that has a matching rule must stay as it is; empty if nothing speaks against replacing it."""
    if reason := kind_refusal(model, name):
        return reason
    layer = model.get_submodule(name)
    if not isinstance(layer, FactorizedLayer) and "weight" not in layer._parameters:
        return "its weight is not a parameter of its own: it is computed from others, as weight_norm does"
    aliases = [alias for alias, module in model.named_modules(remove_duplicate=False) if module is layer]
    own = {f"{alias}.{key}".lstrip(".") for alias in aliases for key, _ in layer.named_parameters()}
    for parameter in () if _is_generated(layer) else layer.parameters():
        holders = {key for key, other in model.named_parameters(remove_duplicate=False) if other is parameter}
        if holders - own:
            return f"it is tied to {sorted(holders - own)[0]!r}"
    if is_hooked(layer):
        return "it has hooks, which a replacement would lose"
    if not math.prod(weight_shape(layer)):
        return f"its weight of shape {weight_shape(layer)} has no entries"
    kind = weight_type(layer)
    return f"its weight is {kind}" if kind else ""


def _is_generated(layer: nn.Module) -> bool:
    return isinstance(layer, FactorizedLayer) and bool(generator_of(layer.spec.method))
