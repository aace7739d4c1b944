"""The drop-in layers for every method. A class under one of them that names its `method` takes that method's options."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.errors import UnsupportedLayer, UserError
from tnlayers.factorized import FactorizedLayer
from tnlayers.lookup import Lookup
from tnlayers.method import Factorization
from tnlayers.plan import Plan
from tnlayers.schedule import PlanChoice

__all__ = [
    "FactorizedConv1d",
    "FactorizedConv2d",
    "FactorizedConv3d",
    "FactorizedConvTranspose1d",
    "FactorizedConvTranspose2d",
    "FactorizedConvTranspose3d",
    "FactorizedEmbedding",
    "FactorizedLinear",
    "layer_type",
    "named_layers",
]


class _Planned(FactorizedLayer):
    """A layer that a plan computes."""

    plan: Plan


class _Convolution(_Planned):
    transposed = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        plan: PlanChoice = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        template = self.dense_type(*geometry, device="meta")
        self._draw(template, self._method(**options), plan, device, dtype)

    @property
    def output_padding(self) -> tuple[int, ...]:
        return (0,) * len(self.spec.geometry.axes)

    def forward(self, input: Tensor) -> Tensor:
        plan, weights = self._planned()
        return plan(input, weights, self.bias)


class FactorizedConv1d(_Convolution):
    """Signature and attributes of `nn.Conv1d`, plus `method` and `plan`; (n, i, w) or (i, w) in, (n, o, w') out. See `FactorizedConv2d`."""

    dense_type = nn.Conv1d


class FactorizedConv2d(_Convolution):
    """Signature and attributes of `nn.Conv2d`, plus `method` and `plan`; (n, i, h, w) or (i, h, w) in, (n, o, h', w') out.

    Args:
        plan: "auto" (the fastest by the cost model), "factors", "dense", groups of factor names, a `Schedule` or a `ByMode`.
        options: the method, or the method's own options where the class fixes it: `rank` (an int, one int a bond,
            `ParamsKept`, `MacsKept` or `RelativeError`, the last from dense only), and others, such as `order` of MPS.

    Raises:
        ValueError: what nn.Conv2d refuses, a rank below 1, a bare float, a plan that is no partition of the factors.
    """

    dense_type = nn.Conv2d


class FactorizedConv3d(_Convolution):
    """Signature and attributes of `nn.Conv3d`, plus `method` and `plan`; (n, i, d, h, w) or without n. See `FactorizedConv2d`."""

    dense_type = nn.Conv3d


class _TransposedConvolution(_Planned):
    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        plan: PlanChoice = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        geometry = (in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation)
        template = self.dense_type(*geometry, padding_mode, device="meta")
        self._draw(template, self._method(**options), plan, device, dtype)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        plan, weights = self._planned()
        more = None if output_size is None else self._output_padding(input, output_size)
        return plan(input, weights, self.bias, more)

    def _output_padding(self, input: Tensor, output_size: Sequence[int]) -> list[int]:
        """Returns the output padding that gives an output of this size.

        Raises:
            ValueError: no output padding does.
        """
        axes = list(self.spec.geometry.axes.values())
        sizes, asked = input.shape[-len(axes) :], list(output_size)[-len(axes) :]
        least = [axis.output_size(size) - axis.output_padding for axis, size in zip(axes, sizes, strict=True)]
        more = [size - low for size, low in zip(asked, least, strict=False)]
        if len(output_size) not in (len(axes), input.dim()) or any(
            not 0 <= pad < max(axis.stride, axis.dilation) for axis, pad in zip(axes, more, strict=True)
        ):
            raise ValueError(
                f"output_size {tuple(output_size)}: an input of {tuple(sizes)} positions gives {least} or a little more"
            )
        return more


class FactorizedConvTranspose1d(_TransposedConvolution):
    """Signature and attributes of `nn.ConvTranspose1d`, plus `method` and `plan`. See `FactorizedConv2d`."""

    dense_type = nn.ConvTranspose1d


class FactorizedConvTranspose2d(_TransposedConvolution):
    """Signature and attributes of `nn.ConvTranspose2d`, plus `method` and `plan`. See `FactorizedConv2d`."""

    dense_type = nn.ConvTranspose2d


class FactorizedConvTranspose3d(_TransposedConvolution):
    """Signature and attributes of `nn.ConvTranspose3d`, plus `method` and `plan`. See `FactorizedConv2d`."""

    dense_type = nn.ConvTranspose3d


class FactorizedLinear(_Planned):
    """Signature and attributes of `nn.Linear`, plus `method` and `plan`; (..., i) in, (..., o) out.

    Args:
        plan: "auto" (the fastest by the cost model), "factors", "dense", groups of factor names, a `Schedule` or a `ByMode`.
        options: as of `FactorizedConv2d`; another is `in_shape` of TT.

    Raises:
        ValueError: a rank below 1, a bare float, an option that makes no sense for these features.
    """

    dense_type = nn.Linear
    in_features: int
    out_features: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        plan: PlanChoice = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        template = nn.Linear(in_features, out_features, bias, device="meta")
        self._draw(template, self._method(**options), plan, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        plan, weights = self._planned()
        if input.is_nested:
            raise UserError(
                "a factorized layer takes no nested tensors: give padded ones, and set use_nested_tensor = False on an "
                "nn.TransformerEncoder around it"
            )
        return plan(input, weights, self.bias)


class FactorizedEmbedding(FactorizedLayer):
    """Signature and attributes of `nn.Embedding`, plus `method`; (...) row numbers in, (..., o) out.

    Only what the rows need is computed: the table is never made. The row of `padding_idx` is all zeros and gets no gradient.

    Args:
        options: as of `FactorizedConv2d`.

    Raises:
        UnsupportedLayer: `max_norm`, `scale_grad_by_freq` or `sparse`, which are about rows that are parameters.
    """

    dense_type = nn.Embedding
    plan: Lookup
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    _SAMPLE = 4096

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        plan: PlanChoice = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        given = (num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        template = nn.Embedding(*given, device="meta")
        if (unlike := self.unlike(template)) is not None:
            raise UnsupportedLayer(f"{type(self).__name__} has no {unlike}")
        self._draw(template, self._method(**options), plan, device, dtype)

    @staticmethod
    def unlike(dense: nn.Module) -> str | None:
        for name in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(dense, name):
                return f"{name}={getattr(dense, name)}"
        pad, weight = dense.padding_idx, dense.weight
        if pad is not None and isinstance(weight, Tensor) and not weight.is_meta and bool(weight[pad].any()):  # type: ignore[index]
            return f"padding_idx={pad} of a row that is not zero"
        return None

    def forward(self, input: Tensor) -> Tensor:
        plan, weights = self._planned()
        rows = plan(input.reshape(-1), weights)
        if self.padding_idx is not None:
            rows = rows.masked_fill((input.reshape(-1) == self.padding_idx)[:, None], 0)
        return rows.reshape(*input.shape, self.embedding_dim)

    def _dense_weight(self) -> Tensor:
        return self._padded(super()._dense_weight())

    def to_dense(self) -> nn.Module:
        dense = super().to_dense()
        with torch.no_grad():
            dense.weight.copy_(self._padded(dense.weight))  # type: ignore[operator, arg-type]
        return dense

    def _padded(self, table: Tensor) -> Tensor:
        if self.padding_idx is None:
            return table
        rows = torch.arange(len(table), device=table.device)[:, None]
        return table.masked_fill(rows == self.padding_idx, 0)

    def _root_mean_square(self) -> float:
        """Estimates it from some rows: all of them together may not fit in memory."""
        factors = dict(self.factors.items())
        with torch.no_grad():
            parameters = self.spec.method.factors(factors, self.spec.factor_shapes)
            rows = torch.randint(self.num_embeddings, (self._SAMPLE,), device=self._like["device"])
            return float(self.plan(rows, self.plan.weights(parameters)).double().square().mean().sqrt())


_GENERIC: tuple[type[FactorizedLayer], ...] = (
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedConv3d,
    FactorizedConvTranspose1d,
    FactorizedConvTranspose2d,
    FactorizedConvTranspose3d,
    FactorizedLinear,
    FactorizedEmbedding,
)


def layer_type(method: Factorization, dense_type: type[nn.Module]) -> type[FactorizedLayer]:
    """Returns the layer of a method in place of a torch layer: this package's that names it, else the one for all methods.

    Raises:
        UnsupportedLayer: the method replaces no such layers.
    """
    method.check_replaces(dense_type)
    generic = [layer for layer in _GENERIC if layer.dense_type is dense_type]
    named = [layer for layer in named_layers() if layer.method is type(method) and layer.dense_type is dense_type]
    return (named + generic)[0]


def named_layers() -> list[type[FactorizedLayer]]:
    """Returns the drop-in layers that name a method of this package."""
    every = [named for layer in _GENERIC for named in layer.__subclasses__()]
    return [layer for layer in every if layer.__module__.startswith("tnlayers.")]
