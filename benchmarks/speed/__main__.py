"""Measures for a given number of seconds; see the package."""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.machine import ROOT, commit, machine
from benchmarks.rows import LostDevice, Rows, Setting, deadlines
from benchmarks.speed import forms, layers, nets, start
from benchmarks.speed.targets import targets, targets_table

PARTS = {"start": (start, 0.04), "forms": (forms, 0.21), "nets": (nets, 0.42), "layers": (layers, 0.33)}
"""Each part, and its share of the time; what a part leaves is the next one's."""
_SECONDS, _QUICK_SECONDS = 1110.0, 155.0
_PEER = "tensorly-torch"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="rows in it are not made again; results/speed/<device>.json")
    parser.add_argument("--seconds", type=float, help=f"{_SECONDS:.0f}, or {_QUICK_SECONDS:.0f} with --quick")
    parser.add_argument("--quick", action="store_true", help="under three minutes, for the rows that matter most")
    parser.add_argument("--tiny", action="store_true", help="everything tiny, to test the script")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--commit", help="what is measured, where there is no git")
    parser.add_argument("--retry", action="store_true", help="make those rows again that raised")
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    torch.backends.cudnn.benchmark = device.type == "cuda"  # looks for the fastest algorithm
    setting = Setting(device, options.tiny)
    about = {"commit": options.commit or commit(), "dtype": str(setting.dtype).removeprefix("torch.")}
    rows = Rows(options.out or ROOT / f"results/speed/{device.type}.json", about | machine(device, (_PEER,)), device)
    if rows.rows and rows.known_commit != about["commit"]:
        print(f"{rows.path}: its {len(rows.rows)} rows are of commit {rows.known_commit}, and are measured anew")
        rows.rows.clear()
    if options.retry:
        rows.forget_errors()
    known = len(rows.rows)
    seconds = options.seconds or (math.inf if options.tiny else _QUICK_SECONDS if options.quick else _SECONDS)
    for part, end in deadlines({part: PARTS[part][1] for part in options.parts}, seconds).items():
        try:
            rows.fill(part, PARTS[part][0].rows(setting), begun + end)
        except LostDevice as error:
            print(f"the device is lost ({error}); run again to go on", file=sys.stderr)
            return 3
    found = targets(rows.rows)
    rows.about["targets"] = [asdict(target) for target in found]
    rows.write()
    print(f"\n{targets_table(found)}\n")
    errors = [row["name"] for row in rows.rows if "error" in row]
    new, left = len(rows.rows) - known, len(rows.left_out)
    print(f"{rows.path}: {known} rows were there, {new} are new; raised: {errors or 'none'}; no time for {left}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
