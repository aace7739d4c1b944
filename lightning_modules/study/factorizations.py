"""The factorizations of a study, whose ranks are bond dimensions of cuts, and the choice of one for each layer."""

from collections.abc import Mapping, Sequence

from torch import nn

from lightning_modules.study.findings import Findings
from tnlayers import MPS, TT, Factorization, LowRank, Rule, Tucker
from tnlayers.contraction import size_of
from tnlayers.cuts import cuts_of
from tnlayers.geometry import Call, Geometry
from tnlayers.spec import LayerSpec

__all__ = ["LINEAR", "REALISED", "cuts_of_method", "recommend", "spec_of"]

_NONE, _GROUPED = "no factorization that saves is tolerated", "a study factorizes no grouped convolution"


def cuts_of_method(method: Factorization, weight_shape: tuple[int, ...]) -> tuple[str, ...]:
    """Names the cut of the weight that each bond of a method makes, in the order of its ranks; no mode of the weight may have size 1."""
    network, sizes = method.network(weight_shape), method.mode_sizes(weight_shape)
    modes = dict(zip("oihw", network.modes, strict=False))
    found = []
    for bond in network.bonds:
        near = network.cut(bond)[0]
        side = {name for name, mode in modes.items() if size_of({*mode}.intersection(near), sizes) > 1}
        found += [cut for cut in cuts_of(weight_shape) if {*cut} in (side, {*modes} - side)]
    return tuple(found)


def _product(weight_shape: tuple[int, ...]) -> TT:
    """Makes a product of two matrices, inputs first: two cores, of which one has all inputs and the other all outputs."""
    return TT(1, in_shape=(weight_shape[1], 1), out_shape=(1, weight_shape[0]))


REALISED = {cuts_of_method(method, (2, 2, 2, 2)): method for method in (Tucker(1), MPS(1), LowRank(1))}
"""Cuts of a Conv2d kernel -> the method whose ranks are their bond dimensions."""

LINEAR = cuts_of_method(_product((2, 2)), (2, 2))
"""The cut of a linear, whose bond dimension is the rank of a product of two matrices."""


def spec_of(module: nn.Module, cuts: tuple[str, ...], bonds: tuple[int, ...]) -> LayerSpec | None:
    """Factorizes a layer whose weight has these bond dimensions at these cuts; None if no method makes them low rank."""
    geometry = Geometry.of(module)
    method: Factorization | None
    if not geometry.axes:
        method = _product(geometry.weight_shape) if cuts == LINEAR else None
    else:  # the ranks of a grouped convolution are those of each group, and not of the whole weight
        method = REALISED.get(cuts) if geometry.groups == 1 else None
    return LayerSpec(geometry, method).at(bonds) if method else None


def recommend(
    findings: Findings, modules: Mapping[str, nn.Module], calls: Mapping[str, Sequence[Call]], tolerance: float
) -> list[Rule]:
    """Finds for each layer the factorization with the fewest multiply-accumulates whose truncation, alone, was tolerated.

    A layer stays dense where none takes fewer of these and of parameters than it does.

    Args:
        findings: those of all truncations of single layers.
        modules: name -> the dense layer.
        calls: name -> what it is given in one pass.
        tolerance: the loss of accuracy that counts as none, in a truncation and in all milder ones at the same cuts.
    """
    rules = []
    for layer in findings.layers:
        module, given, costs = modules[layer.name], calls[layer.name], []
        geometry = Geometry.of(module)
        for curve in (findings.curve(layer.name, *cuts) for cuts in (*REALISED, LINEAR)):
            for row in curve[: findings.num_tolerated(curve, tolerance)]:
                if spec := spec_of(module, row.cuts, row.bonds):
                    macs = spec.macs(given, spec.fewest_macs(given))
                    if macs < geometry.macs(given) and spec.params < geometry.params:
                        costs.append((macs, spec.params, spec.method))
        found = min(costs, key=lambda cost: cost[:2])[2] if costs else None
        rules.append(Rule(layer.name, found, "" if found else _GROUPED if geometry.groups > 1 else _NONE))
    return rules
