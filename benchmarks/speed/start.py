"""The time that is left of the quickstart's net, and what an import and a call cost."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.machine import ROOT
from benchmarks.rows import Row, Setting
from benchmarks.speed.contenders import Contender, in_layouts, measure
from benchmarks.speed.nets import proportional
from benchmarks.speed.ours import ours
from benchmarks.timing import LEAST_ROUNDS, medians
from lightning_modules.data import Digits
from lightning_modules.nets import build_net
from lightning_modules.quickstart import RULES
from tnlayers import Rule, Tucker, rules_from_plain, tensorize

__all__ = ["rows"]

_BATCH = 64  # of the quickstart


def rows(setting: Setting) -> Iterator[Row]:
    yield Row("quickstart", 3.0, partial(quickstart, setting))
    yield Row("import", 12.0, partial(imports, setting))
    yield Row("call", 3.0, partial(call, setting))


def quickstart(setting: Setting) -> dict[str, Any]:
    """Measures the net of `tnlayers quickstart`, before and after its rules."""
    torch.manual_seed(0)
    batch = torch.randn(_BATCH, *Digits.input_shape, device=setting.device, dtype=setting.dtype)
    nets = [build_net("cnn4", num_classes=10, input_shape=Digits.input_shape) for _ in range(2)]
    dense, small = (net.to(setting.device, setting.dtype, memory_format=torch.channels_last) for net in nets)
    small = ours(small, rules_from_plain(RULES), batch.contiguous(memory_format=torch.channels_last))
    contenders = in_layouts("dense", "", dense, batch) + in_layouts("ours", "", small, batch)
    floor = proportional(dense, small, batch) if setting.device.type == "cpu" else None
    return {"batch": _BATCH, "proportional": floor, "measured": measure(contenders, setting)}


def imports(setting: Setting) -> dict[str, Any]:
    """Measures fresh processes that import torch alone, or tnlayers."""
    calls = {
        name: partial(
            subprocess.run, [sys.executable, "-c", f"import {'sys' if setting.tiny else name}"], cwd=ROOT, check=True
        )
        for name in ("torch", "tnlayers")
    }
    return {"seconds_to_import": medians(calls, 1 if setting.tiny else LEAST_ROUNDS)}


def call(setting: Setting) -> dict[str, Any]:
    """Measures a layer so small that its operations hardly count: what a call costs by itself, under the two simplest plans."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1).to(setting.device, setting.dtype, memory_format=torch.channels_last)
    x = torch.randn(1, 8, 8, 8, device=setting.device, dtype=setting.dtype).contiguous(
        memory_format=torch.channels_last
    )
    contenders = [Contender("dense", "", "channels last", conv, x)]
    for plan in ("dense", "factors"):
        layer = tensorize(copy.deepcopy(conv), [Rule("*", Tucker(4), plan=plan)])
        contenders.append(Contender("ours", plan, "channels last", layer, x))
    return {"measured": measure(contenders, setting)}
