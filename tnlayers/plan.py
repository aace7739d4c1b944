"""How a layer is computed: a partition of the factor sequence, compiled once to plain integers.

Every contiguous partition of the factors is an exact way to compute the layer. The factors of a group are contracted with
each other first (weights only); the product then meets the activation as one convolution, or as one matmul for a linear.
All apart is the `"factors"` plan, all together the `"dense"` one, whose cost does not depend on the rank.

Within one step an index of the group is
    kernel    a spatial index of the weight
    kept      in the activation, and needed again later: it groups the convolution (CP's r, or g)
    consumed  in the activation, and summed here
    produced  new in the activation
and the activation's other indices are carried: they move into the batch.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tnlayers.errors import UserError
from tnlayers.network import Contraction, Indices, Network, Sizes, size_of

__all__ = ["Axis", "Partition", "Plan", "PlanChoice", "Roles", "check_plan", "partitions", "roles_of"]

Partition = tuple[tuple[str, ...], ...]
PlanChoice = Literal["auto", "factors", "dense"] | Partition


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution; `padding` is (before, after) in positions."""

    kernel: int
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    dilation: int = 1

    def output_size(self, size: int) -> int:
        return (size + sum(self.padding) - self.dilation * (self.kernel - 1) - 1) // self.stride + 1


@dataclass(frozen=True)
class Roles:
    """What each index does in one step of a partition; depends on the network's strings alone."""

    names: tuple[str, ...]
    before: Indices
    carried: Indices
    kept: Indices
    consumed: Indices
    produced: Indices
    kernel: Indices
    merge: Contraction

    @property
    def after(self) -> Indices:
        return (*self.carried, *self.kept, *self.produced)


def _ends(network: Network) -> tuple[Indices, Indices, Indices]:
    """Returns the indices of the input, of the output, and the spatial ones; `g` belongs to both ends."""
    output, inputs, *spatial = network.modes
    group = tuple(index for index in output if index == "g")
    return (*group, *inputs), output, tuple(index for mode in spatial for index in mode)


@lru_cache(maxsize=4096)  # rank rules ask for the same few thousands of times
def roles_of(network: Network, partition: Partition) -> tuple[Roles, ...]:
    inputs, outputs, spatial = _ends(network)
    held, steps = inputs, []
    for n, names in enumerate(partition):
        group = dict.fromkeys(index for name in names for index in network.indices[name])
        later = {index for other in partition[n + 1 :] for name in other for index in network.indices[name]}
        needed = later.union(outputs)
        kept = tuple(index for index in held if index in group and index in needed)
        consumed = tuple(index for index in held if index in group and index not in needed)
        produced = tuple(index for index in group if index not in (*held, *spatial) and index in needed)
        kernel = tuple(index for index in spatial if index in group)
        roles = Roles(
            names=names,
            before=held,
            carried=tuple(index for index in held if index not in group),
            kept=kept,
            consumed=consumed,
            produced=produced,
            kernel=kernel,
            merge=network.contraction(names, (*kept, *produced, *consumed, *kernel)),
        )
        steps.append(roles)
        held = roles.after
    return tuple(steps)


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
class _Step:
    """One group, compiled: how to merge its factors, and the convolution or matmul that follows."""

    merge: Contraction
    weight_shape: tuple[int, ...]
    channels: tuple[int, ...]
    order: tuple[int, ...]
    carried: int
    kept: int
    arranged: bool
    """Whether the activation may come in another order than the step needs, or with strides that could be misread."""
    subsample: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def weight(self, factors: Mapping[str, Tensor]) -> Tensor:
        """Makes (kept * produced, consumed, kernel...) of the group's factors."""
        return self.merge(factors).reshape(-1).view(self.weight_shape)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, channels_last: bool) -> Tensor:
        """Takes (n, channels, positions...) to (n, channels', positions'...)."""
        batch = x.shape[0]
        if self.subsample:
            x = x[:, :, :: self.subsample[0], :: self.subsample[1]]
        if self.arranged:
            x = _arrange(x, self.channels, self.order, channels_last=channels_last and self.carried == 1)
        if self.carried > 1:
            x = x.view(batch * self.carried, self.kept * self.weight_shape[1], *x.shape[2:])
        if len(self.stride) == 2:
            x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.kept)
        else:
            x = F.linear(x, weight, bias)
        return x.reshape(batch, self.carried * self.weight_shape[0], *x.shape[2:]) if self.carried > 1 else x


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


def _pads_early(axis: Axis, pad_mode: str) -> bool:
    """Tells whether an axis is padded before the first step: a convolution cannot, or its step only picks positions."""
    return pad_mode != "constant" or axis.padding[0] != axis.padding[1] or (axis.kernel == 1 and axis.stride > 1)


def _order(held: Indices, wanted: Indices) -> tuple[int, ...]:
    return tuple(held.index(index) for index in wanted)


@dataclass(frozen=True)
class Plan:
    """A partition, compiled to integers: `plan(x, plan.weights(factors), bias)` computes the layer.

    `pad` is what F.pad takes before the first step: the padding that no single step can do itself (a padding mode other
    than zeros, or more on one side than on the other). It commutes with the steps before the kernel, which have no bias.
    """

    groups: Partition
    steps: tuple[_Step, ...]
    pad: tuple[int, ...]
    pad_mode: str
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
        early = {index for index, axis in axes.items() if _pads_early(axis, pad_mode)}
        steps: list[_Step] = []
        for roles in roles_of(network, partition):
            here = {index: axis if index in roles.kernel else Axis(1) for index, axis in axes.items()}
            channels = tuple(sizes[index] for index in roles.before)
            carried = size_of(roles.carried, sizes)
            wanted = (*roles.carried, *roles.kept, *roles.consumed)
            stride = tuple(axis.stride for axis in here.values())
            # On the CPU torch's strided pointwise convolution in channels last writes past its memory.
            picks = all(axis.kernel == 1 for axis in here.values()) and max(stride, default=1) > 1
            after_carrying = bool(steps) and steps[-1].carried > 1
            step = _Step(
                merge=roles.merge,
                weight_shape=(
                    size_of((*roles.kept, *roles.produced), sizes),
                    size_of(roles.consumed, sizes),
                    *(axis.kernel for axis in here.values()),
                ),
                channels=channels,
                order=_order(roles.before, wanted),
                carried=carried,
                kept=size_of(roles.kept, sizes),
                arranged=roles.before != wanted or carried > 1 or after_carrying or picks or math.prod(channels) == 1,
                subsample=stride if picks else (),
                stride=(1,) * len(stride) if picks else stride,
                padding=tuple(0 if index in early else axis.padding[0] for index, axis in here.items()),
                dilation=tuple(axis.dilation for axis in here.values()),
            )
            steps.append(step)
        last, output = roles_of(network, partition)[-1].after, network.modes[0]
        pad = [axis.padding if index in early else (0, 0) for index, axis in axes.items()]
        return Plan(
            groups=partition,
            steps=tuple(steps),
            pad=tuple(itertools.chain(*reversed(pad))) if early else (),
            pad_mode=pad_mode,
            output_channels=tuple(sizes[index] for index in last),
            output_order=_order(last, output),
            output_arranged=last != output or steps[-1].carried > 1,
        )

    def weights(self, factors: Mapping[str, Tensor]) -> list[Tensor]:
        """Returns the merged weight of each step, differentiable in the factors."""
        return [step.weight(factors) for step in self.steps]

    def __call__(self, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """Takes (n, i, positions...) to (n, o, positions'...), channels last if x is; the positions are absent for a linear."""
        channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        if self.pad:
            x = F.pad(x, self.pad, mode=self.pad_mode)
        for step, weight in zip(self.steps[:-1], weights[:-1], strict=True):
            x = step(x, weight, None, channels_last=channels_last)
        early = None if self.output_arranged else bias
        x = self.steps[-1](x, weights[-1], early, channels_last=channels_last)
        if self.output_arranged:
            x = _arrange(x, self.output_channels, self.output_order, channels_last=channels_last)
            x = x if bias is None else x + bias.to(x.dtype).view(-1, *(1 for _ in x.shape[2:]))
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x
