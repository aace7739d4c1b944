"""What is compared with what: each experiment's configuration, variants and seeds."""

import json
from collections.abc import Sequence
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
        against: the variant that it is compared with, which was trained as long.
    """

    name: str
    options: tuple[str, ...] = ()
    seeds: int = 1
    against: str = "dense"


@dataclass(frozen=True)
class Experiment:
    """
    Attributes:
        name: what the configuration experiment/<name> and the folder of the results are called.
        data: which pictures, in words.
        variants: what is compared.
    """

    name: str
    data: str
    variants: tuple[Variant, ...]

    @property
    def config(self) -> str:
        return f"experiment/{self.name}"

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


def _garipov(name: str, method: dict[str, Any], kept: float) -> Variant:
    """The same layers and budgets for every method; 128 channels are split 4 x 8 x 4 as in the paper where it splits them."""
    modes = {64: [4, 4, 4], 128: [4, 8, 4]}
    sizes = (("conv1_2", 64, 64), ("conv2_1", 64, 128), ("conv*", 128, 128))
    rules = [
        {"pattern": pattern, "rank": f"ParamsKept({kept})", **method}
        | ({"in_shape": modes[inputs], "out_shape": modes[outputs]} if method["method"] == "TTConv" else {})
        for pattern, inputs, outputs in sizes
    ]
    return Variant(name, _rules({"pattern": "conv1_1", "method": "dense"}, *rules))


_TAI_CNN = ("-c", "rules/tai_cnn_lowrank")


def _tai_cnn_pair(how: str = "", *options: str, seeds: int = 1) -> tuple[Variant, Variant]:
    """Dense and low rank for 4 epochs, with these options."""
    dense, shorter = f"dense, 4 epochs{how}", ("--trainer.max_epochs", "4", *options)
    return (
        Variant(dense, shorter, seeds, against=dense),
        Variant(f"low rank, 4 epochs{how}", (*_TAI_CNN, *shorter), seeds, against=dense),
    )


def _rate(rate: float) -> tuple[str, ...]:
    """AdamW's, which is 0.002 otherwise."""
    return ("--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", str(rate))


_TRAINED = "runs/results/vgg16_cifar/dense_seed0/fit/vgg16_cifar/version_0/checkpoints/last.ckpt"
_TRAINED_FEATURES = ("--model.init_from", _TRAINED)


def _heads(name: str, rules: Sequence[dict[str, Any]], frozen: Sequence[str] = ()) -> Variant:
    """fc1 and fc2 by these rules; `frozen` are left untrained beside the features."""
    freeze = {"class_path": "lightning_modules.callbacks.Freeze", "init_args": {"patterns": ["features", *frozen]}}
    callbacks = ("--trainer.callbacks", json.dumps([freeze])) if frozen else ()
    return Variant(name, (*_TRAINED_FEATURES, *_rules(*rules), *callbacks))


def _adtn(depth: int, activation: str = "leaky_relu") -> list[dict[str, Any]]:
    return [{"pattern": "fc[12]", "method": "ADTN", "rank": depth, "activation": activation}]


# The bits of the outputs along the train, then those of the inputs, three to a mode: such trains are as many weights as
# binary ones of this bond dimension and more. Like ADTN of depth 1, they are of rank 4 between outputs and inputs.
_BOND4 = [
    {
        "pattern": "fc1",
        "method": "TT",
        "rank": 4,
        "out_shape": [8, 8, 8, 8, 1, 1, 1],
        "in_shape": [1, 1, 1, 1, 8, 8, 8],
    },
    {
        "pattern": "fc2",
        "method": "TT",
        "rank": 4,
        "out_shape": [8, 8, 8, 8, 1, 1, 1, 1],
        "in_shape": [1, 1, 1, 1, 8, 8, 8, 8],
    },
]

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
        Experiment(
            "tai_cnn",
            CIFAR10_JPEG,
            (
                Variant("dense"),
                Variant("low rank", _TAI_CNN),
                *_tai_cnn_pair(),
                *_tai_cnn_pair(", lr 0.005", *_rate(0.005)),
                *_tai_cnn_pair(", lr 0.001", *_rate(0.001)),
                *_tai_cnn_pair(", no BatchNorm", "--model.net_options.batch_norm", "false", seeds=2),
            ),
        ),
        Experiment(
            "tai_nin",
            CIFAR10_JPEG,
            (Variant("dense"), Variant("low rank", ("-c", "rules/tai_nin_lowrank"))),
        ),
        Experiment(
            "garipov_conv",
            CIFAR10_JPEG,
            (
                Variant("dense"),
                _garipov("TT-conv 2x", {"method": "TTConv"}, 0.494),
                _garipov("naive TT 2x", {"method": "MPS", "order": "h w i o"}, 0.494),
                _garipov("TT-conv 4x", {"method": "TTConv"}, 0.242),
            ),
        ),
        Experiment(
            "garipov_conv_fc",
            CIFAR10_JPEG,
            (
                Variant("dense"),
                Variant("TT-conv, TT-FC", ("-c", "rules/garipov_conv_fc_tt")),
                Variant("TT-conv, TT-FC, smaller", ("-c", "rules/garipov_conv_fc_tt_small")),
            ),
        ),
        Experiment("vgg16_cifar", CIFAR10_JPEG, (Variant("dense"),)),
        Experiment(
            "vgg16_cifar_heads",
            CIFAR10_JPEG,
            (
                # Trained weights, which the others' learning rate would throw away.
                Variant("dense", (*_TRAINED_FEATURES, "--model.optimizer.lr", "0.0005")),
                _heads("ADTN depth 1", _adtn(1)),
                _heads("ADTN depth 1, random and frozen", _adtn(1), frozen=("fc1", "fc2")),
                _heads("MPS of bond 4", _BOND4),
                _heads("ADTN depth 2", _adtn(2)),
                _heads("ADTN depth 2, no activation", _adtn(2, "none")),
                _heads("ADTN depth 2, ReLU", _adtn(2, "relu")),
                _heads("ADTN depth 3", _adtn(3)),
            ),
        ),
    )
}
