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

from tnlayers.anyof import AnyOf
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
        factorization: the method and its rank, or several of them; None leaves the layer dense.
        reason: why; for reports.
        plan: how the factorized layers are computed; see `tnlayers.schedule`.

    Raises:
        ValueError: a pattern, a method or a plan of another kind.
    """

    pattern: str
    factorization: Factorization | AnyOf | None
    reason: str = ""
    plan: PlanChoice = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise UserError(f"pattern {self.pattern!r}: expected the name of a layer, such as 'conv1' or 'layer3.*'")
        if not isinstance(self.factorization, Factorization | AnyOf | None):
            raise UserError(
                f"rule {self.pattern!r}: {self.factorization!r} is no method with a rank, such as Tucker(8)"
            )
        object.__setattr__(self, "plan", check_plan(self.plan))

    def to_plain(self) -> dict[str, Any]:
        """Strings, numbers and lists only."""
        if self.factorization is None:
            return {"pattern": self.pattern, "method": "dense"} | ({"reason": self.reason} if self.reason else {})
        plain = {"pattern": self.pattern} | _plain_methods(self.factorization)
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
        several = "methods" in values
        missing = [key for key in ("pattern", "methods" if several else "method") if key not in values]
        if missing:
            raise UserError(f"{values} has no {missing[0]!r}; expected {{pattern: ..., method: ..., rank: ...}}")
        if not isinstance(values["pattern"], str):
            raise UserError(
                f"pattern {values['pattern']!r} is not a string; expected a layer's name, such as 'conv1' or 'layer*'"
            )
        pattern, reason = str(values.pop("pattern")), str(values.pop("reason", ""))
        plan = values.pop("plan", "auto")
        made = _several(values) if several else _one(values)
        return Rule(pattern, made, reason, plan) if made else Rule(pattern, None, reason)


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


def _one(values: dict[str, Any]) -> Factorization | None:
    """Makes the method of its name, its options and its rank."""
    name = str(values.pop("method"))
    method = _known(name)
    if method is None:
        _check_options(name, values, [])
        return None
    _check_options(name, values, [field.name for field in fields(method)])
    if "rank" not in values:
        raise UserError(
            f"method {name} needs a 'rank': an int, a list of ints, or one of {', '.join(_RANK_RULES)}, such as MacsKept(0.5)"
        )
    values["rank"] = rank_from_text(values["rank"])
    try:
        return method(**values)
    except UserError:
        raise
    except ValueError as error:  # of a method of the user's own
        raise UserError(str(error)) from error


def _several(values: dict[str, Any]) -> AnyOf:
    """Makes the methods of a list, of which each is a name, or a mapping with options, under the rule's one rank."""
    given, rank = values.pop("methods"), values.pop("rank", None)
    if values:
        raise UserError(
            f"option {next(iter(values))!r} is not known for several methods; options of one stand with it: "
            "methods: [Tucker, {method: MPS, order: h w i o}]"
        )
    if rank is None:
        raise UserError(f"methods {given!r} need a 'rank': one of {', '.join(_RANK_RULES)}, such as MacsKept(0.5)")
    rule = rank_from_text(rank)
    made: list[Any] = []
    for item in given if isinstance(given, list | tuple) else ():
        entry = {str(key): value for key, value in item.items()} if isinstance(item, Mapping) else {"method": item}
        if "method" not in entry or "rank" in entry:
            raise UserError(f"methods has {item!r}; expected a name, or {{method: ..., options}} without a rank")
        if str(entry["method"]).lower() == "dense":
            raise UserError("methods has 'dense', which every layer may stay anyway; leave it out")
        made.append(_one(entry | {"rank": 1}))
    return AnyOf(made, rule)


def _known(name: str) -> type[Factorization] | None:
    """Returns the method of a name, whatever its case; None for "dense"."""
    known = {"dense": None, **known_methods()}
    exact_first = sorted(known, key=lambda key: key != name)
    method: Any = next((known[key] for key in exact_first if key.lower() == name.lower()), MISSING)
    if method is MISSING:
        own = "; a method of your own is known once its module is imported" if "." in name else _near(name, known)
        raise UserError(f"method {name!r} is not known; expected one of {', '.join(known)}{own}")
    return method


def _check_options(name: str, values: Mapping[str, Any], options: Sequence[str]) -> None:
    for key in values:
        if key not in options:
            expected = ", ".join(["pattern", "method", *options, *(["plan"] if options else [])])
            near = _near(key, [*options, "plan"])
            raise UserError(f"option {key!r} is not known for method {name}; expected {expected}{near}")


def _plain_methods(given: Factorization | AnyOf) -> dict[str, Any]:
    """Returns the keys of a rule that say by what it factorizes."""
    if not isinstance(given, AnyOf):
        return _plain_method(given)
    entries = [_plain_method(method) for method in given.methods]
    for entry in entries:
        del entry["rank"]
    return {"methods": [entry if len(entry) > 1 else entry["method"] for entry in entries], "rank": _plain(given.rank)}


def _plain_method(method: Factorization) -> dict[str, Any]:
    plain: dict[str, Any] = {"method": method.name()}
    for field in fields(method):
        value = getattr(method, field.name)
        if field.default is MISSING or value != field.default:
            plain[field.name] = _plain(value)
    return plain


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
