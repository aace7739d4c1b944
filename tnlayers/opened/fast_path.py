"""torch's fused kernel for `nn.TransformerEncoderLayer`, which reads the weights of its layers and does not call them.

In evaluation without gradients it would compute with dense weights, whatever the layers are: right, and as slow as if
nothing had been factorized. `nn.TransformerEncoder` moreover makes nested tensors for it, which the layers cannot take.
"""

from typing import Any

from torch import nn

__all__ = ["choose_fast_paths"]

_SWITCHES: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
"""For each module of torch's: the attribute that admits the fused kernel, and the value that does not."""


def choose_fast_paths(model: nn.Module) -> None:
    """Turns the fused kernel off where a layer is not torch's own, and on again where it was and all layers are.

    The attributes are plain ones of torch's modules: they are copied and pickled, and are no part of a state dict.
    """
    for module in model.modules():
        for kind, switch, off in _SWITCHES:
            if isinstance(module, kind) and hasattr(module, switch):
                before = f"_{switch}_if_dense"
                if all(map(_is_plain, _encoder_layers(module))):
                    if before in module.__dict__:
                        setattr(module, switch, module.__dict__.pop(before))
                elif before not in module.__dict__:
                    setattr(module, before, getattr(module, switch))
                    setattr(module, switch, off)


def _encoder_layers(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, nn.TransformerEncoderLayer)]


def _is_plain(layer: nn.Module) -> bool:
    """Tells whether the layers that the kernel skips are torch's own; a subclass may do without some of them."""
    attention = getattr(layer, "self_attn", None)
    linears = [getattr(layer, name, None) for name in ("linear1", "linear2")] + [getattr(attention, "out_proj", None)]
    others = [part for part in linears if part is not None and not isinstance(part, nn.Linear)]
    return not others and (attention is None or isinstance(attention, nn.MultiheadAttention))
