"""What the rows of a study add up to: the figures that its sentences and tables are made of."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from scipy.stats import spearmanr

from lightning_modules.study.measured import Measured, points
from lightning_modules.study.rows import CUT_SETS, Joint, Recommendation, Retrained, Single
from tnlayers.cuts import cut_label

__all__ = ["Control", "Depth", "Findings", "rank_correlation"]

Means = list[tuple[float, str]]


@dataclass(frozen=True)
class Depth:
    """How the norm loss that layers tolerate goes with their depth.

    Attributes:
        layers: the names of the layers, in order.
        cuts: those over which the figures are means.
        means: the tolerated norm loss of each layer.
        num_deep: how many of the last layers are "deep": a third.
        last: the mean of the deep layers.
        correlation: Spearman's, of the means with the order of the layers; None where all means are equal.
        noise: two standard deviations of the rank correlation of what has no trend.
    """

    layers: tuple[str, ...]
    cuts: tuple[str, ...]
    means: tuple[float, ...]
    num_deep: int
    last: float
    correlation: float | None
    noise: float


@dataclass(frozen=True)
class Control:
    """Truncations beside their controls, which have the same layer, cuts and bond dimensions.

    Attributes:
        num: how many pairs there are.
        tolerated: how many of the truncations are tolerated, and how many of the controls.
        gain: the mean accuracy of the truncations above that of their controls.
        verdict: "better" or "worse" where most truncations keep more or less accuracy than their controls, and so does the mean;
            else "alike".
    """

    num: int
    tolerated: tuple[int, int]
    gain: float
    verdict: str


@dataclass(frozen=True)
class Best:
    """The best of several truncations.

    Attributes:
        row: that with the largest norm loss tolerated, or the most accurate where none is.
        num: how many there are.
        num_tolerated: how many of them are tolerated.
    """

    row: Single | Joint
    num: int
    num_tolerated: int


class Findings:
    """The figures of a study, each computed when it is asked for."""

    def __init__(self, measured: Measured) -> None:
        self.measured = measured

    @property
    def standard_error(self) -> float:
        """The standard error of the dense accuracy, as an estimate for other pictures."""
        study = self.measured.study
        return math.sqrt(study.accuracy * (1 - study.accuracy) / study.pictures)

    @property
    def num_pictures_tolerated(self) -> int:
        study = self.measured.study
        return math.floor(study.protocol.tolerance * study.pictures + 1e-9)

    def label(self, *cuts: str) -> str:
        """Names a set of cuts, or both sides of a cut, as in "o|ihw"."""
        if len(cuts) > 1:
            return next((name for name, members in CUT_SETS.items() if members == cuts), "+".join(cuts))
        return cut_label(cuts[0], max((of.shape for of in self.measured.layers if cuts[0] in of.bonds), key=len))

    def layers_with(self, cuts: Sequence[str]) -> str:
        """Says what the layers that have these cuts are called: a linear has but one cut."""
        return "layers" if all(set(cuts) <= layer.bonds.keys() for layer in self.measured.layers) else "convolutions"

    # ---- one layer and one cut at a time

    @cached_property
    def tolerated(self) -> dict[tuple[str, str], float]:
        """(layer, cut) -> the norm loss tolerated there."""
        measured = self.measured
        cells = ((layer.name, cut) for layer in measured.layers for cut in measured.cuts())
        return {at: eps for at in cells if (eps := measured.tolerated_eps(*at)) is not None}

    @property
    def tolerant_layers(self) -> Means:
        """The norm loss that each layer tolerates in the mean, the least first."""
        return _means((layer, eps) for (layer, _), eps in self.tolerated.items())

    @property
    def tolerant_cuts(self) -> Means:
        """The norm loss that is tolerated at each cut in the mean, the least first."""
        return _means((cut, eps) for (_, cut), eps in self.tolerated.items())

    @property
    def num_bottomless(self) -> int:
        """How often a single singular value is tolerated, at cuts that have more."""
        bonds = {layer.name: layer.bonds for layer in self.measured.layers}
        if all(bonds[layer][cut] <= 1 for layer, cut in self.tolerated):
            return 0
        return sum(self.measured.bottomless(*at) for at in self.tolerated)

    @property
    def num_missing(self) -> int:
        """How many layers are not measured yet; in a finished study the norm loss of those that lack is always more."""
        if self.measured.recommendation is not None:
            return 0
        some = sum(any(bond > 1 for bond in layer.bonds.values()) for layer in self.measured.layers)
        return some - len({layer for layer, _ in self.tolerated})

    @property
    def bonds_needed(self) -> Means:
        """The fraction of its bond dimension that each cut needs in the mean, the least first."""
        cells = ((layer, cut) for layer in self.measured.layers for cut in self.measured.cuts())
        needed = ((layer, cut, self.measured.tolerated_bond(layer, cut)) for layer, cut in cells)
        return _means((cut, bond / layer.bonds[cut]) for layer, cut, bond in needed if bond is not None)

    @cached_property
    def depth(self) -> Depth | None:
        """Tolerated norm loss by depth, of convolutions where there are any, over the cuts that all of them have."""
        measured = self.measured
        convolutions = [layer for layer in measured.layers if len(layer.shape) > 2] or measured.layers
        names = [layer.name for layer in convolutions if any(measured.curve(layer.name, cut) for cut in layer.bonds)]
        common = tuple(cut for cut in measured.cuts() if all((name, cut) in self.tolerated for name in names))
        if len(names) < 2 or not common:
            return None
        means = tuple(fmean(self.tolerated[name, cut] for cut in common) for name in names)
        deep = means[-max(1, len(means) // 3) :]
        trend, noise = rank_correlation(range(len(means)), means), 2 / math.sqrt(len(means) - 1)
        return Depth(tuple(names), common, means, len(deep), fmean(deep), trend, noise)

    # ---- several cuts, all layers, controls

    @property
    def best_several(self) -> Best | None:
        """The best truncation of several cuts of one layer."""
        singles = self.measured.singles.items()
        return self._best([curve for (_, cuts, control), curve in singles if len(cuts) > 1 and not control])

    @property
    def best_joint(self) -> Best | None:
        """The best truncation of all layers."""
        return self._best(self.measured.joints.values())

    def _best(self, curves: Iterable[Sequence[Single | Joint]]) -> Best | None:
        counted = [(self.measured.num_tolerated(curve), curve) for curve in curves]
        rows = [row for _, curve in counted for row in curve if row.eps > 0]
        good = [row for kept, curve in counted for row in curve[:kept] if row.eps > 0]
        if good:
            return Best(max(good, key=lambda row: (row.eps, row.accuracy)), len(rows), len(good))
        return Best(max(rows, key=lambda row: (row.accuracy, row.eps)), len(rows), 0) if rows else None

    @property
    def controlled(self) -> list[tuple[str, ...]]:
        """The cuts at which there are controls."""
        return list(dict.fromkeys(cuts for _, cuts, control in self.measured.singles if control))

    def control(self, name: str) -> Control | None:
        """Compares a control with the truncations, of which those count that take something from the norm."""
        measured, pairs = self.measured, list[tuple[Single, Single]]()
        for (layer, cuts, control), curve in measured.singles.items():
            if control == name:
                partners = {row.bonds: row for row in measured.curve(layer, *cuts)}
                pairs += [(partners[row.bonds], row) for row in curve if row.bonds in partners and row.eps > 0]
        if not pairs:
            return None
        first, second = (sum(measured.within(pair[side].accuracy) for pair in pairs) for side in (0, 1))
        gains = [truncation.accuracy - control.accuracy for truncation, control in pairs]
        gain, most = fmean(gains), sum(gain > 0 for gain in gains) - sum(gain < 0 for gain in gains)
        counts = abs(gain) > measured.study.protocol.tolerance and gain * most > 0
        return Control(len(pairs), (first, second), gain, ("better" if gain > 0 else "worse") if counts else "alike")

    # ---- retraining, and what is recommended

    @property
    def retrained(self) -> list[Retrained]:
        """The truncations of all layers that were trained for an epoch or more."""
        return [row for row in self.measured.retrained if len(row.accuracy) > 1]

    @property
    def broken(self) -> list[Retrained]:
        """Those of them that had lost more than the tolerance."""
        return [row for row in self.retrained if not self.measured.within(row.accuracy[0])]

    @property
    def mended(self) -> list[Retrained]:
        """Those of the broken ones that are within the tolerance again."""
        return [row for row in self.broken if self.measured.within(row.accuracy[-1])]

    @property
    def most_mended(self) -> Retrained:
        """The deepest fall that is undone, or that which comes nearest where none is."""
        if self.mended:
            return min(self.mended, key=lambda row: (row.accuracy[0], row.weights == "dense", row.params_kept))
        return max(self.broken, key=lambda row: row.accuracy[-1])

    @property
    def factorized_well(self) -> list[Recommendation]:
        """The ways to factorize the whole net that end within the tolerance."""
        return [row for row in self.measured.factorized if self.measured.within(row.accuracy[-1])]

    @property
    def num_epochs(self) -> int:
        return max(len(row.accuracy) for row in self.broken) - 1

    def effect(self, accuracy: float) -> str:
        """Says in words what was done to the accuracy of the dense net."""
        lost = self.measured.lost(accuracy)
        if abs(lost) < 0.0005:
            return "as accurate as the dense net"
        return f"{points(abs(lost))} {'lost' if lost > 0 else 'gained'}"


def _means(values: Iterable[tuple[str, float]]) -> Means:
    """Computes the mean of what each name has; the smallest comes first."""
    found: dict[str, list[float]] = {}
    for name, value in values:
        found.setdefault(name, []).append(value)
    return sorted((fmean(each), name) for name, each in found.items())


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Computes Spearman's correlation, ties at their mean rank; None where one side is constant."""
    if len(set(x)) == 1 or len(set(y)) == 1:
        return None
    found: Any = spearmanr(x, y)
    return float(found.statistic)
