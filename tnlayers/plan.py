"""How a layer is computed: a partition of the factor sequence with its operations, compiled once to plain integers.

What can be chosen is in `tnlayers.schedule`. All factors apart is the `"factors"` plan, all together the `"dense"` one, whose cost
does not depend on the rank. A transposed convolution is computed in the same way: a step that has no part of the window is
pointwise, one that has some is a transposed convolution along those axes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from tnlayers.contraction import Sizes
from tnlayers.errors import UserError
from tnlayers.network import Network
from tnlayers.roles import Partition, roles_of
from tnlayers.schedule import OnePlan, Schedule, partition_of
from tnlayers.steps import Axis, Step, arrange, compile_step, order_of, possible_operations

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """A schedule, compiled to integers: `plan(x, plan.weights(factors), bias)` computes the layer."""

    schedule: Schedule
    steps: tuple[Step, ...]
    output_channels: tuple[int, ...]
    output_order: tuple[int, ...]
    output_arranged: bool
    """Whether the last step leaves the output in another order."""
    axes: int
    """How many spatial ones there are: none of a linear."""
    is_one_operation: bool
    """Whether one operation of torch computes the layer as it does the dense one."""

    @staticmethod
    def compile(
        network: Network, sizes: Sizes, choice: OnePlan, axes: Mapping[str, Axis], pad_mode: str = "constant"
    ) -> "Plan":
        """Compiles a partition of the factors; where its operations are not named, the plainest ones.

        Args:
            network: the factors' strings.
            sizes: the size of every index.
            choice: the schedule or its partition, or "factors" or "dense".
            axes: the spatial indices of the weight, in order, and their geometry; empty for a linear.
            pad_mode: what F.pad calls it; "constant" pads with zeros.

        Raises:
            UserError: the groups are not a partition of the factors, in order, or an operation cannot compute its group.
        """
        groups = partition_of(network, choice)
        possible = [possible_operations(roles, axes, sizes) for roles in roles_of(network, groups)]
        schedule = choice if isinstance(choice, Schedule) else Schedule(groups, tuple(known[0] for known in possible))
        for names, operation, known in zip(groups, schedule.operations, possible, strict=True):
            if operation not in known:
                raise UserError(f"operation {operation!r} of {names}: expected {' or '.join(map(repr, known))}")
        steps: list[Step] = []
        every = roles_of(network, groups, schedule.operations)
        for roles, operation in zip(every, schedule.operations, strict=True):
            after_carrying = bool(steps) and steps[-1].operation == "convolution" and steps[-1].ahead > 1
            steps.append(compile_step(network, sizes, roles, axes, pad_mode, operation, after_carrying=after_carrying))
        last, output = every[-1].after, network.modes[0]
        misread = steps[-1].operation == "convolution" and steps[-1].ahead > 1
        arranged = last != output or misread
        return Plan(
            schedule=schedule,
            steps=tuple(steps),
            output_channels=tuple(sizes[index] for index in last),
            output_order=order_of(last, output),
            output_arranged=arranged,
            axes=len(axes),
            is_one_operation=len(steps) == 1 and steps[0].is_one_operation and not arranged,
        )

    @property
    def groups(self) -> Partition:
        return self.schedule.groups

    @property
    def is_chain(self) -> bool:
        """Whether each step takes what the step before gives as it is, and is a convolution or one matmul of it."""
        one = all(step.whole and (step.stride or step.kept == 1) for step in self.steps)
        return one and all(
            list(order) == sorted(order) for order in (self.output_order, *(s.order for s in self.steps))
        )

    def weights(self, factors: Mapping[str, Tensor], *, channels_last: bool = False) -> list[Tensor]:
        """Merges each group into the weight of its step, differentiable in the factors.

        Args:
            factors: by name.
            channels_last: whether the input will be in channels last, for which the weights are then laid out; they serve any.
        """
        made, last = [], channels_last
        for step in self.steps:
            made.append(step.weight(factors, last=last))
            last = step.lies_last(last)
        return made

    def __call__(
        self, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, output_padding: Sequence[int] | None = None
    ) -> Tensor:
        """Takes (n, i, positions...) or (i, positions...) to the same of o, channels last if x is; of a linear (..., i) to (..., o).

        Where one operation of torch computes it, the layout of the output is what torch makes of those of x and the weight.

        Args:
            x: the input.
            weights: what `weights` returns.
            bias: (o,), or None.
            output_padding: of a transposed convolution, where a call asks for another than the layer's own.
        """
        if self.axes and x.dim() == self.axes + 1:
            return self(x.unsqueeze(0), weights, bias, output_padding).squeeze(0)
        if self.is_one_operation:
            if self.axes == 2 and torch.is_grad_enabled() and _lies_last(x):
                x = _of_plain_strides(x)
            return self.steps[0].operate(x, weights[0], bias, output_padding)
        if not self.axes and x.dim() != 2:
            rows = self._checkpointed(x.reshape(-1, x.shape[-1]), weights, bias, None)
            return rows.reshape(*x.shape[:-1], rows.shape[1])
        return self._checkpointed(x, weights, bias, output_padding)

    def _checkpointed(
        self, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, output_padding: Sequence[int] | None
    ) -> Tensor:
        """Computes a batch, and has the backward pass compute it again where the schedule says so."""
        if self.schedule.recompute and _may_recompute(x, *weights):

            def call(x: Tensor, bias: Tensor | None, *weights: Tensor) -> Tensor:
                return self._compute(x, weights, bias, output_padding)

            # Nothing in it is random, and its shapes follow from the input's: there is no state to keep, and nothing to check.
            options: dict[str, Any] = {"preserve_rng_state": False, "determinism_check": "none"}
            recomputed: Tensor = checkpoint(call, x, bias, *weights, use_reentrant=False, **options)
            return recomputed
        return self._compute(x, weights, bias, output_padding)

    def _compute(
        self, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, output_padding: Sequence[int] | None
    ) -> Tensor:
        channels_last = _lies_last(x)
        if channels_last:
            x = _of_plain_strides(x)
        final, lies_last = self.steps[-1], channels_last
        for step, weight in zip(self.steps[:-1], weights[:-1], strict=True):
            after = step.lies_last(lies_last)
            x = step(x, weight, None, last=lies_last, to_last=after, output_padding=output_padding)
            lies_last = after
        early = bias if final.whole and not self.output_arranged else None
        x = final(x, weights[-1], early, last=lies_last, to_last=channels_last, output_padding=output_padding)
        if self.output_arranged:
            x = arrange(x, self.output_channels, self.output_order, channels_last=channels_last)
        if bias is not None and early is None:
            x = x + bias.to(x.dtype).view(-1, *(1 for _ in x.shape[2:]))
        if channels_last:
            moved = x.permute(0, 2, 3, 1)
            return x if moved.is_contiguous() else moved.contiguous().permute(0, 3, 1, 2)
        return x.contiguous() if lies_last else x


def _lies_last(x: Tensor) -> bool:
    """Tells whether pictures (n, c, h, w) are in channels last, and not in the default layout too."""
    # Under vmap torch neither tells of a memory format nor makes one, so that the axes are moved instead.
    return x.dim() == 4 and not x.is_contiguous() and x.permute(0, 2, 3, 1).is_contiguous()


def _of_plain_strides(x: Tensor) -> Tensor:
    """Returns (n, c, h, w) in channels last, with the strides that torch itself would give it.

    Where a size is 1, as n of a single picture, its stride may be any, and torch then takes the layout for another one: it
    mixes up the gradient of a weight in channels last.
    """
    c, h, w = x.shape[1:]
    if not torch.jit.is_tracing() and x.stride() == (h * w * c, 1, w * c, c):  # type: ignore[attr-defined]
        return x
    moved = x.permute(0, 2, 3, 1)
    return moved.reshape(-1).view(moved.shape).permute(0, 3, 1, 2)


def _may_recompute(*inputs: Tensor) -> bool:
    """Tells whether there will be a backward pass that can compute anew: not in an exported graph, nor inside of torch.func.grad."""
    if not torch.is_grad_enabled() or not any(value.requires_grad for value in inputs):
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    try:
        with saved_tensors_hooks(_same, _same):
            return True
    except RuntimeError:
        return False


def _same(value: Tensor) -> Tensor:
    return value
