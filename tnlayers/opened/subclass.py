"""Subclasses of torch's layers, such as timm's, that are known to compute what a plain layer does, with another weight or padding."""

from typing import Any, Self

from torch import Tensor, nn

from tnlayers.errors import UserError
from tnlayers.geometry import DENSE, arguments
from tnlayers.opened.opened import Opened, State, twin
from tnlayers.opened.probing import Padding, base_of, pad, probe

__all__ = ["OpenedSubclass", "changing_classes", "is_subclass"]

_LIBRARIES = ("timm", "torchvision", "transformers")
"""Those whose subclasses are known to differ from a plain layer in ways that show whenever they are called."""

_HARMLESS = {"__init__", "__repr__", "__dict__", "__weakref__", "__annotate_func__", "extra_repr", "reset_parameters"}
"""What a class may define and still compute what its base does, in every way in which it is used."""


def is_subclass(module: nn.Module) -> bool:
    """Tells whether a module is of a subclass of torch's layers that is known to be plain.

    No calls of a module prove that it is: it may do something else to inputs that it was not called with. So the classes
    below torch's have to define nothing that computes, or be those of a library whose layers are known. The module moreover
    has nothing but real parameters of its own: what a buffer (a mask) or a module (a quantizer) makes of a weight would be
    lost when the weight changes.
    """
    weight = module._parameters.get("weight")
    ordinary = type(weight) is nn.Parameter and weight.is_floating_point()
    return (
        ordinary
        and type(module) not in DENSE
        and base_of(module) is not None
        and not (module._modules or module._buffers or {"forward", "_conv_forward"} & vars(module).keys())
        and all(kind.__module__.partition(".")[0] in _LIBRARIES for kind in changing_classes(module))
    )


def changing_classes(module: nn.Module) -> list[type]:
    """Returns the classes between a module and torch's layer that define more than how it is made and shown."""
    order = type(module).__mro__
    return [
        kind for kind in order[: order.index(base_of(module))] if any(map(_computes, vars(kind), vars(kind).values()))
    ]


def _computes(name: str, value: object) -> bool:
    return name not in _HARMLESS and (callable(value) or hasattr(value, "__get__"))


class OpenedSubclass(Opened):
    """Drop-in for a subclass of a convolution or a linear layer; its one layer is `conv` or `linear`.

    The layer holds the very Parameters of the subclass where these are what it multiplies by. Otherwise, as with weight
    standardization, it holds the weight that the subclass computes, in a Parameter of its own. The outputs are the same.
    Training is not: it moves that weight itself, free of what the subclass kept it to. Such a module is not closed again.
    """

    _kind: Any
    _padding: Padding
    _is_own: bool

    @classmethod
    def of(cls, dense: Any) -> Self | None:
        """Opens a module; None if it computes something else than padding and a layer."""
        found = _unchanged(dense) or probe(dense)
        if found is None:
            return None
        layer, padding = found
        opened = cls()
        # Others may read the subclass's kernel_size or in_features.
        vars(opened).update({key: value for key, value in vars(dense).items() if key not in vars(opened)})
        opened._kind, opened._padding = type(dense), padding
        opened._is_own = set(layer.parameters()) == set(dense.parameters())
        opened.folded = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in layer.parameters())
        opened.add_module("linear" if type(layer) is nn.Linear else "conv", layer)
        return opened.train(dense.training)

    @property
    def is_plain(self) -> bool:
        return self._is_own and type(self._layer) in DENSE

    def closed(self) -> nn.Module:
        if not self.is_plain:
            raise UserError(f"{self._kind.__name__} does not hold the weight that it would have to: leave it opened")
        dense = twin(self, self._kind)
        dense._parameters, dense._modules = dict(self._layer._parameters), {}
        for key in ("_kind", "_padding", "_is_own", "folded", "kind", "in_view"):
            vars(dense).pop(key, None)
        return dense

    def renamed(self, state: State) -> State:
        (name,) = self._modules
        own = ("weight", "bias") if self._is_own else ()
        return {f"{name}.{key}" if key in own else key: value for key, value in state.items()}

    @property
    def _layer(self) -> Any:
        return next(self.children())

    @property
    def weight(self) -> Tensor:
        """The weight that is multiplied by."""
        return self._layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self._layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self._layer(pad(self, x, self._padding))


def _unchanged(dense: Any) -> tuple[nn.Module, Padding] | None:
    """Returns torch's layer where a subclass leaves what it computes alone."""
    base = base_of(dense)
    if changing_classes(dense) or dense._parameters.keys() - {"weight", "bias"}:
        return None
    layer = base(**arguments(twin(dense, base)), device="meta")
    layer._parameters.update(dense._parameters)
    return layer, ()
