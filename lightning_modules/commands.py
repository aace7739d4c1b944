"""The commands that need no configuration: quickstart, report, export, methods and configs."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import jsonargparse
from rich.console import Console

from lightning_modules.console import say
from tnlayers.errors import UserError

__all__ = ["configs", "export", "methods", "quickstart", "report", "run"]


def run(arguments: list[str]) -> int:
    """Parses and runs one of them; returns the exit code."""
    commands: dict[str, Callable[..., None]] = {
        command.__name__: command for command in (quickstart, report, export, methods, configs)
    }
    name, *rest = arguments
    parser = jsonargparse.ArgumentParser(
        prog=f"tnlayers {name}", exit_on_error=False, allow_abbrev=False, description=commands[name].__doc__
    )
    if name == "configs":
        parser.add_argument("name", nargs="?", help="which one to print, such as experiment/digits")
    else:
        parser.add_function_arguments(commands[name], as_positional=True)
    commands[name](**vars(parser.parse_args(rest)))
    return 0


def quickstart(out: str = "runs/quickstart", seed: int = 0) -> None:
    """Trains a CNN on scikit-learn's digits, compresses it, retrains it and reports.

    Args:
        out: where everything is written; a folder that already holds a run gets a numbered neighbour.
        seed: of the training.
    """
    from lightning_modules.quickstart import run_quickstart

    run_quickstart(Path(out), seed, Console())


def methods() -> None:
    """Prints the table of methods: layers, weights, ranks, options and where they come from."""
    from tnlayers import methods_table

    print(methods_table())


def configs(name: str | None = None) -> None:
    """Lists the configurations that come with the package, for -c in other commands, or prints one."""
    from lightning_modules.shipped_configs import config_names, config_path, description

    if name is not None:
        print(config_path(name).read_text(encoding="utf-8"), end="")
        return
    kind = ""
    for each in config_names():
        if kind != (kind := each.partition("/")[0]):
            say(f"{kind}:")
        say(f"  {each:40} {description(each)}")


def report(checkpoint: str, dense: str | None = None, out: str | None = None, batch: int = 128) -> None:
    """Prints the per-layer table of a checkpoint that fit or compress wrote.

    Args:
        checkpoint: the file.
        dense: the dense checkpoint that it was compressed from, to measure each layer's error against.
        out: a folder to write the report to as well; it must be new.
        batch: pictures in the batch that is timed.
    """
    import copy

    import torch

    from lightning_modules.classifier import load_net
    from lightning_modules.folders import whole_folder
    from lightning_modules.report import Report
    from tnlayers import load_checkpoint, summarize, to_dense

    if batch < 1:
        raise UserError(f"batch {batch}: expected at least 1")
    net, shape = load_net(checkpoint)
    reference = None
    if dense is not None:
        reference = to_dense(copy.deepcopy(net))
        load_checkpoint(dense, reference)
    example = torch.zeros(batch, *shape).contiguous(memory_format=torch.channels_last)
    with whole_folder(Path(out)) if out is not None else nullcontext() as folder:
        found = Report(checkpoint, summarize(net, example, reference=reference), {})
        found.show(Console())
        if folder is not None:
            found.write(folder)


def export(checkpoint: str, out: str) -> None:
    """Writes a checkpoint's net, with its structure, as a .safetensors file.

    Args:
        checkpoint: what fit or compress wrote.
        out: a new file; every command takes it in a checkpoint's place, except to resume a run.
    """
    from lightning_modules.classifier import NET_ARGUMENTS, load_net
    from tnlayers import save_safetensors
    from tnlayers.checkpoints import read_checkpoint

    if Path(out).exists():
        raise UserError(f"{out} is there already; give another name, or remove it first")
    net, _ = load_net(checkpoint)
    hparams = read_checkpoint(checkpoint)["hyper_parameters"]
    save_safetensors(net, out, {key: hparams[key] for key in NET_ARGUMENTS})
    print(f"written     {out}")
