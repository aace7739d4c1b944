"""Times of the forms that a net is deployed in, next to the dense net in the same form: half of the multiply-accumulates kept."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rows import Row, Setting
from benchmarks.speed.ours import ours
from benchmarks.timing import medians
from lightning_modules.nets import build_net
from tnlayers import MacsKept, Rule, Tucker

__all__ = ["rows"]

Form = Callable[[Callable[[], nn.Module], Tensor, Setting], Callable[[], object]]
BATCHES = (1, 32)
RULES = [Rule("conv1", None), Rule("*", Tucker(MacsKept(0.5, multiple=8)))]
_SHAPE = (3, 64, 64)
_ROUNDS, _SECONDS = 50, 4.0


def rows(setting: Setting) -> Iterator[Row]:
    """Yields the forms; those that a compiler makes take longest and come last."""
    for form, (_, seconds) in FORMS.items():
        for batch in (2,) if setting.tiny else BATCHES:
            yield Row(f"{form}, batch {batch}", seconds, partial(row, form, batch, setting))


def row(form: str, batch: int, setting: Setting) -> dict[str, Any]:
    x = torch.randn(batch, *_SHAPE, device=setting.device, dtype=setting.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    torch.compiler.reset()
    makes = {"dense": partial(dense, setting), "ours": lambda: ours(dense(setting), RULES, x)}
    with torch.no_grad():
        calls = {what: FORMS[form][0](make, x, setting) for what, make in makes.items()}
        taken = medians(calls, 1 if setting.tiny else _ROUNDS, setting.device, _SECONDS)
    return {"form": form, "batch": batch, "measured": [{"what": what, "inference": taken[what]} for what in calls]}


def dense(setting: Setting) -> nn.Module:
    """Makes torchvision's ResNet-18 for ten classes, in evaluation."""
    torch.manual_seed(0)
    name = "cnn4" if setting.tiny else "torchvision/resnet18"
    return (
        build_net(name, num_classes=10, input_shape=_SHAPE)
        .eval()
        .to(setting.device, setting.dtype, memory_format=torch.channels_last)
    )


def eager(make: Callable[[], nn.Module], x: Tensor, setting: Setting) -> Callable[[], object]:
    return partial(make(), x)


def in_inference_mode(make: Callable[[], nn.Module], x: Tensor, setting: Setting) -> Callable[[], object]:
    return torch.inference_mode()(partial(make(), x))


def built_in_inference_mode(make: Callable[[], nn.Module], x: Tensor, setting: Setting) -> Callable[[], object]:
    with torch.inference_mode():
        return in_inference_mode(make, x, setting)


def traced(make: Callable[[], nn.Module], x: Tensor, setting: Setting) -> Callable[[], object]:
    return partial(torch.jit.trace(make(), x), x)


def exported(make: Callable[[], nn.Module], x: Tensor, setting: Setting) -> Callable[[], object]:
    return partial(torch.export.export(make(), (x,)).module(), x)


def compiled(make: Callable[[], nn.Module], x: Tensor, setting: Setting) -> Callable[[], object]:
    return partial(torch.compile(make(), backend="eager" if setting.tiny else "inductor"), x)


FORMS: dict[str, tuple[Form, float]] = {
    "eager": (eager, 5.0),
    "inference_mode": (in_inference_mode, 5.0),
    "built in inference_mode": (built_in_inference_mode, 5.0),
    "traced": (traced, 7.0),
    "exported": (exported, 12.0),
    "compiled": (compiled, 25.0),
}
"""How a net is called, and a guess at the seconds that its row takes."""
