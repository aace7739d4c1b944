"""Times of single layers: dense and ours in both layouts, ours under every plan, and tltorch's."""

import copy
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rows import Row, Setting
from benchmarks.speed.cases import Case, Conv, cases
from benchmarks.speed.contenders import Contender, in_layouts, measure
from benchmarks.speed.ours import macs_kept, ours
from benchmarks.speed.tltorch_layers import tltorch_layers
from tnlayers import FactorizedLayer, Rule, Schedule, UserError, autotune
from tnlayers.kept import kept_bytes

__all__ = ["rows"]


def rows(setting: Setting) -> Iterator[Row]:
    for case in cases(tiny=setting.tiny):
        yield Row(case.name, case.seconds, partial(row, case, setting))


def row(case: Case, setting: Setting) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(case.input_shape, device=setting.device, dtype=setting.dtype)
    dense = case.dense()
    conv = case.layer if isinstance(case.layer, Conv) else None
    about = {"method": case.method, "divisor": case.divisor, "batch": case.batch, "kind": "conv" if conv else "linear"}
    about |= {"kernel": conv.kernel, "channels": min(conv.inputs, conv.outputs)} if conv else {}
    example = x.contiguous(memory_format=torch.channels_last) if conv else x
    form = torch.channels_last if conv else torch.contiguous_format
    net = nn.Sequential(copy.deepcopy(dense)).to(setting.device, setting.dtype, memory_format=form)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ranks that are clamped, or that save no parameters
            (layer,) = ours(net, [Rule("0", case.factorization())], example)
    except UserError as error:
        return about | {"left": str(error)}
    if not isinstance(layer, FactorizedLayer):
        return about | {"left": "dense, since no rank is cheaper"}
    theirs = tltorch_layers(dense, layer)
    contenders = in_layouts("dense", "", dense.to(setting.device, setting.dtype), x)
    contenders += in_layouts("ours", "", layer, x)
    contenders += lean(layer, dense, example)
    contenders += under_plans(layer, example)
    for how, other in theirs.items() if isinstance(theirs, dict) else ():
        contenders += in_layouts("tltorch", how, other.to(setting.device, setting.dtype), x)
    about |= cost(layer, example) | ({"tltorch": theirs} if isinstance(theirs, str) else {})
    return about | {"measured": measure(contenders, setting)}


def lean(layer: FactorizedLayer, dense: nn.Module, x: Tensor) -> list[Contender]:
    """Lets the layer contend as `lean` tunes it, where it keeps more for its backward pass than the dense one does."""
    ours, theirs = (kept_bytes(one, [*one.parameters()], x) for one in (layer.train(), dense.train()))
    if ours <= theirs:
        return []
    net = nn.Sequential(copy.deepcopy(layer))
    autotune(net, x, lean=True)
    return [Contender("lean", "", "default" if x.dim() == 2 else "channels last", net, x)]


def under_plans(layer: FactorizedLayer, x: Tensor) -> list[Contender]:
    """Lets the layer contend under every plan and its operations, pictures in channels last."""
    found = []
    for schedule in schedules_on(layer, x, training=False):
        planned = copy.deepcopy(layer)
        planned.set_plan(schedule)
        layout = "default" if x.dim() == 2 else "channels last"
        found.append(Contender("plan", spelled(schedule), layout, planned, x))
    return found


def schedules_on(layer: FactorizedLayer, x: Tensor, *, training: bool) -> list[Schedule]:
    """Returns the plans, that which the cost model holds to be the fastest first; in channels last a bmm step is a linear one."""
    ranked = layer.spec.ranked_schedules([layer.spec.geometry.call(x)], x.device.type, training=training)
    return ranked if x.dim() == 2 else [one for one in ranked if "bmm" not in one.operations] or ranked


def spelled(schedule: Schedule) -> str:
    steps = zip(schedule.groups, schedule.operations, strict=True)
    return " | ".join(f"{' '.join(names)}: {operation}" for names, operation in steps)


def cost(layer: FactorizedLayer, x: Tensor) -> dict[str, Any]:
    """Returns what the layer keeps, of the multiply-accumulates under the plan that has the fewest, and what the cost model chooses."""
    spec = layer.spec
    modes = {"inference": False, "training": True}
    return {
        "rank": list(layer.ranks),
        "plans": {
            "inference": spelled(layer.plan.schedule),  # type: ignore[union-attr]
            "training": spelled(layer.training_plan.schedule),  # type: ignore[union-attr]
        },
        "model": {mode: spelled(schedules_on(layer, x, training=training)[0]) for mode, training in modes.items()},
        "parameters_kept": spec.params / spec.geometry.params,
        "macs_kept": macs_kept(layer, x.shape),
    }
