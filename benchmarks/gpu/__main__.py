"""Measures for a given number of seconds; see the package."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import conformance, layers, nets, training
from benchmarks.machine import ROOT, commit, machine
from benchmarks.rows import LostDevice, Rows, Setting, deadlines

PARTS = {
    "conformance": (conformance, 0.18),
    "layers": (layers, 0.18),
    "nets": (nets, 0.22),
    "training": (training, 0.42),
}
"""Each part, and its share of the time; what a part leaves is the next one's."""
_ALGORITHMS = 4
_TIMES = f"medians of CUDA events, calls in turns, the fastest of cuDNN's first {_ALGORITHMS} algorithms"


SETTINGS = {
    "conformance": "Against float64 on the CPU, TF32 off",
    "layers": f"In bfloat16, channels last unless named otherwise, {_TIMES}",
    "nets": "In bfloat16, in training by autocast without an optimizer's step, channels last; half of the MACs of all layers that "
    f"a method takes, MACs of the whole net by torch's count of an evaluation; {_TIMES}",
    "training": "CIFAR-10 as JPEG, all pictures, augmented on the device; autocast to bfloat16, channels last, AdamW, cosine",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results/gpu/gpu.json", help="rows in it are not made again")
    parser.add_argument("--data", type=Path, help="archive of train/<class>/*.jpg and test/<class>/*.jpg")
    parser.add_argument("--checkpoint", type=Path, help="the published ResNet-20, to retrain it")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", help="what is measured, where there is no git")
    parser.add_argument("--quick", action="store_true", help="everything tiny, to test the script")
    parser.add_argument("--retry", action="store_true", help="make those rows again that raised")
    options = parser.parse_args(arguments)
    start, device = time.monotonic(), torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device; --quick --device cpu tests the script", file=sys.stderr)
        return 2
    setting = Setting(device, options.quick, options.data, options.checkpoint)
    about = {"settings": SETTINGS, "commit": options.commit or commit()} | machine(device)
    rows = Rows(options.out, about, device)
    if options.retry:
        rows.forget_errors()
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark_limit = False, _ALGORITHMS
    for part, end in deadlines({part: PARTS[part][1] for part in options.parts}, options.seconds).items():
        torch.backends.cudnn.benchmark = part != "conformance"  # looks for the fastest algorithm
        try:
            rows.fill(part, PARTS[part][0].rows(setting), start + end)
        except LostDevice as error:
            print(f"the device is lost ({error}); run again to go on", file=sys.stderr)
            return 3
    rows.write()
    errors = [row["name"] for row in rows.rows if "error" in row]
    wrong = [row["name"] for row in rows.rows if row.get("wrong")]
    print(
        f"{len(rows.rows)} rows; raised: {errors or 'none'}; wrong: {wrong or 'none'}; no time for {len(rows.left_out)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
