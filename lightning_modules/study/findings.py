"""The rows of a study as figures: curves, what is tolerated, trends with depth, controls."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import StatisticsError, correlation, fmean
from typing import TypeVar

from lightning_modules.study.rows import (
    CUT_SETS,
    Joint,
    Layer,
    Recommendation,
    Retrained,
    Row,
    Single,
    Study,
)
from tnlayers.cuts import cut_label, cuts_of
from tnlayers.errors import UserError

__all__ = ["Control", "Depth", "Measured", "effect", "points", "rank_correlation", "standard_error"]

_ROUNDING = 1e-9  # of an accuracy
_Truncation = TypeVar("_Truncation", Single, Joint)


@dataclass(frozen=True)
class Measured:
    """The rows of a study, by what they are of; a study that is not finished has fewer.

    Attributes:
        layers: in the order of the rows.
        singles: (layer, cuts, control) -> a curve: truncations by rising norm loss.
        joints: cuts -> a curve.
        untruncated: the dense net itself, retrained.
    """

    study: Study
    layers: tuple[Layer, ...]
    singles: dict[tuple[str, tuple[str, ...], str], tuple[Single, ...]]
    joints: dict[tuple[str, ...], tuple[Joint, ...]]
    untruncated: Retrained | None
    retrained: tuple[Retrained, ...]
    recommendations: tuple[Recommendation, ...]

    @staticmethod
    def of(rows: Sequence[Row]) -> "Measured":
        """
        Raises:
            ValueError: rows that do not begin with a Study.
        """
        if not rows or not isinstance(rows[0], Study):
            raise UserError(
                f"{len(rows)} rows without the study's own first: expected a study.jsonl from its beginning"
            )
        singles: dict[tuple[str, tuple[str, ...], str], list[Single]] = {}
        joints: dict[tuple[str, ...], list[Joint]] = {}
        for row in rows:
            if isinstance(row, Single):
                singles.setdefault((row.layer, row.cuts, row.control), []).append(row)
            elif isinstance(row, Joint):
                joints.setdefault(row.cuts, []).append(row)
        return Measured(
            rows[0],
            tuple(row for row in rows if isinstance(row, Layer)),
            {
                key: tuple(sorted(curve, key=lambda row: (row.eps, _negative(row.bonds))))
                for key, curve in singles.items()
            },
            {cuts: tuple(sorted(curve, key=lambda row: row.eps)) for cuts, curve in joints.items()},
            next((row for row in rows if isinstance(row, Retrained) and not row.cuts), None),
            tuple(row for row in rows if isinstance(row, Retrained) and row.cuts),
            tuple(row for row in rows if isinstance(row, Recommendation)),
        )

    @property
    def factorized(self) -> tuple[Recommendation, ...]:
        """Those that factorize something, and are not what a larger tolerance gave already."""
        found: list[Recommendation] = []
        for row in self.recommendations:
            if any(rule["method"] != "dense" for rule in row.rules) and all(
                row.rules != other.rules for other in found
            ):
                found.append(row)
        return tuple(found)

    @property
    def recommendation(self) -> Recommendation | None:
        """The one with the fewest multiply-accumulates of those that end within the tolerance, or else the most accurate."""
        found = self.factorized or self.recommendations
        good = [row for row in found if self.within(row.accuracy[-1])]
        if good:
            return min(good, key=lambda row: (row.macs_kept, row.params_kept))
        return max(found, key=lambda row: row.accuracy[-1], default=None)

    def lost(self, accuracy: float) -> float:
        """Of the dense net's accuracy; negative where there is more."""
        return self.study.accuracy - accuracy

    def within(self, accuracy: float, tolerance: float | None = None) -> bool:
        """Whether it lost at most the tolerance, that of the protocol unless one is given."""
        return self.lost(accuracy) <= (self.study.protocol.tolerance if tolerance is None else tolerance) + _ROUNDING

    def num_tolerated(self, curve: Sequence[Single | Joint], tolerance: float | None = None) -> int:
        """How many truncations of a curve come before the first that loses too much."""
        return next((place for place, row in enumerate(curve) if not self.within(row.accuracy, tolerance)), len(curve))

    def tolerated(self, curve: Sequence[_Truncation]) -> _Truncation | None:
        """The last of them; None where already the first loses too much."""
        kept = self.num_tolerated(curve)
        return curve[kept - 1] if kept else None

    def curve(self, layer: str, *cuts: str) -> tuple[Single, ...]:
        """The truncations of a layer at these cuts; () where none was measured."""
        return self.singles.get((layer, cuts, ""), ())

    def tolerated_bond(self, layer: Layer, cut: str) -> int | None:
        """The smallest measured bond dimension such that it and every larger one stay within the tolerance; None where not measured."""
        curve = self.curve(layer.name, cut)
        found = self.tolerated(curve)
        return found.bonds[0] if found else layer.bonds[cut] if curve else None

    def tolerated_eps(self, layer: str, *cuts: str) -> float | None:
        """The norm loss there; 0 where the smallest measured one is too much, None where none was measured."""
        curve = self.curve(layer, *cuts)
        found = self.tolerated(curve)
        return found.eps if found else 0.0 if curve else None

    def bottomless(self, layer: str, cut: str) -> bool:
        """Whether a single singular value stays within the tolerance: the layer would tolerate no more norm loss than this cut can take."""
        found = self.tolerated(self.curve(layer, cut))
        return found is not None and found.bonds == (1,)

    def cuts(self) -> tuple[str, ...]:
        """The single cuts that were measured, in the order of `tnlayers.cuts.cuts_of`."""
        found = {cuts[0] for _, cuts, control in self.singles if len(cuts) == 1 and not control}
        widest = max((layer.shape for layer in self.layers), key=len, default=(1, 1))
        return tuple(cut for cut in cuts_of(widest) if cut in found)

    def sets(self) -> tuple[tuple[str, ...], ...]:
        """The several cuts at once that were measured on single layers."""
        return _in_order({cuts for _, cuts, control in self.singles if len(cuts) > 1 and not control})

    def label(self, cuts: Sequence[str]) -> str:
        """The name of a set of cuts, or both sides of a cut, as in "o|ihw"."""
        named = {members: name for name, members in CUT_SETS.items()}
        if len(cuts) > 1:
            return named.get(tuple(cuts), "+".join(cuts))
        shape = max((layer.shape for layer in self.layers if cuts[0] in layer.bonds), key=len)
        return cut_label(cuts[0], shape)

    def layers_with(self, cuts: Sequence[str]) -> str:
        """What the layers that have these cuts are called: a linear has but one."""
        return "layers" if all(set(cuts) <= layer.bonds.keys() for layer in self.layers) else "convolutions"

    def depth(self) -> "Depth | None":
        """Tolerated norm loss against depth: of convolutions where there are any, over the cuts that all of them have."""
        convolutions = [layer for layer in self.layers if len(layer.shape) > 2] or list(self.layers)
        measured = [layer for layer in convolutions if any(self.curve(layer.name, cut) for cut in layer.bonds)]
        common = [cut for cut in self.cuts() if all(self.curve(layer.name, cut) for layer in measured)]
        if len(measured) < 2 or not common:
            return None
        means = [fmean(self.tolerated_eps(layer.name, cut) or 0.0 for cut in common) for layer in measured]
        deep = max(1, len(means) // 3)
        return Depth(
            tuple(layer.name for layer in measured),
            tuple(common),
            tuple(means),
            deep,
            rank_correlation(range(len(means)), means),
        )

    def control(self, name: str) -> "Control | None":
        """A control beside the truncations with the same layer, cuts and bonds; only of what takes something from the norm."""
        pairs = []
        for (layer, cuts, control), curve in self.singles.items():
            if control == name:
                partners = {row.bonds: row for row in self.curve(layer, *cuts)}
                pairs += [(partners[row.bonds], row) for row in curve if row.bonds in partners and row.eps > 0]
        return Control(tuple(pairs)) if pairs else None


@dataclass(frozen=True)
class Depth:
    """
    Attributes:
        layers: in order.
        cuts: over which the figures are means.
        means: the tolerated norm loss of each layer.
        deep: how many of the last layers are "deep": a third.
        correlation: Spearman's, of `means` with the order; None where all means are equal.
    """

    layers: tuple[str, ...]
    cuts: tuple[str, ...]
    means: tuple[float, ...]
    deep: int
    correlation: float | None

    @property
    def first(self) -> float:
        return self.means[0]

    @property
    def last(self) -> float:
        """The mean of the deep layers."""
        return fmean(self.means[-self.deep :])


@dataclass(frozen=True)
class Control:
    """
    Attributes:
        pairs: (truncation, control).
    """

    pairs: tuple[tuple[Single, Single], ...]

    @property
    def better(self) -> int:
        """How many truncations keep more accuracy than their control."""
        return sum(truncation.accuracy > control.accuracy for truncation, control in self.pairs)

    @property
    def worse(self) -> int:
        return sum(truncation.accuracy < control.accuracy for truncation, control in self.pairs)

    @property
    def gain(self) -> float:
        """The mean difference."""
        return fmean(truncation.accuracy - control.accuracy for truncation, control in self.pairs)


def rank_correlation(x: Iterable[float], y: Iterable[float]) -> float | None:
    """Spearman's, ties at their mean rank; None where one side is constant."""
    try:
        return correlation(_ranks([*x]), _ranks([*y]))
    except StatisticsError:
        return None


def points(fraction: float, digits: int = 1) -> str:
    """A difference of accuracies, as in "1.2 points"."""
    text = f"{round(100 * fraction, digits):g}"
    return f"{text} point{'' if text == '1' else 's'}"


def effect(lost: float) -> str:
    """What a truncation did to the accuracy, in words."""
    if abs(lost) < 0.0005:
        return "as accurate as the dense net"
    return f"{points(abs(lost))} {'lost' if lost > 0 else 'gained'}"


def standard_error(study: Study) -> float:
    """Of the dense accuracy, as an estimate for other pictures."""
    return math.sqrt(study.accuracy * (1 - study.accuracy) / study.pictures)


def _ranks(values: list[float]) -> list[float]:
    return [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]


def _negative(bonds: Sequence[int]) -> tuple[int, ...]:
    return tuple(-bond for bond in bonds)


def _in_order(sets: Iterable[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    known = list(CUT_SETS.values())
    return tuple(sorted(sets, key=lambda cuts: (known.index(cuts) if cuts in known else len(known), cuts)))
