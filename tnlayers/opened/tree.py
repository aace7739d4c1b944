"""Opening and closing the modules of a model."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tnlayers.opened.apart import attentions_apart
from tnlayers.opened.attention import OpenedAttention
from tnlayers.opened.conv1d import OpenedConv1D, is_conv1d
from tnlayers.opened.fast_path import choose_fast_paths
from tnlayers.opened.opened import Opened, twin
from tnlayers.opened.recurrent import OpenedCell, OpenedRecurrent
from tnlayers.opened.subclass import OpenedSubclass, is_subclass
from tnlayers.opened.swin import OpenedWindowAttention, is_window_attention
from tnlayers.opened.ties import tied_modules
from tnlayers.tracing import Example

__all__ = [
    "close_in_place",
    "is_hooked",
    "open_in_place",
    "open_module",
    "opened_view",
    "replace_layers",
    "unopened_reason",
]

Model = TypeVar("Model", bound=nn.Module)
_Opener = Callable[[nn.Module | None, nn.Module], Opened | None]

_KINDS: dict[type[nn.Module], type[Opened]] = {
    nn.MultiheadAttention: OpenedAttention,
    nn.LSTM: OpenedRecurrent,
    nn.GRU: OpenedRecurrent,
    nn.RNN: OpenedRecurrent,
    nn.LSTMCell: OpenedCell,
    nn.GRUCell: OpenedCell,
    nn.RNNCell: OpenedCell,
}
_OTHERS: dict[Callable[[nn.Module], bool], type[Opened]] = {
    is_conv1d: OpenedConv1D,
    is_window_attention: OpenedWindowAttention,
    is_subclass: OpenedSubclass,
}
"""The modules of other libraries."""


def open_module(module: nn.Module) -> Opened | None:
    """Opens one module: what computes the same with layers for its linears; None if it is of no kind that can be opened.

    A subclass may compute something else, so the type has to be one of the kinds itself, or be known to be plain. A module
    with hooks stays as it is, since they would be lost.
    """
    kind = _kind_of(module)
    return _named(kind.of(module), module) if kind and not _obstacle(module) else None


def unopened_reason(model: nn.Module, module: nn.Module) -> str:
    """Returns why a module of a model stays closed although it is of a kind that is opened; empty for others."""
    return (_obstacle(module) or _tie(module, tied_modules(model))) if _kind_of(module) else ""


def _kind_of(module: nn.Module) -> type[Opened] | None:
    return _KINDS.get(type(module)) or next((made for test, made in _OTHERS.items() if test(module)), None)


def _obstacle(module: nn.Module) -> str:
    """Returns what in a module itself keeps it from being opened."""
    if any(map(is_hooked, module.modules())):
        return "it has hooks, which a replacement would lose"
    if "forward" in vars(module):
        return "its forward was replaced by another"
    if type(module) is nn.MultiheadAttention and type(module.out_proj) is not NonDynamicallyQuantizableLinear:
        return "its out_proj is not torch's own"
    return ""


def _tie(module: nn.Module, tied: Mapping[nn.Module, str]) -> str:
    return f"it is tied to {tied[module]!r}" if module in tied else ""


def _named(opened: Opened | None, module: nn.Module) -> Opened | None:
    if opened:
        opened.kind = type(module).__name__
    return opened


def is_hooked(module: nn.Module) -> bool:
    """Tells whether a module has hooks, which what replaces it would not have."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def opened_view(model: Model, names: Iterable[str] = (), example_input: Example | None = None) -> Model:
    """Returns a copy of the tree of modules in which all that can be opened is; the model is not changed.

    A module stays closed if another holds one of its parameters too: the two would no longer be tied.

    All parameters, buffers and modules are shared with the model, except for the opened ones and those above them. So it
    shows which layers there are and how they are called, and changes of its parameters are changes of the model's.

    Args:
        model: the model.
        names: names of layers that are expected, as far as they are known; an attention may be opened in two ways.
        example_input: what the model takes; tells which attentions get different inputs.
    """
    seen = _view(model, None, {}, _opener(model, names, example_input))
    choose_fast_paths(seen)
    return seen  # type: ignore[return-value]


def _view(module: nn.Module, parent: nn.Module | None, made: dict[nn.Module, nn.Module], opener: _Opener) -> nn.Module:
    if module in made:
        return made[module]
    opened = opener(parent, module)
    made[module] = opened or module
    if opened:
        opened.in_view = True
    children = {} if opened else {name: child for name, child in module._modules.items() if child is not None}
    seen = {name: _view(child, module, made, opener) for name, child in children.items()}
    if any(seen[name] is not child for name, child in children.items()):
        made[module] = twin(module, type(module))
        made[module]._modules.update(seen)
    return made[module]


def _opener(model: nn.Module, names: Iterable[str], example_input: Example | None = None) -> _Opener:
    """Returns what opens a module of the model, given the one above it, if it can be opened where it stands."""
    tied, apart = tied_modules(model), attentions_apart(model, names, example_input)

    def opened(parent: nn.Module | None, module: nn.Module) -> Opened | None:
        if module in tied or isinstance(parent, nn.MultiheadAttention):
            return None  # an attention does not call its linear, whose type is a subclass of its own
        if module in apart and not _obstacle(module):
            return _named(OpenedAttention.of(module, packed=False), module)
        return open_module(module)

    return opened


def open_in_place(model: Model, names: Collection[str]) -> Model:
    """Opens those modules of a model that hold layers of these names; returns the model (the opened one if it is the model).

    Args:
        model: the model; it is changed.
        names: names of layers in the model's `opened_view`, such as "encoder.layers.0.self_attn.in_proj". Others ask for
            nothing.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    holders: dict[nn.Module, Opened] = {}
    opener = _opener(model, names)
    for name in names:
        path, _, child = name.rpartition(".")
        if (holder := modules.get(path)) is not None:
            above = modules[path.rpartition(".")[0]] if path else None
            opened = holders.get(holder) or opener(above, holder)
            if opened and child in opened.linears:
                holders[holder] = opened
    return replace_layers(model, holders)


def close_in_place(model: Model) -> Model:
    """Closes all opened modules of a model whose layers are plain linears; returns the model (the closed one if it is it)."""
    opened = [module for module in model.modules() if isinstance(module, Opened) and module.is_plain]
    return replace_layers(model, {module: module.closed() for module in opened})


def replace_layers(model: Model, replacements: Mapping[nn.Module, nn.Module]) -> Model:
    """Replaces a module in every place where it is used, so that a shared one stays shared.

    These places are also the plain lists, tuples and dicts of modules, such as a list that a forward goes through.
    """
    if model in replacements:
        return replacements[model]  # type: ignore[return-value]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
        for name, value in list(vars(parent).items()):
            vars(parent)[name] = _exchanged(value, replacements)
    choose_fast_paths(model)
    return model


def _exchanged(value: Any, replacements: Mapping[nn.Module, nn.Module]) -> Any:
    """Returns a copy of a plain list, tuple or dict that holds modules that are replaced, with others in their places."""
    if type(value) not in (list, tuple, dict):
        return value
    items = value.values() if isinstance(value, dict) else value
    if not any(isinstance(item, nn.Module) and item in replacements for item in items):
        return value
    made = [replacements.get(item, item) if isinstance(item, nn.Module) else item for item in items]
    return dict(zip(value, made, strict=True)) if isinstance(value, dict) else type(value)(made)
