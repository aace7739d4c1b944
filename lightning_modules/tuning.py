"""How the layers of a run are computed the fastest: measured by its first process, under its precision, for all of them."""

from collections.abc import Sequence

from lightning.pytorch import Trainer
from torch import nn

from lightning_modules.console import progress_of
from tnlayers import Rule, autotune
from tnlayers.errors import UserError, message
from tnlayers.rules import fits
from tnlayers.schedule import is_measured, plain_plan
from tnlayers.tracing import Example, factorized_layers
from tnlayers.tuning import Tuned

__all__ = ["tune"]


def tune(trainer: Trainer, net: nn.Module, rules: Sequence[Rule], example: Example) -> dict[str, Tuned]:
    """Sets the measured plans of a net's layers, the same ones in every process; a plan that a rule names stays.

    Args:
        trainer: its precision holds, and a bar shows how far it is where the trainer shows bars.
        net: its layers are set in place.
        rules: the first that fits a layer may name its plan.
        example: what the net takes, as in the run.

    Returns:
        What `autotune` found; empty in every process but the first.
    """
    layers = {name: layer for name, layer in factorized_layers(net).items() if not _has_plan(name, rules)}
    found: dict[str, Tuned] = {}
    problem: Exception | None = None
    if trainer.is_global_zero and layers:
        shown = trainer.progress_bar_callback is not None
        try:
            with trainer.precision_plugin.forward_context(), progress_of("timing the layers", shown=shown) as progress:
                found = autotune(net, example, layers=layers, progress=progress)
        except Exception as error:  # whatever it is, the other processes must not wait for plans
            problem = error
    plans = {name: plain_plan(layers[name].plan_choice) for name in found}
    plans, said = trainer.strategy.broadcast((plans, message(problem) if problem else None))
    if said is not None:
        raise problem or UserError(said)
    if not trainer.is_global_zero:
        for name, plan in plans.items():
            layers[name].set_plan(plan)
    return found


def _has_plan(name: str, rules: Sequence[Rule]) -> bool:
    named = next((rule.plan for rule in rules if rule.factorization and fits(name, rule.pattern)), None)
    return named not in (None, "auto") and not is_measured(named)
