"""Time per epoch of each variant of an experiment, next to the dense net's.

python -m benchmarks.epoch_time cnn4_from_scratch tai_cnn            # writes benchmarks/epoch_time.json

One training step (forward, backward, optimizer) of a batch of the experiment's size, pictures of 32x32, on nets with random
weights that take turns in one process; medians over rounds. An epoch is that times the steps of 50,000 pictures, reading them
aside. Experiments that are not named stay in the file as they are.
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

PICTURES, SHAPE, CLASSES, DEFAULT_BATCH = 50_000, (3, 32, 32), 10, 128


def step_of(experiment: Experiment, variant: Variant, batch: int) -> Callable[[], None]:
    """One training step of the variant's net, all of it."""
    model = classifier(experiment, variant)
    tensorize(model.net, model.resolve("random"), init="random")
    optimizer = model._optimizer(model.parameters())
    x, y = torch.randn(batch, *SHAPE), torch.randint(0, CLASSES, (batch,))

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


def trains_a_part(experiment: Experiment) -> bool:
    """Whether callbacks change what is trained, which a step here knows nothing of."""
    return "callbacks" in yaml.safe_load(Path(experiment.config).read_text())["trainer"]


def times(experiment: Experiment, rounds: int) -> dict[str, Any]:
    """What a step and an epoch take of the first variant and of those that are compared with it."""
    data = yaml.safe_load(Path(experiment.config).read_text())["data"]["init_args"]
    batch = data.get("batch_size", DEFAULT_BATCH)
    steps = math.ceil(PICTURES / batch)
    first = experiment.variants[0].name
    compared = [variant for variant in experiment.variants if variant.against == first]
    seconds = medians({variant.name: step_of(experiment, variant, batch) for variant in compared}, rounds)
    variants = [
        {"variant": name, "step_seconds": step, "epoch_seconds": steps * step, "over_dense": step / seconds[first]}
        for name, step in seconds.items()
    ]
    return {"batch": batch, "steps": steps, "variants": variants, "environment": environment()}


def main() -> None:
    whole = [name for name, experiment in EXPERIMENTS.items() if not trains_a_part(experiment)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=whole, metavar="name", help=", ".join(whole))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    found = {name: times(EXPERIMENTS[name], options.rounds) for name in options.names}
    options.out.write_text(json.dumps(known | found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
