"""The factors of layers, fitted to their outputs in place of their weights.

A layer behind others that are compressed does not get what the dense one gets. So of all weights W~ that the factors can make that
is wanted which puts out from the present inputs z what the dense layer puts out, y: the least of E ||y - W~ z||^2. That is the
asymmetric reconstruction of Zhang, Zou, He and Sun, Accelerating very deep convolutional networks for classification and detection
(2015), arXiv 1505.06798, section 3.3, here for every method: the sum is quadratic in each factor, and L-BFGS over all of them goes
from the decomposition to a near minimum. Of the data only the means of z, y, z z^T and y z^T are needed, and nothing is inverted.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.factorized import FactorizedLayer
from tnlayers.linalg import decomposing, precise
from tnlayers.moments import Moments
from tnlayers.normalisation import batch_norms, normalising_by_batches
from tnlayers.slices import has_module
from tnlayers.spec import LayerSpec, rounded
from tnlayers.tracing import evaluating, factorized_layers, tensors_in

__all__ = ["refit", "refit_layers"]

Call = tuple[Any, Any]
"""Positional and keyword arguments."""

_STEPS = 60
_HISTORY = 20
_FLAT = 1e-7  # of the relative squared error between two steps, and of the largest change of a factor's entry
_PRIOR = 1e-3  # of the inputs' mean square: what keeps the weight where the inputs say nothing about it
_FEW = 10  # times the entries of a window: of so many windows the prior weighs twice as much
_WINDOWS = 1 << 16  # of its inputs that a layer is fitted to, or more:
_PER_ENTRY = 8  # so many for each entry of a window
_LARGEST = 8192  # entries of a window, all pairs of which are counted


def refit_layers(
    module: nn.Module,
    dense: nn.Module,
    calls: Sequence[tuple[Call, Call, Any]],
    seed: int,
    kept: Collection[nn.Parameter] = (),
) -> None:
    """Fits the factorized layers of a module to the layers of the same names in the dense one, in the order of their calls.

    BatchNorms of the module normalise by batches meanwhile; their statistics are to be taken anew afterwards. Where a layer has a bias
    or a BatchNorm behind it, the mean of its output is left to those.

    Args:
        module: is changed in place.
        dense: what it stands for, in evaluation mode.
        calls: for each batch the arguments of the module, those of the dense one, and anything.
        seed: draws the places of large inputs that count.
        kept: parameters that stay as they are; layers that have some do too.
    """
    layers = {
        name: layer
        for name, layer in factorized_layers(module).items()
        if _is_fitted(dense, name, layer) and not any(each in kept for each in layer.parameters())
    }
    absorbed = _before_norms(module, layers, calls[0][0])
    for name in absorbed:
        moments = _moments(module, dense, name, calls, seed)
        _fit(layers[name], dense.get_submodule(name), moments, centred=absorbed[name] or _sets_bias(layers[name]))


def refit(
    spec: LayerSpec, parameters: Mapping[str, Tensor], dense: Tensor, moments: Moments, *, centred: bool
) -> tuple[dict[str, Tensor], float, float]:
    """Fits the parameters of a layer to outputs, in float64.

    Args:
        spec: of the layer.
        parameters: the present ones.
        dense: the dense weight, (g o, i, ...), from which the fit strays only as far as the inputs say.
        moments: of the layer's inputs and wanted outputs.
        centred: whether what follows makes up for a constant: a bias that is set then, or a normalisation.

    Returns:
        The parameters, as they were where nothing better was found, and E ||y - W~ z||^2 / E ||y||^2 before and after, both with what
        holds the weight near the dense one.
    """
    inputs, products, energy = moments.second(centred=centred)
    few = 1 + _FEW * inputs.shape[-1] / moments.count
    prior = _PRIOR * few * inputs.diagonal(dim1=-2, dim2=-1).mean()
    weight = precise(dense).reshape(products.shape)
    inputs = inputs + prior * torch.eye(inputs.shape[-1]).to(inputs)
    products, energy = products + prior * weight, energy + prior * weight.square().sum()
    if not energy > 0:
        return dict(parameters), 0.0, 0.0
    fitted = {name: precise(value).clone().requires_grad_() for name, value in parameters.items()}

    def step() -> Tensor:
        with torch.enable_grad():
            made = spec.reconstruct(fitted)
        flat = made.detach().reshape(products.shape)
        seen = flat @ inputs
        for value in fitted.values():
            value.grad = None
        made.backward(((seen - products) * (2 / energy)).reshape(made.shape))
        return ((flat * (seen - 2 * products)).sum() + energy) / energy

    with decomposing():
        before = float(step())
        optimizer = torch.optim.LBFGS(
            list(fitted.values()),
            max_iter=_STEPS,
            history_size=_HISTORY,
            line_search_fn="strong_wolfe",
            tolerance_grad=0,
            tolerance_change=_FLAT,
        )
        optimizer.step(step)
        after = float(step())
    if not after < before:
        return dict(parameters), before, before
    return {name: value.detach() for name, value in fitted.items()}, before, after


def _is_fitted(dense: nn.Module, name: str, layer: FactorizedLayer) -> bool:
    """Tells whether there are outputs for the layer, moments of its inputs fit into memory, and its factors may change."""
    if not has_module(dense, name) or type(dense.get_submodule(name)) is not layer.dense_type:
        return False
    geometry, own = layer.spec.geometry, layer.spec.method
    small = math.prod(geometry.weight_shape[1:]) <= _LARGEST
    trains = all(factor.requires_grad for factor in layer.factors.values())
    return small and trains and not geometry.lookup and own.alone() == own


def _sets_bias(layer: FactorizedLayer) -> bool:
    return layer.bias is not None and layer.bias.requires_grad


def _fit(layer: FactorizedLayer, dense: nn.Module, moments: Moments, *, centred: bool) -> None:
    parameters = dict(layer.factors.items())
    assert isinstance(dense.weight, Tensor)
    weight = layer.spec.geometry.exchanged(dense.weight)
    fitted, before, after = refit(layer.spec, parameters, weight, moments, centred=centred)
    if after < before:
        for name, value in rounded(fitted, layer._like["dtype"]).items():
            layer.factors[name].data.copy_(value)
    if layer.bias is not None and _sets_bias(layer):
        z, y = moments.means()
        made = precise(layer.spec.geometry.exchanged(layer.weight)).reshape(*y.shape, -1)
        layer.bias.data.copy_((y - (made @ z.unsqueeze(-1)).squeeze(-1)).flatten())


def _moments(
    module: nn.Module, dense: nn.Module, name: str, calls: Sequence[tuple[Call, Call, Any]], seed: int
) -> Moments:
    """Returns the moments of what a layer gets and of what the dense one puts out, without a bias that stays as it is."""
    layer = factorized_layers(module)[name]
    geometry, entries = layer.spec.geometry, math.prod(layer.spec.geometry.weight_shape[1:])
    moments = Moments(geometry, max(_WINDOWS, _PER_ENTRY * entries), len(calls))
    generator = torch.Generator().manual_seed(seed)
    constant: Any = 0
    if layer.bias is not None and not _sets_bias(layer):
        constant = layer.bias.view(-1, *[1] * len(geometry.axes))
    for ours, theirs, _ in calls:
        with normalising_by_batches(module), torch.no_grad():
            inputs = _recorded(module, ours, name)
        with evaluating(dense):
            outputs = _recorded(dense, theirs, name)
        for (z, _), (_, y) in zip(inputs, outputs, strict=True):
            moments.add(z, y - constant, generator)
    return moments


def _recorded(module: nn.Module, call: Call, name: str) -> list[tuple[Tensor, Tensor]]:
    """Returns the input and the output of each call of a layer while a module runs."""
    found: list[tuple[Tensor, Tensor]] = []
    given: list[Tensor] = []

    def enters(_: nn.Module, args: Any, kwargs: Any) -> None:
        given.append(next(tensors_in([args, kwargs])).detach().clone())

    def leaves(_: nn.Module, args: Any, output: Tensor) -> None:
        # Copies, since what comes next may write into them.
        found.append((given.pop(), output.detach().clone()))

    layer = module.get_submodule(name)
    handles = [layer.register_forward_pre_hook(enters, with_kwargs=True), layer.register_forward_hook(leaves)]
    try:
        module(*call[0], **call[1])
    finally:
        for handle in handles:
            handle.remove()
    return found


def _before_norms(module: nn.Module, layers: Mapping[str, FactorizedLayer], call: Call) -> dict[str, bool]:
    """Returns the layers in the order of their calls, and whether a BatchNorm takes what they put out."""
    outputs: dict[int, tuple[str, Tensor, int]] = {}
    found: dict[str, bool] = {}

    def leaves(name: str, output: Tensor) -> None:
        outputs[id(output)] = name, output, output._version  # kept, or its place in memory would be another's
        found.setdefault(name, False)

    def enters(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        name, output, version = outputs.get(id(args[0]) if args else 0, ("", None, 0))
        if output is not None and output._version == version:  # else an activation in between has written into it
            found[name] = True

    handles: Iterable[Any] = [
        *(layer.register_forward_hook(lambda *a, name=name: leaves(name, a[-1])) for name, layer in layers.items()),
        *(norm.register_forward_pre_hook(enters) for norm in batch_norms(module)),
    ]
    try:
        with evaluating(module):
            module(*call[0], **call[1])
    finally:
        for handle in handles:
            handle.remove()
    return found
