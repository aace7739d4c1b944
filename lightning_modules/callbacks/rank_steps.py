"""The entries of a rank schedule, and the ranks that each resolves to when its epoch comes."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_modules.tensorized import budget_rules, copied, example_input, tensorized_net
from tnlayers import MacsKept, ParamsKept, Rule, fraction_kept, resolve_truncation, truncate
from tnlayers.errors import UserError
from tnlayers.ranks import Rank, check_multiple, check_rank
from tnlayers.rules import rank_from_text
from tnlayers.tracing import evaluating
from tnlayers.truncation import check_truncation

__all__ = ["AccuracyDrop", "Step", "steps_of"]

_RANGE = re.compile(r"\s*(\d+)\s*-\s*(\d+)\s*")
_PROBES = 8  # halvings of the range of fractions below: the fraction is found to within 3 %
_LEAST = 1e-3


@dataclass(frozen=True)
class AccuracyDrop:
    """Asks for as few parameters as cost at most this much validation accuracy (0.01: one point) right after the truncation.

    With multiple=8 the ranks are multiples of 8, as those of `ParamsKept` are.
    """

    drop: float
    multiple: int = 1

    def __str__(self) -> str:
        return f"AccuracyDrop({self.drop!r}{f', multiple={self.multiple}' if self.multiple != 1 else ''})"

    def __post_init__(self) -> None:
        if not isinstance(self.drop, float) or not 0 <= self.drop < 1:
            raise UserError(
                f"AccuracyDrop({self.drop!r}): expected a number from 0 to below 1, such as 0.01 for one point"
            )
        check_multiple("AccuracyDrop", self.drop, self.multiple)


@dataclass(frozen=True)
class Step:
    """One truncation: a rank, and over how many epochs, this one included, it is still to be reached."""

    rank: Rank | AccuracyDrop
    epochs: int = 1

    def __str__(self) -> str:
        return str(self.rank)

    def check(self, module: LightningModule, pattern: str) -> None:
        """Checks what can be known before its epoch comes.

        Raises:
            UserError: layers that cannot be truncated so, no validation to judge by, or no example.
        """
        rank, net = self.rank, tensorized_net(module)
        if isinstance(rank, AccuracyDrop):
            _accuracy(module, net)
            rank = ParamsKept(1.0, multiple=rank.multiple)
        example_input(module)
        check_truncation(net, rank, pattern=pattern, rules=budget_rules(module))

    def resolve(self, module: LightningModule, pattern: str) -> list[Rule]:
        """Returns one rule for each layer whose rank falls, with integer ranks."""
        net, example, rank, rules = tensorized_net(module), example_input(module), self.rank, budget_rules(module)
        if isinstance(rank, AccuracyDrop):
            return _within_drop(module, rank, pattern)
        if self.epochs > 1:
            assert isinstance(rank, (ParamsKept, MacsKept))
            now = fraction_kept(net, type(rank), example, pattern=pattern, rules=rules, of=rank.of)
            rank = replace(rank, fraction=now * min(rank.fraction / now, 1) ** (1 / self.epochs))
        return resolve_truncation(net, rank, example, pattern=pattern, rules=rules)


def steps_of(ranks: Mapping[int | str, int | str]) -> dict[int, Step]:
    """Returns what happens at the start of which epoch.

    Raises:
        ValueError: an entry that is not understood, or two for the same epoch.
    """
    steps: dict[int, Step] = {}
    for key, value in ranks.items():
        try:
            first, last = _epochs(key)
            rank = _rank(value)
            if last > first and not isinstance(rank, (ParamsKept, MacsKept)):
                raise UserError("a range of epochs goes down to a budget: ParamsKept or MacsKept")
        except UserError as error:
            raise UserError(f"RankSchedule, ranks {{{key}: {value}}}: {error}") from None
        for epoch in range(first, last + 1):
            if epoch in steps:
                raise UserError(f"RankSchedule, ranks {{{key}: {value}}}: epoch {epoch} has a rank already")
            steps[epoch] = Step(rank, last - epoch + 1)
    return steps


def _epochs(key: int | str) -> tuple[int, int]:
    if isinstance(key, str) and (match := _RANGE.fullmatch(key)):
        first, last = int(match[1]), int(match[2])
    elif str(key).strip().isdigit():
        first = last = int(key)
    else:
        raise UserError(f"{key!r} is no epoch; expected a number from 0 on, or a range such as 4-8")
    if last < first:
        raise UserError(f"the range {key!r} ends before it begins")
    return first, last


def _rank(value: int | str) -> Rank | AccuracyDrop:
    rank = rank_from_text(value, AccuracyDrop=AccuracyDrop)
    return rank if isinstance(rank, AccuracyDrop) else check_rank(rank)


def _within_drop(module: LightningModule, asked: AccuracyDrop, pattern: str) -> list[Rule]:
    """Finds, by bisection, the truncation to the fewest parameters that costs at most the drop of validation accuracy that is asked for."""
    net, example = tensorized_net(module), example_input(module)
    which: dict[str, Any] = {"pattern": pattern, "rules": budget_rules(module)}
    before = right_after = _accuracy(module, net)
    high = math.log(fraction_kept(net, ParamsKept, example, **which))
    low, found = high + math.log(_LEAST), list[Rule]()
    for _ in range(_PROBES):
        middle = (low + high) / 2
        try:
            kept = ParamsKept(math.exp(middle), multiple=asked.multiple)
            rules = resolve_truncation(net, kept, example, **which)
        except UserError:  # not even rank 1 is as small
            low = middle
            continue
        smaller = copied(net)
        truncate(smaller, rules)
        accuracy = _accuracy(module, smaller)
        if accuracy >= before - asked.drop:
            high, found, right_after = middle, rules, accuracy
        else:
            low = middle
    rank_zero_info(f"validation accuracy {before:.2%} before the truncation and {right_after:.2%} right after it")
    return found


def _accuracy(module: LightningModule, net: nn.Module) -> float:
    """Asks the module how good a copy of its net is.

    Raises:
        UserError: it cannot say anything, or says another thing than a fraction.
    """
    judge = getattr(module, "accuracy_of", None)
    if judge is None:
        raise UserError(
            f"AccuracyDrop asks how good a truncated net is, and {type(module).__name__} does not say: define "
            "accuracy_of(self, net) in it, from 0 to 1, or give ParamsKept, MacsKept or RelativeError"
        )
    with evaluating(net), torch.compiler.set_stance("force_eager"):
        accuracy = float(judge(net))
    if not 0 <= accuracy <= 1:
        raise UserError(
            f"{type(module).__name__}.accuracy_of returned {accuracy}; expected a fraction from 0 to 1, such as 0.87"
        )
    return accuracy
