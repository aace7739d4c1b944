"""The job behind `tnlayers compress`: a checkpoint in, a tensorized one out, measured on the way."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_modules.classifier import ImageClassifier
from lightning_modules.data import ImageData
from lightning_modules.healing import Healing, heal_slices, healed_sentence
from lightning_modules.loggers import log_pictures, log_table
from lightning_modules.report import Report
from lightning_modules.tuning import tune
from tnlayers import Healed, MacsKept, Rule, Summary, fraction_kept, rules_of, summarize, tensorize, to_dense
from tnlayers.errors import UserError
from tnlayers.normalisation import batch_norms, take_statistics
from tnlayers.summary import percent
from tnlayers.tracing import factorized_layers
from tnlayers.tuning import Tuned

__all__ = [
    "Compression",
    "accuracy_on_test",
    "calibration_batches",
    "compress",
    "layer_metrics",
    "log_report",
    "recalibrate_if_better",
]

_CALIBRATION_BATCHES = 16


@dataclass(frozen=True)
class Compression:
    """The result of `compress`: the rules with integer ranks, and the figures."""

    rules: list[Rule]
    report: Report


def compress(
    model: ImageClassifier,
    data: ImageData,
    trainer: Trainer,
    checkpoint: str | Path,
    out: Path,
    *,
    tunes: bool = False,
    healing: Healing = Healing(),  # noqa: B008  (frozen)
) -> Compression:
    """Loads a checkpoint into the model, applies the model's rules, and writes model.ckpt and the report to `out`.

    Of a tensorized checkpoint the layers that a rule matches are made dense first, so that a budget is always a fraction of
    the dense layers; the others keep what they have.

    BatchNorm's running statistics belong to the dense net's activations. They are estimated anew from training pictures
    where the compressed net then agrees better with the dense one on further training pictures; labels are not used.

    Args:
        model: a classifier with rules and a fresh net; it is compressed in place.
        data: gives the pictures to calibrate with, and the test pictures for the accuracies.
        trainer: runs the tests.
        checkpoint: of the dense net, or of a tensorized one that is to be compressed further.
        out: an empty folder.
        tunes: whether to measure how each layer is computed the fastest, unless its rule names a plan; see `tnlayers.autotune`.
        healing: whether and how the compressed net learns from the dense one without labels.
    """
    trainer.precision_plugin.convert_module(model)  # ranks are chosen in the dtype that the factors will have
    loaded = model.load(checkpoint)
    if not model.rules:
        raise UserError(
            "compress has no rules, and would change nothing: give some, such as -c rules/tucker or "
            "--model.rules '[{pattern: \"*\", method: Tucker, rank: MacsKept(0.5)}]'"
        )
    stage = "before" if rules_of(model.net) else "dense"
    to_dense(model.net, model.rules)
    rules = model.resolve("decompose")  # first of all: what is wrong with them shows before anything is written
    accuracy = {stage: accuracy_on_test(trainer, model, data)}
    dense = copy.deepcopy(model.net)
    tensorize(model.net, rules)
    batches = calibration_batches(data)
    recalibrated = recalibrate_if_better(model.net, dense, batches)
    accuracy["right after"] = accuracy_on_test(trainer, model, data)
    verb = "re-estimated on training pictures" if recalibrated else "kept: new ones did not bring the outputs nearer"
    notes = [f"from        {checkpoint}: {loaded}", f"BatchNorm   statistics {verb}"]
    healed: list[Healed] = []
    if healing.pictures:
        healed, accuracy["healed"] = _healed(trainer, model, dense, data, healing, batches)
        notes.append(healed_sentence(healed, healing, data.num_train))
    # The layout is the one in which the classifier runs the net.
    example = batches[0].cpu().to(model.dtype, memory_format=torch.channels_last)
    tuned, said = _tuned(trainer, model, example) if tunes else ({}, [])
    rules, notes = [_with_plan(rule, model.net) for rule in rules], notes + said
    summary = summarize(model.net.cpu(), example, reference=dense.cpu(), rules=rules)
    report = Report(f"{model.hparams['net']} compressed", summary, accuracy, tuple(notes), tuned, tuple(healed))
    trainer.save_checkpoint(out / "model.ckpt", weights_only=True)
    if trainer.is_global_zero:
        report.write(out)
        log_report(trainer, report, out)
    return Compression(rules, report)


def _healed(
    trainer: Trainer,
    model: ImageClassifier,
    dense: nn.Module,
    data: ImageData,
    healing: Healing,
    batches: Sequence[Tensor],
) -> tuple[list[Healed], float]:
    """Heals the net, takes BatchNorm's statistics anew where that helps; returns what became of its slices, and its accuracy."""
    found = heal_slices(trainer, model, dense, data, healing)
    recalibrate_if_better(model.net, dense, batches)  # with those that belong to no slice
    return found, accuracy_on_test(trainer, model, data)


def _tuned(trainer: Trainer, model: ImageClassifier, example: Tensor) -> tuple[dict[str, Tuned], list[str]]:
    """Measures the plans of a compressed net; returns what was found, and a note where they have more MACs than before."""
    before = _macs_kept(model.net.cpu(), example)
    found = tune(trainer, model.net, model.rules, example)
    if not found or (after := _macs_kept(model.net, example)) <= before:
        return found, []
    kept = f"from {percent(before)} to {percent(after)} of the dense net's"
    return found, [f"MACs rose   {kept}, since computing like dense is faster in some layers"]


def _macs_kept(net: nn.Module, example: Tensor) -> float:
    return fraction_kept(net, MacsKept, example, of="model")


def _with_plan(rule: Rule, net: nn.Module) -> Rule:
    return replace(rule, plan=factorized_layers(net)[rule.pattern].plan_choice) if rule.factorization else rule


def accuracy_on_test(trainer: Trainer, model: ImageClassifier, data: ImageData) -> float:
    """Returns the fraction of the test pictures that the model gets right."""
    return trainer.test(model, datamodule=data, verbose=False)[0]["test/accuracy"]


def calibration_batches(data: ImageData) -> list[Tensor]:
    """Returns training pictures to estimate statistics from, fewer where there are few; one alone has no variance."""
    return data.calibration_batches(max(1, min(_CALIBRATION_BATCHES, data.num_train // 2)))


def recalibrate_if_better(net: nn.Module, dense: nn.Module, batches: Sequence[Tensor]) -> bool:
    """Estimates the BatchNorm statistics on half of the batches, and keeps them if they help on the other half."""
    if not batch_norms(net) or len(batches) < 2 or min(map(len, batches)) < 2:
        return False
    estimate, judge = batches[::2], batches[1::2]
    before = copy.deepcopy(net.state_dict())
    agreement = _agreement(net, dense, judge)
    net.eval()
    like = next(net.parameters())
    take_statistics(net, (((pictures.to(like),), {}) for pictures in estimate))
    better = _agreement(net, dense, judge) > agreement
    if not better:
        net.load_state_dict(before)
    return better


def _agreement(net: nn.Module, dense: nn.Module, batches: Sequence[Tensor]) -> float:
    """Returns how near the outputs are: minus the mean KL divergence of the dense net's probabilities from the net's."""
    net.eval()
    dense.eval()
    like = next(net.parameters())
    dense.to(like.device)
    losses = []
    with torch.no_grad():
        for x in (pictures.to(like) for pictures in batches):
            ours, theirs = (each(x).float().log_softmax(1) for each in (net, dense))
            losses.append(nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean"))
    return -float(torch.stack(losses).mean())


def layer_metrics(summary: Summary) -> dict[str, float]:
    """Returns what is kept in all, and each factorized layer's ranks and error, by the names under which they are logged."""
    totals = summary.totals
    metrics = {"compress/params_kept": totals.params_kept, "compress/macs_kept": totals.macs_kept}
    for layer in summary.layers:
        metrics |= {f"compress/{layer.name}/rank{n}": float(rank) for n, rank in enumerate(layer.rank)}
        if layer.error is not None:
            metrics[f"compress/{layer.name}/error"] = layer.error
    return metrics


def log_report(trainer: Trainer, report: Report, folder: Path) -> None:
    """Hands the figures to every logger, and the table and the plots in `folder` to those that take them. For the first process."""
    metrics = layer_metrics(report.summary)
    metrics |= {f"compress/accuracy_{stage.replace(' ', '_')}": value for stage, value in report.accuracy.items()}
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
        log_table(logger, "compress/layers", *report.summary.table(), step=trainer.global_step)
        log_pictures(logger, "compress/plots", sorted(folder.glob("*.png")), step=trainer.global_step)
        logger.save()
