"""Multiply-accumulates as torch alone counts them."""

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["counted"]


def counted(net: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Returns those of an evaluation whose merged weights are kept, with attention in operations that torch has a count for."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            net.eval()(*args, **kwargs)
            with FlopCounterMode(display=False) as counter:
                net(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2
