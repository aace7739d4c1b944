"""A net whose forward pass goes on from a layer, so that what lies before a truncated layer is computed once."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from tnlayers.errors import UserError
from tnlayers.tracing import layer_inputs

__all__ = ["FromLayer"]

State = dict[fx.Node, Any] | Tensor


class FromLayer:
    """Splits a net's forward pass in front of any of its layers.

    The net is traced by torch.fx in evaluation mode. One that cannot be traced, or that computes something else when it is,
    is run whole each time: the results are the same.

    Args:
        net: in evaluation mode; its weights may change later, its structure may not.
        example: (n, channels, height, width) pictures.

    Attributes:
        layers: names of the two-dimensional convolutions and linears in the order in which they are called.
        splits: whether what lies before a layer is computed once.
    """

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        self._net = net
        called = layer_inputs(net, example)
        self.layers = [name for name in called if type(net.get_submodule(name)) in (nn.Conv2d, nn.Linear)]
        self._interpreter: fx.Interpreter | None = None
        try:
            self._interpreter = fx.Interpreter(fx.symbolic_trace(net))
            whole = net(example)
            self.splits = all(torch.equal(self.after(self.before(name, example)), whole) for name in self.layers)
        except Exception:  # whatever a net does that cannot be traced
            self.splits = False
        if not self.splits:
            self._interpreter = None

    def before(self, layer: str, x: Tensor) -> State:
        """Computes what the net makes of the pictures before it first uses a layer's weight, itself or in a module around it.

        Args:
            layer: its name.
            x: (n, channels, height, width).
        """
        if self._interpreter is None:
            return x
        run, weight = self._interpreter, self._net.get_submodule(layer).weight
        run.env, run.args_iter = {}, iter((x,))
        for node in run.graph.nodes:
            if any(held is weight for held in _parameters(run, node)):
                return dict(run.env)
            run.env[node] = run.run_node(node)
            for used_up in run.user_to_last_uses.get(node, ()):
                run.env[used_up] = None
        raise UserError(f"the net does not use the weight of {layer!r}")

    def after(self, state: State) -> Tensor:
        """Computes the outputs (n, classes) of the rest of the net, with its layers as they are now; the state can be used again."""
        if self._interpreter is None:
            assert isinstance(state, Tensor)
            return self._net(state)
        assert isinstance(state, dict)
        # Copies, because layers may work in place; all at once, so that views are views of the copies.
        copies = copy.deepcopy(list(state.values()))
        return self._interpreter.run(initial_env=dict(zip(state, copies, strict=True)))


def _parameters(run: fx.Interpreter, node: fx.Node) -> Iterable[Any]:
    """Returns what a node may take from the net: the parameters of the module that it calls, or a tensor on its own."""
    if node.op == "call_module":
        return run.fetch_attr(str(node.target)).parameters()
    return [run.fetch_attr(str(node.target))] if node.op == "get_attr" else []
