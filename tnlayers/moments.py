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
from tnlayers.linalg import precise, wide

__all__ = ["Moments", "windows"]

_ENTRIES = 1 << 26  # of the windows that are taken out of one batch


def windows(geometry: Geometry, x: Tensor, places: Tensor | None = None) -> Tensor:
    """Returns the windows that the weight meets at places of the output, (g, m, i h w).

    A transposed convolution is one over an input with zeros between its values, with the window turned round.

    Args:
        geometry: of a layer that is no look-up.
        x: its input, (n, g i, ...) or without n; of a linear (..., i).
        places: m numbers of places in an output (n, ...), channels aside; by default all.
    """
    axes = list(geometry.axes.values())
    if not axes:
        rows = x.reshape(-1, x.shape[-1])
        return (rows if places is None else rows[places]).unsqueeze(0)
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
    x = x.movedim(1, 1 + len(axes))  # (n, *positions, g i, *window), all of it a view
    positions = x.shape[: 1 + len(axes)]
    chosen = torch.arange(math.prod(positions), device=x.device) if places is None else places
    rows = x[torch.unravel_index(chosen, positions)]
    return _by_group(rows.flip([place for place, axis in enumerate(axes, 2) if axis.transposed]), geometry.groups)


def _spread(x: Tensor, dim: int, stride: int) -> Tensor:
    """Puts stride - 1 zeros between the values along a dimension."""
    size = list(x.shape)
    size[dim] = (x.shape[dim] - 1) * stride + 1
    spread = x.new_zeros(size)
    spread.narrow(dim, 0, size[dim])[(slice(None),) * dim + (slice(None, None, stride),)] = x
    return spread


@dataclass
class Moments:
    """Sums over windows, of which `means` and `second` are the means.

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
        axes = len(self.geometry.axes)
        outputs = y.reshape(-1, *y.shape[-1 - axes :]).movedim(1, -1) if axes else y
        outputs = outputs.reshape(-1, outputs.shape[-1])
        most = max(1, min(-(-self.limit // self.batches), _ENTRIES // max(groups * k, 1)))
        total = len(outputs)
        chosen = torch.arange(total) if total <= most else torch.randperm(total, generator=generator)[:most]
        places = chosen.to(z.device)
        with torch.autocast(z.device.type, enabled=False):
            self._add(wide(windows(self.geometry, z, places)), wide(_by_group(outputs[places], groups)))

    def _add(self, rows: Tensor, wanted: Tensor) -> None:
        """Takes windows (g, m, k) and the outputs (g, m, o) there."""
        self._inputs = self._inputs + precise(rows.mT @ rows)
        self._products = self._products + precise(wanted.mT @ rows)
        self._energy = self._energy + precise(wanted.square().sum())
        self._input_sum = self._input_sum + precise(rows.sum(dim=1))
        self._output_sum = self._output_sum + precise(wanted.sum(dim=1))
        self.count += rows.shape[1]

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
