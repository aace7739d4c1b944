"""Draws odd command lines and configurations: wrong types and values, nulls, empty files, folders for files, unknown classes.

`python -m tests.odd_commands --number 200 --seed 0` runs that many and lists those that break the law that `check` states.
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.commands import CONFIGS, tnlayers

__all__ = ["Drawn", "broken_law", "draw"]

LENGTH = 1000
"""Characters that an error may have."""
COMMANDS = ["fit", "validate", "test", "predict", "compress", "study", "report", "export", "quickstart", "methods"]
LIGHTNING = COMMANDS[:6]
WEIGHTS = [6, 2, 2, 2, 3, 1, 2, 2, 1, 1]
TRAINER = {
    "logger": False,
    "max_epochs": 1,
    "limit_train_batches": 1,
    "limit_val_batches": 1,
    "limit_test_batches": 1,
    "limit_predict_batches": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
OPTIONS = [
    *(f"trainer.{name}" for name in (
        "accelerator", "strategy", "precision", "logger", "callbacks", "fast_dev_run", "min_epochs", "min_steps", "max_time",
        "limit_val_batches", "overfit_batches", "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps",
        "log_every_n_steps", "enable_checkpointing", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm",
        "deterministic", "benchmark", "inference_mode", "profiler", "detect_anomaly", "barebones", "plugins",
        "reload_dataloaders_every_n_epochs", "default_root_dir",
    )),
    *(f"model.{name}" for name in (
        "net", "net_options", "init_from", "rules", "init", "teacher", "distill_weight", "temperature", "optimizer",
        "optimizer.lr", "optimizer.weight_decay", "optimizer.betas", "lr_scheduler", "num_classes", "input_shape",
    )),
    *(f"data.{name}" for name in ("batch_size", "val_fraction", "split_seed", "augment", "mean", "std", "root", "num_workers")),
    *(f"model_checkpoint.{name}" for name in ("monitor", "mode", "save_top_k", "every_n_epochs", "dirpath", "filename")),
    "rank_schedule.ranks", "rank_schedule.pattern", "autotune.enabled", "seed_everything", "ckpt_path", "checkpoint", "out",
    "dense", "nonsense", "model", "data", "trainer", "config",
]  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 1, 2, 0.5, -0.5, 1e300, -1e300, float("nan"), float("inf"), 10**30, "", " ", "x", "null", "two",
    "\u00fc\u4e2d\U0001f600", "long" * 25_000, "@missing.yaml", "@folder", "@empty.yaml", "@text.ckpt", "@dense.ckpt", "@missing.ckpt",
    "/proc/nothing", [], [1], [None], [[]], {}, {"a": 1}, {"class_path": "os.system"}, {"class_path": "no.such.Class"},
    {"class_path": None}, {"class_path": "torch.optim.SGD", "init_args": None}, {"class_path": "torch.optim.SGD", "init_args": {"lr": -1}},
    {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 0}},
    [{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "nothing"}}],
    [{"class_path": "lightning.pytorch.callbacks.StochasticWeightAveraging", "init_args": {"swa_lrs": 0.1}}],
    [{"pattern": "conv2", "method": "Tucker", "rank": 2}], [{"pattern": "conv2", "method": "Tucker", "rank": "ParamsKept(0.5)"}],
    [{"pattern": "conv*", "method": "CP", "rank": 10**9}], [{"pattern": None, "method": []}], {0: 2}, {"0": "ParamsKept(0.5)"},
    {"hidden": -1}, {"widths": "x"}, "64-true", "bf16-true", "16-mixed", "torch.optim.Adam", "timm/nothing", "resnet20", "garipov_conv",
    "value", "norm", "simple", "max", "val/loss", "best", "last", "ddp", "lightning.pytorch.callbacks.LearningRateMonitor",
]  # fmt: skip

Drawn = tuple[list[str], dict[str, str]]
"""The arguments of a command, and the texts of the configurations among them; `@` is the folder for both."""


def draw(seed: int) -> Drawn:
    """A command with up to three oddities, on the command line and in configurations."""
    drawing = random.Random(seed)
    command = drawing.choices(COMMANDS, WEIGHTS)[0]
    options = {drawing.choice(OPTIONS): drawing.choice(VALUES) for _ in range(drawing.randint(1, 3))}
    if command not in LIGHTNING:
        given = [drawing.choice(["@dense.ckpt", _text(drawing.choice(VALUES))]) for _ in range(drawing.randint(0, 2))]
        own = {"quickstart": ["seed"], "report": ["dense", "out", "batch"], "export": ["out"], "methods": ["x"]}[
            command
        ]
        if command == "quickstart":  # it trains for seconds where nothing is wrong with it
            return [command, "--out", "/proc/nothing/here", "--seed", _text(drawing.choice(VALUES))], {}
        return [command, *given, f"--{drawing.choice(own)}={_text(drawing.choice(VALUES))}"], {}
    needed = ["--checkpoint", "@dense.ckpt", "--out", "@out"] if command in ("compress", "study") else []
    arguments = [command, "-c", str(CONFIGS / "data/digits.yaml"), "-c", "@base.yaml", *needed]
    if drawing.random() < 0.5:
        arguments += [f"--{option}={_text(value)}" for option, value in options.items()]
        texts = {}
    else:
        texts = {"odd.yaml": _broken(yaml.safe_dump(_nested(options), allow_unicode=True), drawing)}
        arguments += ["-c", "@odd.yaml"]
    if drawing.random() < 0.1:
        del arguments[drawing.randrange(1, len(arguments))]
    if drawing.random() < 0.1:
        arguments += arguments[1:3]
    return arguments, texts


def _text(value: object) -> str:
    return (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
    )


def _nested(options: dict[str, object]) -> dict[str, object]:
    found: dict[str, object] = {}
    for option, value in options.items():
        place: object = found
        *above, last = option.replace("data.", "data.init_args.").split(".")
        for key in above:
            if not isinstance(place.setdefault(key, {}), dict):  # type: ignore[attr-defined]
                place[key] = {}  # type: ignore[index]
            place = place[key]  # type: ignore[index]
        place[last] = value  # type: ignore[index]
    return found


def _broken(text: str, drawing: random.Random) -> str:
    """Most often the text itself; else cut, twice, as a list, or empty."""
    return drawing.choices(
        [
            text,
            text[: drawing.randrange(len(text) + 1)],
            text + text,
            "- " + text.replace("\n", "\n  "),
            "",
            "model:\n",
        ],
        [10, 1, 1, 1, 1, 1],
    )[0]


def broken_law(drawn: Drawn, dense: Path) -> str:
    """What is wrong with how the command ended; empty where it ended well, or with one short line about what was wrong with it."""
    arguments, texts = drawn
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "folder").mkdir()
        (folder / "text.ckpt").write_text("text")
        shutil.copy(dense, folder / "dense.ckpt")
        base = {"trainer": {**TRAINER, "default_root_dir": str(folder / "runs")}}
        for name, text in {"empty.yaml": "", "base.yaml": yaml.safe_dump(base), **texts}.items():
            (folder / name).write_text(text.replace("@", f"{folder}/"))
        given = [argument.replace("@", f"{folder}/") for argument in arguments]
        out, err = io.StringIO(), io.StringIO()
        with (
            _at(folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            try:
                code = tnlayers(*given)
            except SystemExit as stopped:
                code = stopped.code  # type: ignore[assignment]
            except Exception:
                return traceback.format_exc()
    errors = [line for line in err.getvalue().splitlines() if line.startswith("tnlayers: error: ")]
    if "Traceback" in err.getvalue() or code not in (0, 2):
        return f"exit code {code}: {err.getvalue()}"
    if code == 2 and (len(errors) != 1 or len(errors[0]) > LENGTH or err.getvalue().splitlines()[-1] != errors[0]):
        return f"{len(errors)} errors of up to {max(map(len, errors), default=0)} characters: {err.getvalue()}"
    return ""


@contextlib.contextmanager
def _at(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    broken = 0
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        few = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.default_root_dir", folder]
        assert tnlayers("fit", "-c", CONFIGS / "data/digits.yaml", *few, "--trainer.logger", "false") == 0
        dense = next(Path(folder).rglob("last.ckpt"))
        for seed in range(given.seed, given.seed + given.number):
            if problem := broken_law(draw(seed), dense):
                broken += 1
                shown = [argument[:200] for argument in draw(seed)[0]]
                print(f"seed {seed}: {shown} {str(draw(seed)[1])[:300]}\n{problem[-1500:]}\n", file=sys.__stdout__)
    print(f"{given.number} commands, {broken} broke the law")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
