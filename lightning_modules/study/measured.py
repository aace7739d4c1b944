"""The rows of a study by what they are of: curves of truncations, and what of them is tolerated."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lightning_modules.study.rows import CUT_SETS, Joint, Layer, Recommendation, Retrained, Row, Single, Study
from tnlayers.cuts import cuts_of
from tnlayers.errors import UserError

__all__ = ["Measured", "points"]

_ROUNDING = 1e-9  # of an accuracy
_Truncation = TypeVar("_Truncation", Single, Joint)


@dataclass(frozen=True)
class Measured:
    """The rows of a study; one that is not finished has fewer.

    Attributes:
        layers: the layers, in the order of the rows.
        singles: (layer, cuts, control) -> a curve, which is the truncations by rising norm loss.
        joints: cuts -> a curve.
        untruncated: the dense net itself, retrained.
        retrained: the truncations of all layers that were retrained.
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
        """Sorts the rows of a study.

        Raises:
            ValueError: the rows do not begin with a Study.
        """
        if not rows or not isinstance(rows[0], Study):
            raise UserError(
                f"{len(rows)} rows without the study's own first: expected a study.jsonl from its beginning"
            )
        retrained = [row for row in rows if isinstance(row, Retrained)]
        return Measured(
            study=rows[0],
            layers=tuple(row for row in rows if isinstance(row, Layer)),
            singles=_curves(
                (row for row in rows if isinstance(row, Single)),
                key=lambda row: (row.layer, row.cuts, row.control),
                order=lambda row: (row.eps, *(-bond for bond in row.bonds)),
            ),
            joints=_curves(
                (row for row in rows if isinstance(row, Joint)), key=lambda row: row.cuts, order=lambda row: row.eps
            ),
            untruncated=next((row for row in retrained if not row.cuts), None),
            retrained=tuple(row for row in retrained if row.cuts),
            recommendations=tuple(row for row in rows if isinstance(row, Recommendation)),
        )

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

    def lost(self, accuracy: float) -> float:
        """Returns what is lost of the dense net's accuracy; it is negative where there is more."""
        return self.study.accuracy - accuracy

    def within(self, accuracy: float, tolerance: float | None = None) -> bool:
        """Tells whether at most the tolerance is lost, that of the protocol unless one is given."""
        return self.lost(accuracy) <= (self.study.protocol.tolerance if tolerance is None else tolerance) + _ROUNDING

    def num_tolerated(self, curve: Sequence[Single | Joint], tolerance: float | None = None) -> int:
        """Counts the truncations of a curve that come before the first that loses too much."""
        return next((place for place, row in enumerate(curve) if not self.within(row.accuracy, tolerance)), len(curve))

    def tolerated(self, curve: Sequence[_Truncation]) -> _Truncation | None:
        """Returns the last of them; None where already the first loses too much."""
        kept = self.num_tolerated(curve)
        return curve[kept - 1] if kept else None

    def curve(self, layer: str, *cuts: str) -> tuple[Single, ...]:
        """Returns the truncations of a layer at these cuts; () where none was measured."""
        return self.singles.get((layer, cuts, ""), ())

    def tolerated_bond(self, layer: Layer, cut: str) -> int | None:
        """Returns the smallest measured bond dimension such that it and all larger ones are tolerated; None where none was measured."""
        curve = self.curve(layer.name, cut)
        found = self.tolerated(curve)
        return found.bonds[0] if found else layer.bonds[cut] if curve else None

    def tolerated_eps(self, layer: str, *cuts: str) -> float | None:
        """Returns the norm loss there; 0 where the smallest measured one is too much, None where none was measured."""
        curve = self.curve(layer, *cuts)
        found = self.tolerated(curve)
        return found.eps if found else 0.0 if curve else None

    def bottomless(self, layer: str, cut: str) -> bool:
        """Tells whether a single singular value is tolerated, so that the layer might tolerate more norm loss than this cut can take."""
        found = self.tolerated(self.curve(layer, cut))
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
