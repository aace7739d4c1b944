"""What the rows of a study add up to: curves of truncations, what of them is tolerated, and the figures of its report."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, TypeVar

from lightning_modules.study.depth import Depth
from lightning_modules.study.rows import CUT_SETS, Joint, Layer, Recommendation, Retrained, Row, Single, Study
from tnlayers.cuts import cut_label, cuts_of
from tnlayers.errors import UserError

__all__ = ["Best", "Control", "Findings", "points"]

Means = list[tuple[float, str]]
_ROUNDING = 1e-9  # of an accuracy
_Truncation = TypeVar("_Truncation", Single, Joint)


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
    """The rows of a study by what they are of, and their figures, each computed when it is asked for.

    A study that is not finished has fewer rows.

    Attributes:
        study: what was studied, and how.
        layers: the layers, in the order of the rows.
        singles: (layer, cuts, control) -> a curve, which is the truncations by rising norm loss.
        joints: cuts -> a curve.
        untruncated: the dense net itself, retrained.
        retrained: the truncations of all layers that retraining began from.
        recommendations: the ways to factorize the whole net.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        """Sorts the rows of a study.

        Raises:
            UserError: the rows do not begin with a Study.
        """
        if not rows or not isinstance(rows[0], Study):
            raise UserError(
                f"{len(rows)} rows without the study's own first: expected a study.jsonl from its beginning"
            )
        self.study = rows[0]
        self.layers = tuple(row for row in rows if isinstance(row, Layer))
        self.singles: dict[tuple[str, tuple[str, ...], str], tuple[Single, ...]] = _curves(
            (row for row in rows if isinstance(row, Single)),
            key=lambda row: (row.layer, row.cuts, row.control),
            order=lambda row: (row.eps, *(-bond for bond in row.bonds)),
        )
        self.joints: dict[tuple[str, ...], tuple[Joint, ...]] = _curves(
            (row for row in rows if isinstance(row, Joint)), key=lambda row: row.cuts, order=lambda row: row.eps
        )
        retrained = [row for row in rows if isinstance(row, Retrained)]
        self.untruncated = next((row for row in retrained if not row.cuts), None)
        self.retrained = tuple(row for row in retrained if row.cuts)
        self.recommendations = tuple(row for row in rows if isinstance(row, Recommendation))

    # ---- what is tolerated

    def lost(self, accuracy: float) -> float:
        """Returns what is lost of the dense net's accuracy; it is negative where there is more."""
        return self.study.accuracy - accuracy

    def within(self, accuracy: float, tolerance: float | None = None) -> bool:
        """Tells whether at most the tolerance is lost, that of the protocol unless one is given."""
        return self.lost(accuracy) <= (self.study.protocol.tolerance if tolerance is None else tolerance) + _ROUNDING

    def num_tolerated(self, curve: Sequence[Single | Joint], tolerance: float | None = None) -> int:
        """Counts the truncations of a curve that come before the first that loses too much."""
        return next((place for place, row in enumerate(curve) if not self.within(row.accuracy, tolerance)), len(curve))

    def last_tolerated(self, curve: Sequence[_Truncation]) -> _Truncation | None:
        """Returns the last truncation that is tolerated with all before it; None where already the first loses too much."""
        kept = self.num_tolerated(curve)
        return curve[kept - 1] if kept else None

    def curve(self, layer: str, *cuts: str) -> tuple[Single, ...]:
        """Returns the truncations of a layer at these cuts; () where none was measured."""
        return self.singles.get((layer, cuts, ""), ())

    def tolerated_bond(self, layer: Layer, cut: str) -> int | None:
        """Returns the smallest measured bond dimension such that it and all larger ones are tolerated; None where none was measured."""
        curve = self.curve(layer.name, cut)
        found = self.last_tolerated(curve)
        return found.bonds[0] if found else layer.bonds[cut] if curve else None

    def tolerated_eps(self, layer: str, *cuts: str) -> float | None:
        """Returns the norm loss there; 0 where the smallest measured one is too much, None where none was measured."""
        curve = self.curve(layer, *cuts)
        found = self.last_tolerated(curve)
        return found.eps if found else 0.0 if curve else None

    def bottomless(self, layer: str, cut: str) -> bool:
        """Tells whether a single singular value is tolerated, so that the layer might tolerate more norm loss than this cut can take."""
        found = self.last_tolerated(self.curve(layer, cut))
        return found is not None and found.bonds == (1,)

    def cuts(self) -> tuple[str, ...]:
        """Returns the single cuts that were measured, in the order of `tnlayers.cuts.cuts_of`."""
        found = {cuts[0] for _, cuts, control in self.singles if len(cuts) == 1 and not control}
        widest = max((layer.shape for layer in self.layers), key=len, default=(1, 1))
        return tuple(cut for cut in cuts_of(widest) if cut in found)

    def sets(self) -> tuple[tuple[str, ...], ...]:
        """Returns the sets of several cuts that were measured on single layers."""
        found = {cuts for _, cuts, control in self.singles if len(cuts) > 1 and not control}
        known = [cuts for cuts in CUT_SETS.values() if cuts in found]
        return (*known, *sorted(found.difference(known)))

    @property
    def standard_error(self) -> float:
        """The standard error of the dense accuracy, as an estimate for other pictures."""
        study = self.study
        return math.sqrt(study.accuracy * (1 - study.accuracy) / study.pictures)

    @property
    def num_pictures_tolerated(self) -> int:
        study = self.study
        return math.floor(study.protocol.tolerance * study.pictures + 1e-9)

    def label(self, *cuts: str) -> str:
        """Names a set of cuts, or both sides of a cut, as in "o|ihw"."""
        if len(cuts) > 1:
            return next((name for name, members in CUT_SETS.items() if members == cuts), "+".join(cuts))
        return cut_label(cuts[0], max((of.shape for of in self.layers if cuts[0] in of.bonds), key=len))

    def layers_with(self, cuts: Sequence[str]) -> str:
        """Says what the layers that have these cuts are called: a linear has but one cut."""
        return "layers" if all(set(cuts) <= layer.bonds.keys() for layer in self.layers) else "convolutions"

    # ---- one layer and one cut at a time

    @cached_property
    def tolerated(self) -> dict[tuple[str, str], float]:
        """(layer, cut) -> the norm loss tolerated there."""
        cells = ((layer.name, cut) for layer in self.layers for cut in self.cuts())
        return {at: eps for at in cells if (eps := self.tolerated_eps(*at)) is not None}

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
        bonds = {layer.name: layer.bonds for layer in self.layers}
        if all(bonds[layer][cut] <= 1 for layer, cut in self.tolerated):
            return 0
        return sum(self.bottomless(*at) for at in self.tolerated)

    @property
    def num_missing(self) -> int:
        """How many layers are still to be measured; none are once there is a recommendation."""
        if self.recommendation is not None:
            return 0
        some = sum(any(bond > 1 for bond in layer.bonds.values()) for layer in self.layers)
        return some - len({layer for layer, _ in self.tolerated})

    @property
    def bonds_needed(self) -> Means:
        """The fraction of its bond dimension that each cut needs in the mean, the least first."""
        cells = ((layer, cut) for layer in self.layers for cut in self.cuts())
        needed = ((layer, cut, self.tolerated_bond(layer, cut)) for layer, cut in cells)
        return _means((cut, bond / layer.bonds[cut]) for layer, cut, bond in needed if bond is not None)

    @cached_property
    def depth(self) -> Depth | None:
        """Tolerated norm loss by depth, of convolutions where there are any, over the cuts that all of them have."""
        convolutions = [layer for layer in self.layers if len(layer.shape) > 2] or self.layers
        names = [layer.name for layer in convolutions if any(self.curve(layer.name, cut) for cut in layer.bonds)]
        common = tuple(cut for cut in self.cuts() if all((name, cut) in self.tolerated for name in names))
        if len(names) < 2 or not common:
            return None
        means = tuple(fmean(self.tolerated[name, cut] for cut in common) for name in names)
        return Depth(tuple(names), common, means)

    # ---- several cuts, all layers, controls

    @property
    def best_several(self) -> Best | None:
        """The best truncation of several cuts of one layer."""
        singles = self.singles.items()
        return self._best([curve for (_, cuts, control), curve in singles if len(cuts) > 1 and not control])

    @property
    def best_joint(self) -> Best | None:
        """The best truncation of all layers."""
        return self._best(self.joints.values())

    def _best(self, curves: Iterable[Sequence[Single | Joint]]) -> Best | None:
        counted = [(self.num_tolerated(curve), curve) for curve in curves]
        rows = [row for _, curve in counted for row in curve if row.eps > 0]
        good = [row for kept, curve in counted for row in curve[:kept] if row.eps > 0]
        if good:
            return Best(max(good, key=lambda row: (row.eps, row.accuracy)), len(rows), len(good))
        return Best(max(rows, key=lambda row: (row.accuracy, row.eps)), len(rows), 0) if rows else None

    @property
    def controlled(self) -> list[tuple[str, ...]]:
        """The cuts at which there are controls."""
        return list(dict.fromkeys(cuts for _, cuts, control in self.singles if control))

    def control(self, name: str) -> Control | None:
        """Compares a control with the truncations, of which those count that take something from the norm."""
        pairs = list[tuple[Single, Single]]()
        for (layer, cuts, control), curve in self.singles.items():
            if control == name:
                partners = {row.bonds: row for row in self.curve(layer, *cuts)}
                pairs += [(partners[row.bonds], row) for row in curve if row.bonds in partners and row.eps > 0]
        if not pairs:
            return None
        first, second = (sum(self.within(pair[side].accuracy) for pair in pairs) for side in (0, 1))
        gains = [truncation.accuracy - control.accuracy for truncation, control in pairs]
        gain, most = fmean(gains), sum(gain > 0 for gain in gains) - sum(gain < 0 for gain in gains)
        counts = abs(gain) > self.study.protocol.tolerance and gain * most > 0
        return Control(len(pairs), (first, second), gain, ("better" if gain > 0 else "worse") if counts else "alike")

    # ---- retraining, and what is recommended

    @property
    def trained_on(self) -> list[Retrained]:
        """The truncations of all layers that were trained for an epoch or more."""
        return [row for row in self.retrained if len(row.accuracy) > 1]

    @property
    def broken(self) -> list[Retrained]:
        """Those of them that had lost more than the tolerance."""
        return [row for row in self.trained_on if not self.within(row.accuracy[0])]

    @property
    def mended(self) -> list[Retrained]:
        """Those of the broken ones that are within the tolerance again."""
        return [row for row in self.broken if self.within(row.accuracy[-1])]

    @property
    def most_mended(self) -> Retrained:
        """The deepest fall that is undone, or that which comes nearest where none is."""
        if self.mended:
            return min(self.mended, key=lambda row: (row.accuracy[0], row.weights == "dense", row.params_kept))
        return max(self.broken, key=lambda row: row.accuracy[-1])

    @property
    def factorized(self) -> tuple[Recommendation, ...]:
        """The recommendations that factorize something, each once though several tolerances gave it."""
        found: list[Recommendation] = []
        for row in self.recommendations:
            known = any(row.rules == other.rules for other in found)
            if not known and any(rule["method"] != "dense" for rule in row.rules):
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

    @property
    def factorized_well(self) -> list[Recommendation]:
        """The ways to factorize the whole net that end within the tolerance."""
        return [row for row in self.factorized if self.within(row.accuracy[-1])]

    @property
    def num_epochs(self) -> int:
        return max(len(row.accuracy) for row in self.broken) - 1

    def effect(self, accuracy: float) -> str:
        """Says in words what was done to the accuracy of the dense net."""
        lost = self.lost(accuracy)
        if abs(lost) < 0.0005:
            return "as accurate as the dense net"
        return f"{points(abs(lost))} {'lost' if lost > 0 else 'gained'}"


def points(fraction: float, digits: int = 1) -> str:
    """Writes a difference of accuracies, as in "1.2 points"."""
    text = f"{round(100 * fraction, digits):g}"
    return f"{text} point{'' if text == '1' else 's'}"


def _curves(
    rows: Iterable[_Truncation], key: Callable[[_Truncation], Any], order: Callable[[_Truncation], Any]
) -> dict[Any, tuple[_Truncation, ...]]:
    """Groups truncations by a key, each group in an order."""
    found: dict[Any, list[_Truncation]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return {of: tuple(sorted(curve, key=order)) for of, curve in found.items()}


def _means(values: Iterable[tuple[str, float]]) -> Means:
    """Computes the mean of what each name has; the smallest comes first."""
    found: dict[str, list[float]] = {}
    for name, value in values:
        found.setdefault(name, []).append(value)
    return sorted((fmean(each), name) for name, each in found.items())
