"""The page of a results file: `python -m benchmarks.gpu.tables results/gpu/h100.json > docs/gpu.md`."""

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tnlayers.markdown import markdown_table

__all__ = ["tables"]

Measured = dict[str, Any]
_QUIET = 8
"""A load average below which nothing else keeps the processors from launching kernels."""


def tables(result: Measured) -> str:
    """Writes a page: a heading, a sentence and a table for each part that has rows."""
    of: dict[str, list[Measured]] = {}
    for row in result["rows"]:
        of.setdefault(row["part"], []).append(row)
    sections = ["# On a GPU", _about(result)]
    for part, write in _WRITERS.items():
        rows = [row for row in of.get(part, []) if "error" not in row]
        if rows:
            sections.append(f"## {part.capitalize()}\n\n{result['settings'][part]}.\n\n{write(rows)}")
    raised = [[row["part"], row["name"], row["error"].splitlines()[0]] for row in result["rows"] if "error" in row]
    if raised:
        sections.append("## What raised\n\n" + markdown_table(["part", "row", "error"], raised))
    return "\n\n".join(sections) + "\n"


def _about(result: Measured) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    left = f" No time was left for {len(result['left_out'])} rows." if result["left_out"] else ""
    return f"{result['device']}; {versions}; commit {(result['commit'] or 'unknown')[:10]}.{left}"


def _conformance(rows: Sequence[Measured]) -> str:
    checks, wrong = sum(row["checks"] for row in rows), [row for row in rows if row["wrong"]]
    cells = [[row["name"], row["checks"], len(row["wrong"]), row["wrong"][0]] for row in wrong]
    listed = "\n\n" + markdown_table(["row", "checks", "wrong", "the first"], cells, numbers=(1, 2)) if cells else ""
    return f"{checks} checks in {len(rows)} rows; {sum(len(row['wrong']) for row in wrong)} went wrong.{listed}"


def _layers(rows: Sequence[Measured]) -> str:
    heading = ["layer", "computed as", "MACs kept", "inference", "inference, graph", "training", "peak memory"]
    return markdown_table(heading, (cells for row in rows for cells in _layer(row)), numbers=range(2, 7))


def _layer(row: Measured) -> Iterable[list[str]]:
    """Writes the faster dense layout in microseconds, and each method as times faster than that, form by form."""
    dense = [of for name, of in row["of"].items() if name.startswith("dense")]
    best = {form: min(of[form] for of in dense) for form in ("inference", "inference, graph", "training")}
    peak = min((of["training peak bytes"] or 0) for of in dense)
    yield [
        row["name"],
        "dense",
        "",
        *(f"{1e6 * seconds:.0f} µs" for seconds in best.values()),
        f"{peak / 2**20:.1f} MiB",
    ]
    for name, of in row["of"].items():
        if not name.startswith("dense") and "inference" in of:
            speeds = [f"{best[form] / of[form]:.2f}x" for form in best]
            yield ["", name, f"{of['macs_kept']:.1%}", *speeds, _share(of["training peak bytes"], peak)]


def _share(value: int | None, of: int) -> str:
    return f"{value / of:.0%}" if value and of else ""


def _nets(rows: Sequence[Measured]) -> str:
    forms = sorted({form for row in rows for form in row["of"]["dense"] if form != "training peak bytes"})
    cells = []
    for row in rows:
        dense, (own,) = row["of"]["dense"], [of for name, of in row["of"].items() if name != "dense"]
        times = [f"{1e3 * dense[form]:.2f} ms, {dense[form] / own[form]:.2f}x" if form in own else "" for form in forms]
        peak = _share(own.get("training peak bytes"), dense.get("training peak bytes") or 0)
        cells.append([row["name"], f"{row['parameters_kept']:.1%}", f"{row['macs_kept']:.1%}", *times, peak])
    heading = [
        "net",
        "parameters kept",
        "MACs kept",
        *(f"{form}: dense, times faster" for form in forms),
        "peak memory",
    ]
    return markdown_table(heading, cells, numbers=range(1, len(heading)))


def _training(rows: Sequence[Measured]) -> str:
    groups: dict[tuple[str, str, str], list[Measured]] = {}
    for row in rows:
        groups.setdefault((row["start"], row["net"], row["method"]), []).append(row)
    heading = ["net", "start", "method", "convolutions' weights kept", "MACs kept", "epochs", "epoch", "right after"]
    heading += ["test accuracy", "seeds"]
    cells = []
    for (start, net, method), runs in groups.items():
        first, accuracies = runs[0], [100 * row["accuracy"] for row in runs]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
        kept = [f"{first['convolution_weights_kept']:.1%}", f"{first['macs_kept']:.1%}"]
        after = f"{100 * first['right_after']:.2f}" if "right_after" in first else ""
        seconds = [row["epoch_seconds"] for row in runs if row["load"] < _QUIET]
        epoch = f"{statistics.median(seconds):.2f} s" if seconds else ""
        reached = f"{statistics.mean(accuracies):.2f}{spread}"
        cells.append([net, start, method, *kept, first["epochs"], epoch, after, reached, len(runs)])
    return markdown_table(heading, cells, numbers=range(3, len(heading)))


_WRITERS = {"conformance": _conformance, "layers": _layers, "nets": _nets, "training": _training}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tables", description=__doc__)
    parser.add_argument("results", type=Path)
    print(tables(json.loads(parser.parse_args().results.read_text())), end="")


if __name__ == "__main__":
    main()
