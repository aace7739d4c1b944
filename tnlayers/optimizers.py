"""Optimizers that were made before a model's layers were replaced: they go on with parameters that are no longer the model's."""

import gc
import warnings
from collections.abc import Iterable
from weakref import ReferenceType

from torch import nn
from torch.optim import Optimizer

__all__ = ["warn_of_optimizers"]


def warn_of_optimizers(before: Iterable[ReferenceType[nn.Parameter]], model: nn.Module) -> None:
    """Warns of every optimizer of this program that holds a parameter that left a model: it would train nothing.

    Args:
        before: the parameters that the model had. Those that nobody holds any longer are in no optimizer, and to look
            through all objects of a program takes a while.
        model: as it is now.
    """
    kept = set(model.parameters())
    gone = {parameter for reference in before if (parameter := reference()) is not None and parameter not in kept}
    for found in gc.get_objects() if gone else ():
        if not issubclass(type(found), Optimizer):
            continue
        held = [parameter for group in getattr(found, "param_groups", ()) for parameter in group["params"]]
        if stale := sum(parameter in gone for parameter in held):
            warnings.warn(
                f"{type(found).__name__} was made before the model was tensorized: {stale} of the {len(held)} parameters that it "
                "trains are no longer the model's; make it anew",
                stacklevel=3,
            )
