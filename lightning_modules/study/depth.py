"""How the norm loss that layers tolerate goes with their depth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from scipy.stats import spearmanr

__all__ = ["Depth", "rank_correlation"]


@dataclass(frozen=True)
class Depth:
    """The norm loss tolerated by the layers in order.

    Attributes:
        layers: the names of the layers.
        cuts: those over which the figures are means.
        means: the tolerated norm loss of each layer.
    """

    layers: tuple[str, ...]
    cuts: tuple[str, ...]
    means: tuple[float, ...]

    @property
    def num_deep(self) -> int:
        """How many of the last layers are "deep": a third."""
        return max(1, len(self.means) // 3)

    @property
    def last(self) -> float:
        """The mean of the deep layers."""
        return fmean(self.means[-self.num_deep :])

    @property
    def correlation(self) -> float | None:
        """Spearman's correlation of the means with the order of the layers; None where all means are equal."""
        return rank_correlation(range(len(self.means)), self.means)

    @property
    def noise(self) -> float:
        """Two standard deviations of the rank correlation of what has no trend."""
        return 2 / math.sqrt(len(self.means) - 1)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Computes Spearman's correlation, ties at their mean rank; None where one side is constant."""
    if len(set(x)) == 1 or len(set(y)) == 1:
        return None
    found: Any = spearmanr(x, y)
    return float(found.statistic)
