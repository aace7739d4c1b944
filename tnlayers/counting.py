"""What a whole model costs: the multiply-accumulates of a forward, whichever operations do them, as torch counts them."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # there is no public way to see operators
from torch.utils.module_tracker import ModuleTracker

from tnlayers.dense_form import dense_form
from tnlayers.factorized import FactorizedLayer
from tnlayers.opened import Opened
from tnlayers.tracing import Example, arguments_of, evaluating, plain_attention, tensors_in

__all__ = ["Counted", "count_macs", "num_params", "whole_cost"]

Shape = torch.Size
_ATEN = torch.ops.aten
_MULTIPLIES = {"mm", "mv", "matmul", "linear", "conv", "convolution", "attention", "transformer", "rnn", "lstm", "gru"}


@dataclass(frozen=True)
class Counted:
    """The multiply-accumulates of one forward.

    Attributes:
        total: of the whole forward.
        by_module: name -> those within the calls of a module, without those of the modules asked for that it calls itself.
        unknown: operators that multiply by weights and that no formula is known for; they count as 0.
    """

    total: int
    by_module: Mapping[str, int]
    unknown: tuple[str, ...]


def count_macs(model: nn.Module, example_input: Example, modules: Mapping[str, nn.Module] | None = None) -> Counted:
    """Counts the multiply-accumulates of a forward in evaluation mode without gradients.

    These are half of the operations of `torch.utils.flop_counter.FlopCounterMode`, which knows convolutions and matrix products,
    together with attention, recurrent layers and products with vectors on every device. Products with what a mask
    or padding makes zero count; biases, normalisations, activations and Fourier transforms do not.

    Args:
        model: any module.
        example_input: what it takes.
        modules: those to count by themselves, by name.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, since it brings Triton, which takes long to import

    args, kwargs = arguments_of(example_input)
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    # Torch's own tracker hooks gradients, which fails for views of parameters and for gradients within a forward.
    counter.mod_tracker = _Everywhere()
    unknown = _Unknown(model, counter.flop_registry)
    own: dict[str, int] = {}
    eager = torch.compiler.set_stance("force_eager")  # a compiled graph has no operators to be seen
    with evaluating(model), eager, plain_attention():
        if any(isinstance(module, FactorizedLayer) for module in model.modules()):
            model(*args, **kwargs)  # makes the merged weights that evaluation keeps
        with _counting(modules or {}, counter.get_total_flops, own), unknown, counter:
            model(*args, **kwargs)
    by_module = {name: flops // 2 for name, flops in own.items()}
    return Counted(counter.get_total_flops() // 2, by_module, tuple(sorted(unknown.names)))


def num_params(model: nn.Module, *, dense: bool = False) -> int:
    """Counts a model's parameters, shared ones once: as it is, or with dense layers in place of factorized ones.

    Of a view it counts what the model has.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, FactorizedLayer)] if dense else []
    made = {parameter for layer in layers for parameter in layer.factors.parameters()}
    rest = sum(parameter.numel() for parameter in model.parameters() if parameter not in made)
    return rest + sum(layer.spec.geometry.params for layer in layers) + _folded(model, dense=dense)


def _folded(model: nn.Module, *, dense: bool) -> int:
    """Counts the parameters that only the modules have that were opened: those that are still there, or all."""
    opened = (module for module in model.modules() if isinstance(module, Opened))
    return sum(module.folded for module in opened if dense or module.in_view)


def whole_cost(model: nn.Module, example_input: Example | None, *, by_macs: bool) -> tuple[int, int]:
    """Returns what a model costs as it is and in its dense form: parameters, or multiply-accumulates of the example."""
    if not by_macs:
        return num_params(model), num_params(model, dense=True)
    assert example_input is not None
    present = count_macs(model, example_input).total
    if not any(isinstance(module, FactorizedLayer) for module in model.modules()):
        return present, present
    return present, count_macs(dense_form(model), example_input).total


class _Everywhere(ModuleTracker):
    """Tells torch's counter of no module that is called: all is counted together."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def _counting(modules: Mapping[str, nn.Module], total: Callable[[], int], own: dict[str, int]) -> Iterator[None]:
    """Adds to `own` what `total` rises by within each module's calls, apart from the calls of others within these."""
    calls: list[list[int]] = []  # the total at the start of each call that is under way, and what others took within it

    def enter(*_: object) -> None:
        calls.append([total(), 0])

    def leave(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            start, others = calls.pop()
            taken = total() - start
            own[name] = own.get(name, 0) + taken - others
            if calls:
                calls[-1][1] += taken

        return hook

    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave(name), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Unknown(TorchDispatchMode):
    """Notes the operators that multiply by weights and that no formula is known for."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, known: Mapping[Any, Any]) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._known = known
        self._weights = {_place(value) for value in (*model.parameters(), *model.buffers()) if value.dim() > 1} - {0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "overloadpacket", func)
        if packet not in self._known and self._multiplies(str(packet), [*args, *(kwargs or {}).values()]):
            self.names.add(str(packet))
        return func(*args, **(kwargs or {}))

    def _multiplies(self, name: str, values: list[Any]) -> bool:
        """Tells by the words of the name of one of torch's operators; one of others does if it gets a weight."""
        space, _, plain = name.partition(".")
        if space in ("aten", "prims"):
            return not _MULTIPLIES.isdisjoint(re.split("_", plain))
        packed = any(isinstance(value, torch.ScriptObject) for value in values)
        return packed or any(_place(value) in self._weights for value in tensors_in(values))


def _place(value: Tensor) -> int:
    """Returns where a tensor's memory begins; 0 for one that has none of its own."""
    try:
        return value.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


# ---- formulas of shapes for operators that torch has none for; in operations, of which a multiply-accumulate has two


def _product(x: Shape, y: Shape, *_: Any, **__: Any) -> int:
    """x (m, k), or (b, m, k), times y (k), (k, n) or (b, k, n)."""
    return 2 * math.prod(x) * (y[-1] if len(y) > 1 else 1)


def _added_product(_: Shape, x: Shape, y: Shape, *__: Any, **___: Any) -> int:
    return _product(x, y)


def _trilinear(*shapes: Any, out_shape: Shape, **_: Any) -> int:
    """Of `nn.Bilinear`: (n, i) times (o, i, j) over i, then times (n, j) over j."""
    out_features, first, second = shapes[1]
    rows = math.prod(out_shape) // max(out_features, 1)
    return 2 * rows * out_features * second * (first + 1)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """(..., heads, q, d) times (..., d, k), then times (..., k, d'); key and value may have fewer heads."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(x: Shape, *weights: Any, **_: Any) -> int:
    """Each position times every matrix of the layers: (..., features), then weights alone or in a list, as torch's operators differ."""
    given = weights[0] if isinstance(weights[0], list) else weights[:2]
    return 2 * math.prod(x[:-1]) * sum(math.prod(weight) for weight in given if len(weight) == 2)


def _nothing(*_: Any, **__: Any) -> int:
    """The operator adds up what others have multiplied."""
    return 0


_BY_NAME: dict[str, Callable[..., int]] = {
    "mv": _product,
    "dot": _product,
    "vdot": _product,
    "_int_mm": _product,
    "addmv": _added_product,
    "addbmm": _added_product,
    "_trilinear": _trilinear,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_attention_math_for_mps": _attention,
    "mkldnn_rnn_layer": _recurrent,
    "_cudnn_rnn": _recurrent,
    "miopen_rnn": _recurrent,
    "_thnn_fused_lstm_cell": _nothing,
    "_thnn_fused_gru_cell": _nothing,
}
_FORMULAS = {getattr(_ATEN, name): formula for name, formula in _BY_NAME.items() if hasattr(_ATEN, name)}
