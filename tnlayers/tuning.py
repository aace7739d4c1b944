"""The fastest way to compute each layer, measured where it will run."""

import math
import time
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.errors import UserError
from tnlayers.factorized import FactorizedLayer
from tnlayers.kept import kept_bytes
from tnlayers.layers import FactorizedEmbedding
from tnlayers.plan import Plan
from tnlayers.schedule import ByMode, Schedule
from tnlayers.tracing import Example, arguments_of, evaluating, factorized_layers, layer_inputs, tensors_in

__all__ = ["Progress", "Timing", "Tuned", "autotune", "check_values", "timed_calls"]

_CANDIDATES = 6  # how many of the cost model's favourites are measured
_HOPELESS = 1.25  # of the fastest
_ALL_ROUNDS = 2  # before anything drops out: a machine that does something else meanwhile spoils single times
_ROUNDS = 6
_SHORTEST = 1e-3  # seconds: what is shorter is repeated within a measurement
_LONG = 5e-2  # seconds of a call for which it matters little what lies in the caches
_LONGEST = 1.0  # seconds, after which no further round begins

Progress = Callable[[str, float, float], None]
"""Takes what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Timing:
    """One mode of one layer.

    Attributes:
        schedule: the fastest.
        seconds: of a call, in training with its gradients.
        dense_seconds: the same of the dense layer.
    """

    schedule: Schedule
    seconds: float
    dense_seconds: float

    @property
    def is_dense(self) -> bool:
        """Whether the layer computes like the dense one, since none of the other ways that were measured is faster."""
        return len(self.schedule.groups) == 1

    @property
    def speedup(self) -> float:
        return self.dense_seconds / self.seconds


@dataclass(frozen=True)
class Tuned:
    """What was found for a layer.

    Attributes:
        inference: of a call in evaluation.
        training: of a call in training.
        num_calls: how often the model calls the layer with such an input; it is the largest one.
    """

    inference: Timing
    training: Timing
    num_calls: int = 1


@dataclass(frozen=True)
class _Form:
    """What a layer is given, without the values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(x: Tensor) -> "_Form":
        return _Form(tuple(x.shape), x.stride(), x.dtype, x.device)

    def drawn(self) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(0)
        stride = self.stride if 0 not in self.stride else torch.empty(self.shape, device="meta").stride()  # expanded
        x = torch.empty_strided(self.shape, stride, dtype=self.dtype, device=self.device)
        return x.normal_(generator=generator)


def autotune(
    model: nn.Module,
    example_input: Example,
    *,
    lean: bool = False,
    layers: Collection[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Tuned]:
    """Measures how each factorized layer is computed the fastest, and has it computed so from then on.

    In evaluation and in training the candidates are the plans that the cost model holds to be the fastest, with their operations, and
    the plan "dense": a layer that none of them makes faster than the dense one computes like it in evaluation; in training
    merging its weight comes on top, and what is found says by how much. No value changes by more than rounding.

    What is found holds for the device, the dtype, the layout, the batch and the autocast under which this is called; it is kept
    in each layer's `plan_choice`, and so in checkpoints, with the machine that it was measured on.

    Args:
        model: a model with factorized layers; their plans are set in place.
        example_input: what the model takes, with the batch and the memory format that it will be used with.
        lean: whether a layer in training shall keep no more bytes for its backward pass than the dense layer does, of
            activations, merged weights, parameters and their gradients. Where a plan would keep more, the activations between
            its steps are made again in the backward pass, which takes most of another forward call; that is measured with it.
            If no plan keeps so little, that which keeps the least is taken.
        layers: the names of those to measure; by default all, whatever their plans are.
        progress: is told of each layer; nothing is printed.

    Returns:
        Name -> what was found. Layers that the example does not reach are absent, and so are embeddings, which have one plan.

    Raises:
        UserError: there are no values to compute with, no factorized layer that the example reaches, or none of a name.
    """
    check_values(model, example_input)
    forms = layer_inputs(model, example_input, _Form.of)
    chosen = _asked_for(model, layers, forms)
    known: dict[Any, Tuned] = {}
    found = {}
    for done, (name, layer) in enumerate(chosen.items()):
        if progress is not None:
            progress(f"timing {name}", done, len(chosen))
        form = max(forms[name], key=lambda form: math.prod(form.shape))
        trains = tuple(factor.requires_grad for factor in layer.parameters())
        key = layer.spec, form, layer.bias is not None, trains, layer._like["dtype"], layer._memory_format
        if key not in known:
            known[key] = _measured(layer, form, lean=lean)
        found[name] = replace(known[key], num_calls=forms[name].count(form))
        layer.set_plan(ByMode(known[key].inference.schedule, known[key].training.schedule, _machine(form)))
    if progress is not None:
        progress("timing layers", len(chosen), len(chosen))
    return found


def _asked_for(model: nn.Module, layers: Collection[str] | None, reached: Container[str]) -> dict[str, FactorizedLayer]:
    """Returns the layers that are to be measured, by name.

    Raises:
        UserError: the model has none, the example reaches none, or there is none of a name.
    """
    factorized = factorized_layers(model)
    if not factorized:
        raise UserError("there is no factorized layer to time; tensorize the model first")
    if not any(name in reached for name in factorized):
        raise UserError(f"the example input reaches none of the factorized layers, such as {next(iter(factorized))!r}")
    if isinstance(layers, str) or not all(name in factorized for name in layers or ()):
        raise UserError(f"layers {layers!r}: expected names of factorized layers, such as [{next(iter(factorized))!r}]")
    return {
        name: layer
        for name, layer in factorized.items()
        if name in reached and not isinstance(layer, FactorizedEmbedding) and (layers is None or name in layers)
    }


def check_values(model: nn.Module, example_input: Example | None) -> None:
    """Checks that there is something to measure with.

    Raises:
        UserError: no tensor in the example, or values that are on the meta device.
    """
    given = list(tensors_in(arguments_of(example_input))) if example_input is not None else []
    if not given:
        raise UserError(
            f"example_input {example_input!r}: layers are timed on what reaches them; expected what the model takes, such as "
            "torch.zeros(32, 3, 224, 224)"
        )
    if any(value.is_meta for value in (*given, *model.parameters())):
        raise UserError(
            "the meta device has no values to compute with, so nothing can be timed there; move the model and the example first"
        )


def _machine(form: _Form) -> str:
    if form.device.type == "cuda":
        name = torch.cuda.get_device_name(form.device)
    else:
        name = f"{form.device.type} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    size, dtype = "x".join(map(str, form.shape)), str(form.dtype).removeprefix("torch.")
    return f"{name}, torch {torch.__version__}, {size} {dtype}"


def _measured(layer: FactorizedLayer, form: _Form, *, lean: bool) -> Tuned:
    """Times the candidates and the dense layer, on inputs like those that the layer gets."""
    with torch.inference_mode(False):
        x, dense = form.drawn(), layer.to_dense()
        inference, training = (_fastest(layer, dense, x, training=mode, lean=lean) for mode in (False, True))
    return Tuned(inference, training)


def _fastest(layer: FactorizedLayer, dense: nn.Module, x: Tensor, *, training: bool, lean: bool) -> Timing:
    trained = [parameter for parameter in dense.parameters() if parameter.requires_grad]
    with evaluating(dense):
        limit = kept_bytes(dense, trained, x) if lean and training else None
        candidates = _candidates(layer, x, limit, training=training)
        like_ours = _stepped if training else _evaluated
        calls: dict[Any, Callable[[], Any]] = {None: like_ours(dense, trained, x)}
        seconds = _seconds(calls | timed_calls(layer, candidates, x, training=training), x.device)
    best = min(candidates, key=lambda schedule: seconds[schedule])
    return Timing(best, seconds[best], seconds[None])


def _candidates(layer: FactorizedLayer, x: Tensor, limit: int | None, *, training: bool) -> list[Schedule]:
    """Returns the cost model's favourites, and its favourite that computes like the dense layer; with a limit, those that keep it."""
    ranked = layer.spec.ranked_schedules([layer.spec.geometry.call(x)], x.device.type, training=training)
    if x.dim() == 4 and not x.is_contiguous():  # in channels last a bmm step is a linear one, where there can be one
        ranked = [one for one in ranked if "bmm" not in one.operations] or ranked
    dense = next(schedule for schedule in ranked if len(schedule.groups) == 1)
    if limit is not None:
        return _lean(layer, list(dict.fromkeys([dense, *ranked])), x, limit)
    return list(dict.fromkeys([*ranked[:_CANDIDATES], dense]))


def _lean(layer: FactorizedLayer, ranked: Sequence[Schedule], x: Tensor, limit: int) -> list[Schedule]:
    """Returns the first that keep no more bytes than the limit, recomputed where they would; if none does, that which keeps the least."""
    kept: dict[Schedule, int] = {}
    found: list[Schedule] = []
    for schedule in ranked:
        for one in (schedule, replace(schedule, recompute=True)):
            kept[one] = kept_bytes(*_computing(layer, one, x, training=True), x)
            if kept[one] <= limit:
                found.append(one)
                break
        if len(found) > _CANDIDATES:
            break
    return found or [min(kept, key=lambda one: kept[one])]


def timed_calls(
    layer: FactorizedLayer, every: Sequence[Schedule], x: Tensor, *, training: bool
) -> dict[Schedule, Callable[[], Any]]:
    """Returns a call of a layer for each schedule, without the layer's own checks: what is timed.

    Args:
        layer: it is not changed.
        every: the schedules.
        x: what it is given.
        training: whether a call merges the weights and takes the gradients too.
    """
    form = _stepped if training else _evaluated
    return {schedule: form(*_computing(layer, schedule, x, training=training), x) for schedule in every}


def _computing(
    layer: FactorizedLayer, schedule: Schedule, x: Tensor, *, training: bool
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Returns the layer as a function, with what its gradients are taken for; in inference its weights are merged before."""
    plan = layer.spec.compile(schedule, x.device.type)
    assert isinstance(plan, Plan)
    weights = [] if training else [weight.detach() for weight in layer.merged_weights(plan)]

    def compute(x: Tensor) -> Tensor:
        return plan(x, weights or layer.merged_weights(plan), layer.bias)

    return compute, [parameter for parameter in layer.parameters() if parameter.requires_grad]


def _evaluated(compute: Callable[..., Tensor], _: Sequence[Tensor], x: Tensor) -> Callable[[], Any]:
    def call() -> Tensor:
        with torch.no_grad():
            return compute(x)

    return call


def _stepped(compute: Callable[..., Tensor], parameters: Sequence[Tensor], x: Tensor) -> Callable[[], Any]:
    x = x.detach().requires_grad_()

    def call() -> Any:
        torch.clear_autocast_cache()  # each step of a training casts its weights anew
        with torch.enable_grad():
            y = compute(x)
            return torch.autograd.grad(y, [x, *parameters], torch.ones_like(y))

    return call


def _seconds(calls: Mapping[Schedule | None, Callable[[], Any]], device: torch.device) -> dict[Schedule | None, float]:
    """Returns the least time of each call; they take turns, and what is far behind after some rounds drops out.

    A turn of short calls begins with one that is not timed: in a net the input lies in the caches, which the turn before has filled.
    """
    least = dict.fromkeys(calls, math.inf)
    repeats = {}
    for name, call in calls.items():
        call()  # chooses algorithms, makes threads
        repeats[name] = max(1, math.ceil(_SHORTEST / max(_once(call, 1, device), 1e-6)))
    start = time.perf_counter()
    for number in range(_ROUNDS):
        limit = _HOPELESS * min(least.values())
        for name, call in calls.items():
            if number < _ALL_ROUNDS or name is None or least[name] <= limit:
                if least[name] < _LONG:
                    call()
                least[name] = min(least[name], _once(call, repeats[name], device))
        if number >= _ALL_ROUNDS and time.perf_counter() - start > _LONGEST:
            break
    return least


def _once(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    """Waits for what the device still has to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
