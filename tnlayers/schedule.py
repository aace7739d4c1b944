"""What can be chosen about how a layer is computed: which factors are merged, and which operation computes each step.

Every contiguous partition of the factors is an exact way to compute the layer. The factors of a group are contracted with each
other first (weights only); the product then meets the activation in one step, by one of these operations:

    convolution  torch's own; the only one for a step that has a part of the window
    linear       one matmul of all positions, whose channels lie last: it copies nothing in channels last, and turns an
                 activation of the default layout into channels last while it reads it
    bmm          one matmul for each picture (or leading index) which leaves the layout as it is; for linear layers, one that leaves
                 the other features where they are

None of them changes a value by more than rounding; which is the fastest depends on the device and on the sizes.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tnlayers.errors import UserError
from tnlayers.network import Network
from tnlayers.roles import Operation, Partition

__all__ = [
    "ByMode",
    "OnePlan",
    "Partition",
    "PlanChoice",
    "Schedule",
    "at_other_ranks",
    "check_plan",
    "is_measured",
    "of_mode",
    "partition_of",
    "partitions",
    "plain_plan",
]


@dataclass(frozen=True)
class Schedule:
    """A partition of the factors, and the operation of each of its groups.

    Attributes:
        groups: the names of the factors that are merged.
        operations: one for each group.
        recompute: whether the activations between the steps are made again in the backward pass instead of being kept for it.

    Raises:
        UserError: groups or operations of another kind, or not as many of one as of the other.
    """

    groups: Partition
    operations: tuple[Operation, ...]
    recompute: bool = False

    def __post_init__(self) -> None:
        groups = _groups(self.groups)
        operations = tuple(self.operations) if isinstance(self.operations, (list, tuple)) else ()
        known = get_args(Operation)
        if groups is None or len(operations) != len(groups) or not all(one in known for one in operations):
            raise UserError(
                f"groups {self.groups!r} with operations {self.operations!r}: expected groups of factor names, and for each of "
                f"them one of {', '.join(known)}"
            )
        if not isinstance(self.recompute, bool):
            raise UserError(f"recompute {self.recompute!r}: expected true or false")
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "operations", operations)


OnePlan = Literal["auto", "factors", "dense"] | Partition | Schedule
"""A way to compute a layer; where no operations are named, the cost model chooses them."""


@dataclass(frozen=True)
class ByMode:
    """One plan for inference and another one wherever gradients flow.

    Attributes:
        inference: where the merged weights are kept.
        training: where they are made at every call.
        measured_on: the machine on which they were found to be the fastest; empty where they were not measured.
    """

    inference: OnePlan
    training: OnePlan
    measured_on: str = ""

    def __post_init__(self) -> None:
        for mode in ("inference", "training"):
            plan = getattr(self, mode)
            if isinstance(plan, ByMode) or (isinstance(plan, Mapping) and "inference" in plan):
                raise UserError(f"the {mode} plan is one for each mode itself; expected one plan")
            object.__setattr__(self, mode, check_plan(plan))
        if not isinstance(self.measured_on, str):
            raise UserError(f"measured_on {self.measured_on!r}: expected the name of a machine")


PlanChoice = OnePlan | ByMode


def check_plan(plan: object) -> PlanChoice:
    """Returns the choice of a plan, from its plain form too: lists for tuples, mappings for schedules and plans by mode.

    Raises:
        UserError: a value of another kind; whether groups are those of a network is known when it is compiled.
    """
    if isinstance(plan, (Schedule, ByMode)):
        return plan
    if isinstance(plan, Mapping):
        made: Any = ByMode if "inference" in plan else Schedule
        try:
            return made(**plan)
        except TypeError:
            raise UserError(
                f"plan {dict(plan)!r}: expected groups and operations, or an inference and a training plan"
            ) from None
    if (groups := _groups(plan)) is not None:
        return groups
    if plan in ("auto", "factors", "dense"):
        return plan
    raise UserError(
        f"plan {plan!r}: expected 'auto', 'factors', 'dense', groups of factor names, a Schedule or a ByMode"
    )


def of_mode(plan: PlanChoice, *, training: bool) -> OnePlan:
    """Returns what is chosen for training, or for inference."""
    if isinstance(plan, ByMode):
        return plan.training if training else plan.inference
    return plan


def is_measured(plan: PlanChoice) -> bool:
    """Tells whether a choice was found by measuring, rather than asked for or estimated."""
    return isinstance(plan, ByMode) and bool(plan.measured_on)


def at_other_ranks(plan: PlanChoice) -> PlanChoice:
    """Returns what is left of a choice where the ranks change: what was measured says nothing of those."""
    return "auto" if is_measured(plan) else plan


def plain_plan(plan: PlanChoice) -> Any:
    """Returns the choice as strings, lists and mappings."""
    if isinstance(plan, ByMode):
        measured = {"measured_on": plan.measured_on} if plan.measured_on else {}
        return {"inference": plain_plan(plan.inference), "training": plain_plan(plan.training)} | measured
    if isinstance(plan, Schedule):
        recompute = {"recompute": True} if plan.recompute else {}
        return {"groups": plain_plan(plan.groups), "operations": list(plan.operations)} | recompute
    return plan if isinstance(plan, str) else [list(group) for group in plan]


def _groups(groups: object) -> Partition | None:
    if isinstance(groups, (list, tuple)) and all(isinstance(group, (list, tuple)) for group in groups):
        return tuple(tuple(group) for group in groups)
    return None


def partitions(names: Sequence[str]) -> Iterator[Partition]:
    """Yields every contiguous partition, from all apart to all together."""
    for joined in itertools.product((False, True), repeat=len(names) - 1):
        groups = [[names[0]]]
        for name, join in zip(names[1:], joined, strict=True):
            if join:
                groups[-1].append(name)
            else:
                groups.append([name])
        yield tuple(map(tuple, groups))


def partition_of(network: Network, plan: OnePlan) -> Partition:
    """Returns the partition of a choice that is not "auto".

    Raises:
        UserError: groups that are no partition of the factors, in order.
    """
    names, groups = tuple(network.factors), plan.groups if isinstance(plan, Schedule) else plan
    if groups == "factors":
        return tuple((name,) for name in names)
    if groups == "dense":
        return (names,)
    if not isinstance(groups, str) and tuple(itertools.chain(*groups)) == names and all(groups):
        return tuple(tuple(group) for group in groups)
    raise UserError(
        f"plan {groups!r} is none of 'auto', 'factors', 'dense' or groups of the factors {names} in that order, "
        f"such as {tuple((name,) for name in names)}"
    )
