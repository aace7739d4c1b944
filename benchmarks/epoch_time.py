"""Time per epoch of each variant of an experiment, next to the dense net's.

python -m benchmarks.epoch_time cnn4_from_scratch tai_cnn            # writes benchmarks/epoch_time.json

One training step (forward, backward, optimizer) of a batch of 128 pictures of 32x32, on nets with random weights that take
turns in one process; medians over rounds. An epoch is that many times the steps of 50,000 pictures, reading them aside.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from benchmarks.timing import medians
from lightning_modules.classifier import ImageClassifier
from lightning_modules.report import environment
from results.experiments import EXPERIMENTS, Experiment, Variant
from tnlayers import tensorize

BATCH, PICTURES, SHAPE, CLASSES = 128, 50_000, (3, 32, 32), 10
STEPS = math.ceil(PICTURES / BATCH)


def step_of(experiment: Experiment, variant: Variant) -> Callable[[], None]:
    """One training step of the variant's net."""
    model = classifier(experiment, variant)
    tensorize(model.net, model.resolve("random"), init="random")
    optimizer = model._optimizer(model.parameters())
    x, y = torch.randn(BATCH, *SHAPE), torch.randint(0, CLASSES, (BATCH,))

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def classifier(experiment: Experiment, variant: Variant) -> ImageClassifier:
    """The model that these options make, before its layers are factorized."""
    model: dict[str, Any] = {"num_classes": CLASSES, "input_shape": SHAPE}
    options = ("-c", experiment.config, *variant.options)
    for option, value in zip(options[::2], options[1::2], strict=True):
        if option == "-c":
            model |= yaml.safe_load(Path(value).read_text()).get("model", {})
        elif option.startswith("--model."):
            model[option.removeprefix("--model.")] = yaml.safe_load(value)
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(ImageClassifier, "model")
    return parser.instantiate(parser.parse_object({"model": model})).model


def rows(experiment: Experiment, rounds: int) -> list[dict[str, Any]]:
    """What a step and an epoch of each variant take; the first is what the others are compared with."""
    seconds = medians({variant.name: step_of(experiment, variant) for variant in experiment.variants}, rounds)
    first = seconds[experiment.variants[0].name]
    return [
        {"variant": name, "step_seconds": step, "epoch_seconds": STEPS * step, "over_dense": step / first}
        for name, step in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=EXPERIMENTS, metavar="name", help=", ".join(EXPERIMENTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    result = {
        "batch": BATCH,
        "steps": STEPS,
        "experiments": {name: rows(EXPERIMENTS[name], options.rounds) for name in options.names},
        "environment": environment(),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()
