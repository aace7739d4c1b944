"""The constants of the cost model, fitted to measured times of single layers on this machine.

python -m benchmarks.constants          # measures into benchmarks/constants_<device>.json where that is not there, then fits

For inference and for training apart it prints the constants and how often the schedule that the model chooses, by those in use and by
the fitted ones, is within 5 % of the fastest one that was measured. Rounded, they go into `Machine.of` of tnlayers/cost.py. All
threads of torch take part, so the machine should do nothing else meanwhile.
"""

import argparse
import itertools
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import nn

from lightning_modules.report import environment
from tnlayers import CP, MPS, SVD, TT, Factorization, FactorizedLayer, LowRank, ParamsKept, Rule, Tucker, tensorize
from tnlayers.cost import Machine, Rate, estimate, schedules
from tnlayers.schedule import Schedule
from tnlayers.tuning import timed_calls

ROUNDS = 8
CONVS = [(64, 64, 56, 3), (128, 128, 28, 3), (256, 256, 14, 3), (512, 512, 7, 3), (16, 16, 32, 3), (32, 32, 16, 3)]
CONVS += [(64, 64, 8, 3), (96, 256, 27, 5), (256, 64, 56, 1), (1024, 256, 14, 1), (128, 256, 28, 3)]
LINEARS = [(1024, 1024), (3072, 768), (784, 256)]


def layers() -> Iterator[tuple[str, nn.Module, Factorization, torch.Tensor]]:
    for (inputs, outputs, side, kernel), batch in itertools.product(CONVS, (1, 8)):
        x = torch.randn(batch, inputs, side, side).to(memory_format=torch.channels_last)
        for rank in (4, 2):
            methods: list[Factorization] = [Tucker(min(inputs, outputs) // rank)]
            methods += [method(ParamsKept(1 / rank)) for method in (CP, MPS, SVD, LowRank)]
            for method in methods:
                name = f"{inputs} {outputs} {side} {kernel} batch {batch} {method}"
                dense = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
                yield name, dense.to(memory_format=torch.channels_last), method, x
    for (inputs, outputs), batch in itertools.product(LINEARS, (1, 64, 1024)):
        for method in (LowRank(min(inputs, outputs) // 8), LowRank(min(inputs, outputs) // 4), TT(4), TT(16)):
            name = f"{inputs} {outputs} batch {batch} {method}"
            yield name, nn.Linear(inputs, outputs), method, torch.randn(batch, inputs)


def measured(layer: FactorizedLayer, x: torch.Tensor, *, training: bool) -> dict[Schedule, float]:
    """Returns the least seconds of each schedule; what is far behind after two rounds drops out."""
    spec = layer.spec
    every = list(schedules(spec.network, spec.sizes, spec.geometry.axes, spec.plans))
    if x.dim() == 4:
        every = [one for one in every if "bmm" not in one.operations] or every
    calls = timed_calls(layer, every, x, training=training)
    least = dict.fromkeys(calls, math.inf)
    for number in range(ROUNDS):
        near = min(least.values()) * (2 if number > 2 else math.inf)
        for one, call in calls.items():
            if least[one] <= near or number < 3:
                start = time.perf_counter()
                call()
                least[one] = min(least[one], time.perf_counter() - start)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only-fit", action="store_true")
    options = parser.parse_args()
    path = Path(__file__).with_name("constants_cpu.json")
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    cases: dict[str, tuple[FactorizedLayer, torch.Tensor]] = {}
    for name, dense, method, x in layers():
        if options.only_fit and name not in known["rows"]:
            continue
        try:
            (layer,) = tensorize(nn.Sequential(dense), [Rule("0", method)], init="random")
        except ValueError:
            continue
        if not isinstance(layer, FactorizedLayer):
            continue
        cases[name] = layer, x
        if name in known["rows"]:
            continue
        known["rows"][name] = {
            mode: [[one.groups, one.operations, seconds] for one, seconds in found.items()]
            for mode in ("inference", "training")
            for found in [measured(layer, x, training=mode == "training")]
        }
        known["environment"] = environment()
        path.write_text(json.dumps(known) + "\n")
        print(name, flush=True)
    for mode in ("inference", "training"):
        fit(cases, known["rows"], mode)


START = {
    **{"convolution peak": 4.5e10, "convolution half": 8, "convolution launch": 5e-5},
    **{"linear peak": 5e10, "linear half": 8, "linear launch": 5e-5, "bmm launch": 5e-5},
    **{"depthwise peak": 2e10, "depthwise launch": 5e-5, "values": 1.7e9, "merge launch": 5e-5},
}


def machine_of(logs: np.ndarray) -> Machine:
    of = dict(zip(START, np.exp(logs).tolist(), strict=True))
    convolution = Rate(of["convolution peak"], of["convolution half"], of["convolution launch"])
    linear, bmm = (Rate(of["linear peak"], of["linear half"], of[f"{name} launch"]) for name in ("linear", "bmm"))
    rates: Any = {"convolution": convolution, "linear": linear, "bmm": bmm}
    return Machine(rates, Rate(of["depthwise peak"], 0, of["depthwise launch"]), of["values"], of["merge launch"])


def fit(cases: dict[str, tuple[FactorizedLayer, torch.Tensor]], rows: Any, mode: str) -> None:
    points = defaultdict(list)
    for name in cases:
        for groups, operations, seconds in rows[name][mode]:
            points[name].append((Schedule(groups, operations), seconds))

    def predicted(machine: Machine, name: str, one: Schedule) -> float:
        layer, x = cases[name]
        spec, call = layer.spec, layer.spec.geometry.call(x)
        size = spec.geometry.input_size(call)
        training = mode == "training"
        return estimate(spec.network, spec.sizes, one, spec.geometry.axes, machine, size, call.rows, training=training)

    def residuals(logs: np.ndarray) -> np.ndarray:
        machine, found = machine_of(logs), []
        for name, measured_ in points.items():
            best = min(seconds for _, seconds in measured_)
            for one, seconds in measured_:  # what is far from the best need not be told exactly
                weight = 1.0 if seconds < 1.5 * best else 0.2
                found.append(weight * np.log(predicted(machine, name, one) / seconds))
        return np.array(found)

    start = np.log(list(START.values()))
    fitted = least_squares(residuals, start, loss="soft_l1", max_nfev=25).x
    print(mode, {name: f"{value:.3g}" for name, value in zip(START, np.exp(fitted), strict=True)})
    tried = {
        "start": machine_of(start),
        "in use": Machine.of("cpu", training=mode == "training"),
        "fitted": machine_of(fitted),
    }
    for which, machine in tried.items():
        regrets = []
        for name, measured_ in points.items():
            chosen = min(measured_, key=lambda pair: predicted(machine, name, pair[0]))
            regrets.append(chosen[1] / min(seconds for _, seconds in measured_))
        near = [f"within {percent} %: {np.mean(np.array(regrets) <= 1 + percent / 100):.0%}" for percent in (5, 10)]
        print(f"  {which:8} {', '.join(near)}, mean {np.mean(regrets):.3f}")


if __name__ == "__main__":
    main()
