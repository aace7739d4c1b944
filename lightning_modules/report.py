"""What a compression did, for people and programs: a table on the terminal, Markdown, JSON and plots."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_modules.plots import plot_accuracy, plot_layers, png
from lightning_modules.timing_report import plain_timings, timed
from tnlayers import Healed, Summary
from tnlayers.files import write_files
from tnlayers.summary import LayerSummary, Totals, kept, percent
from tnlayers.tuning import Tuned

__all__ = ["Report", "environment"]


@dataclass(frozen=True)
class Report:
    """What a compression did.

    Attributes:
        title: what was compressed.
        summary: parameters, multiply-accumulates, errors and times.
        accuracy: stage ("dense" or "before", "right after", "healed", "retrained") -> fraction of the test pictures.
        notes: sentences that belong to the figures.
        tuned: what was measured to choose the layers' plans.
        healed: what became of each slice.
    """

    title: str
    summary: Summary
    accuracy: dict[str, float]
    notes: tuple[str, ...] = ()
    tuned: Mapping[str, Tuned] = field(default_factory=dict)
    healed: tuple[Healed, ...] = ()

    def show(self, console: Console) -> None:
        """Prints the per-layer table, narrow enough for a terminal of 80 columns, and the totals."""
        table = Table(title=self.title, box=SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
        table.add_column("layer", overflow="fold")
        table.add_column("method, rank")
        for heading in ("params", "kept", "MACs", "kept", "error", "speed"):
            table.add_column(heading, justify="right", no_wrap=True)
        for layer in self.summary.layers:
            how = f"{layer.method} {','.join(map(str, layer.rank))}" if layer.rank else layer.kind
            table.add_row(layer.name, how, *_figures(layer, layer.error), style="" if layer.rank else "dim")
        table.add_section()
        table.add_row("other operations", "", *_figures(self.summary.other, None), style="dim")
        table.add_row("whole model", "", *_figures(self.summary.totals, None), style="bold")
        console.print(table)
        for line in self.sentences():
            console.print(line, highlight=False, soft_wrap=True)

    def sentences(self) -> list[str]:
        totals = self.summary.totals
        lines = [
            f"parameters  {totals.dense_params:,} -> {totals.params:,} ({percent(totals.params_kept)} kept)",
            f"MACs        {totals.dense_macs:,} -> {totals.macs:,} ({percent(totals.macs_kept)} kept), for one sample",
        ]
        if self.summary.unknown:
            lines.append(f"not counted {', '.join(self.summary.unknown)}: no formula is known for what they do")
        if totals.seconds and totals.dense_seconds:
            lines.append(
                f"time        {1e3 * totals.dense_seconds:.2f} ms -> {1e3 * totals.seconds:.2f} ms "
                f"({totals.dense_seconds / totals.seconds:.2f}x as fast), for a batch of {self.summary.batch} on {self.summary.device}, "
                f"{torch.get_num_threads()} threads, channels last"
            )
        if self.tuned:
            lines.append(f"timed       {timed(self.tuned)}")
        if self.accuracy:
            lines.append("accuracy    " + ", ".join(f"{stage} {value:.2%}" for stage, value in self.accuracy.items()))
        reasons: dict[tuple[str, str, str], list[str]] = {}
        for layer in self.summary.layers:
            if layer.note:
                what, kind = ("left dense", f" ({layer.kind})") if layer.method == "dense" else ("note", "")
                reasons.setdefault((what, kind, layer.note), []).append(layer.name or "the model itself")
        lines += [f"{what:11} {', '.join(names)}{kind}: {reason}" for (what, kind, reason), names in reasons.items()]
        return [*lines, *self.notes]

    def write(self, folder: Path) -> None:
        """Writes report.md, report.json, layers.png and, with two stages or more, accuracy.png: all of them or none."""
        plots = {"layers.png": plot_layers(self.summary)}
        if len(self.accuracy) > 1:
            plots["accuracy.png"] = plot_accuracy(self.summary, self.accuracy)
        pictures = [f"![{name.removesuffix('.png')}]({name})" for name in plots]
        text = [
            f"# {self.title}",
            "\n".join(f"- {line}" for line in self.sentences()),
            *pictures,
            self.summary.to_markdown(),
        ]
        files = {
            "report.md": "\n\n".join(text) + "\n",
            "report.json": json.dumps(self.to_plain(), indent=2) + "\n",
        }
        write_files(folder, {**{name: png(figure) for name, figure in plots.items()}, **files})

    def to_plain(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "accuracy": self.accuracy,
            "notes": list(self.notes),
            "environment": environment(),
            "timings": plain_timings(self.tuned),
            "healed": [asdict(one) for one in self.healed],
            **self.summary.to_plain(),
        }


def _figures(entry: LayerSummary | Totals, error: float | None) -> list[str]:
    """Writes parameters, MACs, what is kept of them, the error, and how many times faster than dense."""
    speed = f"{entry.dense_seconds / entry.seconds:.2f}x" if entry.seconds and entry.dense_seconds else ""
    return [
        f"{entry.params:,}",
        percent(kept(entry.params, entry.dense_params), 0),
        f"{entry.macs / 1e6:.2f}M",
        percent(kept(entry.macs, entry.dense_macs), 0),
        "" if error is None else f"{error:.3f}",
        speed,
    ]


def environment() -> dict[str, Any]:
    """Lists what the figures depend on: versions and the machine."""
    packages = ("tnlayers", "torch", "torchvision", "lightning", "tensorly")
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{name: version(name) for name in packages},
    }
