"""How a layer is computed: a partition of the factor sequence, compiled once to plain integers.

Every contiguous partition of the factors is an exact way to compute the layer. The factors of a group are contracted with
each other first (weights only); the product then meets the activation as one convolution, or as one matmul for a linear.
A transposed convolution is computed in the same way: a step that has no part of the window is a pointwise convolution, one that
has some is a transposed convolution along those axes.

All apart is the `"factors"` plan, all together the `"dense"` one, whose cost does not depend on the rank.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tnlayers.errors import UserError
from tnlayers.network import Contraction, Indices, Network, Sizes, size_of
from tnlayers.roles import Partition, Roles, roles_of

__all__ = ["Axis", "Partition", "Plan", "PlanChoice", "Step", "check_plan", "partitions"]

PlanChoice = Literal["auto", "factors", "dense"] | Partition


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution; `padding` is (before, after) in positions, `output_padding` of a transposed one."""

    kernel: int
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    dilation: int = 1
    transposed: bool = False
    output_padding: int = 0

    def output_size(self, size: int) -> int:
        reach = self.dilation * (self.kernel - 1) + 1
        if self.transposed:
            return (size - 1) * self.stride - sum(self.padding) + reach + self.output_padding
        return (size + sum(self.padding) - reach) // self.stride + 1

    def positions(self, size: int) -> int:
        """Returns how many positions the kernel is laid on: those of the output, of a transposed convolution those of the input."""
        return size if self.transposed else self.output_size(size)


def check_plan(plan: object) -> PlanChoice:
    """Returns the choice of a plan, its groups as tuples.

    Raises:
        ValueError: a value of another kind; whether groups are those of a network is known when it is compiled.
    """
    if isinstance(plan, (list, tuple)) and all(isinstance(group, (list, tuple)) for group in plan):
        return tuple(tuple(group) for group in plan)
    if plan in ("auto", "factors", "dense"):
        return plan
    raise UserError(f"plan {plan!r}: expected 'auto', 'factors', 'dense' or groups of factor names")


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


def _partition(network: Network, choice: PlanChoice) -> Partition:
    names = tuple(network.factors)
    if choice == "factors":
        return tuple((name,) for name in names)
    if choice == "dense":
        return (names,)
    if not isinstance(choice, str) and tuple(itertools.chain(*choice)) == names and all(choice):
        return tuple(tuple(group) for group in choice)
    raise UserError(
        f"plan {choice!r} is none of 'auto', 'factors', 'dense' or groups of the factors {names} in that order, "
        f"such as {tuple((name,) for name in names)}"
    )


@dataclass(frozen=True)
class Step:
    """One group, compiled: how to merge its factors, and the convolution or matmul that follows."""

    merge: Contraction
    weight_shape: tuple[int, ...]
    channels: tuple[int, ...]
    order: tuple[int, ...]
    carried: int
    kept: int
    consumed: int
    produced: int
    arranged: bool
    """Whether the activation may come in another order than the step needs, or with strides that could be misread."""
    pad: tuple[int, ...]
    """What F.pad takes: the padding that the convolution cannot do itself, of another mode than zeros or uneven."""
    pad_mode: str
    subsample: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    """That of a transposed convolution; empty for any other step."""
    window: tuple[bool, ...]
    """Which of the spatial axes the step has."""

    def weight(self, factors: Mapping[str, Tensor]) -> Tensor:
        """Makes (kept * produced, consumed, window...) of the group's factors, transposed (kept * consumed, produced, window...)."""
        return self.merge(factors).reshape(-1).view(self.weight_shape)

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        channels_last: bool,
        output_padding: Sequence[int] | None = None,
    ) -> Tensor:
        """Takes (n, channels, positions...) to (n, channels', positions'...)."""
        batch = x.shape[0]
        if self.pad:
            x = F.pad(x, self.pad, mode=self.pad_mode)
        if self.subsample:
            x = x[(slice(None), slice(None), *(slice(None, None, step) for step in self.subsample))]
        if self.arranged:
            x = _arrange(x, self.channels, self.order, channels_last=channels_last and self.carried == 1)
        if self.carried > 1:
            x = x.unflatten(1, (self.carried, self.kept * self.consumed)).flatten(0, 1)
        if not self.stride:
            x = _linear(x, weight, bias, self.kept)
        elif self.output_padding:
            more = self.output_padding
            if output_padding is not None:
                more = tuple(size if own else 0 for size, own in zip(output_padding, self.window, strict=True))
            transposed = _TRANSPOSED[len(self.stride)]
            x = transposed(x, weight, bias, self.stride, self.padding, more, self.kept, self.dilation)
        else:
            convolution = _CONVOLUTIONS[len(self.stride)]
            x = convolution(x, weight, bias, self.stride, self.padding, self.dilation, self.kept)
        return x.reshape(batch, self.carried * self.kept * self.produced, *x.shape[2:]) if self.carried > 1 else x


_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, kept: int) -> Tensor:
    """Takes (n, kept * consumed) to (n, kept * produced), by one matrix for each of the kept."""
    if kept == 1:
        return F.linear(x, weight, bias)
    split = x.unflatten(1, (kept, -1)).transpose(0, 1)
    y = torch.bmm(split, weight.unflatten(0, (kept, -1)).mT).transpose(0, 1).flatten(1)
    return y if bias is None else y + bias.to(y.dtype)


def _arrange(x: Tensor, channels: tuple[int, ...], order: tuple[int, ...], *, channels_last: bool) -> Tensor:
    """Puts the channels' indices of (n, channels, positions...) in another order, in one of torch's two layouts.

    Where a dimension has size 1 the strides can be those of both layouts, or of neither; torch's kernels then disagree among
    themselves, and give wrong numbers. Passing through one dimension makes them those of one layout; it copies nothing
    where the values lie in that order already.
    """
    batch, positions, count = x.shape[0], x.shape[2:], len(channels)
    split = x.reshape(batch, *channels, *positions)
    moved, places = [1 + place for place in order], range(1 + count, 1 + count + len(positions))
    if channels_last:
        flat = split.permute(0, *places, *moved).reshape(-1)
        return flat.view(batch, *positions, math.prod(channels)).permute(0, 3, 1, 2)
    return split.permute(0, *moved, *places).reshape(-1).view(batch, math.prod(channels), *positions)


def _pads_first(axis: Axis, pad_mode: str) -> bool:
    """Tells whether an axis is padded before the convolution: that cannot do it, or the step only picks positions."""
    if axis.transposed:
        return False
    return pad_mode != "constant" or axis.padding[0] != axis.padding[1] or (axis.kernel == 1 and axis.stride > 1)


def _order(held: Indices, wanted: Indices) -> tuple[int, ...]:
    return tuple(held.index(index) for index in wanted)


def _compile_step(
    network: Network,
    sizes: Sizes,
    roles: Roles,
    axes: Mapping[str, Axis],
    pad_mode: str,
    *,
    after_carrying: bool,
) -> Step:
    """Compiles one group; `after_carrying` is whether the step before carried indices."""
    here = {index: axis if index in roles.kernel else Axis(1) for index, axis in axes.items()}
    channels = tuple(sizes[index] for index in roles.before)
    carried, kept, consumed, produced = (
        size_of(indices, sizes) for indices in (roles.carried, roles.kept, roles.consumed, roles.produced)
    )
    wanted = (*roles.carried, *roles.kept, *roles.consumed)
    stride = tuple(axis.stride for axis in here.values())
    transposed = any(axis.transposed for axis in here.values())
    # On the CPU torch's strided pointwise convolution in channels last writes past its memory.
    picks = not transposed and all(axis.kernel == 1 for axis in here.values()) and max(stride, default=1) > 1
    padded = [axis.padding if _pads_first(axis, pad_mode) else (0, 0) for axis in here.values()]
    merge, leading = roles.merge, (kept * produced, consumed)
    if transposed:
        output = (*roles.kept, *roles.consumed, *roles.produced, *roles.kernel)
        merge, leading = network.contraction(roles.names, output), (kept * consumed, produced)
    return Step(
        merge=merge,
        weight_shape=(*leading, *(axis.kernel for axis in here.values())),
        channels=channels,
        order=_order(roles.before, wanted),
        carried=carried,
        kept=kept,
        consumed=consumed,
        produced=produced,
        arranged=roles.before != wanted or carried > 1 or after_carrying or picks or math.prod(channels) == 1,
        pad=tuple(itertools.chain(*reversed(padded))) if any(map(any, padded)) else (),
        pad_mode=pad_mode,
        subsample=stride if picks else (),
        stride=(1,) * len(stride) if picks else stride,
        padding=tuple(
            0 if any(before) else axis.padding[0] for before, axis in zip(padded, here.values(), strict=True)
        ),
        dilation=tuple(axis.dilation for axis in here.values()),
        output_padding=tuple(axis.output_padding for axis in here.values()) if transposed else (),
        window=tuple(index in roles.kernel for index in here),
    )


@dataclass(frozen=True)
class Plan:
    """A partition, compiled to integers: `plan(x, plan.weights(factors), bias)` computes the layer."""

    groups: Partition
    steps: tuple[Step, ...]
    output_channels: tuple[int, ...]
    output_order: tuple[int, ...]
    output_arranged: bool
    """Whether the last step leaves the output in another order."""

    @staticmethod
    def compile(
        network: Network, sizes: Sizes, groups: PlanChoice, axes: Mapping[str, Axis], pad_mode: str = "constant"
    ) -> "Plan":
        """Compiles a partition of the factors.

        Args:
            network: the factors' strings.
            sizes: the size of every index.
            groups: the partition, or "factors" or "dense".
            axes: the spatial indices of the weight, in order, and their geometry; empty for a linear.
            pad_mode: what F.pad calls it; "constant" pads with zeros.

        Raises:
            ValueError: the groups are not a partition of the factors, in order.
        """
        partition = _partition(network, groups)
        steps: list[Step] = []
        for roles in roles_of(network, partition):
            after_carrying = bool(steps) and steps[-1].carried > 1
            steps.append(_compile_step(network, sizes, roles, axes, pad_mode, after_carrying=after_carrying))
        last, output = roles_of(network, partition)[-1].after, network.modes[0]
        return Plan(
            groups=partition,
            steps=tuple(steps),
            output_channels=tuple(sizes[index] for index in last),
            output_order=_order(last, output),
            output_arranged=last != output or steps[-1].carried > 1,
        )

    @property
    def is_chain(self) -> bool:
        """Whether each step takes what the step before gives as it is, and is a convolution or one matmul of it."""
        one = all(step.carried == 1 and (step.stride or step.kept == 1) for step in self.steps)
        return one and all(
            list(order) == sorted(order) for order in (self.output_order, *(s.order for s in self.steps))
        )

    def weights(self, factors: Mapping[str, Tensor]) -> list[Tensor]:
        """Returns the merged weight of each step, differentiable in the factors."""
        return [step.weight(factors) for step in self.steps]

    def __call__(
        self, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, output_padding: Sequence[int] | None = None
    ) -> Tensor:
        """Takes (n, i, positions...) to (n, o, positions'...), channels last if x is; the positions are absent for a linear.

        Args:
            x: the input.
            weights: what `weights` returns.
            bias: (o,), or None.
            output_padding: of a transposed convolution, where a call asks for another than the layer's own.
        """
        # Under vmap torch neither tells of a memory format nor makes one, so that the axes are moved instead.
        channels_last = x.dim() == 4 and not x.is_contiguous() and x.permute(0, 2, 3, 1).is_contiguous()
        for step, weight in zip(self.steps[:-1], weights[:-1], strict=True):
            x = step(x, weight, None, channels_last=channels_last, output_padding=output_padding)
        early = None if self.output_arranged else bias
        x = self.steps[-1](x, weights[-1], early, channels_last=channels_last, output_padding=output_padding)
        if self.output_arranged:
            x = _arrange(x, self.output_channels, self.output_order, channels_last=channels_last)
            x = x if bias is None else x + bias.to(x.dtype).view(-1, *(1 for _ in x.shape[2:]))
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if channels_last else x
