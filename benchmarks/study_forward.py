"""What the truncation study saves by going on from the truncated layer instead of running the whole net.

python -m benchmarks.study_forward resnet20 cnn4            # writes benchmarks/study_forward.json

Forward passes of 128 pictures of 32x32, on nets with random weights that take turns in one process; medians over rounds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import medians
from lightning_modules import build_net
from lightning_modules.report import environment
from lightning_modules.study.measurement.forward import FromLayer

BATCH, SHAPE, CLASSES = 128, (3, 32, 32), 10


@torch.no_grad()
def row(name: str, rounds: int) -> dict[str, Any]:
    """Seconds of a whole pass and of those from each layer on; `times_faster` is for as many passes from every layer."""
    net = build_net(name, num_classes=CLASSES, input_shape=SHAPE).eval()
    pictures = torch.randn(BATCH, *SHAPE).contiguous(memory_format=torch.channels_last)
    forward = FromLayer(net, pictures[:2])
    states = {layer: forward.before(layer, pictures) for layer in forward.layers}
    calls = {layer: lambda state=state: forward.after(state) for layer, state in states.items()}
    seconds = medians({"": lambda: net(pictures), **calls}, rounds)
    whole = seconds.pop("")
    faster = whole * len(seconds) / sum(seconds.values())
    return {"net": name, "whole_seconds": whole, "from_layer_seconds": seconds, "times_faster": faster}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="net")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    found = [row(name, options.rounds) for name in options.names]
    result = {"batch": BATCH, "nets": found, "environment": environment()}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()
