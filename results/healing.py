"""What healing without labels gives back, on a published ResNet-20: one command measures and writes the JSON and the page's table.

python -m results.healing --data data/cifar10-png --checkpoint resnet20-12fca82f.th

Every seed draws 1,024 other training pictures. A row that is in the JSON is not measured again.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules import build_net
from lightning_modules.compression import recalibrate_if_better
from lightning_modules.data import Folders
from lightning_modules.report import environment
from results.run import RESULTS
from tnlayers import (
    CP,
    SVD,
    AnyOf,
    Factorization,
    LowRank,
    MacsKept,
    Rule,
    Tucker,
    heal,
    load_checkpoint,
    resolve,
    tensorize,
)
from tnlayers.markdown import markdown_table

JSON = RESULTS / "healing_resnet20.json"
PAGE = RESULTS.parent / "docs" / "healing.md"
_BEGIN, _END = "<!-- table of results.healing -->\n", "<!-- end of table -->"

BUDGETS = (0.5, 0.3, 0.2)
METHODS: Mapping[str, tuple[type[Factorization], ...]] = {
    "CP": (CP,),
    "any of four": (CP, Tucker, LowRank, SVD),
    "LowRank": (LowRank,),
    "Tucker": (Tucker,),
}
SEEDS = {"CP": 3, "any of four": 3, "LowRank": 1, "Tucker": 1}
STAGES = ("right after", "BatchNorm statistics", "closed form", "healed")
_BATCHES, _SIZE = 8, 128


def measure(data: Folders, dense: nn.Module, name: str, budget: float, seed: int) -> dict[str, Any]:
    """Compresses and heals once; returns the accuracies and seconds of each stage."""
    chosen = AnyOf(METHODS[name], MacsKept(budget)) if len(METHODS[name]) > 1 else METHODS[name][0](MacsKept(budget))
    rules = [Rule("conv1", None), Rule("linear", None), Rule("*", chosen)]
    drawn = data.calibration_batches(_BATCHES * 3)[_BATCHES * seed : _BATCHES * (seed + 1)]
    batches = [pictures.to(memory_format=torch.channels_last) for pictures in drawn]
    found: dict[str, Any] = {"method": name, "budget": budget, "seed": seed, "accuracy": {}, "seconds": {}}
    net = copy.deepcopy(dense)
    start = time.perf_counter()
    plan = resolve(net, rules, batches[0])
    tensorize(net, plan)
    found["seconds"]["compress"] = time.perf_counter() - start
    found["layers"] = {rule.pattern: rule.to_plain() for rule in plan}
    found["accuracy"]["right after"] = accuracy(net, data)
    normed = copy.deepcopy(net)
    recalibrate_if_better(normed, dense, batches)
    found["accuracy"]["BatchNorm statistics"] = accuracy(normed, data)
    for stage, options in (("closed form", {"steps": 0}), ("healed", {})):
        healed = copy.deepcopy(net)
        start = time.perf_counter()
        slices = heal(healed, dense, batches, seed=seed, **options)
        found["seconds"][stage] = time.perf_counter() - start
        found["accuracy"][stage] = accuracy(healed, data)
        found[f"errors, {stage}"] = [[one.before, one.refitted, one.after] for one in slices]
    return found


def accuracy(net: nn.Module, data: Folders) -> float:
    """Returns the percentage of the test pictures that a net gets right."""
    right = total = 0
    net.eval()
    with torch.no_grad():
        for pictures, labels in data.test_batches():
            x: Tensor = pictures.to(memory_format=torch.channels_last)
            right += int((net(x).argmax(dim=1) == labels).sum())
            total += len(labels)
    return 100 * right / total


def table(found: Mapping[str, Any]) -> str:
    """Writes a row for each method and budget: means over the seeds, and the standard deviation where there are several."""
    rows = []
    for budget in BUDGETS:
        for name in METHODS:
            runs = [run for run in found["runs"] if (run["method"], run["budget"]) == (name, budget)]
            if runs:
                cells = [_mean([run["accuracy"][stage] for run in runs]) for stage in STAGES]
                seconds = [
                    statistics.mean(run["seconds"][part] for run in runs)
                    for part in ("compress", "closed form", "healed")
                ]
                rows.append([f"{budget:g}", name, *cells, *(f"{each:.0f} s" for each in seconds), str(len(runs))])
    headings = ["MACs", "method", *STAGES, "time to compress", "closed form", "healed", "seeds"]
    return (
        f"The dense network gets {found['dense']:.2f} % right. {found['environment']['machine']}, "
        f"torch {found['environment']['torch']}.\n\n" + markdown_table(headings, rows, numbers=range(2, len(headings)))
    )


def written(found: Mapping[str, Any]) -> str:
    """Writes the JSON with a line for each run."""
    head = json.dumps({key: value for key, value in found.items() if key != "runs"}, indent=1).removesuffix("\n}")
    return head + ',\n "runs": [\n' + ",\n".join(map(json.dumps, found["runs"])) + "\n]}\n"


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def with_table(text: str, found: Mapping[str, Any]) -> str:
    """Returns a page with the table between its markers written anew."""
    before, rest = text.split(_BEGIN)
    return f"{before}{_BEGIN}{table(found)}\n{_END}{rest.split(_END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="CIFAR-10 as class folders, train/ and test/")
    parser.add_argument("--checkpoint", required=True, help="resnet20-12fca82f.th")
    parser.add_argument("--out", type=Path, default=JSON)
    options = parser.parse_args()
    data = Folders(root=options.data, val_fraction=0, batch_size=_SIZE)
    dense = build_net("resnet20", num_classes=10, input_shape=(3, 32, 32)).eval()
    load_checkpoint(options.checkpoint, dense)
    dense = dense.to(memory_format=torch.channels_last)
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"runs": []}
    found |= {"dense": accuracy(dense, data), "environment": environment()}
    known = {(run["method"], run["budget"], run["seed"]) for run in found["runs"]}
    for seed in range(max(SEEDS.values())):
        for name in METHODS:
            for budget in BUDGETS:
                if seed < SEEDS[name] and (name, budget, seed) not in known:
                    found["runs"].append(run := measure(data, dense, name, budget, seed))
                    options.out.write_text(written(found))
                    print(
                        name,
                        budget,
                        seed,
                        {stage: round(value, 2) for stage, value in run["accuracy"].items()},
                        flush=True,
                    )
    print(table(found))
    if options.out == JSON:
        PAGE.write_text(with_table(PAGE.read_text(), found))


if __name__ == "__main__":
    main()
