"""Which layers to factorize, and how: in Python, and as plain values for YAML files and checkpoints.

A resolved rule is a rule like any other, with a layer's exact name and integer ranks, so what was decided can be read,
edited, saved and applied again. The plain form names methods that the program has imported: nothing is imported because a file says so.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from fnmatch import fnmatchcase
from typing import Any

from tnlayers.errors import UserError, about
from tnlayers.method import Factorization, known_methods
from tnlayers.ranks import MacsKept, ParamsKept, RankRule, RelativeError
from tnlayers.schedule import PlanChoice, check_plan, plain_plan

__all__ = ["Rule", "fits", "rank_from_text", "rules_from_plain"]

_RANK_RULES = {rule.__name__: rule for rule in (ParamsKept, MacsKept, RelativeError)}
_RANK_TEXT = re.compile(
    r"\s*(\w+)\s*\(\s*(?:fraction\s*=|error\s*=)?\s*([^()\s,]+)\s*((?:,\s*\w+\s*=\s*([\"']?)[\w.-]+\4\s*)*)\)\s*"
)
_OPTION = re.compile(r"(\w+)\s*=\s*[\"']?([\w.-]+)")


@dataclass(frozen=True)
class Rule:
    """What to do with the layers of a name.

    Args:
        pattern: a layer's name as in `model.named_modules()`; `*`, `?` and `[...]` match as in file names, across dots.
        factorization: the method and its rank; None leaves the layer dense.
        reason: why; for reports.
        plan: how the factorized layers are computed; see `tnlayers.schedule`.

    Raises:
        ValueError: a pattern, a method or a plan of another kind.
    """

    pattern: str
    factorization: Factorization | None
    reason: str = ""
    plan: PlanChoice = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise UserError(f"pattern {self.pattern!r}: expected the name of a layer, such as 'conv1' or 'layer3.*'")
        if not isinstance(self.factorization, Factorization | None):
            raise UserError(
                f"rule {self.pattern!r}: {self.factorization!r} is no method with a rank, such as Tucker(8)"
            )
        object.__setattr__(self, "plan", check_plan(self.plan))

    def to_plain(self) -> dict[str, Any]:
        """Strings, numbers and lists only."""
        if self.factorization is None:
            return {"pattern": self.pattern, "method": "dense"} | ({"reason": self.reason} if self.reason else {})
        plain: dict[str, Any] = {"pattern": self.pattern, "method": self.factorization.name()}
        for field in fields(self.factorization):
            value = getattr(self.factorization, field.name)
            if field.default is MISSING or value != field.default:
                plain[field.name] = _plain(value)
        if self.plan != "auto":
            plain["plan"] = plain_plan(self.plan)
        return plain | ({"reason": self.reason} if self.reason else {})

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> "Rule":
        """Makes the rule of a mapping.

        Raises:
            ValueError: an unknown method, key, rank or value; the message names it and what was expected.
        """
        if not isinstance(plain, Mapping):
            raise UserError(f"{plain!r} is not a mapping; expected {{pattern: ..., method: ..., rank: ...}}")
        values = {str(key): value for key, value in plain.items()}
        missing = [key for key in ("pattern", "method") if key not in values]
        if missing:
            raise UserError(f"{values} has no {missing[0]!r}; expected {{pattern: ..., method: ..., rank: ...}}")
        if not isinstance(values["pattern"], str):
            raise UserError(
                f"pattern {values['pattern']!r} is not a string; expected a layer's name, such as 'conv1' or 'layer*'"
            )
        pattern, name, reason = str(values.pop("pattern")), str(values.pop("method")), str(values.pop("reason", ""))
        known = {"dense": None, **known_methods()}
        exact_first = sorted(known, key=lambda key: key != name)
        method = next((known[key] for key in exact_first if key.lower() == name.lower()), MISSING)
        if method is MISSING:
            own = "; a method of your own is known once its module is imported" if "." in name else _near(name, known)
            raise UserError(f"method {name!r} is not known; expected one of {', '.join(known)}{own}")
        options = [*(field.name for field in fields(method)), "plan"] if method else []
        for key in values:
            if key not in options:
                expected = ", ".join(["pattern", "method", *options])
                raise UserError(
                    f"option {key!r} is not known for method {name}; expected {expected}{_near(key, options)}"
                )
        if method is None:
            return Rule(pattern, None, reason)
        if "rank" not in values:
            raise UserError(
                f"method {name} needs a 'rank': an int, a list of ints, or one of {', '.join(_RANK_RULES)}, such as MacsKept(0.5)"
            )
        values["rank"] = rank_from_text(values["rank"])
        plan = values.pop("plan", "auto")
        try:
            factorization = method(**values)
        except UserError:
            raise
        except ValueError as error:  # of a method of the user's own
            raise UserError(str(error)) from error
        return Rule(pattern, factorization, reason, plan)


def fits(name: str, pattern: str) -> bool:
    """Tells whether a layer's name fits a rule's pattern."""
    return name == pattern or fnmatchcase(name, pattern)  # the first: names may hold what patterns give a meaning


def rules_from_plain(plain: Sequence[Mapping[str, Any] | Rule]) -> list[Rule]:
    """Returns the rules; an error says which one it is about."""
    rules = []
    for place, item in enumerate(plain):
        pattern = item.get("pattern") if isinstance(item, Mapping) else item
        with about(f"rules[{place}] (pattern {pattern!r})"):
            rules.append(item if isinstance(item, Rule) else Rule.from_plain(item))
    return rules


def rank_from_text(value: Any, **more: type[Any]) -> Any:
    """Returns a rank that may be written as text, such as "MacsKept(0.5)" or "ParamsKept(0.5, of=model, multiple=8)".

    Args:
        value: the text, or a rank already.
        more: what else takes a number, by name: dataclasses whose other fields are options.

    Raises:
        UserError: a text that is no rank rule.
    """
    if not isinstance(value, str):
        return value
    rules: dict[str, type[Any]] = {**_RANK_RULES, **more}
    match = _RANK_TEXT.fullmatch(value)
    rule = rules.get(match[1]) if match else None
    if match is None or rule is None:
        raise UserError(
            f"rank {value!r} is not understood; expected an int, a list of ints, or one of {', '.join(rules)}, such as MacsKept(0.5)"
        )
    try:
        number = float(match[2])
    except ValueError:
        raise UserError(f"rank {value!r}: {match[2]!r} is not a number") from None
    given, known = _OPTION.findall(match[3]), [field.name for field in fields(rule)[1:]]
    for place, (key, text) in enumerate(given):
        if key not in known or key in dict(given[:place]):
            raise UserError(
                f"rank {value!r}: {key}={text} is not understood; {rule.__name__} takes {' and '.join(known)}, once each"
            )
    return rule(number, **{key: int(text) if text.isdecimal() and len(text) < 10 else text for key, text in given})


def _plain(value: Any) -> Any:
    if isinstance(value, RankRule):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _near(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word.lower(), [name.lower() for name in known], n=1)
    found = [name for name in known if close and name.lower() == close[0]]
    return f" (did you mean {found[0]!r}?)" if found else ""
