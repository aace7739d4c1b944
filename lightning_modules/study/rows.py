"""What a truncation study measures, row by row; each row is a line of its study.jsonl.

`eps` and `delta` are the norm losses of `tnlayers.cuts.NormLoss`, accuracies fractions of the pictures, `loss` the mean cross-entropy.
"""

from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from tnlayers.errors import UserError

__all__ = [
    "CONTROLS",
    "CUT_SETS",
    "Joint",
    "Layer",
    "Protocol",
    "Recommendation",
    "Retrained",
    "Row",
    "Single",
    "Study",
    "row_from_plain",
    "row_to_plain",
]

CUT_SETS = {"Tucker-2": ("o", "i"), "Tucker": ("o", "i", "h", "w"), "MPS": ("i", "ih", "o")}
"""Several cuts of a Conv2d kernel that belong together, in the order in which they are truncated."""

CONTROLS = ("random error", "random weight")
"""What a truncation is compared with; see `Single`."""


@dataclass(frozen=True)
class Protocol:
    """What to measure.

    Args:
        layers: which convolutions and linears: a pattern as in rules.
        losses: norm losses (eps); every cut is truncated to the smallest bond dimension that loses at most as much.
        retrain: norm losses of the joint truncations that are retrained.
        epochs: of each retraining; 0 retrains nothing, the whole nets in factors neither.
        tolerance: the loss of accuracy that counts as none, as a fraction of the pictures: 0.01 is one point.
        pictures: how many test pictures, drawn at random; None for all.
        seed: of that draw, of the random controls and of the retraining.

    Raises:
        ValueError: a norm loss that is not between 0 and 1, a tolerance that is no fraction below 1, or a number below its least.
    """

    layers: str = "*"
    losses: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
    retrain: tuple[float, ...] = (0.3, 0.5, 0.7)
    epochs: int = 5
    tolerance: float = 0.01
    pictures: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("losses", "retrain"):
            given = tuple(sorted(set(getattr(self, name))))
            if any(not 0 < eps < 1 for eps in given):
                raise UserError(f"{name} {list(given)}: expected norm losses between 0 and 1, such as 0.1, 0.3, 0.5")
            object.__setattr__(self, name, given)
        if not self.losses:
            raise UserError("losses is empty: give at least one norm loss, such as 0.3")
        if not 0 <= self.tolerance < 1:
            raise UserError(
                f"tolerance is {self.tolerance}; expected a fraction of the pictures below 1: 0.01 is one point"
            )
        for name, least in (("epochs", 0), ("pictures", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}; expected at least {least}")


@dataclass(frozen=True)
class Row:
    """What is common to all rows.

    Attributes:
        kind: the word for it in the journal.
        identity: the fields that tell it from other rows of its kind.
    """

    kind: ClassVar[str]
    identity: ClassVar[tuple[str, ...]] = ()

    @property
    def key(self) -> tuple[object, ...]:
        return (self.kind, *(getattr(self, name) for name in self.identity))


@dataclass(frozen=True)
class Study(Row):
    """The first row, which says what the others are of.

    Attributes:
        net: its name.
        checkpoint: the file's name; `sha256` is of its content.
        data: the data set's class, and the number of `pictures` that are evaluated.
        accuracy, loss: of the dense net.
        training: how nets are retrained: option -> value.
    """

    kind: ClassVar[str] = "study"
    net: str
    checkpoint: str
    sha256: str
    data: str
    pictures: int
    classes: int
    accuracy: float
    loss: float
    protocol: Protocol
    training: dict[str, Any]
    version: int = 1


@dataclass(frozen=True)
class Layer(Row):
    """A layer before anything is truncated, in the order in which the net calls them.

    Attributes:
        name: as in `model.named_modules()`.
        shape: of the weight.
        params: of the weight.
        macs: multiply-accumulates for one picture.
        bonds: cut -> the bond dimension at which it is whole.
        entropy: cut -> its entanglement entropy in nats.
    """

    kind: ClassVar[str] = "layer"
    identity: ClassVar[tuple[str, ...]] = ("name",)
    name: str
    shape: tuple[int, ...]
    params: int
    macs: int
    bonds: dict[str, int]
    entropy: dict[str, float]


@dataclass(frozen=True)
class Single(Row):
    """One layer truncated and the others whole.

    Attributes:
        cuts: in the order in which they were truncated, to the dimensions `bonds`.
        control: empty for the truncation itself; "random weight": the layer's weight is one with the same singular values in random
            directions, truncated likewise; "random error": the singular values that the truncation took, in random directions, are
            added to the weight.
    """

    kind: ClassVar[str] = "single"
    identity: ClassVar[tuple[str, ...]] = ("layer", "cuts", "bonds", "control")
    layer: str
    cuts: tuple[str, ...]
    bonds: tuple[int, ...]
    control: str
    eps: float
    delta: float
    accuracy: float
    loss: float


@dataclass(frozen=True)
class Joint(Row):
    """All layers that have these cuts truncated at an equal norm loss.

    Attributes:
        target: the norm loss of every cut of every layer, at most.
        bonds: layer -> the bond dimension of each cut.
        eps, delta: of all weights together, as one vector.
    """

    kind: ClassVar[str] = "joint"
    identity: ClassVar[tuple[str, ...]] = ("cuts", "target")
    cuts: tuple[str, ...]
    target: float
    bonds: dict[str, tuple[int, ...]]
    eps: float
    delta: float
    accuracy: float
    loss: float


@dataclass(frozen=True)
class Retrained(Row):
    """A joint truncation that is trained on; without cuts, the dense net itself.

    Attributes:
        cuts, target: of the joint truncation.
        weights: what is trained: "dense" weights, which may leave the truncation again, or the "factors" themselves.
        accuracy: before the first epoch, and after each.
        params_kept, macs_kept: of the whole net, as factors.
    """

    kind: ClassVar[str] = "retrained"
    identity: ClassVar[tuple[str, ...]] = ("cuts", "target", "weights")
    cuts: tuple[str, ...]
    target: float
    weights: str
    accuracy: tuple[float, ...]
    params_kept: float
    macs_kept: float


@dataclass(frozen=True)
class Recommendation(Row):
    """For each layer the cheapest factorization whose truncation, alone, was tolerated; all of them applied together.

    A study has several, because what layers tolerate alone is more than they tolerate together.

    Attributes:
        tolerance: the loss of accuracy that counted as none in each layer.
        rules: resolved rules in their plain form.
        accuracy: before the first epoch of retraining the factors, as `compress` leaves the net (BatchNorm's statistics estimated
            anew where that helps), and after each.
        params_kept, macs_kept: of the whole net.
    """

    kind: ClassVar[str] = "recommendation"
    identity: ClassVar[tuple[str, ...]] = ("tolerance",)
    tolerance: float
    rules: tuple[dict[str, Any], ...]
    accuracy: tuple[float, ...]
    params_kept: float
    macs_kept: float


def row_to_plain(row: Row) -> dict[str, Any]:
    return {"kind": row.kind, **asdict(row)}


def row_from_plain(plain: dict[str, Any]) -> Row:
    """Makes the row of a mapping as JSON gives it: lists become tuples.

    Raises:
        ValueError: no such kind, or fields that are not this kind's.
    """
    values = {key: _frozen(value) for key, value in plain.items()}
    kinds = {kind.kind: kind for kind in Row.__subclasses__()}
    with suppress(TypeError, KeyError):
        if isinstance(protocol := values.get("protocol"), dict):
            values["protocol"] = Protocol(**protocol)
        return kinds[values.pop("kind")](**values)
    raise UserError(f"a row of keys {sorted(plain)} and kind {plain.get('kind')!r} is not one of a study")


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    return {key: _frozen(item) for key, item in value.items()} if isinstance(value, dict) else value
