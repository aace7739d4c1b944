"""Several methods for the layers of one rule, of which each layer gets the one that serves it best."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tnlayers.errors import UserError
from tnlayers.method import Factorization
from tnlayers.ranks import Rank, RankRule, check_rank

__all__ = ["AnyOf"]


@dataclass(frozen=True)
class AnyOf:
    """Some methods under one rank rule: what it allows is shared out among layers and methods together.

    How much a layer loses by each method is measured at some ranks and interpolated between them. A budget is shared out so that the sum
    of the losses is as small as the search finds; under `RelativeError` each layer gets the method that needs the fewest parameters.

    Args:
        methods: classes such as Tucker, or instances where a method has options; their ranks do not count.
        rank: the rule, such as MacsKept(0.5).

    Raises:
        UserError: no method, one that is none, or one that joins layers; a rank that is no rule.
    """

    methods: tuple[Factorization, ...]
    rank: RankRule

    def __init__(self, methods: Sequence[Factorization | type[Factorization]], rank: Rank) -> None:
        rule = check_rank(rank)
        if not isinstance(rule, RankRule):
            raise UserError(
                f"rank {rank!r} of several methods: an int means something else for each; give a rule, such as MacsKept(0.5)"
            )
        given: list[Any] = list(methods) if isinstance(methods, Sequence) and not isinstance(methods, str) else []
        made = [_with_rank(method, rule) for method in given]
        if not made:
            raise UserError(f"methods {methods!r}: expected a list of methods, such as [Tucker, CP, LowRank]")
        object.__setattr__(self, "methods", tuple(dict.fromkeys(made)))
        object.__setattr__(self, "rank", rule)

    @property
    def replaces(self) -> tuple[str, ...]:
        """The torch layers that one of the methods or more replaces."""
        return tuple(dict.fromkeys(kind for method in self.methods for kind in method.replaces))

    def replaced(self) -> str:
        """Returns what the methods replace, in words."""
        return "; ".join(f"{method.name()} {method.replaced()}" for method in self.methods)

    def name(self) -> str:
        return " or ".join(method.name() for method in self.methods)

    def for_kind(self, kind: str) -> tuple[Factorization, ...]:
        """Returns the methods that replace a torch layer of this type's name."""
        return tuple(method for method in self.methods if kind in method.replaces)


def _with_rank(method: Any, rule: RankRule) -> Factorization:
    if isinstance(method, type) and issubclass(method, Factorization):
        method = method(rule)
    if not isinstance(method, Factorization):
        raise UserError(f"methods has {method!r}, which is no method: expected classes such as Tucker, or instances")
    if joint := getattr(method, "joint", ""):
        raise UserError(f"methods has {method.name()} with joint={joint!r}: layers that share a generator need a rule")
    return method.with_rank(rule)
