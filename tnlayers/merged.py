"""The merged weights of a layer's plan, kept while it evaluates: there they do not change from call to call.

So is the dense weight of a layer whose `.weight` is read, as by `x.to(layer.weight.dtype)`.

A graph that is compiled, exported or traced cannot ask whether a factor has changed since. So what is kept is made before it:
by `eval()`, by a load and by a move to another device or dtype. Eager calls ask each time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from typing import Any, Literal, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from tnlayers.errors import UserError
from tnlayers.leaf import Leaf
from tnlayers.linalg import precise
from tnlayers.lookup import Lookup
from tnlayers.plan import Plan
from tnlayers.spec import LayerSpec

__all__ = ["Merged", "Merging"]

_Kept = Literal["_merged", "_whole"]


class Merged:
    """Weights, and what tells whether they are still those of their factors.

    Torch counts writes in place, but not those of fused optimizers, whose steps it announces. What is written through `.data` or by
    another process is seen at the next `eval()`.

    Attributes:
        weights: the merged weight of each step of the plan, or the dense weight alone.
        factors: the parameters that they were made of, by name.
        stepped: whether an optimizer of one of the factors has taken a step since.
        checked: whether they were made by a forward call. Those made by `eval()` are merged once more, since callers often
            write through `.data` right after it, such as to exchange weights for their moving averages.
    """

    def __init__(self, weights: list[Tensor], factors: Mapping[str, nn.Parameter], *, checked: bool) -> None:
        self.weights, self.factors, self.checked, self.stepped = weights, dict(factors), checked, False
        # They hold the factors' memory, so that it is not given to another tensor.
        self._aliases = [factor.detach() for factor in factors.values()]
        # What tells of writes and exchanges; asking for a shape would leave its mark in a trace.
        self._marks = [(own, own._version, own.data_ptr(), own.dtype, own.stride()) for own in factors.values()]
        # Code that reads a dense weight may write to it.
        self._versions = [(weight, weight._version) for weight in weights]
        _told_of_steps()[id(self)] = self

    def made_of(self, factors: Mapping[str, Tensor | None]) -> bool:
        """Tells whether these are the parameters, under the same names."""
        return len(factors) == len(self.factors) and all(factors.get(name) is own for name, own in self.factors.items())

    def unwritten(self) -> bool:
        """Tells whether no step was announced, no write counted, and no exchange of the parameters' memory seen."""
        if self.stepped:
            return False
        for own, version, pointer, dtype, stride in self._marks:
            if own._version != version or own.data_ptr() != pointer or own.dtype != dtype or own.stride() != stride:
                return False
        return all(weight._version == version for weight, version in self._versions)


@cache
def _told_of_steps() -> "WeakValueDictionary[int, Merged]":
    """Returns all that is kept at present, which torch tells of every optimizer's step from now on."""
    present: WeakValueDictionary[int, Merged] = WeakValueDictionary()

    @torch.compiler.disable
    def tell(optimizer: torch.optim.Optimizer, *_: object) -> None:
        # Other threads may add to it meanwhile, so it is not iterated over; it is empty while everything trains.
        kept = [merged for reference in present.valuerefs() if (merged := reference()) is not None]
        values = [value for group in optimizer.param_groups if kept for value in group["params"]]
        stepped, sharded = {id(value) for value in values}, any(hasattr(value, "full_tensor") for value in values)
        for merged in kept:  # layers see factors that are sharded as others, which are made of them for a call
            merged.stepped |= sharded or any(id(factor) in stepped for factor in merged.factors.values())

    register_optimizer_step_post_hook(tell)
    return present


class Merging(Leaf):
    """A layer of factors that are merged for a plan, in evaluation once.

    Attributes:
        factors: the parameters, by name.
        spec: what the layer is.
        plan: how it is computed where what is merged is kept.
        training_plan: how it is computed wherever gradients may flow, so that it merges at every call.
    """

    factors: nn.ParameterDict
    spec: LayerSpec
    plan: Plan | Lookup
    training_plan: Plan | Lookup
    _merged: Merged | None
    _whole: Merged | None = None
    _held: tuple[Any, list[Tensor]] | None = None
    _channels_last: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._merged = None
        self.register_load_state_dict_post_hook(_keep_again)

    @property
    def _like(self) -> dict[str, Any]:
        """The device and dtype of the factors."""
        factor = next(iter(self.factors.values()))
        return {"device": factor.device, "dtype": factor.dtype}

    @property
    def _memory_format(self) -> torch.memory_format:
        """That of the dense layer which this one stands for."""
        return torch.channels_last if self._channels_last else torch.contiguous_format

    def _lie_as(self, weight: Tensor) -> None:
        """Takes the memory format of a dense weight; where its windows have one position it is the default one."""
        last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
        self._channels_last = last and not weight.is_contiguous()

    def _precise_weight(self) -> Tensor:
        with torch.no_grad():
            return self.spec.reconstruct({name: precise(value) for name, value in self.factors.items()})

    @property
    def weight(self) -> Tensor:
        """The dense weight that the factors make, as the torch layer stores it, differentiable in them.

        It is made at each access, in evaluation without gradients at the first one. Code that gives it to a function, as in
        `F.linear(x, layer.weight)`, saves no operation.
        """
        (weight,) = self._fresh("_whole") or self._make("_whole", None)
        return weight

    def _dense_weight(self) -> Tensor:
        return self.spec.geometry.exchanged(self.spec.reconstruct(dict(self.factors.items())))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuses a weight, which tools that know only torch's own layers set.

        Raises:
            UserError: the name is "weight".
        """
        if name == "weight":
            raise UserError(
                f"{type(self).__name__} has no weight to set, it has factors; tnlayers.to_chains makes torch's own layers of "
                "them, for tools that know only those"
            )
        super().register_parameter(name, param)

    @contextmanager
    def merged_once(self) -> Iterator[None]:
        """Merges once for all calls in this block, for whoever calls the layer many times, such as at every time step."""
        self._held = self._planned()
        try:
            yield
        finally:
            self._held = None

    def _planned(self) -> tuple[Any, list[Tensor]]:
        """Returns the plan of the mode, and its merged weights."""
        if self._held is not None:
            return self._held
        kept = self._fresh("_merged")
        if kept is not None:
            return self.plan, kept
        plan = self.training_plan if self._takes_gradients() else self.plan
        return plan, self._make("_merged", plan)

    def merged_weights(self, plan: Any) -> list[Tensor]:
        """Returns the weights of the steps of any plan of this layer, merged anew and differentiable in the factors."""
        return self._make("_merged", plan)

    def _takes_gradients(self) -> bool:
        """Tells whether gradients may flow into the factors in this call."""
        if self.training or not torch.is_grad_enabled():
            return self.training
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return False  # the graph is for inference, whatever the mode is in which it is made
        return any(factor.requires_grad for factor in self.factors.values())

    def _fresh(self, name: _Kept) -> list[Tensor] | None:
        """Returns what is kept and made of the present factors; None where it has to be made anew."""
        kept: Merged | None = self._merged if name == "_merged" else self._whole
        by_dynamo = torch.compiler.is_dynamo_compiling()  # which cannot ask for torch's counts
        if self.training:
            if self._merged is not None or self._whole is not None:  # somebody has set the mode without `train()`
                self._merged = self._whole = None
            return None
        ready = not by_dynamo and kept is not None and kept.checked and not self._takes_gradients()
        if kept is not None and ready and kept.made_of(self.factors._parameters) and kept.unwritten():
            return kept.weights
        factors = self._present()
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
        if torch.compiler.is_exporting() or tracing:  # the graph is of the weights as they are now
            same = kept is not None and (not tracing or kept.made_of(factors))
            fresh = kept is not None and same and (not kept.stepped if by_dynamo else kept.unwritten())
            return kept.weights if kept is not None and fresh else None
        if self._takes_gradients():
            return None
        if by_dynamo:
            fresh = kept is not None and not kept.stepped and kept.made_of(factors)
            return kept.weights if kept is not None and fresh else None
        if any(type(factor) is not nn.Parameter or factor.is_inference() for factor in factors.values()):
            return None
        kept = self._kept(name, checked=True)
        setattr(self, name, kept)
        return kept.weights

    def _keep(self) -> None:
        """Makes what evaluation keeps, and drops what training does not."""
        read = self._whole is not None
        self._merged = self._whole = None
        factors, shapes = self.factors, self.spec.parameter_shapes
        whole = all(type(value) is nn.Parameter and value.shape == shapes.get(name) for name, value in factors.items())
        countable = whole and not any(factor.is_inference() for factor in factors.values())
        if not self.training and countable and self._like["device"].type != "meta":
            with suppress(NotImplementedError):  # a dtype that is there to be stored alone
                self._merged = self._kept("_merged", checked=False)
                self._whole = self._kept("_whole", checked=False) if read else None

    def _kept(self, name: _Kept, *, checked: bool) -> Merged:
        with torch.inference_mode(False), torch.no_grad():
            weights = [weight.detach() for weight in self._make(name, self.plan)]  # some are views of a factor
            return Merged(weights, self._present(), checked=checked)

    def _make(self, name: _Kept, plan: Any) -> list[Tensor]:
        """Makes it in the factors' own precision: autocast would round the products, and casts the result itself."""
        spec, parameters = self.spec, self._present()
        device = next(iter(parameters.values())).device.type
        casts = device != "meta" and torch.is_autocast_enabled(device)  # meta has no autocast
        with torch.autocast(device, enabled=False) if casts else nullcontext():
            if name == "_whole":
                return [self._dense_weight()]
            factors = spec.method.factors(parameters, spec.factor_shapes)
            return plan.weights(factors, channels_last=self._channels_last)

    def _present(self) -> dict[str, nn.Parameter]:
        """Returns the factors by name; the public way to them takes as long as a small layer does."""
        factors = self.factors
        own = {name: value for name, value in factors._parameters.items() if value is not None}
        return own if own.keys() == factors.keys() else dict(factors.items())

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self._keep()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Applies it to the factors, and takes the memory format that it gives a weight like the dense one.

        The merged weights of a layer of pictures then lie in that format. Factors have none: torch refuses it for five dimensions.
        """
        with torch.inference_mode(False):
            if len(self.spec.geometry.axes) == 2:
                like = torch.empty((2, 2, 2, 2), memory_format=self._memory_format, **self._like)
                self._channels_last = fn(like).is_contiguous(memory_format=torch.channels_last)
            super()._apply(lambda x: fn(x.reshape(-1)).view(x.shape) if x.dim() > 3 else fn(x), recurse)
        self._moved()
        self._keep()
        return self

    def _moved(self) -> None:
        """Is called when the factors may have come to another device."""

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what is derived; a shallow copy has modules and parameters of its own to exchange."""
        own = {name: dict(getattr(self, name)) for name in ("_modules", "_parameters")}
        return self.__dict__ | own | {"_merged": None, "_whole": None, "_held": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep()


def _keep_again(layer: nn.Module, _: Any) -> None:
    """Makes what is kept anew after a load, whose writes no compiled graph sees."""
    assert isinstance(layer, Merging)
    layer._keep()
