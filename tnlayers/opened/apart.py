"""Which attentions get queries, keys and values that differ, and so need no third of what one projection of all would give."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tnlayers.opened.attention import PARTS
from tnlayers.tracing import Example, arguments_of, evaluating

__all__ = ["attentions_apart"]

_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def attentions_apart(model: nn.Module, names: Iterable[str], example_input: Example | None) -> set[nn.Module]:
    """Returns the attentions of a model that have to be opened with three projections.

    These are the ones whose `q_proj`, `k_proj` or `v_proj` is named, those that are known to look at another sequence, and
    those whose inputs differ when the model is called with the example.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    split = (name.rpartition(".") for name in names)
    named = {modules.get(path) for path, _, last in split if last in PARTS}
    layers = [module for module in modules.values() if isinstance(module, _LAYERS)]
    cross = {getattr(layer, "multihead_attn", None) for layer in layers}
    same = {getattr(layer, "self_attn", None) for layer in layers}
    attentions: set[nn.Module] = {module for module in modules.values() if type(module) is nn.MultiheadAttention}
    apart = {module for module in attentions if module in named or module in cross}
    if example_input is not None:
        apart |= _with_different_inputs(model, attentions - apart - same, example_input)
    return apart


def _with_different_inputs(model: nn.Module, attentions: set[nn.Module], example_input: Example) -> set[nn.Module]:
    """Returns the attentions that are not given one tensor as query, key and value; they are called if there are any."""
    differ: set[nn.Module] = set()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        if not (given["query"] is given["key"] is given["value"]):
            differ.add(module)

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in attentions]
    args, kwargs = arguments_of(example_input)
    try:
        if attentions:
            with evaluating(model), torch.compiler.set_stance("force_eager"):
                model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return differ
