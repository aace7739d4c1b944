"""What is to be reached, and how far the rows of a run reach it."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tnlayers.markdown import markdown_table

__all__ = ["FORMS", "NEVER_SLOWER", "Target", "best", "choice", "repeated", "speed", "targets", "targets_table"]

Measured = dict[str, Any]
FORMS = ("inference", "training")
NEVER_SLOWER = 0.97
"""The least times as fast as dense that counts as no slower: times of equal calls differ by as much."""
_NEAR, _NETS = 1.05, {"ResNet-18": (1.75, 1.5), "ResNet-50": (1.75, 1.5), "VGG-16": (1.75, 1.5)}
_NETS |= {"ResNet-20": (1.5, 1.4), "MobileNetV3-small": (1.0, 1.0)}


@dataclass(frozen=True)
class Target:
    """A row of the table.

    Attributes:
        what: the ratio.
        goal: what it is to be, as text.
        measured: what it is, and of which rows.
        met: None where no row tells.
    """

    what: str
    goal: str
    measured: str = "no rows"
    met: bool | None = None


def best(row: Measured, what: str, form: str, **wanted: str) -> float | None:
    """Returns the seconds, or bytes, of a row's fastest contender of a kind; None where there is none."""
    found = [
        one[form]
        for one in row["measured"]
        if one["what"] == what and form in one and all(one[key] == value for key, value in wanted.items())
    ]
    return min(found, default=None)


def speed(row: Measured, form: str, against: str = "dense", what: str = "ours") -> float | None:
    """Returns how many times as fast one is as the other, each in its best layout."""
    slow, fast = best(row, against, form), best(row, what, form)
    return None if slow is None or fast is None else slow / fast


def choice(row: Measured, form: str) -> float | None:
    """Returns the time of the plan that the cost model chooses over that of the fastest one."""
    found = {one["how"]: one[form] for one in row["measured"] if one["what"] == "plan" and form in one}
    chosen = found.get(row.get("model", {}).get(form))
    return None if chosen is None else chosen / min(found.values())


def repeated(row: Measured, form: str) -> list[tuple[float, float]]:
    """Compares two choices of a plan by each half of the rounds: how far behind its fastest plan each of them is there.

    Returns:
        For each half, that of the cost model and that of the other half's fastest plan: what noise leaves of any choice.
    """
    found = {one["how"]: one[f"{form} halves"] for one in row["measured"] if f"{form} halves" in one}
    chosen = row.get("model", {}).get(form)
    if chosen not in found:
        return []
    pairs = []
    for half in (0, 1):
        fastest = min(times[half] for times in found.values())
        again = min(found.values(), key=lambda times, other=1 - half: times[other])
        pairs.append((found[chosen][half] / fastest, again[half] / fastest))
    return pairs


def targets(rows: Sequence[Measured]) -> list[Target]:
    """Computes the table from all rows of a run."""
    of: dict[str, list[Measured]] = {"layers": [], "nets": [], "forms": [], "start": []}
    for row in rows:
        if "measured" in row or "seconds_to_import" in row:
            of[row["part"]].append(row)
    return [
        *_layers(of["layers"]),
        *_trains([row for row in of["layers"] if row["method"] == "TT" and row["kind"] == "linear"]),
        *_choices(of["layers"]),
        *_forms(of["forms"]),
        *_nets(of["nets"]),
        *_start({row["name"]: row for row in of["start"]}),
    ]


def targets_table(found: Iterable[Target]) -> str:
    said = {True: "yes", False: "**no**", None: ""}
    cells = [[one.what, one.goal, one.measured, said[one.met]] for one in found]
    return markdown_table(["what", "target", "measured", "met"], cells)


def _layers(rows: Sequence[Measured]) -> Iterable[Target]:
    for form in FORMS:
        yield _least(f"any layer against the faster dense layout, {form}", rows, form)
    yield _peak(rows)
    quarter = [
        row
        for row in rows
        if (row["method"], row["divisor"], row["batch"]) == ("Tucker", 4, 8)
        and row["channels"] >= 64
        and row["kernel"] > 1
    ]
    of = "Tucker at a quarter of 64 channels and more, 3x3 and 5x5, batch 8"
    for form, goal in zip(FORMS, (0.78, 0.50), strict=True):
        of_reduction = partial(_of_reduction, form=form)
        yield _mean(f"{of}: speed-up over MAC reduction, {form}", quarter, of_reduction, goal)
    for form, goal in zip(FORMS, (1.8, 1.5), strict=True):
        yield _mean(
            f"the same layers against tltorch's better path, {form}", quarter, partial(_of_peer, form=form), goal
        )


def _peak(rows: Sequence[Measured]) -> Target:
    what, goal, form = "peak memory of a training step over dense's, layers", "<= 1", "training peak bytes"
    found = {row["name"]: 1 / share for row in rows if (share := speed(row, form)) is not None}
    if not found:
        return Target(what, goal)
    worst, above = max(found, key=lambda name: found[name]), sum(share > 1 for share in found.values())
    told = f"{found[worst]:.2f} at most ({worst}); above 1 in {above} of {len(found)}"
    lean = {row["name"]: 1 / share for row in rows if (share := speed(row, form, what="lean")) is not None}
    if lean:
        slower = [time for row in rows if (time := speed(row, "training", "lean", "ours")) is not None]
        above, still = (sum(shares[name] > 1 for name in lean) for shares in (found, lean))
        told += f"; of {len(lean)} that keep more than dense for the backward pass, above 1 in {above}, tuned with lean=True in {still}, "
        told += f"in {statistics.median(slower):.2f} times the time"
    return Target(what, goal, told, not above)


def _trains(rows: Sequence[Measured]) -> Iterable[Target]:
    for form in FORMS:
        what = f"TT of linears against tltorch's BlockTT of the same ranks, better path, {form}"
        yield _mean(what, rows, partial(_of_peer, form=form), 3.0)
        yield _least(f"TT of linears against dense, {form}", rows, form)


def _choices(rows: Sequence[Measured]) -> Iterable[Target]:
    for form in FORMS:
        what, goal = f"the cost model's plan within 5 % of the best one, {form}", ">= 90 % of the rows"
        found = [share for row in rows if (share := choice(row, form)) is not None]
        if not found:
            yield Target(what, goal)
            continue
        near, told = _near(found), f"of {len(found)}"
        if pairs := [pair for row in rows for pair in repeated(row, form)]:
            model, again = ([pair[place] for pair in pairs] for place in (0, 1))
            told += f"; by half of the rounds: {_near(model):.0%}, and the other half's fastest plan {_near(again):.0%}"
        yield Target(what, goal, f"{near:.0%} {told}", near >= 0.9)


def _near(found: Sequence[float]) -> float:
    return statistics.fmean(share <= _NEAR for share in found)


def _forms(rows: Sequence[Measured]) -> Iterable[Target]:
    for batch, goal in ((1, 1.0), (32, 0.62)):
        found = {row["form"]: 1 / share for row in rows if row["batch"] == batch and (share := speed(row, FORMS[0]))}
        what = f"ResNet-18 (64x64) at half the MACs, batch {batch}: time left in each form"
        told = ", ".join(f"{form} {share:.2f}" for form, share in found.items())
        met = max(found.values()) <= goal if found else None
        yield Target(what, f"<= {goal:.2f}", told or "no rows", met)


def _nets(rows: Sequence[Measured]) -> Iterable[Target]:
    for net, goals in _NETS.items():
        for form, goal in zip(FORMS, goals, strict=True):
            found = {
                row["method"]: share
                for row in rows
                if row["net"] == net and "Tai" not in row["method"] and (share := speed(row, form)) is not None
            }
            what, told = f"{net} at half the MACs, best method, {form}", f">= {goal:.2f}"
            if not found:
                yield Target(what, told)
                continue
            method = max(found, key=lambda name: found[name])
            (row,) = (row for row in rows if (row["net"], row["method"]) == (net, method))
            measured = f"{found[method]:.2f} ({method}{_in_proportion(row, form)})"
            yield Target(what, told, measured, found[method] >= goal)
    tai = [share for row in rows if "Tai" in row["method"] and (share := speed(row, FORMS[0])) is not None]
    plain = [share for row in rows if (share := speed(row, FORMS[0], what="chains")) is not None]
    what, goal = "VGG-16 with Tai et al.'s ranks, inference", ">= 2.50"
    if tai:
        (row,) = (row for row in rows if "Tai" in row["method"])
        measured = f"{tai[0]:.2f}{_in_proportion(row, FORMS[0])}; plain convolutions {plain[0]:.2f}"
        yield Target(what, goal, measured, tai[0] >= 2.5)
    else:
        yield Target(what, goal)


def _in_proportion(row: Measured, form: str) -> str:
    """Tells what it would be if the time of the replaced layers fell as their operations do, and no other did."""
    known = row.get("proportional") if form == "inference" else None
    return f"; in proportion to the MACs {known:.2f}" if known else ""


def _start(rows: dict[str, Measured]) -> Iterable[Target]:
    what, goal = "quickstart: time left", "<= 75 %"
    share = speed(rows["quickstart"], FORMS[0]) if "quickstart" in rows else None
    floor = rows["quickstart"].get("proportional") if share else None
    told = f"; in proportion to the MACs {1 / floor:.0%}" if floor else ""
    yield Target(what, goal, f"{1 / share:.0%}{told}", 1 / share <= 0.75) if share else Target(what, goal)
    what, goal = "import tnlayers over import torch", "<= 0.3 s"
    if "import" in rows:
        taken = rows["import"]["seconds_to_import"]
        more = taken["tnlayers"] - taken["torch"]
        yield Target(what, goal, f"{more:.2f} s over {taken['torch']:.2f} s", more <= 0.3)
    else:
        yield Target(what, goal)


def _of_reduction(row: Measured, what: str, form: str) -> float | None:
    share = speed(row, form, what=what)
    return None if share is None else share * float(row["macs_kept"])


def _of_peer(row: Measured, what: str, form: str) -> float | None:
    return speed(row, form, "tltorch", what)


def _least(what: str, rows: Sequence[Measured], form: str) -> Target:
    """Compares the least, and tells what it is where each layer has the plan that was measured to be its fastest."""
    goal, told = f">= {NEVER_SLOWER}", []
    for kind in ("ours", "plan"):
        found = {row["name"]: share for row in rows if (share := speed(row, form, what=kind)) is not None}
        if found:
            least, below = (
                min(found, key=lambda name: found[name]),
                sum(share < NEVER_SLOWER for share in found.values()),
            )
            told.append((f"{found[least]:.2f} at least ({least}); below in {below} of {len(found)}", not below))
    if not told:
        return Target(what, goal)
    return Target(what, goal, "; under the best plan ".join(text for text, _ in told), told[0][1])


def _mean(what: str, rows: Sequence[Measured], of: Callable[[Measured, str], float | None], goal: float) -> Target:
    """Compares a geometric mean, and tells what it is where each layer has the plan that was measured to be its fastest."""
    ours, best_plan = ([share for row in rows if (share := of(row, kind)) is not None] for kind in ("ours", "plan"))
    if not ours:
        return Target(what, f">= {goal}")
    mean = _geometric(ours)
    told = f"{mean:.2f}, {min(ours):.2f} to {max(ours):.2f} in {len(ours)} rows"
    told += f"; under the best plan {_geometric(best_plan):.2f}" if best_plan else ""
    return Target(what, f">= {goal}", told, mean >= goal)


def _geometric(found: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, found)))
