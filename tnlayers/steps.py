"""One step of a plan, compiled to integers: a group's merged weight meets the activation in one operation."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tnlayers.contraction import Contraction, Indices, Sizes, size_of
from tnlayers.network import Network
from tnlayers.roles import Operation, Roles

__all__ = ["Axis", "Step", "arrange", "compile_step", "order_of", "possible_operations"]


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


@dataclass(frozen=True)
class Step:
    """One group, compiled: how to merge its factors, and the operation that follows.

    Attributes:
        merge: makes the weight of the factors.
        merge_last: makes it with the window in front of the second of its channels' indices, as channels last has it.
        ahead: how many channels there are of what the step does not touch, in front of what it does.
        behind: the same behind it.
        arranged: whether the activation may come in another order than the step needs, or with strides that could be misread.
        pad: what F.pad takes: the padding that the operation cannot do itself, of another mode than zeros or uneven.
        output_padding: that of a transposed convolution; empty for any other step.
        window: which of the spatial axes the step has.
    """

    operation: Operation
    merge: Contraction
    merge_last: Contraction
    weight_shape: tuple[int, ...]
    channels: tuple[int, ...]
    order: tuple[int, ...]
    ahead: int
    kept: int
    consumed: int
    produced: int
    behind: int
    arranged: bool
    pad: tuple[int, ...]
    pad_mode: str
    subsample: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    window: tuple[bool, ...]

    def weight(self, factors: Mapping[str, Tensor], *, last: bool = False) -> Tensor:
        """Makes (kept * produced, consumed, window...) of the group's factors, transposed (kept * consumed, produced, window...).

        Args:
            factors: those of the group, among others.
            last: whether the activation will be in channels last.
        """
        if last and self.has_layouts:
            lead, channels, *window = self.weight_shape
            return self.merge_last(factors).reshape(-1).view(lead, *window, channels).permute(0, 3, 1, 2)
        return self.merge(factors).reshape(-1).view(self.weight_shape)

    def _laid_out(self, weight: Tensor, *, last: bool) -> Tensor:
        """Lays a convolution's weight out as its activation, which copies nothing where it lies so.

        Torch would copy it at every call otherwise, or give the output the layout of the weight.
        """
        if not last or not self.has_layouts:
            return weight.contiguous()
        # Under vmap torch makes no memory format, so that the axes are moved.
        return weight.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if weight.is_contiguous() else weight

    @property
    def whole(self) -> bool:
        """Whether all channels of the output are made here, so that a bias may be added."""
        return self.ahead == self.behind == 1

    @property
    def has_layouts(self) -> bool:
        """Whether channels last differs from the default layout of the weight, and serves its activation."""
        pictures = self.operation == "convolution" and len(self.weight_shape) == 4 and self.ahead == 1
        return pictures and self.weight_shape[1] > 1 and math.prod(self.weight_shape[2:]) > 1

    @property
    def is_one_operation(self) -> bool:
        """Whether an operation of torch does all of it, on an input as torch's own layer takes it."""
        moves = self.arranged or self.pad or self.subsample
        matmul = self.operation == "linear" and not self.stride and self.kept == 1
        return self.whole and not moves and (matmul or self.operation == "convolution")

    def operate(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, output_padding: Sequence[int] | None = None
    ) -> Tensor:
        """Calls the operation of torch; see `__call__`."""
        if not self.stride:
            return F.linear(x, weight, bias)
        if not self.output_padding:
            convolution = _CONVOLUTIONS[len(self.stride)]
            return convolution(x, weight, bias, self.stride, self.padding, self.dilation, self.kept)
        more = self.output_padding
        if output_padding is not None:
            more = tuple(size if own else 0 for size, own in zip(output_padding, self.window, strict=True))
        transposed = _TRANSPOSED[len(self.stride)]
        return transposed(x, weight, bias, self.stride, self.padding, more, self.kept, self.dilation)

    def lies_last(self, last: bool) -> bool:
        """Tells whether the output is in channels last, for an input that is or is not."""
        if self.operation == "convolution" and self.ahead > 1:
            return False
        return last or (self.operation == "linear" and bool(self.stride))

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        last: bool,
        to_last: bool,
        output_padding: Sequence[int] | None = None,
    ) -> Tensor:
        """Takes (n, channels, positions...) to (n, channels', positions'...).

        Args:
            x: the activation.
            weight: what `weight` returns, of a convolution in either layout.
            bias: (channels',), or None.
            last: whether the activation is in channels last.
            to_last: whether the output shall be; a linear step alone can change it.
            output_padding: of a transposed convolution, where a call asks for another than the layer's own.
        """
        if self.pad:
            x = F.pad(x, self.pad, mode=self.pad_mode)
        if self.subsample:
            x = x[(slice(None), slice(None), *(slice(None, None, step) for step in self.subsample))]
        if self.operation == "convolution":
            return self._convolve(x, weight, bias, last=last, output_padding=output_padding)
        flips = bool(self.stride) and to_last and not last and self.kept == self.behind == 1
        if self.arranged or (flips and self.ahead > 1):
            x, last, flips = arrange(x, self.channels, self.order, channels_last=last or flips), last or flips, False
        if flips:
            return _turned(x, weight, bias)
        if self.stride and last and not to_last and self.kept == 1 and self.whole:
            return _turned_back(x, weight, bias)
        return self._multiply(x, weight, bias, last=last and bool(self.stride))

    def _convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *, last: bool, output_padding: Sequence[int] | None
    ) -> Tensor:
        batch, weight = x.shape[0], self._laid_out(weight, last=last)
        if self.arranged:
            x = arrange(x, self.channels, self.order, channels_last=last and self.ahead == 1)
        if self.ahead > 1:
            x = x.unflatten(1, (self.ahead, self.kept * self.consumed)).flatten(0, 1)
        x = self.operate(x, weight, bias, output_padding)
        return x.reshape(batch, self.ahead * self.kept * self.produced, *x.shape[2:]) if self.ahead > 1 else x

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, last: bool) -> Tensor:
        """Multiplies what the channels are at each place, where they lie in memory, by the weight."""
        channels, produced = (self.ahead, self.kept * self.consumed), self.ahead * self.kept * self.produced
        leading, positions = tuple(x.shape[:1]), tuple(x.shape[2:])
        if last:
            leading, positions = (*leading, *positions), ()
            x = x.permute(0, 2, 3, 1)
        if positions:
            split = x.unflatten(1, (*channels, self.behind)).flatten(3)
            y = _batched(split.flatten(0, 1), weight, bias, self.kept)
            y = y.reshape(*leading, produced * self.behind, *positions)
        elif self.whole and self.kept == 1:
            y = F.linear(x.contiguous() if self.subsample else x, weight, bias)  # one matmul, not one for each row
        elif self.behind == 1:
            rows = (x if self.ahead == 1 else x.unflatten(-1, channels)).flatten(0, -2)
            y = _linear(rows, weight, bias, self.kept).reshape(*leading, produced)
        else:
            split = x.reshape(-1, self.kept * self.consumed, self.behind)
            y = _batched(split, weight, bias, self.kept).reshape(*leading, produced * self.behind)
        return y.permute(0, 3, 1, 2) if last else y


_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, kept: int) -> Tensor:
    """Takes (n, kept * consumed) to (n, kept * produced), by one matrix for each of the kept."""
    if kept == 1:
        return F.linear(x, weight, bias)
    split = x.unflatten(1, (kept, -1)).transpose(0, 1)
    y = torch.bmm(split, weight.unflatten(0, (kept, -1)).mT).transpose(0, 1).flatten(1)
    return y if bias is None else y + bias.to(y.dtype)


def _batched(x: Tensor, weight: Tensor, bias: Tensor | None, kept: int) -> Tensor:
    """Takes (n, kept * consumed, inner) to (n, kept * produced, inner)."""
    if kept == 1:
        matrices = weight.expand(x.shape[0], *weight.shape)
        return torch.bmm(matrices, x) if bias is None else torch.baddbmm(bias[:, None], matrices, x)
    y = torch.matmul(weight.unflatten(0, (kept, -1)), x.unflatten(1, (kept, -1))).flatten(1, 2)
    return y if bias is None else y + bias.to(y.dtype)[:, None]


def _turned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Takes (n, consumed, h, w) of the default layout to (n, produced, h, w) in channels last."""
    if _folds(x, weight, len(weight)):
        return F.linear(x.permute(0, 2, 3, 1).contiguous(), weight, bias).permute(0, 3, 1, 2)
    rows, matrices = x.flatten(2).mT, weight.mT.expand(x.shape[0], *weight.mT.shape)
    y = torch.bmm(rows, matrices) if bias is None else torch.baddbmm(bias, rows, matrices)
    return y.reshape(x.shape[0], *x.shape[2:], y.shape[2]).permute(0, 3, 1, 2)


def _turned_back(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Takes (n, consumed, h, w) in channels last to (n, produced, h, w) of the default layout."""
    if _folds(x, weight, x.shape[1]):
        rows = F.linear(x.permute(0, 2, 3, 1).flatten(1, 2), weight, bias)
        return rows.mT.reshape(-1).view(x.shape[0], rows.shape[2], *x.shape[2:])
    columns = x.permute(0, 2, 3, 1).flatten(1, 2).mT
    return _batched(columns, weight, bias, 1).unflatten(2, x.shape[2:])


def _folds(x: Tensor, weight: Tensor, width: int) -> bool:
    """Tells whether a copy of (n, h, w) times the other channels is less than a gradient of the weight for each picture.

    One matmul for each picture copies nothing, but in the backward pass it makes (n, produced, consumed), to sum over n.
    """
    gradient = weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_exporting()
    return gradient and x.shape[2] * x.shape[3] < width


def arrange(x: Tensor, channels: tuple[int, ...], order: tuple[int, ...], *, channels_last: bool) -> Tensor:
    """Puts the channels' indices of (n, channels, positions...) in another order, in one of torch's two layouts.

    Where a dimension has size 1 the strides can be those of both layouts, or of neither; torch's kernels then disagree among
    themselves, and give wrong numbers. Passing through one dimension makes them those of one layout; it copies nothing
    where the values lie in that order already.
    """
    batch, positions, count = x.shape[0], x.shape[2:], len(channels)
    split = x.reshape(batch, *channels, *positions)
    moved, places = [1 + place for place in order], range(1 + count, 1 + count + len(positions))
    if channels_last and len(positions) == 2:
        flat = split.permute(0, *places, *moved).reshape(-1)
        return flat.view(batch, *positions, math.prod(channels)).permute(0, 3, 1, 2)
    return split.permute(0, *moved, *places).reshape(-1).view(batch, math.prod(channels), *positions)


def order_of(held: Indices, wanted: Indices) -> tuple[int, ...]:
    return tuple(held.index(index) for index in wanted)


def possible_operations(roles: Roles, axes: Mapping[str, Axis], sizes: Sizes) -> tuple[Operation, ...]:
    """Returns the operations that can compute a step, the plainest first."""
    if not axes:
        return ("linear", "bmm")
    here = [axes[index] for index in roles.kernel]
    if any(axis.kernel > 1 or axis.transposed for axis in here):
        return ("convolution",)
    # Torch has channels last for two axes alone, as far as this package uses it.
    if len(axes) != 2 or size_of(roles.kept, sizes) > 1:
        return ("convolution", "bmm")
    return ("linear", "convolution", "bmm")


def compile_step(
    network: Network,
    sizes: Sizes,
    roles: Roles,
    axes: Mapping[str, Axis],
    pad_mode: str,
    operation: Operation,
    *,
    after_carrying: bool,
) -> Step:
    """Compiles one group; `after_carrying` is whether the step before was a convolution that carried indices."""
    here = {index: axis if index in roles.kernel else Axis(1) for index, axis in axes.items()}
    channels = tuple(sizes[index] for index in roles.before)
    ahead, kept, consumed, produced, behind = (
        size_of(indices, sizes) for indices in (roles.ahead, roles.kept, roles.consumed, roles.produced, roles.behind)
    )
    stride = tuple(axis.stride for axis in here.values())
    transposed = any(axis.transposed for axis in here.values())
    convolves = operation == "convolution"
    # On the CPU torch's strided pointwise convolution in channels last writes past its memory.
    picks = not transposed and all(axis.kernel == 1 for axis in here.values()) and max(stride, default=1) > 1
    padded = [axis.padding if not convolves or _pads_first(axis, pad_mode) else (0, 0) for axis in here.values()]
    first, second, leading = (*roles.kept, *roles.produced), roles.consumed, (kept * produced, consumed)
    if transposed:
        first, second, leading = (*roles.kept, *roles.consumed), roles.produced, (kept * consumed, produced)
    misread = convolves and (ahead > 1 or after_carrying or picks or math.prod(channels) == 1)
    return Step(
        operation=operation,
        merge=network.contraction(roles.names, (*first, *second, *roles.kernel)),
        merge_last=network.contraction(roles.names, (*first, *roles.kernel, *second)),
        weight_shape=(*leading, *(axis.kernel for axis in here.values())) if convolves else leading,
        channels=channels,
        order=order_of(roles.before, roles.wanted),
        ahead=ahead,
        kept=kept,
        consumed=consumed,
        produced=produced,
        behind=behind,
        arranged=roles.before != roles.wanted or misread,
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


def _pads_first(axis: Axis, pad_mode: str) -> bool:
    """Tells whether an axis is padded before the convolution: that cannot do it, or the step only picks positions."""
    if axis.transposed:
        return False
    return pad_mode != "constant" or axis.padding[0] != axis.padding[1] or (axis.kernel == 1 and axis.stride > 1)
