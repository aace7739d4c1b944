"""What all factorized layers share: the parameters, the bias, the geometry and the plan loop.

A layer knows its method only through the `Factorization` contract, so none of this changes when a method is added.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from tnlayers.budget import Fit, Slot, settle
from tnlayers.errors import UnsupportedLayer, UserError
from tnlayers.geometry import Call, Geometry, arguments
from tnlayers.linalg import precise, relative_error
from tnlayers.merged import Merging
from tnlayers.method import Factorization
from tnlayers.ranks import Rank, Ranks
from tnlayers.schedule import PlanChoice, at_other_ranks, check_plan, is_measured
from tnlayers.spec import LayerSpec

__all__ = ["FactorizedLayer", "Fill", "Init"]
Init = Literal["decompose", "random"]
Fill = Literal["decompose", "random", "empty"]


class FactorizedLayer(Merging):
    """What all layers share: factors in place of a weight, and a plan in place of one operation.

    Attributes:
        factors: the parameters that make the weight, by name: the network's factors, or what generates them.
        bias: as in the dense layer.
        spec: what the layer is: its geometry, the method and the ranks.
        plan: how it is computed in evaluation.
        training_plan: how it is computed wherever gradients may flow.
        plan_choice: what these were chosen by, as the constructor takes it.
        decomposition_error: the relative error at conversion, against the dense weight; None from scratch, after a
            truncation and after a load.
    """

    __signature__: ClassVar[inspect.Signature]
    method: ClassVar[type[Factorization]]
    dense_type: ClassVar[type[nn.Module]]

    bias: nn.Parameter | None
    decomposition_error: float | None
    _compiled_for: str

    def __init_subclass__(cls) -> None:
        """Shows the options of the method that a layer names in place of its `**options`: they are the method's own signature."""
        super().__init_subclass__()
        shown = list(inspect.signature(cls.__init__).parameters.values())[1:]
        if hasattr(cls, "method") and shown and shown[-1].kind is inspect.Parameter.VAR_KEYWORD:
            names, options = {parameter.name for parameter in shown}, inspect.signature(cls.method).parameters
            own = (option.replace(kind=option.KEYWORD_ONLY) for option in options.values() if option.name not in names)
            shown[-1:] = own
        cls.__signature__ = inspect.Signature(shown)

    @staticmethod
    def _settled(slot: Slot, dense: nn.Module, plan: PlanChoice) -> tuple[LayerSpec, PlanChoice, Fit | None]:
        """Returns what becomes of one layer by itself.

        Raises:
            UserError: no rank is cheaper than dense.
        """
        (choice,) = settle([slot], slot.method.rank, plan)
        if choice.spec is None:
            method = type(slot.method).__name__
            raise UserError(
                f"no such rank of {method} is cheaper than the dense {dense}; leave it dense ({choice.reason})"
            )
        return choice.spec, choice.plan, choice.fit

    def _draw(self, template: nn.Module, method: Factorization, plan: PlanChoice, device: Any, dtype: Any) -> None:
        """Sets everything up from a dense layer without storage, which has checked and normalised the arguments."""
        slot = Slot(Geometry.of(template), method, None, dtype or torch.get_default_dtype())
        spec, plan, _ = self._settled(slot, template, plan)
        self._start(template, spec, plan, device=device, dtype=dtype)
        self.reset_parameters()

    def _start(self, dense: nn.Module, spec: LayerSpec, plan: PlanChoice, **dd: Any) -> None:
        """Sets everything up in place of a dense layer, with empty parameters."""
        given = arguments(dense)
        biased = given.pop("bias", False)  # which is a parameter here
        for name, value in given.items():
            setattr(self, name, value)
        self.decomposition_error = None
        self.factors = nn.ParameterDict()
        self._become(spec, plan, **dd)
        bias = nn.Parameter(torch.empty(self.spec.geometry.out_channels, **dd)) if biased else None
        self.register_parameter("bias", bias)

    def _become(self, spec: LayerSpec, plan: PlanChoice, *, anew: bool = False, **dd: Any) -> None:
        """Becomes what a spec says: new, empty factors where a shape changes, or everywhere, and the plan for them."""
        self.spec = spec
        trains = all(factor.requires_grad for factor in self.factors.values())
        shapes = spec.parameter_shapes
        kept = {name: factor for name, factor in self.factors.items() if factor.shape == shapes.get(name) and not anew}
        with torch.inference_mode(False):  # torch counts no writes to what is made in inference mode
            made = {
                name: nn.Parameter(torch.empty(shape, **dd), requires_grad=trains)
                for name, shape in shapes.items()
                if name not in kept
            }
        if made or len(kept) < len(self.factors):  # anew: a shallow copy of the layer holds the same one
            self.factors = nn.ParameterDict([(name, (kept | made)[name]) for name in shapes]).train(self.training)
        self.set_plan(plan)

    @property
    def ranks(self) -> Ranks:
        return self.spec.ranks

    @property
    def rank(self) -> int | Ranks:
        """The bond dimensions, as the constructor takes them: an int where there is one bond."""
        return self.ranks if len(self.ranks) > 1 else self.ranks[0]

    def set_plan(self, plan: PlanChoice) -> None:
        """Chooses how the layer is computed; see `tnlayers.schedule`."""
        self.plan_choice = check_plan(plan)
        self._compile()
        self._keep()

    def _compile(self) -> None:
        self._compiled_for = self._like["device"].type
        self.plan = self.spec.compile(self.plan_choice, self._compiled_for)
        self.training_plan = self.spec.compile(self.plan_choice, self._compiled_for, training=True)

    def _moved(self) -> None:
        if self._like["device"].type not in (self._compiled_for, "meta"):  # other operations are the fastest there
            self._compile()

    def reset_parameters(self) -> None:
        """Gives the reconstructed weight the standard deviation that the dense layer's own initialisation has."""
        spec, std = self.spec, self.spec.geometry.init_std
        parameters = dict(self.factors.items())
        if self._like["device"].type != "meta":
            spec.method.draw(parameters, spec.network, spec.sizes, std)
            # A product of random draws has heavy tails, so one draw can be far from its expected scale: set it.
            drawn = self._root_mean_square()
            spec.method.scale(parameters, std / drawn if drawn > 0 else 1.0)
        self._reset_bias()

    def _root_mean_square(self) -> float:
        return math.sqrt(self._precise_weight().square().mean())

    def _reset_bias(self) -> None:
        """Draws the bias as the dense layer does."""
        if self.bias is not None:
            bound = 1 / math.sqrt(self.spec.geometry.fan_in) if self.spec.geometry.fan_in > 0 else 0.0
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_dense(cls, dense: nn.Module, **options: Any) -> Self:
        """Makes the layer whose weight is closest to a dense layer's.

        Args:
            dense: the torch layer; it is not changed.
            options: `rank`, and the other keyword-only arguments of the constructor.

        Raises:
            UnsupportedLayer: the dense layer is of another type.
            ValueError: a rank or an option that makes no sense for this layer.
        """
        plan = options.pop("plan", "auto")
        method = cls._method(**options)
        cls._check(dense)
        spec, plan, fit = cls._settled(Slot.of_dense(dense, method), dense, plan)
        return cls.from_spec(dense, spec, plan, fit=fit)

    @classmethod
    def _method(cls, **options: Any) -> Factorization:
        """Returns what a layer is built with: the method that its class names, with the options, or the one that is given."""
        method = cls.method(**options) if hasattr(cls, "method") else options.pop("method", None)
        if not isinstance(method, Factorization) or (options and not hasattr(cls, "method")):
            given = ", ".join(f"{name}={value!r}" for name, value in ({"method": method} | options).items())
            raise TypeError(f"{cls.__name__} takes a method, such as method=Tucker(8), not {given}")
        method.check_replaces(cls.dense_type)
        return method

    @classmethod
    def _check(cls, dense: nn.Module) -> None:
        if type(dense) is not cls.dense_type:
            raise UnsupportedLayer(f"{cls.__name__} replaces {cls.dense_type.__name__}, not {type(dense).__name__}")
        if (unlike := cls.unlike(dense)) is not None:
            raise UnsupportedLayer(f"{cls.__name__} has no {unlike}; leave the layer dense")
        if not dense.weight.is_floating_point():  # type: ignore[operator]
            raise UnsupportedLayer(
                f"{cls.__name__} takes real floating-point weights; this layer's dtype is {dense.weight.dtype}"
            )

    @staticmethod
    def unlike(dense: nn.Module) -> str | None:
        """Returns the argument of a torch layer of the kind that the factorized one does not have, if it is used."""
        return None

    @classmethod
    def from_spec(
        cls,
        dense: nn.Module,
        spec: LayerSpec,
        plan: PlanChoice = "auto",
        *,
        init: Fill = "decompose",
        factors: nn.ParameterDict | None = None,
        fit: Fit | None = None,
    ) -> Self:
        """Makes the factorized layer in a dense one's place: same geometry, device, dtype, mode and requires_grad.

        Args:
            dense: the torch layer; it is not changed.
            spec: what it becomes.
            plan: how it is computed.
            init: "decompose" for the closest weight, "random" to train from scratch, "empty" where a state dict follows.
            factors: the parameters that make this layer and others, instead of its own.
            fit: what the method makes of the weight, where that is known.

        Raises:
            UnsupportedLayer: the dense layer is of another type.
        """
        cls._check(dense)
        weight, own = dense.weight, getattr(cls, "method", type(spec.method))
        assert isinstance(weight, Tensor)
        if spec.geometry != Geometry.of(dense) or own is not type(spec.method):
            raise UserError(f"{spec} is not of this layer: {cls.__name__} in place of {dense}")
        if factors is None and (alone := spec.method.alone()) != spec.method:
            spec = LayerSpec(spec.geometry, alone)
        layer = cls._empty(dense, spec, plan, device=weight.device, dtype=weight.dtype)
        layer._lie_as(weight)
        if factors is not None:
            layer.factors = factors
        if init == "random":
            layer.reset_parameters() if factors is None else layer._reset_bias()
        elif init == "decompose":
            if factors is None:
                fit = fit or spec.decompose(precise(spec.geometry.exchanged(weight)), weight.dtype)
                layer.decomposition_error = layer._fill(fit)
            else:
                own = layer.spec.geometry.exchanged(layer._precise_weight())
                layer.decomposition_error = relative_error(weight, own)
            if layer.bias is not None:
                _copy(layer.bias, dense.bias)
        for factor in layer.factors.values():
            factor.requires_grad_(weight.requires_grad)
        if layer.bias is not None and isinstance(dense.bias, Tensor):
            layer.bias.requires_grad_(dense.bias.requires_grad)
        return layer.train(dense.training)

    @classmethod
    def _empty(cls, dense: nn.Module, spec: LayerSpec, plan: PlanChoice, **dd: Any) -> Self:
        """Returns the layer of a spec, whose parameters are to be filled; a constructor of a user's own settles and draws again."""
        constructor = next(base for base in cls.__mro__ if "__init__" in vars(base))
        if constructor.__module__ == f"{__package__}.layers":
            layer = cls.__new__(cls)
            Merging.__init__(layer)
            layer._start(dense, spec, plan, **dd)
            return layer
        method = {f.name: getattr(spec.method, f.name) for f in fields(spec.method)}
        make: Callable[..., Self] = cls
        options = method if hasattr(cls, "method") else {"method": spec.method}
        return make(**arguments(dense), **dd, plan=plan, **options)

    def _fill(self, fit: Fit) -> float:
        """Fills the factors; returns the relative error of what they now are, rounded to their dtype."""
        fitted, error = fit
        for name, factor in self.factors.items():
            _copy(factor, fitted[name])
        return error

    def to_dense(self) -> nn.Module:
        """Makes the torch layer that computes the same."""
        dense = nn.utils.skip_init(type(self).dense_type, **arguments(self), **self._like)
        _copy(dense.weight, self.spec.geometry.exchanged(self._precise_weight()))
        if self.bias is not None:
            _copy(dense.bias, self.bias)
            dense.bias.requires_grad_(self.bias.requires_grad)
        dense.weight.requires_grad_(any(factor.requires_grad for factor in self.factors.values()))
        return dense.train(self.training).to(memory_format=self._memory_format)

    def truncate(self, rank: Rank, plan: PlanChoice | None = None) -> float:
        """Lowers the rank of this layer in place, keeping the closest weight; for a model see `tnlayers.truncate`.

        The factors are new Parameters where their shape changes: make the optimizer anew afterwards.

        Args:
            rank: the new rank; an int lowers every bond that is above it.
            plan: how it is computed from then on; None keeps what was chosen, unless that was measured at the old rank.

        Returns:
            ||W - W~||_F / ||W||_F against the weight before.

        Raises:
            ValueError: a rank above the present one, or one that is not valid for the method.
        """
        rank = self.spec.method.with_rank(rank).rank  # refuses what the method cannot have
        if isinstance(rank, int) and rank > max(self.ranks):
            rank = (rank,) * len(self.ranks)  # which says that it is too high
        (choice,) = settle([self.slot()], rank, plan or at_other_ranks(self.plan_choice))
        if choice.spec in (None, self.spec):  # the layer may be as small as it can be
            self.set_plan(self.plan_choice if plan is None and is_measured(self.plan_choice) else choice.plan)
            return 0.0
        assert choice.spec is not None
        weight = self._precise_weight()
        self._become(choice.spec, choice.plan, **self._like)
        self.decomposition_error = None
        return self._fill(choice.fit or self.spec.decompose(weight, self._like["dtype"]))

    def slot(self, calls: Sequence[Call] | None = None, *, flat: bool = False) -> Slot:
        """Describes the layer, whose ranks may be lowered; see `Slot.of_dense`."""
        like, present = self._like, (self.spec, self.plan.groups)
        known = None if flat else self._precise_weight
        return Slot(self.spec.geometry, self.spec.method, known, like["dtype"], like["device"].type, calls, present)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes on the ranks that the state brings, so that a truncated layer loads into any definition.

        A state that is not this layer's is left to torch's own errors.
        """
        start = f"{prefix}factors."
        shapes = {
            key.removeprefix(start): tuple(value.shape) for key, value in state_dict.items() if key.startswith(start)
        }
        self.decomposition_error = None
        with suppress(UserError):
            found = self.spec.of_parameters(shapes)
            if found.ranks != self.ranks:
                self._become(found, at_other_ranks(self.plan_choice), anew=True, **self._like)
                warnings.warn(
                    f"{prefix.rstrip('.') or type(self).__name__}: rank {found.ranks} adopted from the loaded state; "
                    "an optimizer made before holds the old factors: make it anew",
                    stacklevel=2,
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        method = self.spec.method
        options = {f.name: getattr(method, f.name) for f in fields(method) if getattr(method, f.name) != f.default}
        named = {} if hasattr(self, "method") else {"method": type(method).__name__}
        shown = arguments(self) | named | options | {"rank": self.rank, "plan": self.plan.groups}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def _copy(target: Any, source: Any) -> None:
    with torch.no_grad():
        target.copy_(source)
