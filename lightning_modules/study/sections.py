"""The sections of a study's report as data: headings, paragraphs, tables and pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from lightning_modules.study import pictures
from lightning_modules.study.factors import REALISED
from lightning_modules.study.findings import Measured, points
from lightning_modules.study.rows import CONTROLS, Recommendation
from lightning_modules.study.sentences import (
    bonds_sentence,
    control_sentence,
    depth_sentence,
    joint_sentence,
    most_tolerant,
    opening,
    recommendation_sentence,
    retraining_sentence,
    several_sentence,
    together_sentence,
)

__all__ = ["Section", "Table", "sections"]

_RESTS_ON = {method: cuts for cuts, method in REALISED.items()}


@dataclass(frozen=True)
class Table:
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """
    Attributes:
        paragraphs: what is code stands between backticks.
        name: of the picture's file, without its ending.
        picture: its pages.
        listed: the paragraphs are the items of a list.
    """

    heading: str
    paragraphs: tuple[str, ...]
    name: str = ""
    picture: Sequence[Figure] = ()
    table: Table | None = None
    listed: bool = False


def sections(measured: Measured) -> list[Section]:
    """Those for which there are rows."""
    parts: list[tuple[Callable[[Measured], Section], object]] = [
        (_short, True),
        (_single, measured.cuts()),
        (_bonds, measured.cuts()),
        (_depth, measured.depth()),
        (_several, measured.sets()),
        (_controls, any(control for _, _, control in measured.singles)),
        (_joint, measured.joints),
        (_retrained, any(len(row.accuracy) > 1 for row in measured.retrained)),
        (_spectra, measured.layers),
        (_together, measured.recommendations),
        (_recommended, measured.recommendation),
    ]
    return [section(measured) for section, rows in parts if rows]


def _short(measured: Measured) -> Section:
    return Section("In short", tuple(opening(measured)), listed=True)


def _single(measured: Measured) -> Section:
    text = (
        "Each layer is truncated alone, at one cut, to smaller and smaller bond dimensions. A cut is named by the modes of the kernel on "
        "its two sides: outputs o, inputs i, height h, width w. The large point of a line is the largest norm loss up to which all "
        f"truncations lose at most {points(measured.study.protocol.tolerance)}. The scale of the points is logarithmic beyond that."
    )
    picture = pictures.truncations(measured, [(cut,) for cut in measured.cuts()])
    return Section("Accuracy against norm loss", (most_tolerant(measured), text), "single", picture)


def _bonds(measured: Measured) -> Section:
    text = (
        "The smallest bond dimension such that it and every larger one that was measured are tolerated, of the bond dimension at which "
        "the cut is whole. Pale: most can go. Only what was measured counts, so a smaller one in between may be tolerated too."
    )
    return Section(
        "The bond dimension that each cut needs", (bonds_sentence(measured), text), "bonds", pictures.bonds(measured)
    )


def _depth(measured: Measured) -> Section:
    trend = measured.depth()
    assert trend is not None
    picture = pictures.depth(measured, trend)
    return Section("Norm loss tolerated, by depth", (depth_sentence(measured),), "depth", picture)


def _several(measured: Measured) -> Section:
    sets = measured.sets()
    names = "; ".join(f"{measured.label(cuts)} ({', '.join(cuts)})" for cuts in sets)
    text = (
        f"Each layer is truncated alone, at several cuts one after the other: {names}. The table has the largest norm loss tolerated and "
        "the bond dimensions there."
    )
    rows = []
    for layer in measured.layers:
        curves = [measured.curve(layer.name, *cuts) for cuts in sets]
        if any(curves):
            found = [measured.tolerated(curve) for curve in curves]
            cells = [f"{row.eps:.2f} at {', '.join(map(str, row.bonds))}" if row else "" for row in found]
            rows.append(
                (layer.name, *(cell or ("none" if curve else "") for cell, curve in zip(cells, curves, strict=True)))
            )
    table = Table(("layer", *(measured.label(cuts) for cuts in sets)), tuple(rows))
    picture = pictures.truncations(measured, sets)
    return Section("Several cuts at once", (several_sentence(measured), text), "several", picture, table)


def _controls(measured: Measured) -> Section:
    cuts = dict.fromkeys(measured.label(cuts) for _, cuts, control in measured.singles if control)
    text = (
        f"Measured at {', '.join(cuts)}. Random error: the singular values that a truncation takes, in random directions, are added to "
        "the weight. Random weight: the layer's weight is one with the same singular values in random directions, truncated likewise. "
        "A truncation takes from the weight's norm, a random error adds to it; BatchNorm's statistics stay those of the dense net."
    )
    said = [sentence for name in CONTROLS if (sentence := control_sentence(measured, name))]
    return Section("Controls", (*said, text), "controls", pictures.controls(measured))


def _joint(measured: Measured) -> Section:
    text = (
        "Each of these cuts of every layer that has them is truncated to the smallest bond dimension that loses at most the same norm; "
        "several cuts together lose more."
    )
    return Section("All layers at once", (joint_sentence(measured), text), "joint", pictures.joint(measured))


def _retrained(measured: Measured) -> Section:
    text = (
        "Truncations of all layers that have these cuts, trained on: as dense weights, which may leave the truncation again, and as "
        "the factors themselves, which keep that much of the whole net's parameters and MACs (all of them where no factorization has "
        f"fewer). {_how_trained(measured)}"
    )
    losses = {(row.cuts, row.target): row.eps for curve in measured.joints.values() for row in curve}
    rows = tuple(
        (
            measured.label(row.cuts),
            f"{row.target:g}",
            f"{losses[row.cuts, row.target]:.2f}" if (row.cuts, row.target) in losses else "",
            row.weights,
            f"{row.accuracy[0]:.1%}",
            f"{row.accuracy[-1]:.1%}",
            *((f"{row.params_kept:.0%}", f"{row.macs_kept:.0%}") if row.weights == "factors" else ("", "")),
        )
        for row in measured.retrained
    )
    header = (
        "cuts",
        "norm loss of a cut, at most",
        "of all weights",
        "trained",
        "before",
        "after",
        "parameters kept",
        "MACs kept",
    )
    return Section(
        "What retraining brings back",
        (retraining_sentence(measured), text),
        "retrained",
        pictures.retrained(measured),
        Table(header, rows),
    )


def _how_trained(measured: Measured) -> str:
    training = measured.study.training
    weight = training["distill_weight"] if training["teacher"] else 0
    labels, teacher = "from the labels", f"from the outputs of {training['teacher']}"
    if weight in (0, 1):
        return f"They learn {teacher if weight else labels}."
    return f"They learn {labels} and, with a weight of {weight:g}, {teacher}."


def _spectra(measured: Measured) -> Section:
    text = (
        "The effective rank of each cut of the trained weights, the exponential of its entanglement entropy: how many singular values "
        "the weight uses. Dark: they are nearly equal, and a truncation takes much of the norm."
    )
    return Section("Spectra of the trained weights", (text,), "spectra", pictures.effective_ranks(measured))


def _together(measured: Measured) -> Section:
    text = (
        "For each layer the factorization with the fewest MACs whose truncation, alone, loses at most so much, and every milder one too: "
        "of a convolution Tucker-2, an MPS or low rank, of a linear a product of two matrices. All of them applied together, BatchNorm's "
        "statistics estimated anew where that helps, and the factors retrained."
    )

    def row(of: Recommendation) -> tuple[str, ...]:
        kept = (f"{of.params_kept:.0%}", f"{of.macs_kept:.0%}")
        trained = f"{of.accuracy[-1]:.1%}" if len(of.accuracy) > 1 else ""
        after = (f"{of.accuracy[0]:.1%}", trained, f"{100 * measured.lost(of.accuracy[-1]):.1f}")
        chosen = of is measured.recommendation and measured.within(of.accuracy[-1])
        return (points(of.tolerance, 2), *kept, *after, "recommended" if chosen else "")

    header = ("lost by a layer alone", "parameters kept", "MACs kept", "right after", "retrained", "points lost", "")
    rows = tuple(map(row, measured.factorized))
    return Section("The whole net in factors", (together_sentence(measured), text), table=Table(header, rows))


def _recommended(measured: Measured) -> Section:
    study, found = measured.study, measured.recommendation
    assert found is not None
    how = (
        f"For each layer the cheapest factorization whose truncation, alone, loses at most {points(found.tolerance, 2)}. The table "
        "has the norm loss and the points lost that this rests on."
    )
    caution = (
        f"All figures are of the same {study.pictures:,} test pictures, and so was the choice: confirm the accuracy on pictures that had "
        "no part in it."
    )
    use = (
        "rules.yaml and config.yaml, beside this report, hold it. To use it, from where the study was run: `tnlayers compress -c "
        f"path/to/config.yaml --checkpoint path/to/{study.checkpoint} --out path/to/compressed`, which measures the time too, and then "
        "retrain. Each layer is computed in the way that is held to be the fastest, with more MACs than it could where these are not."
    )
    reasons: dict[str, list[str]] = {}
    for rule in found.rules:
        if rule["method"] == "dense":
            reasons.setdefault(rule.get("reason", ""), []).append(rule["pattern"])
    dense = [f"Dense: {', '.join(names)}{reason and f' ({reason})'}." for reason, names in reasons.items()]
    rows = tuple(_chosen(measured, rule) for rule in found.rules)
    table = Table(("layer", "method", "rank", "norm loss", "points lost"), rows)
    return Section(
        "Recommendation", (recommendation_sentence(measured), " ".join([how, *dense]), caution, use), table=table
    )


def _chosen(measured: Measured, rule: dict[str, Any]) -> tuple[str, ...]:
    """A line of the recommendation's table; a dense layer rests on no truncation."""
    if rule["method"] == "dense":
        return (rule["pattern"], "dense", "", "", "")
    ranks = tuple(rule["rank"]) if isinstance(rule["rank"], (list, tuple)) else (rule["rank"],)
    curve = measured.curve(rule["pattern"], *_RESTS_ON.get(rule["method"], ("i",)))
    # Ranks are clamped to what the other ranks of the layer let them attain, and may be below the bond dimensions measured.
    enough = [row for row in curve if all(bond >= rank for bond, rank in zip(row.bonds, ranks, strict=False))]
    figures = (f"{enough[-1].eps:.2f}", f"{100 * measured.lost(enough[-1].accuracy):.1f}") if enough else ("", "")
    return (rule["pattern"], rule["method"], ", ".join(map(str, ranks)), *figures)
