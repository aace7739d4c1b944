"""The same factorizations as tltorch's layers: https://github.com/tensorly/torch, on PyPI as tensorly-torch.

It computes by TensorLy, whose backend has to be PyTorch's for that in the whole process; its import sets it too, so it is imported
where it is needed.
"""

import tensorly
from torch import nn

from tnlayers import CP, MPS, TT, FactorizedLayer, Tucker

__all__ = ["IMPLEMENTATIONS", "tltorch_layers"]

IMPLEMENTATIONS = ("factorized", "reconstructed")


def tltorch_layers(dense: nn.Module, layer: FactorizedLayer) -> dict[str, nn.Module] | str:
    """Makes tltorch's layers of the same sizes and ranks as a factorized layer, with random factors.

    Returns:
        Implementation -> layer, or the reason why there are none.
    """
    try:
        from tltorch import FactorizedConv, FactorizedLinear
    except ImportError:
        return "tensorly-torch is not installed"
    tensorly.set_backend("pytorch")
    method, ranks = layer.spec.method, layer.ranks
    if isinstance(method, TT):
        outputs, inputs = method.shapes((dense.out_features, dense.in_features))  # type: ignore[arg-type]
        given = {"factorization": "blocktt", "rank": (1, *ranks, 1)}
        return {how: FactorizedLinear(inputs, outputs, implementation=how, **given) for how in IMPLEMENTATIONS}
    if not isinstance(dense, nn.Conv2d) or not isinstance(method, Tucker | CP | MPS):
        return f"tltorch has no {type(method).__name__} of a {type(dense).__name__}"
    if dense.groups > 1:
        return "tltorch has no groups"
    name, rank = {
        Tucker: ("tucker", (*ranks, *dense.kernel_size)),
        CP: ("cp", ranks[0]),
        MPS: ("tt", (1, *ranks, 1)),
    }[type(method)]
    given = {"factorization": name, "rank": rank, "decompose_weights": False}
    return {how: FactorizedConv.from_conv(dense, implementation=how, **given) for how in IMPLEMENTATIONS}
