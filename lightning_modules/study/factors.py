"""From truncated cuts to the factorizations that have just these ranks, and the choice of one for each layer."""

from collections.abc import Mapping, Sequence

from torch import nn

from lightning_modules.study.findings import Measured
from lightning_modules.study.rows import CUT_SETS
from tnlayers import MPS, TT, Factorization, LowRank, Rule, Tucker
from tnlayers.geometry import Call, Geometry
from tnlayers.spec import LayerSpec

__all__ = ["REALISED", "factorization_of", "fewer_params", "recommend"]

REALISED = {CUT_SETS["Tucker-2"]: "Tucker", CUT_SETS["MPS"]: "MPS", ("ih",): "LowRank"}
"""Cuts of a Conv2d kernel -> the method whose ranks are their bond dimensions."""

_NONE, _GROUPED = "no factorization that saves is tolerated", "a study factorizes no grouped convolution"


def factorization_of(module: nn.Module, cuts: Sequence[str], bonds: Sequence[int]) -> Factorization | None:
    """The factorization of a layer whose weight has these bond dimensions at these cuts; None if no method makes them low rank."""
    geometry = Geometry.of(module)
    if geometry.groups > 1:
        return None  # the ranks of a grouped convolution are those of each group
    shape = geometry.weight_shape
    method: Factorization
    match REALISED.get(tuple(cuts)):
        case "Tucker":
            method = Tucker(rank=tuple(bonds))
        case "MPS":
            method = MPS(rank=tuple(bonds))
        case "LowRank":
            method = LowRank(rank=bonds[0])
        case None if tuple(cuts) == ("i",) and len(shape) == 2:
            # Two cores, of which the first has all inputs and the other all outputs: a product of two matrices, inputs first.
            method = TT(rank=bonds[0], in_shape=(shape[1], 1), out_shape=(1, shape[0]))
        case _:
            return None
    return method.with_rank(method.clamp(shape, tuple(bonds)))


def fewer_params(module: nn.Module, method: Factorization) -> bool:
    """Whether the factors have fewer parameters than the layer's weight."""
    geometry = Geometry.of(module)
    return LayerSpec(geometry, method).params < geometry.params


def recommend(
    measured: Measured, modules: Mapping[str, nn.Module], calls: Mapping[str, Sequence[Call]], tolerance: float
) -> list[Rule]:
    """For each layer the factorization with the fewest multiply-accumulates whose truncation, alone, was tolerated.

    Of a convolution it is one of `REALISED`, of a linear a product of two matrices.

    Args:
        measured: all truncations of single layers.
        modules: name -> the dense layer.
        calls: name -> what it is given in one pass.
        tolerance: the loss of accuracy that counts as none, in a truncation and in all milder ones at the same cuts.
    """
    rules = []
    for layer in measured.layers:
        module, curves = modules[layer.name], [measured.curve(layer.name, *cuts) for cuts in (*REALISED, ("i",))]
        good = [row for curve in curves for row in curve[: measured.num_tolerated(curve, tolerance)]]
        methods = [method for row in good if (method := factorization_of(module, row.cuts, row.bonds))]
        found = _cheapest(module, methods, calls[layer.name])
        reason = _GROUPED if Geometry.of(module).groups > 1 else _NONE
        rules.append(Rule(layer.name, found, "" if found else reason))
    return rules


def _cheapest(module: nn.Module, methods: Sequence[Factorization], calls: Sequence[Call]) -> Factorization | None:
    """The method that can be computed with the fewest multiply-accumulates; None if none takes fewer of these and of parameters
    than the dense layer.
    """
    geometry = Geometry.of(module)
    costs = []
    for method in methods:
        spec = LayerSpec(geometry, method)
        costs.append((spec.macs(calls, spec.best_plan(calls, by_macs=True)), spec.params, method))
    cheaper = [cost for cost in costs if cost[0] < geometry.macs(calls) and cost[1] < geometry.params]
    return min(cheaper, key=lambda cost: cost[:2])[2] if cheaper else None
