"""`nn.MultiheadAttention` with its projections as layers.

n: batch, l: queries, s: keys, e: embedding, h: heads, d: width of a head (e = h d).
"""

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tnlayers.errors import UserError
from tnlayers.opened.opened import Opened, State, linear, stacked

__all__ = ["OpenedAttention"]

PARTS = ("q_proj", "k_proj", "v_proj")


class OpenedAttention(Opened):
    """Drop-in for `nn.MultiheadAttention`; its linears are `in_proj` (e -> 3e) or `q_proj`, `k_proj`, `v_proj`, and `out_proj`.

    There is one `in_proj` where queries, keys and values have the same width. Self-attention calls it once. Where the
    three inputs differ, each meets its third of a dense weight. A factorized layer is called on each distinct input
    and a third of its output is used, since no third of it can be computed by itself in general. An attention that is
    known to get different inputs is therefore opened with three projections.

    The children hold the very Parameters of the module that was opened, with one exception: three projections hold copies
    of the thirds of what that module keeps in one Parameter (the bias, and the weight if the widths are equal).
    """

    # torch's fused kernels read dense weights past the layers, and are for modules that say True here.
    _qkv_same_embed_dim = False
    in_proj: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    out_proj: Any
    bias_k: Any
    bias_v: Any

    def __init__(self, dense: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = dense.embed_dim, dense.kdim, dense.vdim
        self.num_heads, self.head_dim = dense.num_heads, dense.head_dim
        self.dropout, self.batch_first, self.add_zero_attn = dense.dropout, dense.batch_first, dense.add_zero_attn
        self.bias_k, self.bias_v = dense.bias_k, dense.bias_v

    @classmethod
    def of(cls, dense: Any, *, packed: bool = True) -> Self:
        """Opens an attention.

        Args:
            dense: an `nn.MultiheadAttention`.
            packed: whether there is one `in_proj` where the widths allow it.
        """
        opened = cls(dense)
        weight, bias = dense.in_proj_weight, dense.in_proj_bias
        if packed and weight is not None:
            opened.in_proj = linear(weight, bias)
        else:
            separate = [dense.q_proj_weight, dense.k_proj_weight, dense.v_proj_weight]
            weights = separate if weight is None else _thirds(weight)
            biases = [None] * 3 if bias is None else _thirds(bias)
            for name, w, b in zip(PARTS, weights, biases, strict=True):
                opened.add_module(name, linear(w, b))
        opened.out_proj = linear(dense.out_proj.weight, dense.out_proj.bias)
        return opened.train(dense.training)

    def closed(self) -> nn.MultiheadAttention:
        self._check_plain()
        dense: Any = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            bias=self.in_proj_bias is not None,
            add_bias_kv=self.bias_k is not None,
            add_zero_attn=self.add_zero_attn,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            device="meta",
        )
        first = self._projections()
        dense.in_proj_bias = None if first[0].bias is None else _joined([layer.bias for layer in first])
        if dense._qkv_same_embed_dim:
            dense.in_proj_weight = _joined([layer.weight for layer in first])
        else:
            dense.q_proj_weight, dense.k_proj_weight, dense.v_proj_weight = (layer.weight for layer in first)
        dense.out_proj.weight, dense.out_proj.bias = self.out_proj.weight, self.out_proj.bias
        dense.bias_k, dense.bias_v = self.bias_k, self.bias_v
        return dense.train(self.training)

    def renamed(self, state: State) -> State:
        new: State = {}
        for key, value in state.items():
            base, _, kind = key.rpartition("_")  # such as in_proj_weight or q_proj_weight
            if key in ("in_proj_weight", "in_proj_bias") and not self._is_packed:
                new |= {f"{name}.{kind}": part for name, part in zip(PARTS, value.chunk(3), strict=True)}
            elif base in ("in_proj", *PARTS):
                new[f"{base}.{kind}"] = value
            else:
                new[key] = value
        return new

    @property
    def _is_packed(self) -> bool:
        return hasattr(self, "in_proj")

    def _projections(self) -> list[Any]:
        """Returns the layers in front: one, or those of queries, keys and values."""
        return [self.in_proj] if self._is_packed else [self.q_proj, self.k_proj, self.v_proj]

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The dense weight (3e, e), as torch's module has it; None where keys or values have another width."""
        weights = [layer.weight for layer in self._projections()]
        return torch.cat(weights) if len({weight.shape for weight in weights}) == 1 else None

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The bias (3e,), as torch's module has it."""
        biases = [layer.bias for layer in self._projections()]
        return None if biases[0] is None else torch.cat(biases)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes what `nn.MultiheadAttention` does, with the same arguments.

        Raises:
            UserError: nested tensors, inputs of different batches, keys and values of different lengths, a mask of another shape
                or of whole numbers, `is_causal` without a mask.
        """
        self._check(query, key, value, is_causal and attn_mask is None)
        self._check_masks(query, key, key_padding_mask, attn_mask)
        q, k, v = (self._heads(x) for x in self._project(query, key, value))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q, k.shape[2])
        if self.bias_k is not None:
            shape = (k.shape[0], -1, -1, -1)
            k = torch.cat([k, self._heads(self.bias_k).expand(shape)], dim=2)
            v = torch.cat([v, self._heads(self.bias_v).expand(shape)], dim=2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[3]))  # all attend to what was added
        weights, dropout = None, self.dropout if self.training else 0.0
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(2, 3)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            mixed = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights.squeeze(0) if query.dim() == 2 else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        mixed = mixed.transpose(1, 2).flatten(2)  # (n, l, e)
        if query.dim() == 2:
            mixed = mixed.squeeze(0)
        elif not self.batch_first:
            mixed = mixed.transpose(0, 1)
        return self.out_proj(mixed), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor, lacks_mask: bool) -> None:
        if query.is_nested or key.is_nested or value.is_nested:
            raise UserError(
                "an opened attention takes no nested tensors: give padded ones and a key_padding_mask, and set "
                "use_nested_tensor = False on an nn.TransformerEncoder around it"
            )
        if not (query.dim() == key.dim() == value.dim() and query.dim() in (2, 3)):
            dims = (query.dim(), key.dim(), value.dim())
            raise UserError(f"query, key and value have {dims} dimensions; expected 3 each, or 2 each without a batch")
        if lacks_mask:
            raise UserError("is_causal=True is a hint about attn_mask: give the causal mask too")
        if key.shape[:-1] != value.shape[:-1]:
            shapes = tuple(key.shape), tuple(value.shape)
            raise UserError(f"key and value have shapes {shapes}; expected equal ones up to the last axis")
        batch = slice(0, 1) if self.batch_first else slice(1, 2)
        if query.dim() == 3 and query.shape[batch] != key.shape[batch]:
            shapes = tuple(query.shape), tuple(key.shape)
            raise UserError(f"query and key have shapes {shapes}; expected the same batch")

    def _sizes(self, x: Tensor) -> tuple[int, int]:
        """Returns the batch and the length of an input, whose batch is 1 where it has none."""
        if x.dim() == 2:
            return 1, x.shape[0]
        return (x.shape[0], x.shape[1]) if self.batch_first else (x.shape[1], x.shape[0])

    def _check_masks(self, query: Tensor, key: Tensor, padding: Tensor | None, attn: Tensor | None) -> None:
        (n, l), (_, s) = self._sizes(query), self._sizes(key)  # noqa: E741
        if attn is not None and attn.shape not in ((l, s), (n * self.num_heads, l, s)):
            expected = f"{(l, s)}, or (batch * num_heads, *{(l, s)})"
            raise UserError(f"attn_mask has shape {tuple(attn.shape)}; expected {expected}")
        if padding is not None and padding.shape != ((n, s) if query.dim() == 3 else (s,)):
            expected = str((n, s) if query.dim() == 3 else (s,))
            raise UserError(f"key_padding_mask has shape {tuple(padding.shape)}; expected {expected}")
        for name, mask in {"attn_mask": attn, "key_padding_mask": padding}.items():
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise UserError(f"{name} is of type {mask.dtype}; expected torch.bool or floating-point numbers")

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Returns queries, keys and values, each (..., e)."""
        if not self._is_packed:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if type(self.in_proj) is nn.Linear and not (query is key is value):
            return tuple(map(self._third, range(3), (query, key, value)))
        q, k, v = queried = self.in_proj(query).chunk(3, dim=-1)
        if key is not query:
            _, k, v = self.in_proj(key).chunk(3, dim=-1)
        if value is query:
            v = queried[2]
        elif value is not key:
            v = self.in_proj(value).chunk(3, dim=-1)[2]
        return q, k, v

    def _third(self, place: int, x: Tensor) -> Tensor:
        """Calls a plain `in_proj` with a third of its weight and bias."""
        parts = {key: value.chunk(3)[place] for key, value in self.in_proj.named_parameters()}
        return functional_call(self.in_proj, parts, (x,))

    def _heads(self, x: Tensor) -> Tensor:
        """Turns (n, l, e), (l, n, e) if not batch_first, or (l, e) into (n, h, l, d)."""
        if x.dim() == 2:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, attn: Tensor | None, padding: Tensor | None, q: Tensor, s: int) -> Tensor | None:
        """Returns what is added to the scores, of a shape that (n, h, l, s) can be expanded from."""
        n, h, l, _ = q.shape  # noqa: E741
        masks = []
        if attn is not None:
            masks.append(_added(attn, q.dtype).view(n if attn.dim() == 3 else 1, h if attn.dim() == 3 else 1, l, s))
        if padding is not None:
            masks.append(_added(padding, q.dtype).view(n, 1, 1, s))
        return sum(masks[1:], masks[0]) if masks else None

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turns a mask that is True where nothing may attend into one that is added to the scores; others are that already."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _thirds(packed: nn.Parameter) -> list[nn.Parameter]:
    return [nn.Parameter(part.clone(), requires_grad=packed.requires_grad) for part in packed.detach().chunk(3)]


def _joined(parts: list[nn.Parameter]) -> nn.Parameter:
    return parts[0] if len(parts) == 1 else stacked(parts)
