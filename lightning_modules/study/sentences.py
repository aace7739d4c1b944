"""What a study says, in sentences: computed from its rows, and the opposite where the rows say so."""

import math
from collections.abc import Sequence
from statistics import fmean

from lightning_modules.study.findings import Measured, effect, points, standard_error
from lightning_modules.study.rows import CONTROLS, Joint, Retrained, Single

__all__ = [
    "about",
    "bonds_sentence",
    "control_sentence",
    "depth_sentence",
    "joint_sentence",
    "most_tolerant",
    "opening",
    "recommendation_sentence",
    "retraining_sentence",
    "several_sentence",
    "together_sentence",
]

_SAME = 0.02  # norm losses that differ by less are called the same


def opening(measured: Measured) -> list[str]:
    """The study's answer; the sentences of what was not measured yet are left out."""
    found = [
        about(measured),
        most_tolerant(measured),
        depth_sentence(measured),
        " ".join(filter(None, (several_sentence(measured), joint_sentence(measured)))),
        " ".join(filter(None, (control_sentence(measured, name) for name in CONTROLS))),
        retraining_sentence(measured),
        recommendation_sentence(measured),
    ]
    return [sentence for sentence in found if sentence]


def about(measured: Measured) -> str:
    study = measured.study
    tolerance = study.protocol.tolerance
    return (
        f"{study.net} from {study.checkpoint} has an accuracy of {study.accuracy:.2%} on {study.pictures:,} test pictures ({study.data}) "
        f"(standard error {points(standard_error(study))}). Tolerated means at most {points(tolerance)} lost, "
        f"{math.floor(tolerance * study.pictures + 1e-9)} of these pictures."
    )


def most_tolerant(measured: Measured) -> str:
    """Which cuts and layers tolerate most and least, by the mean of what their curves tolerate."""
    cells = {
        (layer.name, cut): eps
        for layer in measured.layers
        for cut in measured.cuts()
        if (eps := measured.tolerated_eps(layer.name, cut)) is not None
    }
    if not cells:
        return ""
    by_layer, by_cut = (
        sorted(
            ((fmean(eps for at, eps in cells.items() if at[side] == name), name) for name in _names(cells, side)),
            reverse=True,
        )
        for side in (0, 1)
    )
    bonds = {layer.name: layer.bonds for layer in measured.layers}
    single = sum(measured.bottomless(*at) for at in cells)
    text = f"One layer and one cut at a time, the norm loss tolerated is {fmean(cells.values()):.2f} in the mean"
    if len(by_layer) > 1:
        text += f": most in {by_layer[0][1]} ({by_layer[0][0]:.2f}), least in {by_layer[-1][1]} ({by_layer[-1][0]:.2f})"
    if len(by_cut) > 1:
        most, least = by_cut[0], by_cut[-1]
        text += f"; of the cuts most at {measured.label([most[1]])} ({most[0]:.2f}), least at {measured.label([least[1]])} ({least[0]:.2f})"
    largest = max(bonds[layer][cut] for layer, cut in cells)
    todo = sum(any(bond > 1 for bond in layer.bonds.values()) for layer in measured.layers) - len(by_layer)
    if (
        todo and measured.recommendation is None
    ):  # a finished study has no truncations of layers whose norm loss is always more
        text += f"; {todo} {'layer is' if todo == 1 else 'layers are'} not measured yet"
    if single and largest > 1:
        text += f". In {single} of {len(cells)} cases even bond dimension 1 is tolerated, and the cut can take no more"
    return text + "."


def bonds_sentence(measured: Measured) -> str:
    """The mean fraction of its bond dimension that each cut needs, the least first."""
    needed: dict[str, list[float]] = {}
    for layer in measured.layers:
        for cut in measured.cuts():
            bond = measured.tolerated_bond(layer, cut)
            if bond is not None:
                needed.setdefault(cut, []).append(bond / layer.bonds[cut])
    means = sorted((fmean(fractions), cut) for cut, fractions in needed.items())
    listed = ", ".join(f"{mean:.0%} at {measured.label([cut])}" for mean, cut in means)
    return f"Needed in the mean over the layers, of the bond dimension: {listed}."


def depth_sentence(measured: Measured) -> str:
    """The first layer against the last third, and the trend over all."""
    depth = measured.depth()
    if depth is None:
        return ""
    step = depth.last - depth.first
    verdict = "about as much" if abs(step) < _SAME else "more" if step > 0 else "less"
    than = "as" if verdict == "about as much" else "than"
    last = f"the last {depth.deep} layers" if depth.deep > 1 else f"the last, {depth.layers[-1]}"
    over = f"averaged over {len(depth.cuts)} cuts" if len(depth.cuts) > 1 else f"at {measured.label(depth.cuts)}"
    text = (
        f"Deep layers tolerate {verdict} norm loss {than} the first: {over}, "
        f"{depth.first:.2f} in {depth.layers[0]} and {depth.last:.2f} in {last}"
    )
    if len(depth.means) == 2:  # which are no trend
        return text + "."
    if depth.correlation is None:
        return text + "; all layers tolerate the same."
    noise = 2 / math.sqrt(len(depth.means) - 1)  # two standard deviations of the correlation of what has no trend
    if noise > 1:
        return f"{text}; {len(depth.means)} layers are too few for a trend (rank correlation {depth.correlation:+.2f})."
    trend = "no trend" if abs(depth.correlation) < noise else "rising" if depth.correlation > 0 else "falling"
    join = "but" if {verdict, trend} in ({"more", "falling"}, {"less", "rising"}) else "and"
    how = "there is no clear trend" if trend == "no trend" else f"it is {trend} with depth"
    return f"{text}; {join} over all {len(depth.means)} layers {how} (rank correlation {depth.correlation:+.2f})."


def several_sentence(measured: Measured) -> str:
    """The largest norm loss that several cuts of one layer take within the tolerance, or that there is none."""
    curves = [curve for (_, cuts, control), curve in measured.singles.items() if len(cuts) > 1 and not control]
    return _best(measured, "several cuts of one layer at once", curves)


def joint_sentence(measured: Measured) -> str:
    return _best(measured, "all layers at once", list(measured.joints.values()))


def control_sentence(measured: Measured, name: str) -> str:
    """What a control says about the truncations beside it."""
    control = measured.control(name)
    if control is None:
        return ""
    within = [sum(measured.within(pair[side].accuracy) for pair in control.pairs) for side in (0, 1)]
    counts = f"of {len(control.pairs)} truncations {within[0]} are tolerated and of their controls {within[1]}"
    gain = f"the control keeps {points(abs(control.gain))} {'less' if control.gain > 0 else 'more'} in the mean"
    least = measured.study.protocol.tolerance
    better = control.better > control.worse and control.gain > least
    worse = control.better < control.worse and control.gain < -least
    if name == "random error":
        if better:
            verdict = "the directions that a truncation takes matter less than others: its norm loss alone does not explain the accuracy"
        elif worse:
            verdict = "a truncation does more harm than other errors of its size: what is tolerated is not owed to its choice of directions"
        else:
            verdict = "a truncation does about as much harm as other errors of its size: its directions make little difference"
        return f"An error of equal norm in random directions: {counts}; {gain}, so {verdict}."
    if within == [0, 0]:
        verdict = "the question is open"
    elif within[1] == 0:
        verdict = "the spectrum alone makes no layer tolerant: what was trained matters"
    elif better:
        verdict = "what was trained matters, but some layers can do without it"
    else:
        verdict = (
            "what was trained in these layers does not matter, and that a truncation is tolerated says nothing about it"
        )
    return f"A random weight with the same singular values: {counts}; {gain}, so {verdict}."


def retraining_sentence(measured: Measured) -> str:
    """What retraining brings back of the truncations that lost more than the tolerance."""
    rows = [row for row in measured.retrained if len(row.accuracy) > 1]
    broken = [row for row in rows if not measured.within(row.accuracy[0])]
    if not broken:
        return "No truncation that was retrained had lost more than is tolerated." if rows else ""
    back = [row for row in broken if measured.within(row.accuracy[-1])]
    counts = [
        f"{sum(row.weights == weights for row in back)} of {sum(row.weights == weights for row in broken)} as {name}"
        for weights, name in (("dense", "dense weights"), ("factors", "factors"))
        if any(row.weights == weights for row in broken)
    ]
    epochs = _epochs(max(len(row.accuracy) for row in broken) - 1)
    if "pictures" in measured.study.training:
        epochs += f" over {measured.study.training['pictures']:,} pictures"
    text = f"After {epochs} what had lost too much is within the tolerance again in {' and '.join(counts)}"
    if back:
        deepest = min(back, key=lambda row: (row.accuracy[0], row.weights == "dense", row.params_kept))
        text += f"; the deepest fall that is undone is {_fall(measured, deepest)}"
    else:
        text += f"; the nearest is {_fall(measured, max(broken, key=lambda row: row.accuracy[-1]))}"
    if measured.untruncated:
        after = measured.untruncated.accuracy[-1]
        text += f". The dense net itself, trained on likewise, ends at {after:.1%} ({effect(measured.lost(after))})"
    return text + "."


def together_sentence(measured: Measured) -> str:
    """Whether layers that are tolerated alone are tolerated together."""
    found = measured.factorized
    if not found:
        return "No layer tolerates a factorization that saves."
    good = [row for row in found if measured.within(row.accuracy[-1])]
    which = f"Of {len(found)} way{'' if len(found) == 1 else 's'} to factorize the whole net"
    if not good:
        return f"{which} none ends within the tolerance: the layers tolerate less together than alone."
    return f"{which} {len(good)} {'ends' if len(good) == 1 else 'end'} within the tolerance."


def recommendation_sentence(measured: Measured) -> str:
    found = measured.recommendation
    if found is None:
        return ""
    if not measured.factorized:
        return "Nothing is recommended: no layer tolerates a factorization that saves."
    good = measured.within(found.accuracy[-1])
    text = (
        f"{'Recommended' if good else 'None is within the tolerance, and the most accurate is'}: "
        f"{found.params_kept:.0%} of the parameters and {found.macs_kept:.0%} of the MACs kept; "
        f"accuracy {found.accuracy[0]:.2%} right after ({effect(measured.lost(found.accuracy[0]))})"
    )
    if len(found.accuracy) > 1:
        after = found.accuracy[-1]
        text += f", {after:.2%} after {_epochs(len(found.accuracy) - 1)} of retraining ({effect(measured.lost(after))})"
    return text + "; chosen and measured on the same pictures."


def _epochs(count: int) -> str:
    return f"{count} epoch{'' if count == 1 else 's'}"


def _best(measured: Measured, what: str, curves: Sequence[Sequence[Single | Joint]]) -> str:
    rows = [row for curve in curves for row in curve if row.eps > 0]
    if not rows:
        return ""
    good = [row for curve in curves for row in curve[: measured.num_tolerated(curve)] if row.eps > 0]
    if not good:
        mildest = max(rows, key=lambda row: (row.accuracy, row.eps))
        return (
            f"Of {len(rows)} truncations of {what} none is tolerated; the best is {_where(measured, mildest)} at norm loss "
            f"{mildest.eps:.2f} ({effect(measured.lost(mildest.accuracy))})."
        )
    best = max(good, key=lambda row: (row.eps, row.accuracy))
    return (
        f"Of {len(rows)} truncations of {what} {len(good)} are tolerated; the largest norm loss of them is {best.eps:.2f}, "
        f"by {_where(measured, best)} ({effect(measured.lost(best.accuracy))})."
    )


def _where(measured: Measured, row: Single | Joint) -> str:
    if isinstance(row, Joint):
        return measured.label(row.cuts)
    bonds = ", ".join(f"{cut} {bond}" for cut, bond in zip(row.cuts, row.bonds, strict=True))
    return f"{row.layer} as {measured.label(row.cuts)} ({bonds})"


def _fall(measured: Measured, row: Retrained) -> str:
    return (
        f"{measured.label(row.cuts)} of all {measured.layers_with(row.cuts)} at up to {row.target:g} a cut, "
        f"{row.accuracy[0]:.1%} before and {row.accuracy[-1]:.1%} after "
        f"({'dense weights' if row.weights == 'dense' else f'factors, {row.params_kept:.0%} of the parameters'})"
    )


def _names(cells: dict[tuple[str, str], float], side: int) -> list[str]:
    return list(dict.fromkeys(at[side] for at in cells))
