"""Optimizers that were made before a model's layers were replaced: they go on with parameters that are no longer the model's."""

import gc
import warnings
from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

__all__ = ["warn_of_optimizers"]


def warn_of_optimizers(gone: Iterable[nn.Parameter]) -> None:
    """Warns of every optimizer of this program that holds one of the parameters that left a model: it would train nothing."""
    lost = {id(parameter) for parameter in gone}
    for found in gc.get_objects() if lost else ():
        if not issubclass(type(found), Optimizer):
            continue
        held = [parameter for group in getattr(found, "param_groups", ()) for parameter in group["params"]]
        if stale := sum(id(parameter) in lost for parameter in held):
            warnings.warn(
                f"{type(found).__name__} was made before the model was tensorized: {stale} of the {len(held)} parameters that it "
                "trains are no longer the model's; make it anew",
                stacklevel=3,
            )
