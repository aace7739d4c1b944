"""Writes the tables of results/README.md anew, from the JSONs alone: `python -m results.tables`."""

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results.experiments import EXPERIMENTS, Experiment, Variant
from results.run import RESULTS, result_path
from tnlayers.markdown import markdown_table

TIMES = RESULTS.parent / "benchmarks/epoch_time.json"
_MARKED = re.compile(r"(<!-- runs of (\w+) -->\n).*?(<!-- end of runs -->)", re.DOTALL)
_HEADINGS = (
    "variant",
    "weights kept, convolutions",
    "weights kept, linears",
    "parameters",
    "fewer",
    "MACs kept",
    "epoch",
    "training accuracy",
    "test accuracy",
    "against dense",
    "seeds",
)


def tables(text: str, results: Path) -> str:
    """Returns the text with what is between its markers written anew."""
    return _MARKED.sub(lambda found: found[1] + section(EXPERIMENTS[found[2]], results) + found[3], text)


def section(experiment: Experiment, results: Path, times: Path = TIMES) -> str:
    """Writes a line on the runs and a row for each variant that has some, as Markdown."""
    runs = {
        variant.name: [
            json.loads(path.read_text())
            for seed in range(variant.seeds)
            if (path := result_path(results, experiment, variant, seed)).exists()
        ]
        for variant in experiment.variants
    }
    done = [run for found in runs.values() for run in found]
    if not done:
        return "No run is finished yet.\n"
    epochs = _epochs(experiment.name, times)
    rows = [
        _row(variant, runs[variant.name], runs.get(variant.against, []), epochs.get(variant.name, ""))
        for variant in experiment.variants
        if runs[variant.name]
    ]
    table = markdown_table(_HEADINGS, rows, numbers=range(1, len(_HEADINGS)))
    return f"{_sentence(done, len(experiment.runs()))}\n\n{table}\n"


def _sentence(runs: Sequence[dict[str, Any]], planned: int) -> str:
    epochs = " to ".join(str(number) for number in sorted({run["epochs"] for run in runs}))
    versions = "; ".join(sorted({f"torch {run['environment']['torch']}, {_machine(run)}" for run in runs}))
    return (
        f"{runs[0]['data']}; {epochs} epoch{'' if epochs == '1' else 's'}; {len(runs)} of {planned} runs. {versions}."
    )


def _machine(run: dict[str, Any]) -> str:
    return run["environment"]["gpu"] or run["environment"]["machine"]


def _epochs(name: str, times: Path) -> dict[str, str]:
    """Reads variant -> seconds of an epoch and their fraction of the dense net's; {} where none were measured."""
    measured = json.loads(times.read_text()) if times.exists() else {}
    rows = measured[name]["variants"] if name in measured else []
    return {row["variant"]: f"{row['epoch_seconds']:.0f} s, {row['over_dense']:.2f}x" for row in rows}


def _row(
    variant: Variant, runs: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]], epoch: str
) -> list[str]:
    first = runs[0]  # the counts are the same for every seed
    totals, accuracies = first["totals"], _accuracies(runs)
    compared = reference and variant.name != variant.against
    return [
        variant.name,
        *(_kept(first, dimensions) for dimensions in (4, 2)),
        f"{totals['params']:,}",
        f"{totals['dense_params'] / totals['params']:.2f}x",
        f"{totals['macs'] / totals['dense_macs']:.1%}",
        epoch,
        _spread([run["train"][-1]["accuracy"] for run in runs]),
        _spread(accuracies),
        f"{100 * (statistics.mean(accuracies) - statistics.mean(_accuracies(reference))):+.2f}" if compared else "",
        str(len(runs)),
    ]


def _accuracies(runs: Sequence[dict[str, Any]]) -> list[float]:
    return [run["test"]["accuracy"] for run in runs]


def _kept(run: dict[str, Any], dimensions: int) -> str:
    """Writes how much is kept of the weights with so many dimensions, biases aside; the text is empty if the net has none."""
    layers = [layer for layer in run["layers"] if len(layer["weight_shape"]) == dimensions]
    if not layers:
        return ""
    return f"{100 * sum(layer['weights'] for layer in layers) / sum(layer['dense_weights'] for layer in layers):.3g} %"


def _spread(fractions: Sequence[float]) -> str:
    """Writes the mean in percent, and the standard deviation where there are several."""
    mean = f"{100 * statistics.mean(fractions):.2f}"
    return f"{mean} ± {100 * statistics.stdev(fractions):.2f}" if len(fractions) > 1 else mean


def main() -> None:
    readme = RESULTS / "README.md"
    readme.write_text(tables(readme.read_text(), RESULTS))


if __name__ == "__main__":
    main()
