"""Factors to and from other libraries: TensorLy's tensors, tltorch's, and layers in a row that others have saved.

Legend: o, i, d, h, w as in `tnlayers.network`; a weight here is (o, i) or (o, i, ...) whatever layer it is of: that of a transposed
convolution and of an embedding has o in front as well.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tnlayers.errors import UnsupportedLayer, UserError
from tnlayers.factorized import FactorizedLayer
from tnlayers.geometry import Geometry
from tnlayers.layers import layer_type
from tnlayers.linalg import decomposing, precise
from tnlayers.method import Factorization
from tnlayers.methods.cp import CP
from tnlayers.methods.cpmatrix import CPMatrix
from tnlayers.methods.fulltucker import FullTucker
from tnlayers.methods.lowrank import LowRank
from tnlayers.methods.mps import MPS
from tnlayers.methods.svd import SVD
from tnlayers.methods.tt import TT
from tnlayers.methods.tucker import Tucker
from tnlayers.methods.tuckermatrix import TuckerMatrix
from tnlayers.network import Network
from tnlayers.spec import LayerSpec

if TYPE_CHECKING:
    from tensorly.cp_tensor import CPTensor
    from tensorly.tt_matrix import TTMatrix
    from tensorly.tt_tensor import TTTensor
    from tensorly.tucker_tensor import TuckerTensor

__all__ = ["from_layers", "from_tensorly", "to_tensorly"]


def to_tensorly(layer: FactorizedLayer) -> "CPTensor | TuckerTensor | TTTensor | TTMatrix":
    """Returns a layer's factors as the type of TensorLy's that they are; what that makes is the layer's weight, exactly.

    CP gives a `CPTensor` and Tucker a `TuckerTensor`, of the weight or of the tensorized weight (o1, ..., od, i1, ..., id); MPS gives
    a `TTTensor` whose modes are in the layer's `order`; TT gives a `TTMatrix`. The tensors share the layer's memory.

    Raises:
        UnsupportedLayer: a layer of several groups, or of a method that TensorLy has no type for.
    """
    from tensorly.cp_tensor import CPTensor  # here, since TensorLy takes long to import
    from tensorly.tt_matrix import TTMatrix
    from tensorly.tt_tensor import TTTensor
    from tensorly.tucker_tensor import TuckerTensor

    method, network, groups = layer.spec.method, layer.spec.network, layer.spec.geometry.groups
    factors = {name: factor.detach() for name, factor in layer.factors.items()}
    if groups > 1:
        raise UnsupportedLayer(f"its {groups} groups are as many weights; a tensor of TensorLy's is one")
    with decomposing():
        if isinstance(method, _MATRICES):
            held = [_matrix_of(network, mode) for mode in network.weight_indices]
            sizes = [layer.spec.sizes[mode] for mode in network.weight_indices]
            matrices = [
                torch.eye(size).to(factors["core"])
                if name is None
                else factors[name].mT
                if bond_first
                else factors[name]
                for (name, bond_first), size in zip(held, sizes, strict=True)
            ]
            if isinstance(method, CP):
                return CPTensor((torch.ones_like(matrices[0][0]), matrices))
            return TuckerTensor((factors["core"], matrices))
        if isinstance(method, (MPS, TT)):
            first, *middle, last = factors.values()
            cores = [first[None], *middle, last[..., None]]
            return TTTensor(cores) if isinstance(method, MPS) else TTMatrix([core.transpose(1, 2) for core in cores])
    raise UnsupportedLayer(f"TensorLy has no type for {type(method).__name__}; it has some for CP, Tucker, MPS and TT")


def from_tensorly(dense: nn.Module, tensor: Any, *, order: str = "i d h w o") -> FactorizedLayer:
    """Makes the layer whose weight is a tensor of TensorLy's, or of tltorch's, in place of a dense layer's.

    For a convolution a `CPTensor` or `TuckerTensor` has the modes (o, i, ...) and a `TTTensor` those of `order`. For a linear the
    modes are (o1, ..., od, i1, ..., id), and a `TTMatrix` has the rows (o1, ..., od). tltorch's types have them in the same order.

    Args:
        dense: the torch layer, such as nn.Conv2d(8, 12, 3), whose arguments and bias the new one has; its weight does not count.
        tensor: anything with the `factors` of such a tensor, and its `core` or `weights`.
        order: the modes of a `TTTensor`, such as "o i h w" from `tensor_train(conv.weight)`.

    Raises:
        UserError: the tensor has other sizes than the layer's weight.
        UnsupportedLayer: a layer of several groups, or of a kind that has no such factorization.
    """
    if not hasattr(tensor, "factors"):
        raise UserError(
            f"a {type(tensor).__name__} has no factors; expected a CPTensor, TuckerTensor, TTTensor or TTMatrix"
        )
    parts = [precise(torch.as_tensor(factor)) for factor in tensor.factors]
    core, weights = (
        None if (part := getattr(tensor, name, None)) is None else precise(torch.as_tensor(part))
        for name in ("core", "weights")
    )
    half, is_conv = len(parts) // 2, len(Geometry.of(dense).weight_shape) > 2
    modes = {"out_shape": tuple(map(len, parts[:half])), "in_shape": tuple(map(len, parts[half:]))}
    if core is not None:
        whole = is_conv and all(part.equal(torch.eye(len(part)).to(part)) for part in parts[2:])
        method = Tucker(1) if whole else FullTucker(1) if is_conv else TuckerMatrix(1, **modes)
        return _of_matrices(dense, method, parts[:2] if whole else parts, {"core": core})
    if weights is not None or all(part.dim() == 2 for part in parts):
        scale = 1 if weights is None else weights
        return _of_matrices(dense, CP(1) if is_conv else CPMatrix(1, **modes), [scale * parts[0], *parts[1:]])
    train: Factorization = MPS(1, order=order)
    if all(part.dim() == 4 for part in parts):
        rows, columns = (tuple(part.shape[axis] for part in parts) for axis in (1, 2))
        train, parts = TT(1, out_shape=rows, in_shape=columns), [part.transpose(1, 2) for part in parts]
    first, *middle, last = parts
    names = _network_of(dense, train).factors
    return _layer(dense, train, _named(names, [first.squeeze(0), *middle, last.squeeze(-1)]))


def from_layers(layers: Sequence[nn.Module]) -> FactorizedLayer:
    """Makes one layer of two or three that follow each other, such as others save them in an nn.Sequential; it computes the same.

    Two linears make a `LowRank`. A convolution and a pointwise one make an `SVD`, a vertical and a horizontal one a `LowRank`, and
    one between two pointwise ones a `Tucker`. A bias in between moves to the end.

    Raises:
        UnsupportedLayer: layers of other kinds, in another order, or with arguments that one layer cannot have.
    """
    kinds = {type(layer) for layer in layers}
    if len(kinds) > 1 or not kinds <= {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d}:
        names = ", ".join(type(layer).__name__ for layer in layers)
        raise UnsupportedLayer(f"{names}: expected two linears, or two or three convolutions of one kind")
    weights = [precise(layer.weight) for layer in layers]  # type: ignore[arg-type]
    for before, after in pairwise(layers):
        made, taken = len(before.weight), after.weight.shape[1] * getattr(after, "groups", 1)  # type: ignore[arg-type, index]
        if made != taken:
            raise UnsupportedLayer(f"{before} gives {made} and {after} takes {taken}; they do not follow each other")
    if kinds == {nn.Linear} and len(layers) == 2:
        sizes = {"in_features": weights[0].shape[1], "out_features": weights[1].shape[0]}
        return _joined(layers, sizes, LowRank(1), weights)
    pointwise = [weight[0, 0].numel() == 1 for weight in weights]
    if pointwise == [True, False, True]:
        return _joined(layers, _one(layers), Tucker(1), [weights[0].flatten(1), weights[1], weights[2].flatten(1)])
    if len(layers) == 2 and pointwise[1]:
        return _joined(layers, _one(layers), SVD(1), [weights[0], weights[1].flatten(1)])
    if len(layers) == 2 and kinds == {nn.Conv2d} and weights[0].shape[3] == weights[1].shape[2] == 1:
        return _joined(layers, _one(layers), LowRank(1), [weights[0][..., 0], weights[1][:, :, 0]])
    raise UnsupportedLayer(
        f"{', '.join(map(str, layers))}: no method computes these in a row; see `from_layers` for those that one does"
    )


_MATRICES = (CP, FullTucker, Tucker, TuckerMatrix)
"""The methods with one matrix for each mode, but for those that the core has."""


def _network_of(dense: nn.Module, method: Factorization) -> Network:
    return method.network(Geometry.of(dense).weight_shape)


def _matrix_of(network: Network, mode: str) -> tuple[str | None, bool]:
    """Returns the factor that is the matrix of a mode, if there is one, and whether its bond comes first."""
    for name, indices in network.indices.items():
        if mode in indices and name != "core":
            return name, indices[1] == mode
    return None, False


def _named(names: Iterable[str], parts: Sequence[Tensor]) -> dict[str, Tensor]:
    names = list(names)
    if len(names) != len(parts):
        raise UserError(f"the tensor has {len(parts)} factors; this layer has {len(names)}: {', '.join(names)}")
    return dict(zip(names, parts, strict=True))


def _of_matrices(
    dense: nn.Module, method: Factorization, matrices: Sequence[Tensor], more: Mapping[str, Tensor] | None = None
) -> FactorizedLayer:
    network = _network_of(dense, method)
    held = [_matrix_of(network, mode) for mode in network.weight_indices]
    found = _named([name for name, _ in held if name], matrices)
    turned = {name: found[name].mT if bond_first else found[name] for name, bond_first in held if name}
    return _layer(dense, method, {**turned, **(more or {})})


def _layer(dense: nn.Module, method: Factorization, factors: Mapping[str, Tensor]) -> FactorizedLayer:
    """Returns the layer of these factors; where a bond is above what is attainable the weight has others that are as exact."""
    geometry, network = Geometry.of(dense), _network_of(dense, method)
    if geometry.groups > 1:
        raise UnsupportedLayer(f"{dense} has {geometry.groups} groups, which are as many weights; a tensor is one")
    shapes = {name: tuple(factor.shape) for name, factor in factors.items()}
    made = network.weight_shape(network.sizes_from(shapes))
    if made != geometry.weight_shape:
        raise UserError(f"the tensor makes a weight of the shape {made}; {dense} has {geometry.weight_shape}")
    ranks = method.ranks_from(network, shapes)
    spec = LayerSpec(geometry, method.with_rank(method.clamp(geometry.weight_shape, ranks)))
    if spec.ranks != ranks:
        factors, _ = spec.decompose(network.reconstruct(factors))
    layer = layer_type(method, type(dense)).from_spec(dense, spec, init="empty")
    with torch.no_grad():
        for name, parameter in layer.factors.items():
            parameter.copy_(factors[name])
        if layer.bias is not None:
            layer.bias.copy_(dense.bias)  # type: ignore[arg-type]
    return layer


def _joined(
    layers: Sequence[nn.Module], options: dict[str, Any], method: Factorization, parts: Sequence[Tensor]
) -> FactorizedLayer:
    like, bias = layers[-1].weight, _bias(layers)
    assert isinstance(like, Tensor)
    dense = type(layers[0])(**options, bias=bias is not None, device=like.device, dtype=like.dtype)
    if bias is not None:
        dense.bias = nn.Parameter(bias.to(like))
    return _layer(dense, method, dict(zip(_network_of(dense, method).factors, parts, strict=True)))


def _bias(layers: Sequence[Any]) -> Tensor | None:
    """Returns the bias of all layers as one at the end.

    Raises:
        UnsupportedLayer: a bias in front of a convolution that pads with zeros, where it would be missing.
    """
    bias = None
    for layer in layers:
        if bias is not None:
            if any(getattr(layer, "padding", ())) and bias.any():
                raise UnsupportedLayer(f"{layer} pads what has a bias already; one layer cannot do that")
            bias = (
                precise(layer.weight).flatten(2).sum(dim=2) @ bias
                if layer.weight.dim() > 2
                else precise(layer.weight) @ bias
            )
        if layer.bias is not None:
            bias = precise(layer.bias) + (0 if bias is None else bias)
    return bias


def _one(layers: Sequence[Any]) -> dict[str, Any]:
    """Returns the arguments of the convolution that these are together.

    Raises:
        UnsupportedLayer: there is none: groups, another padding than with numbers of zeros, or two that move along one axis.
    """
    for layer in layers:
        if layer.groups > 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise UnsupportedLayer(f"{layer}: expected one group and a padding with a number of zeros")
    own = [tuple(zip(layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True)) for layer in layers]
    chosen = []
    for axis in zip(*own, strict=True):
        moving = [one for one in axis if one[:3] != (1, 1, 0)]
        if len(moving) > 1:
            raise UnsupportedLayer(f"two of the layers have a window, a stride or a padding along one axis: {moving}")
        chosen.append(moving[0] if moving else (1, 1, 0, 1))
    names = ("kernel_size", "stride", "padding", "dilation")
    sizes = {"in_channels": layers[0].in_channels, "out_channels": layers[-1].out_channels}
    return sizes | dict(zip(names, zip(*chosen, strict=True), strict=True))
