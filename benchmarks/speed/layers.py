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
from benchmarks.speed.ours import ours
from benchmarks.speed.tltorch_layers import tltorch_layers
from tnlayers import FactorizedLayer, Rule, UserError

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
    net = nn.Sequential(copy.deepcopy(dense)).to(setting.device, setting.dtype)
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
    contenders += under_plans(layer, example)
    for how, other in theirs.items() if isinstance(theirs, dict) else ():
        contenders += in_layouts("tltorch", how, other.to(setting.device, setting.dtype), x)
    about |= cost(layer, x) | ({"tltorch": theirs} if isinstance(theirs, str) else {})
    return about | {"measured": measure(contenders, setting)}


def under_plans(layer: FactorizedLayer, x: Tensor) -> list[Contender]:
    """Lets the layer contend under every plan, pictures in channels last."""
    found = []
    for groups in layer.spec.plans:
        planned = copy.deepcopy(layer)
        planned.set_plan(groups)
        layout = "default" if x.dim() == 2 else "channels last"
        found.append(Contender("plan", " | ".join(map(" ".join, groups)), layout, planned, x))
    return found


def cost(layer: FactorizedLayer, x: Tensor) -> dict[str, Any]:
    """Returns what the layer keeps; of the multiply-accumulates, under the plan that has the fewest."""
    spec = layer.spec
    calls = [spec.geometry.call(x)]
    return {
        "rank": list(layer.ranks),
        "plan": " | ".join(map(" ".join, layer.plan.groups)),
        "parameters_kept": spec.params / spec.geometry.params,
        "macs_kept": spec.macs(calls, spec.best_plan(calls, by_macs=True)) / spec.geometry.macs(calls),
    }
