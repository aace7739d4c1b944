"""What a compression did, for people and programs: a table on the terminal, Markdown, JSON and plots."""

import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_modules.plots import plot_accuracy, plot_layers
from tnlayers import Summary

__all__ = ["Report", "environment", "new_folder"]


@dataclass(frozen=True)
class Report:
    """
    Attributes:
        title: what was compressed.
        summary: parameters, multiply-accumulates, errors and times.
        accuracy: stage ("dense", "right after", "retrained") -> fraction of the test pictures.
        notes: sentences that belong to the figures.
    """

    title: str
    summary: Summary
    accuracy: dict[str, float]
    notes: tuple[str, ...] = ()

    def show(self, console: Console) -> None:
        """The per-layer table and the totals."""
        headings, rows = self.summary.table()
        places = [place for place, heading in enumerate(headings) if heading != "note"]
        table = Table(title=self.title, box=SIMPLE_HEAD, title_justify="left")
        for place in places:
            table.add_column(
                headings[place], justify="left" if headings[place] in ("layer", "method") else "right", no_wrap=True
            )
        for row in rows[:-1]:
            table.add_row(*(row[place] for place in places))
        table.add_section()
        table.add_row(*(rows[-1][place] for place in places), style="bold")
        console.print(table)
        for line in self.sentences():
            console.print(line, highlight=False)

    def sentences(self) -> list[str]:
        totals = self.summary.totals
        lines = [
            f"parameters  {totals.dense_params:,} -> {totals.params:,} ({totals.params_kept:.1%} kept)",
            f"MACs        {totals.dense_macs:,} -> {totals.macs:,} ({totals.macs_kept:.1%} kept), for one picture",
        ]
        if totals.seconds and totals.dense_seconds:
            lines.append(
                f"time        {1e3 * totals.dense_seconds:.2f} ms -> {1e3 * totals.seconds:.2f} ms "
                f"({totals.dense_seconds / totals.seconds:.2f}x as fast), for a batch of {self.summary.batch} on {self.summary.device}, "
                f"{torch.get_num_threads()} threads"
            )
        if self.accuracy:
            lines.append("accuracy    " + ", ".join(f"{stage} {value:.2%}" for stage, value in self.accuracy.items()))
        reasons: dict[str, list[str]] = {}
        for layer in self.summary.layers:
            if layer.note:
                reasons.setdefault(layer.note, []).append(layer.name)
        lines += [f"dense       {', '.join(names)}: {reason}" for reason, names in reasons.items()]
        return [*lines, *self.notes]

    def write(self, folder: Path) -> None:
        """report.md, report.json, layers.png and, with two stages or more, accuracy.png."""
        folder.mkdir(parents=True, exist_ok=True)
        plots = {"layers.png": plot_layers(self.summary)}
        if len(self.accuracy) > 1:
            plots["accuracy.png"] = plot_accuracy(self.summary, self.accuracy)
        for name, figure in plots.items():
            figure.savefig(folder / name, dpi=120)
        pictures = [f"![{name.removesuffix('.png')}]({name})" for name in plots]
        text = [
            f"# {self.title}",
            "\n".join(f"- {line}" for line in self.sentences()),
            *pictures,
            self.summary.to_markdown(),
        ]
        (folder / "report.md").write_text("\n\n".join(text) + "\n")
        (folder / "report.json").write_text(json.dumps(self.to_plain(), indent=2) + "\n")

    def to_plain(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "accuracy": self.accuracy,
            "notes": list(self.notes),
            "environment": environment(),
            **self.summary.to_plain(),
        }


def environment() -> dict[str, Any]:
    """What the figures depend on: versions and the machine."""
    packages = ("tnlayers", "torch", "torchvision", "lightning", "tensorly")
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{name: version(name) for name in packages},
    }


def new_folder(path: str | Path) -> Path:
    """The folder, made; it must not hold anything yet.

    Raises:
        FileExistsError: it holds files, or is one.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} already holds a run; give another --out, or remove it first")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
