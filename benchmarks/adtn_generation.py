"""What one generation of a 4096 x 4096 weight (2^24) by ADTN costs: time next to the dense linear's, and memory.

python -m benchmarks.adtn_generation            # writes benchmarks/adtn_generation.json

The times are medians of runs that take turns in one process; memory is the growth of a fresh process's peak.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.timing import medians
from tnlayers import ADTNLinear

FEATURES, BATCH, RUNS = 4096, 128, 7
DEPTHS = (1, 2, 3)


def layer_of(depth: int) -> ADTNLinear:
    return ADTNLinear(FEATURES, FEATURES, bias=False, rank=depth)


def generate(layer: ADTNLinear) -> None:
    with torch.no_grad():
        layer._merge()


def train(layer: nn.Module, x: torch.Tensor) -> None:
    """Forward and backward of one batch."""
    layer(x).square().mean().backward()
    layer.zero_grad()


def peak_mib(what: str, depth: int) -> float:
    """Growth of the peak memory of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.adtn_generation", "--memory", what, "--depth", str(depth)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_growth(what: str, depth: int) -> None:
    layer, x = layer_of(depth), torch.randn(BATCH, FEATURES)
    small = ADTNLinear(64, 64, bias=False, rank=depth)  # what torch itself loads on the first call is not counted
    train(small, torch.randn(2, 64))
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is what is held now
    before = peak()
    generate(layer) if what == "generate" else train(layer, x)
    print((peak() - before) / 1024)


def peak() -> int:
    """The process's peak memory in KiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--memory", choices=("generate", "train"), help=argparse.SUPPRESS)
    parser.add_argument("--depth", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        return print_growth(options.memory, options.depth)
    layers, dense = {depth: layer_of(depth) for depth in DEPTHS}, nn.Linear(FEATURES, FEATURES, bias=False)
    x = torch.randn(BATCH, FEATURES)

    def forward() -> None:
        with torch.no_grad():
            dense(x)

    calls: dict[str, Callable[[], None]] = {"dense forward": forward, "dense train": lambda: train(dense, x)}
    calls |= {f"generate {depth}": lambda layer=layer: generate(layer) for depth, layer in layers.items()}  # type: ignore[misc]
    calls |= {f"train {depth}": lambda layer=layer: train(layer, x) for depth, layer in layers.items()}  # type: ignore[misc]
    seconds = medians(calls, RUNS)
    rows: list[dict[str, Any]] = [
        {
            "depth": depth,
            "parameters": sum(gates.numel() for gates in layer.parameters()),
            "generate_seconds": seconds[f"generate {depth}"],
            "generate_over_dense_forward": seconds[f"generate {depth}"] / seconds["dense forward"],
            "train_seconds": seconds[f"train {depth}"],
            "train_over_dense_train": seconds[f"train {depth}"] / seconds["dense train"],
            "generate_peak_mib": peak_mib("generate", depth),
            "train_peak_mib": peak_mib("train", depth),
        }
        for depth, layer in layers.items()
    ]
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads()}
    dense_seconds = {"forward": seconds["dense forward"], "train": seconds["dense train"]}
    result = {"batch": BATCH, "dense_seconds": dense_seconds, "rows": rows, "versions": versions, "machine": machine}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()
