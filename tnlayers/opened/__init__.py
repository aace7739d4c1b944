"""Modules that own weights and multiply by them inside, where no rule about layers reaches them, opened.

An opened module computes exactly the same, and its linears are plain `nn.Linear` children: `self_attn.in_proj` of an
attention, `lstm.hh_l0` of an LSTM. Rules, budgets and checkpoints work on those as on any other. When all of them are
plain again, the module can be closed.
"""

from tnlayers.opened.fast_path import choose_fast_paths
from tnlayers.opened.opened import Opened
from tnlayers.opened.tree import (
    close_in_place,
    is_hooked,
    open_in_place,
    open_module,
    opened_view,
    replace_layers,
    unopened_reason,
)

__all__ = [
    "Opened",
    "choose_fast_paths",
    "close_in_place",
    "is_hooked",
    "open_in_place",
    "open_module",
    "opened_view",
    "replace_layers",
    "unopened_reason",
]
