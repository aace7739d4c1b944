"""BatchNorm while a net is fitted to features: by batches, with statistics taken anew at the end."""

import copy
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tnlayers.tracing import modes_kept

__all__ = ["batch_norms", "normalising_by_batches", "take_statistics"]


def batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [each for each in module.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def normalising_by_batches(module: nn.Module) -> Iterator[None]:
    """Sets evaluation mode for this block, so that nothing is dropped, but for BatchNorm."""
    with modes_kept(module):
        module.eval()
        for norm in batch_norms(module):
            norm.train()
        yield


def take_statistics(module: nn.Module, calls: Iterable[tuple[Any, Any]], kept: Collection[nn.Parameter] = ()) -> None:
    """Sets the running statistics of a module's BatchNorms to the plain averages over calls of it.

    Args:
        module: is changed in place.
        calls: the positional and the keyword arguments of each.
        kept: parameters of others; a BatchNorm whose weight is among them keeps its statistics.
    """
    norms = [norm for norm in batch_norms(module) if norm.track_running_stats and norm.weight not in kept]
    if not norms:
        return
    before = [(norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
    try:
        with normalising_by_batches(module), torch.no_grad():
            for args, kwargs in calls:
                module(*args, **kwargs)
    finally:
        for norm, (momentum, state) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if not norm.num_batches_tracked:  # nothing has reached it
                norm.load_state_dict(state)
