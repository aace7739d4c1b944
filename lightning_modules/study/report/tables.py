"""The tables of a study's report, as Markdown."""

from collections.abc import Sequence
from typing import Any

from lightning_modules.study.factorizations import LINEAR, REALISED
from lightning_modules.study.findings import Findings, points
from tnlayers.markdown import markdown_table

__all__ = ["TABLES"]

_RESTS_ON = {method.name(): cuts for cuts, method in REALISED.items()}


def _several(of: Findings) -> str:
    """Lists the largest norm loss that each layer tolerates at several cuts, and the bond dimensions there."""
    rows = []
    for layer in of.layers:
        curves = [of.curve(layer.name, *cuts) for cuts in of.sets()]
        found = [(curve, of.last_tolerated(curve)) for curve in curves]
        if any(curves):
            cells = [
                f"{row.eps:.2f} at {_listed(row.bonds)}" if row else "none" if curve else "" for curve, row in found
            ]
            rows.append([layer.name, *cells])
    return markdown_table(["layer", *(of.label(*cuts) for cuts in of.sets())], rows)


def _retrained(of: Findings) -> str:
    """Lists each retrained truncation of all layers before and after."""
    losses = {(row.cuts, row.target): f"{row.eps:.2f}" for curve in of.joints.values() for row in curve}
    rows = []
    for row in of.retrained:
        kept = (f"{row.params_kept:.0%}", f"{row.macs_kept:.0%}") if row.weights == "factors" else ("", "")
        what = (of.label(*row.cuts), f"{row.target:g}", losses.get((row.cuts, row.target), ""), row.weights)
        rows.append([*what, f"{row.accuracy[0]:.1%}", f"{row.accuracy[-1]:.1%}", *kept])
    what = ("cuts", "norm loss of a cut, at most", "of all weights", "trained")
    return markdown_table([*what, "before", "after", "parameters kept", "MACs kept"], rows)


def _together(of: Findings) -> str:
    """Lists the ways to factorize the whole net."""
    rows = []
    for row in of.factorized:
        before, after = row.accuracy[0], row.accuracy[-1]
        chosen = row is of.recommendation and of.within(after)
        figures = (f"{before:.1%}", f"{after:.1%}" if len(row.accuracy) > 1 else "", _lost(of, after))
        kept = (f"{row.params_kept:.0%}", f"{row.macs_kept:.0%}")
        rows.append([points(row.tolerance, 2), *kept, *figures, "recommended" if chosen else ""])
    kept = ("parameters kept", "MACs kept")
    return markdown_table(["lost by a layer alone", *kept, "right after", "retrained", "points lost", ""], rows)


def _recommended(of: Findings) -> str:
    """Lists what is recommended for each layer, and the truncation that it rests on."""
    found = of.recommendation
    rows = [_chosen(of, rule) for rule in found.rules] if found else []
    return markdown_table(["layer", "method", "rank", "norm loss", "points lost"], rows)


def _chosen(of: Findings, rule: dict[str, Any]) -> list[str]:
    """Tells on which truncation a rule rests; that of a dense layer rests on none."""
    if rule["method"] == "dense":
        return [rule["pattern"], "dense", "", "", ""]
    ranks = tuple(rule["rank"]) if isinstance(rule["rank"], (list, tuple)) else (rule["rank"],)
    curve = of.curve(rule["pattern"], *_RESTS_ON.get(rule["method"], LINEAR))
    # Ranks are clamped to what the other ranks of the layer let them attain, and may be below the bond dimensions of.
    enough = [row for row in curve if all(bond >= rank for bond, rank in zip(row.bonds, ranks, strict=False))]
    figures = (f"{enough[-1].eps:.2f}", _lost(of, enough[-1].accuracy)) if enough else ("", "")
    return [rule["pattern"], rule["method"], _listed(ranks), *figures]


def _lost(of: Findings, accuracy: float) -> str:
    """Writes the points that are lost of the dense net's accuracy."""
    return f"{100 * of.lost(accuracy):.1f}"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


TABLES = {"several": _several, "retrained": _retrained, "together": _together, "recommended": _recommended}
"""Section -> what writes its table."""
