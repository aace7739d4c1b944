"""What a layer's weight meets: the second moments of the windows of its inputs, and of its outputs with them.

Of the n windows z of an input, of k = i h w entries each in every group g, and the outputs y (o) that the layer is to have there:
the means of z z^T and y z^T, and of what is needed to centre them. They say what any weight W does: E ||y - W z||^2.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tnlayers.geometry import Geometry
from tnlayers.linalg import precise

__all__ = ["Moments", "windows"]

_ENTRIES = 1 << 26  # of the windows that are taken out of one batch


def windows(geometry: Geometry, x: Tensor) -> Tensor:
    """Returns the windows that the weight meets at each place of the output, as a view (n, *positions, g i, *window).

    A transposed convolution is one over an input with zeros between its values, with the window turned round.

    Args:
        geometry: of a layer that is no look-up.
        x: its input, (n, g i, ...) or without n; of a linear (..., i).
    """
    axes = list(geometry.axes.values())
    if not axes:
        return x.reshape(-1, x.shape[-1])
    x = x.unsqueeze(0) if x.dim() == len(axes) + 1 else x
    pads: list[int] = []
    for place, axis in enumerate(axes):
        before, after = axis.padding
        reach = axis.dilation * (axis.kernel - 1)
        if axis.transposed:
            x = _spread(x, 2 + place, axis.stride)
            before, after = reach - before, reach - after + axis.output_padding
        pads = [before, after, *pads]
    x = F.pad(x, pads, mode=geometry.pad_mode) if any(pads) else x
    for place, axis in enumerate(axes):
        step = 1 if axis.transposed else axis.stride
        x = x.unfold(2 + place, axis.dilation * (axis.kernel - 1) + 1, step)[..., :: axis.dilation]
    x = x.flip([place for place, axis in enumerate(axes, 2 + len(axes)) if axis.transposed])
    return x.movedim(1, 1 + len(axes))


def _spread(x: Tensor, dim: int, stride: int) -> Tensor:
    """Puts stride - 1 zeros between the values along a dimension."""
    size = list(x.shape)
    size[dim] = (x.shape[dim] - 1) * stride + 1
    spread = x.new_zeros(size)
    spread.narrow(dim, 0, size[dim])[(slice(None),) * dim + (slice(None, None, stride),)] = x
    return spread


@dataclass
class Moments:
    """Sums over windows; `of` returns means.

    Attributes:
        geometry: of the layer.
        limit: how many windows are taken out of all batches, at random.
        batches: how many batches there will be.
    """

    geometry: Geometry
    limit: int
    batches: int

    def __post_init__(self) -> None:
        self.count = 0
        self._inputs = self._products = self._energy = torch.zeros(())
        self._input_sum = self._output_sum = torch.zeros(())

    def add(self, z: Tensor, y: Tensor, generator: torch.Generator) -> None:
        """Takes windows of a batch.

        Args:
            z: what the layer gets.
            y: what it is to put out, (n, g o, ...), of a linear (..., o).
            generator: draws the windows where there are too many.
        """
        groups, k = self.geometry.groups, math.prod(self.geometry.weight_shape[1:])
        seen = windows(self.geometry, z)
        positions = seen.shape[: 1 + len(self.geometry.axes)]
        outputs = y.reshape(-1, y.shape[-1]) if not self.geometry.axes else y.reshape(-1, *y.shape[-len(positions) :])
        outputs = outputs.movedim(1, -1)
        most = max(1, min(-(-self.limit // self.batches), _ENTRIES // max(groups * k, 1)))
        total = math.prod(positions)
        chosen = torch.arange(total) if total <= most else torch.randperm(total, generator=generator)[:most]
        places = torch.unravel_index(chosen.to(seen.device), positions)
        rows = _by_group(seen[places], groups)
        wanted = _by_group(outputs[places], groups)
        self._inputs = self._inputs + precise(rows.mT @ rows)
        self._products = self._products + precise(wanted.mT @ rows)
        self._energy = self._energy + precise(wanted.square().sum())
        self._input_sum = self._input_sum + precise(rows.sum(dim=1))
        self._output_sum = self._output_sum + precise(wanted.sum(dim=1))
        self.count += len(chosen)

    def means(self) -> tuple[Tensor, Tensor]:
        """Returns the means (g, k) of the windows and (g, o) of the outputs."""
        return self._input_sum / self.count, self._output_sum / self.count

    def second(self, *, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Returns E z z^T (g, k, k), E y z^T (g, o, k) and E ||y||^2, about the means where `centred`."""
        inputs, products, energy = (one / self.count for one in (self._inputs, self._products, self._energy))
        if not centred:
            return inputs, products, energy
        z, y = self.means()
        inputs = inputs - z.unsqueeze(-1) * z.unsqueeze(-2)
        products = products - y.unsqueeze(-1) * z.unsqueeze(-2)
        return inputs, products, (energy - y.square().sum()).clamp_min(0)


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """(m, g c, ...) -> (g, m, c ...)."""
    return rows.reshape(len(rows), groups, -1).transpose(0, 1)
