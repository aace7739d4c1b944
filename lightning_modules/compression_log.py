"""What becomes of the factorized layers during a run: in every logger and, for truncations, in the run's folder."""

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_modules.classifier import ImageClassifier
from lightning_modules.compression import log_report
from lightning_modules.plots import plot_spectra
from lightning_modules.report import Report
from tnlayers import FactorizedLayer, Rule, rules_of, summarize, to_dense
from tnlayers.linalg import effective_rank, precise, singular_values

__all__ = ["CompressionLog", "run_folder"]

_WIDEST = 1024  # the singular values of wider weights take longer than they are worth in every epoch
_PANELS = 16


class CompressionLog(Callback):
    """Logs, with every epoch's metrics, what the net keeps and the rank and effective rank of each factorized layer.

    Of each truncation (`RankSchedule` calls `truncated`) it writes a report, the spectra and plots.
    """

    def __init__(self) -> None:
        self._rules: list[Rule] = []
        self._kept: dict[str, float] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, ImageClassifier) and (layers := factorized_layers(pl_module.net)):
            values = self._costs(pl_module)
            for name, layer in layers.items():
                values |= {f"compress/{name}/rank{n}": float(rank) for n, rank in enumerate(layer.ranks)}
                if min(_unfolding_shape(layer)) <= _WIDEST:
                    values[f"compress/{name}/effective_rank"] = effective_rank(_spectrum(layer))
            pl_module.log_dict(values, sync_dist=trainer.world_size > 1)

    def _costs(self, module: ImageClassifier) -> dict[str, float]:
        """Counted anew only where ranks have changed."""
        if (rules := rules_of(module.net)) != self._rules:
            totals = summarize(module.net, module.example_input, measure=False).totals
            self._rules = rules
            self._kept = {"compress/params_kept": totals.params_kept, "compress/macs_kept": totals.macs_kept}
        return dict(self._kept)

    def truncated(self, trainer: Trainer, module: ImageClassifier, before: nn.Module) -> None:
        """Reports the truncation that made `module.net` of `before`; called in every process."""
        folder = run_folder(trainer) / "truncations" / f"epoch={trainer.current_epoch}"
        if not trainer.is_global_zero:
            return
        old = {name: before.get_submodule(name) for name in factorized_layers(module.net)}
        changed = {name: new for name, new in factorized_layers(module.net).items() if _text(new) != _text(old[name])}
        spectra = {
            name: (_spectrum(old[name]).tolist(), _spectrum(layer).tolist())
            for name, layer in changed.items()
            if min(_unfolding_shape(layer)) <= _WIDEST
        }
        titles = {name: f"{_text(old[name])} to {_text(layer)}" for name, layer in changed.items()}
        summary = summarize(module.net, module.example_input, reference=to_dense(before), measure=False)
        title = f"{module.hparams['net']}, truncated at epoch {trainer.current_epoch}"
        report = Report(title, summary, {}, ("errors      against the weights right before the truncation",))
        report.write(folder)
        (folder / "spectra.json").write_text(json.dumps({name: list(pair) for name, pair in spectra.items()}) + "\n")
        errors = {layer.name: layer.error or 0.0 for layer in summary.layers}
        worst = sorted(spectra, key=lambda name: -errors[name])[:_PANELS]
        if worst:
            shown = {name: spectra[name] for name in spectra if name in worst}
            plot_spectra(shown, titles).savefig(folder / "spectra.png", dpi=120)
        log_report(trainer, report, folder, stage="truncation")


def factorized_layers(net: nn.Module) -> dict[str, FactorizedLayer]:
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, FactorizedLayer)}


def run_folder(trainer: Trainer) -> Path:
    """Where a run keeps what it writes, beside its checkpoints; asked by every process."""
    saved = trainer.checkpoint_callback
    folder = getattr(saved, "dirpath", None)
    return Path(folder).parent if folder else Path(trainer.log_dir or trainer.default_root_dir)


def _unfolding_shape(layer: FactorizedLayer) -> tuple[int, int]:
    rows, columns, *window = layer.geometry.weight_shape
    for size in window:
        columns *= size
    return layer.geometry.groups * rows, columns


def _spectrum(layer: nn.Module) -> Tensor:
    """Singular values of the weight as a matrix (out | rest), the largest first."""
    assert isinstance(layer.weight, Tensor)
    return singular_values(precise(layer.weight).flatten(1))


def _text(layer: nn.Module) -> str:
    return "·".join(map(str, layer.ranks)) if isinstance(layer, FactorizedLayer) else "dense"
