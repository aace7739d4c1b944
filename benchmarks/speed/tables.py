"""The page of a results file: `python -m benchmarks.speed.tables results/speed/cpu.json` writes docs/speed.md and docs/speed.png."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.machine import ROOT
from benchmarks.speed.targets import FORMS, best, speed, targets, targets_table
from lightning_modules.plots import INK, clean, png
from tnlayers.markdown import markdown_table

__all__ = ["plot", "tables"]

Measured = dict[str, Any]
_PAGE = ROOT / "docs/speed.md"
_PICTURE = _PAGE.with_suffix(".png")
_OURS, _THEIRS = "#1f6fb4", "#e08a3c"
_BEST = "Times as fast as dense, each in its faster layout of the input, default or channels last"


_MISSED = """Where a target is missed, these are the floors that were measured, and why:

- Normalisation, activations and additions take the time that they took before. "In proportion" is what a net would be whose replaced
  layers take as much less time as they have fewer operations, under the plans with the fewest, while all else takes its time.
- Under "the best plan" each layer is computed in that of its plans in channels last whose median is the least. What is missing
  there is in the operations: one with few channels uses several threads worse than the dense convolution does, and moves as many values
  for fewer multiplications. So it is in the quickstart's net, whose largest layer has 128 channels.
- A layer keeps the activations between its steps. `lean=True` of autotune bounds what is kept from the forward to the backward pass, and so
  the sum over the layers of a net; the peak of one layer's step is reached while it computes, and mostly stays.
- No choice between plans that are nearly as fast can be repeated better than the times can. What the cost model lacks beyond that is in
  its form, not in its constants: over 256 other layers (`python -m benchmarks.constants`) those that are in use choose within 5 % of the
  fastest plan in 83 % of the cases in inference and 76 % in training, and constants fitted to these very cases in 82 % and 77 %. `autotune`
  measures instead."""


def _calls(rows: Sequence[Measured]) -> str:
    """Writes what a call costs by itself, where that was measured."""
    (row,) = [row for row in rows if row["name"] == "call"][:1] or [{"measured": []}]
    times = {one["how"]: [_time(one[form]) for form in FORMS] for one in row["measured"]}
    if not times:
        return ""
    dense, like, apart = (times[how] for how in ("", "dense", "factors"))
    return (
        "- In eager mode a call asks whether the factors have changed since their weights were merged, and where factors are merged "
        "a training step does so forward and backward. Of a convolution with so few channels that its operations hardly count, a call "
        f"takes {dense[0]} dense, {like[0]} of ours where it computes like that, {apart[0]} in three convolutions; a training step "
        f"{dense[1]}, {like[1]} merging, and {apart[1]} in three convolutions. That is what small layers lose. Graphs ask "
        "nothing: compare the forms."
    )


def tables(result: Measured) -> str:
    """Writes the page: the targets, then a sentence and a table for each part that has rows."""
    of: dict[str, list[Measured]] = {}
    for row in result["rows"]:
        if "error" not in row:
            of.setdefault(row["part"], []).append(row)
    sections = ["# Speed", _about(result), "## Targets", targets_table(targets(result["rows"]))]
    sections += ["\n".join(filter(None, [_MISSED, _calls(of.get("start", []))]))]
    for part, (sentence, write) in _WRITERS.items():
        if part in of:
            sections += [f"## {part.capitalize()}", sentence, write(of[part])]
    left = [[row["name"], row["left"]] for row in of.get("layers", []) if "left" in row]
    if left:
        sections += ["### Left dense", markdown_table(["layer", "reason"], left)]
    raised = [[row["part"], row["name"], row["error"].splitlines()[0]] for row in result["rows"] if "error" in row]
    if raised:
        sections += ["## What raised", markdown_table(["part", "row", "error"], raised)]
    return "\n\n".join(sections) + "\n"


def _about(result: Measured) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    loads = [row["load"] for row in result["rows"]]
    load = f" The load average was {min(loads)} to {max(loads)}." if loads else ""
    left = f" No time was left for {len(result['left_out'])} rows." if result["left_out"] else ""
    return (
        f"`make bench` measures what is compared in turns, in one process, and takes medians; the weights are random. "
        f"{result['device']}, {result['threads']} threads, {result['dtype']}; {versions}; commit "
        f"{(result['commit'] or 'unknown')[:10]}.{load}{left}"
    )


def _layers(rows: Sequence[Measured]) -> str:
    heading = ["layer", "MACs kept", "dense", "ours", "best plan", "tltorch", "training: dense", "ours", "best plan"]
    cells = (_layer(row) for row in rows if "measured" in row)
    table = markdown_table([*heading, "tltorch", "peak memory"], cells, numbers=range(1, 11))
    return f"![Speed-up over MAC reduction, of every layer]({_PICTURE.name})\n\n{table}"


def _layer(row: Measured) -> list[str]:
    cells = [row["name"], f"{row['macs_kept']:.1%}"]
    for form in FORMS:
        cells += [_time(best(row, "dense", form)), *(_times(speed(row, form, what=what)) for what in _KINDS)]
    return [*cells, _peak(row)]


_KINDS = ("ours", "plan", "tltorch")


def _nets(rows: Sequence[Measured]) -> str:
    heading = ["net, method, batch", "parameters kept", "MACs kept"]
    heading += ["inference: dense", "ours", "in proportion", "training: dense", "ours"]
    cells = []
    for row in rows:
        times = [cell for form in FORMS for cell in (_time(best(row, "dense", form)), _times(speed(row, form)))]
        times.insert(2, _times(row.get("proportional")))
        kept = [f"{row['parameters_kept']:.1%}", f"{row['macs_kept']:.1%}"]
        cells.append([f"{row['name']}, {row['batch']}", *kept, *times, _peak(row)])
    return markdown_table([*heading, "peak memory"], cells, numbers=range(1, 9))


def _forms(rows: Sequence[Measured]) -> str:
    cells = [[row["name"], _time(best(row, "dense", FORMS[0])), _times(speed(row, FORMS[0]))] for row in rows]
    return markdown_table(["form", "dense", "ours"], cells, numbers=(1, 2))


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} µs"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _peak(row: Measured) -> str:
    """Writes what a training step's peak is of dense's, the lower one of the layouts each."""
    share = speed(row, "training peak bytes")
    return "" if share is None else f"{1 / share:.0%}"


_WRITERS = {
    "nets": (
        "Half of the multiply-accumulates (MACs) of all layers that a method takes, in ranks that are multiples of 8, the first layer "
        "left dense, or the ranks of Tai et al.; MACs of the whole net by torch's count of an evaluation. "
        f'{_BEST}. "In proportion" is what the net would be if the time of each replaced layer fell as its operations do under the plan '
        "that has the fewest, and all else took its time in the dense net, whose layers are timed one by one in channels last, in "
        "passes of their own. Peak memory is of a training step.",
        _nets,
    ),
    "forms": (
        "ResNet-18 on pictures of 64x64 pixels in evaluation, Tucker at half of the MACs, channels last, next to the dense net in the "
        "same form.",
        _forms,
    ),
    "layers": (
        f'{_BEST}; MACs kept under the plan that has the fewest. "Best plan" is the least median of all plans of the factors and '
        'their operations, pictures in channels last; "tltorch" is the faster one of its implementations, factorized and reconstructed.',
        _layers,
    ),
}


def plot(rows: Iterable[Measured]) -> Figure:
    """Draws the speed-up of every layer against the reduction of its multiply-accumulates; on the line all of it is time saved."""
    measured = [row for row in rows if row["part"] == "layers" and "measured" in row]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, form in zip(figure.subplots(1, 2, sharex=True, sharey=True), FORMS, strict=True):
        for what, color in (("tltorch", _THEIRS), ("ours", _OURS)):
            points = [(1 / row["macs_kept"], speed(row, form, what=what)) for row in measured]
            places = [(x, y) for x, y in points if y is not None]
            axes.scatter(*zip(*places, strict=True), s=12, color=color, alpha=0.7, label=what) if places else None
        highest = max((1 / row["macs_kept"] for row in measured), default=1.0)
        axes.plot([1, max(highest, 2)], [1, max(highest, 2)], color=INK, linewidth=0.8, linestyle=":")
        axes.axhline(1, color=INK, linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(form, fontsize=10, color=INK)
        axes.set_xlabel("MACs of dense over ours", fontsize=9, color=INK)
        clean(axes)
    figure.axes[0].set_ylabel("times as fast as dense", fontsize=9, color=INK)
    if measured:
        figure.axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.tables", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=_PAGE, help="the page; its picture lies next to it")
    options = parser.parse_args()
    result = json.loads(options.results.read_text())
    options.out.write_text(tables(result))
    (options.out.parent / _PICTURE.name).write_bytes(png(plot(result["rows"])))


if __name__ == "__main__":
    main()
