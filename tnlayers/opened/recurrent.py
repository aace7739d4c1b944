"""`nn.LSTM`, `nn.GRU`, `nn.RNN` and their cells with the products of inputs and of hidden states as layers.

n: batch, t: time steps, i: input features, h: hidden features, g: gates (4 h of an LSTM, 3 h of a GRU, h of an RNN).
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tnlayers.errors import UserError
from tnlayers.opened.opened import Opened, State, linear

__all__ = ["OpenedCell", "OpenedRecurrent"]

HiddenState = tuple[Tensor, ...]
"""(hidden,) of a GRU and an RNN, (hidden, memory) of an LSTM."""


def step(mode: str, x: Tensor, hidden: Tensor, state: HiddenState) -> HiddenState:
    """Takes one step in time.

    Args:
        mode: as torch names it: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        x: the product of the input, with its bias, (n, g).
        hidden: the product of the hidden state, with its bias, (n, g).
        state: the state before.

    Source: the formulas on the pages of torch's `nn.LSTM`, `nn.GRU` and `nn.RNN`.
    """
    if mode == "LSTM":
        i, f, cell, o = (x + hidden).chunk(4, dim=-1)
        memory = f.sigmoid() * state[1] + i.sigmoid() * cell.tanh()
        return o.sigmoid() * memory.tanh(), memory
    if mode == "GRU":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, dim=-1), hidden.chunk(3, dim=-1)
        new = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
        return (new + (x_z + h_z).sigmoid() * (state[0] - new),)
    return ((x + hidden).tanh() if mode == "RNN_TANH" else (x + hidden).relu(),)


class OpenedRecurrent(Opened):
    """Drop-in for `nn.LSTM`, `nn.GRU` and `nn.RNN`; its linears are `ih_l0`, `hh_l0`, `ih_l0_reverse` and so on.

    With a `proj_size` there are `hr_l0` and so on. All hold the very Parameters of the module that was opened. The inputs of
    all time steps are multiplied in one call, and then one step after another is taken. So each step costs a few launches
    that torch's fused kernels save: fewer operations are less time only where the hidden state is wide.
    """

    def __init__(self, dense: nn.RNNBase) -> None:
        super().__init__()
        self.mode, self.input_size, self.hidden_size = dense.mode, dense.input_size, dense.hidden_size
        self.num_layers, self.bias, self.batch_first = dense.num_layers, dense.bias, dense.batch_first
        self.dropout, self.bidirectional, self.proj_size = dense.dropout, dense.bidirectional, dense.proj_size

    @classmethod
    def of(cls, dense: nn.Module) -> Self:
        assert isinstance(dense, nn.RNNBase)
        opened, parameters = cls(dense), dict(dense.named_parameters(remove_duplicate=False))
        for key, weight in parameters.items():
            kind, _, name = key.partition("_")
            if kind == "weight":
                opened.add_module(name, linear(weight, parameters.get(f"bias_{name}")))
        return opened.train(dense.training)

    def closed(self) -> nn.RNNBase:
        self._check_plain()
        sizes = (self.input_size, self.hidden_size, self.num_layers, self.bias, self.batch_first)
        options: dict[str, Any] = {"bidirectional": self.bidirectional, "device": "meta"}
        if self.mode == "LSTM":
            options["proj_size"] = self.proj_size
        if self.mode == "RNN_RELU":
            options["nonlinearity"] = "relu"
        dense = getattr(nn, self.mode.partition("_")[0])(*sizes[:3], bias=sizes[3], batch_first=sizes[4], **options)
        dense.dropout = self.dropout  # the constructor would warn again where it is of no use
        for name, layer in self.linears.items():
            for kind, parameter in layer.named_parameters():
                setattr(dense, f"{kind}_{name}", parameter)
        return dense.train(self.training)

    def renamed(self, state: State) -> State:
        return {re.sub(r"^(weight|bias)_(\w+)$", r"\2.\1", key): value for key, value in state.items()}

    def flatten_parameters(self) -> None:
        """Does nothing, as torch's does where its kernels need no common buffer."""

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """Computes what torch's module does, with the same arguments: padded or packed sequences, with or without a batch.

        Raises:
            UserError: an input or an initial state of another shape.
        """
        output, state = self._packed(input, hx) if isinstance(input, PackedSequence) else self._padded(input, hx)
        return output, state if self.mode == "LSTM" else state[0]

    def _packed(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, HiddenState]:
        """Packed rows lie in the order of time, the longest sequences first; states come and go in the caller's order."""
        sizes, order, back = input.batch_sizes.tolist(), input.sorted_indices, input.unsorted_indices
        state = self._initial(input.data, sizes[0], hx)
        state = state if order is None else tuple(part.index_select(1, order) for part in state)
        data, state = self._layers(input.data, sizes, state)
        state = state if back is None else tuple(part.index_select(1, back) for part in state)
        return PackedSequence(data, input.batch_sizes, order, back), state

    def _padded(self, input: Tensor, hx: Any) -> tuple[Tensor, HiddenState]:
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            shape = tuple(input.shape)
            raise UserError(f"the input has shape {shape}; expected 2 or 3 axes, the last of {self.input_size}")
        batched = input.dim() == 3
        steps = input.transpose(0, 1) if batched and self.batch_first else input
        steps = steps if batched else steps.unsqueeze(1)
        t, n = steps.shape[:2]
        data, state = self._layers(steps.flatten(0, 1), [n] * t, self._initial(steps, n, hx, batched=batched))
        output = data.unflatten(0, (t, n))
        if not batched:
            return output.squeeze(1), tuple(part.squeeze(1) for part in state)
        return output.transpose(0, 1) if self.batch_first else output, state

    def _initial(self, input: Tensor, n: int, hx: Any, *, batched: bool = True) -> HiddenState:
        """Returns the states before the first step, each (layers * directions, n, features)."""
        widths = (self.proj_size or self.hidden_size, self.hidden_size) if self.mode == "LSTM" else (self.hidden_size,)
        shapes = [(self.num_layers * (1 + self.bidirectional), n, width) for width in widths]
        if hx is None:
            return tuple(input.new_zeros(shape) for shape in shapes)
        given = tuple(hx) if self.mode == "LSTM" else (hx,)
        given = given if batched else tuple(part.unsqueeze(1) for part in given)
        if [tuple(part.shape) for part in given] != shapes:
            raise UserError(f"hx has shapes {[tuple(part.shape) for part in given]}; expected {shapes}")
        return given

    def _layers(self, data: Tensor, sizes: list[int], state: HiddenState) -> tuple[Tensor, HiddenState]:
        """Runs all layers over the steps of a sequence, which lie one behind the other: (rows, i) -> (rows, features)."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        last: list[HiddenState] = []
        for layer in range(self.num_layers):
            outputs = []
            for name in (f"l{layer}{direction}" for direction in directions):
                output, end = self._steps(name, data, sizes, tuple(part[len(last)] for part in state))
                outputs.append(output)
                last.append(end)
            data = torch.cat(outputs, dim=-1)
            if self.dropout and layer < self.num_layers - 1:
                data = F.dropout(data, self.dropout, self.training)
        return data, tuple(torch.stack(parts) for parts in zip(*last, strict=True))

    def _steps(self, name: str, data: Tensor, sizes: Sequence[int], state: HiddenState) -> tuple[Tensor, HiddenState]:
        """Runs one layer in one direction; a sequence that has ended, or not begun, keeps its state."""
        layers, outputs = self.linears, []
        inputs = layers[f"ih_{name}"](data).split(sizes)
        hidden, project = layers[f"hh_{name}"], layers.get(f"hr_{name}")
        backward = name.endswith("_reverse")
        with _merged_once(hidden), _merged_once(project):
            for x in reversed(inputs) if backward else inputs:
                running = tuple(part[: len(x)] for part in state)
                h, *memory = step(self.mode, x, hidden(running[0]), running)
                new = (project(h) if project else h, *memory)
                outputs.append(new[0])
                still = [part[len(x) :] for part in state]
                state = tuple(torch.cat(pair) for pair in zip(new, still, strict=True)) if len(still[0]) else new
        return torch.cat(outputs[::-1] if backward else outputs), state

    def extra_repr(self) -> str:
        return f"{self.mode}, {self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"


def _merged_once(layer: nn.Module | None) -> AbstractContextManager[None]:
    """Lets a factorized layer merge its factors once for all time steps, rather than at each."""
    return getattr(layer, "merged_once", nullcontext)()


class OpenedCell(Opened):
    """Drop-in for `nn.LSTMCell`, `nn.GRUCell` and `nn.RNNCell`; its linears `ih` and `hh` hold the very Parameters."""

    ih: nn.Module
    hh: nn.Module

    def __init__(self, dense: nn.RNNCellBase) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.bias = dense.input_size, dense.hidden_size, dense.bias
        kind = type(dense).__name__.removesuffix("Cell")
        self.mode = f"RNN_{dense.nonlinearity.upper()}" if isinstance(dense, nn.RNNCell) else kind

    @classmethod
    def of(cls, dense: Any) -> Self:
        opened = cls(dense)
        opened.ih, opened.hh = linear(dense.weight_ih, dense.bias_ih), linear(dense.weight_hh, dense.bias_hh)
        return opened.train(dense.training)

    def closed(self) -> nn.RNNCellBase:
        self._check_plain()
        kind, _, nonlinearity = self.mode.partition("_")
        options = {"nonlinearity": nonlinearity.lower()} if nonlinearity else {}
        make = getattr(nn, f"{kind}Cell")
        dense = make(self.input_size, self.hidden_size, self.bias, device="meta", **options)
        for name, layer in self.linears.items():
            for key, parameter in layer.named_parameters():
                setattr(dense, f"{key}_{name}", parameter)
        return dense.train(self.training)

    renamed = OpenedRecurrent.renamed

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Computes what torch's cell does: (n, i) or (i,), and the state, to the next state.

        Raises:
            UserError: an input or a state of another shape.
        """
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise UserError(
                f"the input has shape {tuple(input.shape)}; expected 1 or 2 axes, the last of {self.input_size}"
            )
        x = self.ih(input)
        if hx is None:
            zeros = x.new_zeros(*input.shape[:-1], self.hidden_size)
            hx = (zeros, zeros) if self.mode == "LSTM" else zeros
        state = tuple(hx) if self.mode == "LSTM" else (hx,)
        shapes, expected = [tuple(part.shape) for part in state], (*input.shape[:-1], self.hidden_size)
        if shapes != [expected] * (2 if self.mode == "LSTM" else 1):
            raise UserError(f"hx has shapes {shapes}; expected {expected} each")
        new = step(self.mode, x, self.hh(state[0]), state)
        return new if self.mode == "LSTM" else new[0]
