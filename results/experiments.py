"""What is compared with what: each experiment's configuration, variants and seeds."""

import json
from dataclasses import dataclass
from typing import Any

__all__ = ["EXPERIMENTS", "Experiment", "Variant"]

CIFAR10_JPEG = "CIFAR-10, all 50,000 and 10,000 pictures, as JPEG of quality 75"


@dataclass(frozen=True)
class Variant:
    """
    Attributes:
        options: what follows the experiment's configuration on the command line.
        seeds: how many runs, of seeds 0, 1, ...
    """

    name: str
    options: tuple[str, ...] = ()
    seeds: int = 1


@dataclass(frozen=True)
class Experiment:
    """
    Attributes:
        name: of configs/experiment/<name>.yaml, and of the folder of the results.
        data: which pictures, in words.
        variants: the first is what the others are compared with.
    """

    name: str
    data: str
    variants: tuple[Variant, ...]

    @property
    def config(self) -> str:
        return f"configs/experiment/{self.name}.yaml"

    def runs(self) -> list[tuple[Variant, int]]:
        """Variants and seeds, the most telling first: seed 0 of all, from those with the most seeds on."""
        every = [(variant, seed) for variant in self.variants for seed in range(variant.seeds)]
        return sorted(every, key=lambda run: (run[1], -run[0].seeds))


def _rules(*rules: dict[str, Any]) -> tuple[str, ...]:
    return ("--model.rules", json.dumps(rules))


def _cnn4(method: str, times: int, kept: float, seeds: int) -> Variant:
    rules = _rules(
        {"pattern": "conv1", "method": "dense"}, {"pattern": "conv*", "method": method, "rank": f"ParamsKept({kept})"}
    )
    return Variant(f"{method} {times}x", rules, seeds)


_METHODS = ("Tucker", "CP", "MPS", "TTConv", "LowRank")
# conv1 stays dense, so the others keep a little less than the convolutions do in all.
_BUDGETS = ((2, 0.49, 1), (4, 0.245, 3), (8, 0.12, 1))

EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "cnn4_from_scratch",
            CIFAR10_JPEG,
            (Variant("dense", seeds=3), *(_cnn4(method, *budget) for budget in _BUDGETS for method in _METHODS)),
        ),
    )
}
