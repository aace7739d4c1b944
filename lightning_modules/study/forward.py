"""A net whose forward pass goes on from a layer, so that what lies before a truncated layer is computed once."""

from typing import Any

import torch
from torch import Tensor, fx, nn

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
        layers: names of the convolutions and linears in the order in which they are called.
        splits: whether what lies before a layer is computed once.
    """

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        self._net = net
        self.layers = list(layer_inputs(net, example))
        self._interpreter: fx.Interpreter | None = None
        try:
            self._interpreter = fx.Interpreter(fx.symbolic_trace(net))
            ends = {self.layers[0], self.layers[-1]}
            self.splits = all(torch.equal(self.after(self.before(name, example)), net(example)) for name in ends)
        except Exception:  # whatever a net does that cannot be traced
            self.splits = False
        if not self.splits:
            self._interpreter = None

    def before(self, layer: str, x: Tensor) -> State:
        """What the net makes of the pictures before it calls a layer for the first time.

        Args:
            layer: its name.
            x: (n, channels, height, width).
        """
        if self._interpreter is None:
            return x
        run = self._interpreter
        run.env, run.args_iter = {}, iter((x,))
        for node in run.graph.nodes:
            if node.op == "call_module" and node.target == layer:
                return dict(run.env)
            run.env[node] = run.run_node(node)
            for used_up in run.user_to_last_uses.get(node, ()):
                run.env[used_up] = None
        raise ValueError(f"the net does not call {layer!r}")

    def after(self, state: State) -> Tensor:
        """(n, classes) outputs of the rest of the net, with its layers as they are now; the state can be used again."""
        if self._interpreter is None:
            assert isinstance(state, Tensor)
            return self._net(state)
        assert isinstance(state, dict)
        # Copies, because layers may work in place.
        copies = {node: fx.node.map_aggregate(value, _copy) for node, value in state.items()}
        return self._interpreter.run(initial_env=copies)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
