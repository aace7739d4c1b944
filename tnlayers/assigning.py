"""Which layers of a model each rule takes, and why the others stay as they are."""

import difflib
import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from tnlayers.anyof import AnyOf
from tnlayers.errors import UserError
from tnlayers.geometry import dense_type_of
from tnlayers.method import Factorization
from tnlayers.opened import unopened_reason
from tnlayers.reasons import kind_of, kind_refusal, refusal, weight_owners
from tnlayers.rules import Rule, fits

__all__ = ["assign", "left_over", "method_for"]

Owners = Mapping[str, nn.Module]


def assign(model: nn.Module, owners: Owners, rules: Sequence[Rule]) -> list[list[str]]:
    """Returns the names of the layers that each rule takes; the first that matches a layer wins.

    Args:
        model: the model.
        owners: its modules that hold a weight, by name.
        rules: the rules.

    Raises:
        UserError: a pattern that matches nothing that its method could take.
    """
    taken: list[list[str]] = [[] for _ in rules]
    matched = [False] * len(rules)
    for name in owners:
        takers = [place for place, rule in enumerate(rules) if fits(name, rule.pattern) and _takes(rule, model, name)]
        for place in takers:
            matched[place] = True
        if takers:
            taken[takers[0]].append(name)
    for rule, found, names in zip(rules, matched, taken, strict=True):
        if not found:
            raise UserError(_no_match(model, owners, rule))
        if rule.factorization and not names:
            warnings.warn(
                f"rule {rule.pattern!r} takes no layer: earlier rules take all that it matches; put it before them",
                stacklevel=5,
            )
    return taken


def left_over(
    model: nn.Module, owners: Owners, rules: Sequence[Rule], taken: Sequence[Sequence[str]]
) -> dict[str, str]:
    """Returns why each layer that no rule takes stays as it is."""
    rest = set(owners).difference(*taken)
    reasons = {}
    for name in owners:
        fitting = [rule.factorization for rule in rules if rule.factorization and fits(name, rule.pattern)]
        if name in rest:
            method = fitting[0].name() if fitting else ""
            nothing = kind_refusal(model, name) or f"{method} has nothing for {kind_of(owners[name])}"
            reasons[name] = nothing if fitting else "no rule takes it"
    return reasons


def method_for(model: nn.Module, name: str, rules: Sequence[Rule]) -> Factorization | None:
    """Returns the method, of several the first, of the first rule that matches a dense layer; None if it has to stay dense."""
    if kind_refusal(model, name):
        return None
    matching = [rule for rule in rules if fits(name, rule.pattern) and _takes(rule, model, name)]
    if not matching or refusal(model, name):
        return None
    given = matching[0].factorization
    return given.for_kind(dense_type_of(model.get_submodule(name)).__name__)[0] if isinstance(given, AnyOf) else given


def _takes(rule: Rule, model: nn.Module, name: str) -> bool:
    if rule.factorization is None:
        return True
    return not kind_refusal(model, name) and _replaces(rule.factorization, model.get_submodule(name))


def _replaces(method: Factorization | AnyOf, layer: nn.Module) -> bool:
    return dense_type_of(layer).__name__ in method.replaces


def _no_match(model: nn.Module, owners: Owners, rule: Rule) -> str:
    """Says what a pattern matches, if anything, and why that cannot be taken."""
    method, start = rule.factorization.name() if rule.factorization else "", f"pattern {rule.pattern!r} matches"
    replaced = rule.factorization.replaced() if rule.factorization else ""
    other = [name for name in owners if fits(name, rule.pattern)]
    if other and (reason := kind_refusal(model, other[0])):
        return f"{start} only layers that no method takes, such as {other[0]!r}: {reason}"
    if other:
        return f"{start} only {kind_of(owners[other[0]])} layers such as {other[0]!r}, and {method} replaces {replaced}"
    around = [name for name in owners if fits(name, rule.pattern.rpartition(".")[0])]
    for name in around:  # a module that has no layers because it is not opened
        if reason := unopened_reason(model, owners[name]):
            return f"{start} no layer, and {kind_of(owners[name])} {name!r} is not opened: {reason}"
    there = dict(model.named_modules(remove_duplicate=False)).get(rule.pattern)
    if there is not None and weight_owners(there):
        return f"{start} {kind_of(there)} {rule.pattern!r}, which holds layers and has no weight itself; write '{rule.pattern}.*'"
    if there is not None:
        return f"{start} {kind_of(there)} {rule.pattern!r}, which has no weight that could be factorized"
    names = [name for name in owners if _takes(rule, model, name)]
    near = difflib.get_close_matches(rule.pattern, names, n=3, cutoff=0.4) or names[:3]
    layers = f"layers that {method} replaces" if replaced else "layers"
    hint = f"the nearest are {', '.join(map(repr, near))}" if near else "the model has none that could be replaced"
    return f"{start} no layer; of the {len(names)} {layers} {hint}"
