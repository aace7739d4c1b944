"""Runs experiments and leaves one JSON for each run: results/<experiment>/<variant>_seed<k>.json.

python -m results.run cnn4_from_scratch --data.root data/cifar10-jpeg

A run whose JSON is there is skipped, one that was stopped goes on, and several of these commands share the runs among them.
Other options are handed to `tnlayers fit` and `tnlayers test`.
"""

import argparse
import csv
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

from lightning_modules.classifier import load_net
from lightning_modules.locks import try_lock
from lightning_modules.report import environment
from results.experiments import EXPERIMENTS, Experiment, Variant
from tnlayers import Summary, summarize

RESULTS = Path(__file__).parent


def result_path(results: Path, experiment: Experiment, variant: Variant, seed: int) -> Path:
    return results / experiment.name / f"{re.sub(r'[^a-z0-9]+', '_', variant.name.lower())}_seed{seed}.json"


def run(
    experiment: Experiment,
    variant: Variant,
    seed: int,
    *,
    where: Sequence[str],
    handed: Sequence[str],
    results: Path,
    runs: Path,
) -> None:
    """Trains, tests and writes the JSON, unless it is there or another process is at it.

    Args:
        where: options for both commands that say where the pictures are.
        handed: further options, which the JSON's command has too.
        results: the folder of the JSONs.
        runs: the folder of logs and checkpoints.
    """
    path = result_path(results, experiment, variant, seed)
    folder = runs / experiment.name / path.stem
    with try_lock(folder / "lock") as lock:
        if lock is None or path.exists():
            return
        options = ["-c", experiment.config, *variant.options, "--seed_everything", str(seed), *handed]
        fit = ["--trainer.default_root_dir", str(folder / "fit"), "--ckpt_path", "last"]
        tnlayers("fit", *options, *where, *fit, lock=lock)
        (checkpoint,) = folder.glob("fit/*/*/checkpoints/last.ckpt")
        tested = ["--trainer.default_root_dir", str(folder / "test"), "--ckpt_path", str(checkpoint)]
        tnlayers("test", *options, *where, *tested, lock=lock)
        trained = rows(checkpoint.parents[1] / "metrics.csv", "train/loss", "train/accuracy")
        tests = sorted(folder.glob("test/*/*/metrics.csv"), key=lambda file: file.stat().st_mtime)
        (test,) = rows(tests[-1], "test/loss", "test/accuracy")
        net, shape = load_net(checkpoint)
        result = {
            "experiment": experiment.name,
            "variant": variant.name,
            "seed": seed,
            "data": experiment.data,
            "command": shlex.join(["tnlayers", "fit", *options]),
            "epochs": len(trained),
            "test": test,
            "train": trained,
            **counts(net, summarize(net, torch.zeros(1, *shape), measure=False)),
            "environment": environment(),
        }
        write(path, result)


def tnlayers(*arguments: str, lock: IO[str]) -> None:
    """Runs a command, which holds the lock too: it may outlive this process."""
    subprocess.run([sys.executable, "-m", "lightning_modules.cli", *arguments], check=True, pass_fds=[lock.fileno()])


def rows(path: Path, *names: str) -> list[dict[str, float]]:
    """The rows of a metrics.csv that have these metrics."""
    with open(path, newline="") as file:
        found = [row for row in csv.DictReader(file) if all(row.get(name) for name in names)]
    return [{name.partition("/")[2]: float(row[name]) for name in names} for row in found]


def counts(net: torch.nn.Module, summary: Summary) -> dict[str, Any]:
    """Parameters and MACs of the whole net and of each layer, and the convolutions' weights alone."""
    layers = [
        {
            "name": layer.name,
            "method": layer.method,
            "weight_shape": layer.weight_shape,
            "rank": layer.rank,
            "dense_weights": layer.dense_params - _biases(net, layer.name),
            "weights": layer.params - _biases(net, layer.name),
            "dense_macs": layer.dense_macs,
            "macs": layer.macs,
        }
        for layer in summary.layers
    ]
    convolutions = [layer for layer in layers if len(layer["weight_shape"]) == 4]  # type: ignore[arg-type]
    totals = summary.to_plain()["totals"]
    return {
        "totals": {name: totals[name] for name in ("dense_params", "params", "dense_macs", "macs")},
        "convolutions": {
            name: sum(layer[name] for layer in convolutions)
            for name in ("dense_weights", "weights", "dense_macs", "macs")
        },
        "layers": layers,
    }


def _biases(net: torch.nn.Module, name: str) -> int:
    bias = net.get_submodule(name).bias
    return bias.numel() if isinstance(bias, torch.Tensor) else 0


def write(path: Path, result: dict[str, Any]) -> None:
    """The whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("names", nargs="+", choices=EXPERIMENTS, metavar="name", help=", ".join(EXPERIMENTS))
    parser.add_argument("--data.root", dest="root", help="folder of the pictures")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSONs")
    parser.add_argument("--runs", type=Path, default=Path("runs/results"), help="folder of logs and checkpoints")
    options, handed = parser.parse_known_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    where = ["--data.root", options.root] if options.root else []
    failed = False
    for name in options.names:
        experiment = EXPERIMENTS[name]
        for variant, seed in experiment.runs():
            try:
                run(experiment, variant, seed, where=where, handed=handed, results=options.results, runs=options.runs)
            except subprocess.CalledProcessError as error:  # the other runs need not wait for this one
                print(f"{name}, {variant.name}, seed {seed}: {error}", file=sys.stderr)
                failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
