"""What a rank may be: an int, one for each bond, or a rule that decides it."""

import operator
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, Literal

from tnlayers.errors import UserError

__all__ = [
    "MacsKept",
    "Of",
    "ParamsKept",
    "Rank",
    "RankRule",
    "Ranks",
    "RelativeError",
    "check_multiple",
    "check_rank",
]

Ranks = tuple[int, ...]
Of = Literal["rule", "model"]


@dataclass(frozen=True)
class _Rule:
    """A rank that is decided by one number, the first field; the last one is what the ranks are multiples of.

    With `multiple=8` every bond is a multiple of 8, except one that is at the highest rank which the weight's shape attains: that
    need not be a multiple. A layer stays dense where no such ranks are cheaper, and as it is where its ranks are below them.
    """

    def __post_init__(self) -> None:
        value, *_, multiple = astuple(self)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise UserError(f"{type(self).__name__}({value!r}): expected a number above 0 and at most 1")
        check_multiple(type(self).__name__, value, multiple)

    def __str__(self) -> str:
        (_, first), *others = ((field, getattr(self, field.name)) for field in fields(self))
        said = [repr(first), *(f"{field.name}={value}" for field, value in others if value != field.default)]
        return f"{type(self).__name__}({', '.join(said)})"


@dataclass(frozen=True)
class _Budget(_Rule):
    """A fraction to keep, of what a rule takes or of the whole model.

    Of the model, everything that no rule takes counts as kept, and so do the layers of other rules at what they come to cost;
    all rules with such a budget share it.
    """

    fraction: float
    of: Of = "rule"
    multiple: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of not in ("rule", "model"):
            raise UserError(
                f"{type(self).__name__}({self.fraction!r}, of={self.of!r}): expected of='rule' or of='model'"
            )


@dataclass(frozen=True)
class ParamsKept(_Budget):
    """Keep this fraction of the weights' parameters (not the biases) of all layers that the rule matches, shared out well.

    With of="model" it is a fraction of all parameters of the model. With multiple=8 the ranks are multiples of 8, except those
    at the highest rank that the weight's shape attains; the budget is then met as nearly as such ranks allow, from below.
    """


@dataclass(frozen=True)
class MacsKept(_Budget):
    """Keep this fraction of the multiply-accumulates of all layers that the rule matches, shared out where they matter most.

    With of="model" it is a fraction of all that the model's forward does. With multiple=8 the ranks are multiples of 8, except
    those at the highest rank that the weight's shape attains; the budget is then met as nearly as such ranks allow, from below.
    """


@dataclass(frozen=True)
class RelativeError(_Rule):
    """In every layer the cheapest ranks found whose ||W - W~||_F / ||W||_F is at most this, measured on the factors in their dtype.

    With multiple=8 only ranks that are multiples of 8, or the highest that the weight's shape attains, are looked for.
    """

    error: float
    multiple: int = 1


RankRule = ParamsKept | MacsKept | RelativeError
Rank = int | Sequence[int] | RankRule


def check_multiple(rule: str, value: object, multiple: object) -> None:
    """Refuses what ranks cannot be multiples of; the name and the number of the rule that has it are for the message.

    Raises:
        UserError: it is no int of at least 1.
    """
    if type(multiple) is not int or multiple < 1:
        raise UserError(f"{rule}({value!r}, multiple={multiple!r}): expected an int of at least 1, such as multiple=8")


def check_rank(rank: object) -> int | Ranks | RankRule:
    """Returns the rank as an int, a tuple of ints or a rule.

    Raises:
        ValueError: anything else; for a bare float the message says which rules it could have meant.
    """
    if isinstance(rank, RankRule):
        return rank
    if isinstance(rank, float):
        raise UserError(
            f"rank {rank!r} is a bare float; say what it is a fraction of: ParamsKept({rank!r}), MacsKept({rank!r}) "
            f"or RelativeError({rank!r})"
        )
    try:
        given: tuple[Any, ...] = tuple(rank) if isinstance(rank, (list, tuple)) else (rank,)
        ranks = tuple(operator.index(value) for value in given if not isinstance(value, bool))
    except TypeError:
        ranks = ()
    if not ranks or len(ranks) < len(given):
        raise UserError(f"rank {rank!r}: expected an int, a tuple of ints, ParamsKept, MacsKept or RelativeError")
    if min(ranks) < 1:
        raise UserError(f"rank {rank!r}: every rank must be at least 1")
    return ranks if isinstance(rank, (list, tuple)) else ranks[0]
