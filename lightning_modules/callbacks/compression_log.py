"""The log of a run's factorized layers: ranks, what is kept, effective ranks, and a report of every truncation."""

import json

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_modules.compression import layer_metrics, log_report
from lightning_modules.loggers import run_folder
from lightning_modules.plots import Spectrum, plot_spectra, png
from lightning_modules.report import Report
from lightning_modules.tensorized import example_input, tensorized_net
from tnlayers import FactorizedLayer, Summary, summarize
from tnlayers.files import write_files
from tnlayers.linalg import effective_rank, precise, singular_values
from tnlayers.tracing import factorized_layers

__all__ = ["CompressionLog"]

_TINY = torch.finfo(torch.float64).tiny


class CompressionLog(Callback):
    """Logs the factorized layers of a net beside its metrics, at the start, after every epoch and at truncations.

    compress/params_kept and compress/macs_kept are of the whole net. Of each layer: compress/<layer>/rank0, rank1, ... and
    compress/<layer>/effective_rank, which tells how many of them the weights use (`tnlayers.linalg.effective_rank`, of the
    weight unfolded as outputs x rest). A net without factorized layers logs nothing.
    """

    def __init__(self) -> None:
        self._ranks: dict[str, object] = {}
        self._kept: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics, layers = self._measured(pl_module), factorized_layers(tensorized_net(pl_module))
        errors = {f"compress/{name}/error": layer.decomposition_error for name, layer in layers.items()}
        if trainer.is_global_zero and metrics and trainer.global_step == 0:
            for logger in trainer.loggers:
                logger.log_metrics(
                    metrics | {name: error for name, error in errors.items() if error is not None}, step=0
                )
                logger.save()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            pl_module.log_dict(self._measured(pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log_dict(self._measured(pl_module))

    def truncated(self, trainer: Trainer, module: LightningModule, reference: nn.Module, epoch: int) -> None:
        """Reports a truncation: files in truncations/epoch=<epoch>/ of the run's folder, and the same to the loggers.

        Every process may call it; the first one works.

        Args:
            trainer: whose loggers and folder these are.
            module: holds the net as it is now.
            reference: a copy of the net from before.
            epoch: names the folder.
        """
        if not trainer.is_global_zero:
            return
        folder = run_folder(trainer) / "truncations" / f"epoch={epoch}"
        net, named = tensorized_net(module), module.hparams.get("net")
        title = named if isinstance(named, str) else type(module).__name__
        summary = summarize(net, example_input(module), reference=reference, measure=False)
        note = "error       of this truncation: against the weights right before it"
        report = Report(f"{title} truncated at epoch {epoch}", summary, {}, (note,))
        report.write(folder)
        spectra = _spectra(reference, net, summary)
        files: dict[str, str | bytes] = {
            "spectra.json": json.dumps({each.layer: each.to_plain() for each in spectra}) + "\n"
        }
        if spectra:
            files["spectra.png"] = png(plot_spectra(spectra))
        write_files(folder, files)
        log_report(trainer, report, folder)

    def _measured(self, module: LightningModule) -> dict[str, float]:
        net = tensorized_net(module)
        if not (layers := factorized_layers(net)):
            return {}
        ranks = {name: layer.ranks for name, layer in layers.items()}
        if ranks != self._ranks:  # else nothing that is counted has changed
            self._ranks = dict(ranks)
            counts = layer_metrics(summarize(net, example_input(module), measure=False))
            self._kept = {name: value for name, value in counts.items() if not name.endswith("/error")}
        spread = {f"compress/{name}/effective_rank": effective_rank(_unfolded(layer)) for name, layer in layers.items()}
        return self._kept | spread


def _unfolded(layer: nn.Module) -> Tensor:
    """Returns the weight as float64 (outputs, rest)."""
    with torch.no_grad():
        return precise(layer.weight).flatten(1)  # type: ignore[arg-type]


def _spectra(reference: nn.Module, net: nn.Module, summary: Summary) -> list[Spectrum]:
    """Returns the spectra of the layers whose rank changed, those with the largest error first."""
    errors = {layer.name: layer.error or 0.0 for layer in summary.layers}
    spectra = []
    for name, layer in factorized_layers(net).items():
        old = reference.get_submodule(name)
        before = old.ranks if isinstance(old, FactorizedLayer) else ()
        if before != layer.ranks:
            values, left = (singular_values(_unfolded(each)) for each in (old, layer))
            top = values[0].clamp(min=_TINY)
            spectra.append(
                Spectrum(
                    layer=name,
                    values=tuple((values / top).tolist()),
                    left=tuple((left / top).tolist()),
                    before=before,
                    after=layer.ranks,
                    error=errors[name],
                )
            )
    return sorted(spectra, key=lambda each: -each.error)
