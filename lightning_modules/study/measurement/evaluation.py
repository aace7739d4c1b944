"""Accuracy of a net with other weights in its layers."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.data.pictures import Batch
from lightning_modules.study.measurement.forward import FromLayer

__all__ = ["Score", "score", "scores_of_layer", "weights"]


@dataclass
class Score:
    """What a net has got right and lost on the pictures that it was given so far."""

    correct: int = 0
    total_loss: float = 0.0
    pictures: int = 0

    @property
    def accuracy(self) -> float:
        return self.correct / self.pictures

    @property
    def loss(self) -> float:
        """The mean cross-entropy."""
        return self.total_loss / self.pictures

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Adds logits (n, classes) and labels (n,); nan is wrong. The sums are on the CPU, because not every device has float64."""
        logits, labels = logits.cpu().double(), labels.cpu()
        self.correct += int(((logits.argmax(1) == labels) & ~logits.isnan().any(1)).sum())
        self.total_loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        self.pictures += len(labels)


@torch.no_grad()
def score(net: nn.Module, batches: Iterable[Batch]) -> Score:
    """Evaluates a net that is in evaluation mode."""
    found = Score()
    for pictures, labels in batches:
        found.add(net(pictures), labels)
    return found


@torch.no_grad()
def scores_of_layer(
    forward: FromLayer,
    layer: str,
    module: nn.Module,
    candidates: Sequence[Tensor],
    batches: Iterable[Batch],
    tick: Callable[[], None],
) -> list[Score]:
    """Evaluates a net with each of the candidates as one layer's weight; what lies before the layer is computed once a batch.

    Args:
        forward: of the net.
        layer: the layer's name, and `module` the layer.
        candidates: weights of its shape.
        batches: pictures on its device, and labels.
        tick: called after each batch.
    """
    found = [Score() for _ in candidates]
    for pictures, labels in batches:
        state = forward.before(layer, pictures)
        for candidate, result in zip(candidates, found, strict=True):
            with weights({module: candidate}):
                result.add(forward.after(state), labels)
        tick()
    return found


@contextmanager
def weights(replaced: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Gives layers other weights until the block ends, and then their own again."""
    tensors = [_weight(module) for module in replaced]
    own = [tensor.clone() for tensor in tensors]
    try:
        for tensor, value in zip(tensors, replaced.values(), strict=True):
            tensor.copy_(value)
        yield
    finally:
        for tensor, value in zip(tensors, own, strict=True):
            tensor.copy_(value)


def _weight(module: nn.Module) -> Tensor:
    """Returns the weight of a layer, to write to."""
    assert isinstance(module.weight, Tensor)
    return module.weight.detach()
