"""Networks with fresh weights, built by a name such as `resnet20` or `torchvision/resnet18`."""

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from itertools import chain
from typing import Any

import torch
import torchvision
from torch import nn
from torch.func import functional_call

from lightning_modules.nets.caffenet import caffenet
from lightning_modules.nets.cnn4 import CNN4
from lightning_modules.nets.garipov import garipov_conv, garipov_conv_fc
from lightning_modules.nets.resnet50_cifar import resnet50_cifar
from lightning_modules.nets.resnet_cifar import cifar_resnet
from lightning_modules.nets.tai import tai_cnn, tai_nin
from lightning_modules.nets.vgg16_cifar import vgg16_cifar
from tnlayers.errors import UserError
from tnlayers.tracing import evaluating

__all__ = ["NETS", "build_net"]

Builder = Callable[..., nn.Module]

NETS: dict[str, Builder] = {
    "cnn4": CNN4,
    "resnet20": cifar_resnet(20),
    "resnet32": cifar_resnet(32),
    "resnet44": cifar_resnet(44),
    "resnet56": cifar_resnet(56),
    "resnet50_cifar": resnet50_cifar,
    "vgg16_cifar": vgg16_cifar,
    "garipov_conv": garipov_conv,
    "garipov_conv_fc": garipov_conv_fc,
    "tai_cnn": tai_cnn,
    "tai_nin": tai_nin,
    "caffenet": caffenet,
}
"""Our own networks: each builder takes `num_classes`, `input_shape` and its options by keyword."""
_SIZES = (32, 64, 96, 128, 192, 224, 256, 299, 384)
"""Heights and widths that are proposed to whoever has pictures that a net cannot read."""


def build_net(name: str, *, num_classes: int, input_shape: tuple[int, int, int], **options: Any) -> nn.Module:
    """Builds a network with fresh weights.

    Args:
        name: one of `NETS`, `torchvision/<name>` or `timm/<name>`.
        num_classes: number of outputs.
        input_shape: (channels, height, width) of a picture.
        **options: what the network's own constructor takes, such as `widths` of `cnn4`.

    Raises:
        UserError: the name is unknown, the network does not take an option, or it cannot read the shape.
    """
    if len(input_shape) != 3 or min(input_shape) < 1 or num_classes < 1:
        raise UserError(
            f"input_shape is {tuple(input_shape)} and num_classes {num_classes}, but net {name!r} needs three positive "
            "sizes (channels, height, width) and at least one class"
        )
    library, _, model = name.rpartition("/")
    if library == "torchvision":
        builder = _torchvision_builder(model, input_shape[0])
        arguments: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    elif library == "timm":
        builder = _timm_builder(model)
        arguments = {"pretrained": False, "num_classes": num_classes, "in_chans": input_shape[0]}
    elif name in NETS:
        builder = NETS[name]
        arguments = {"num_classes": num_classes, "input_shape": input_shape}
    else:
        raise UserError(_unknown(name, [*NETS, *_torchvision_names()]))
    accepted = _option_names(builder) - arguments.keys()
    said = f"its options are {', '.join(sorted(accepted)) or 'none'}"
    if name in NETS and (unknown := sorted(options.keys() - accepted)):
        raise UserError(f"net {name!r} does not take the options {unknown}: {said}")
    try:
        net = builder(**arguments, **options)
    except _refusals(name) as error:
        if not options:
            raise
        raise UserError(f"net {name!r} cannot be built with the options {options} ({error}): {said}") from error
    _check_reads(net, name, input_shape)
    return net


def _refusals(name: str) -> tuple[type[Exception], ...]:
    """Returns the kinds of errors by which a net refuses what a user gave; in a net of ours any other kind is a bug."""
    return (ValueError, RuntimeError) if name in NETS else (Exception,)  # torch's own: more memory than there is, say


def _check_reads(net: nn.Module, name: str, input_shape: tuple[int, int, int]) -> None:
    """Sends one picture through the net without computing; what fails so is tried in earnest, as a net may need values.

    Raises:
        UserError: the net cannot read pictures of that size.
    """
    if not _refusal(net, input_shape, "meta"):
        return
    error = _refusal(net, input_shape, next(net.parameters()).device)
    if error is None:
        return
    if not isinstance(error, _refusals(name)):
        raise error
    channels, height, width = input_shape
    size = next((size for size in _SIZES if not _refusal(net, (channels, size, size), "meta")), None)
    fix = f"it reads {size}x{size}, so give --data.image_size {size} where the data are folders, or" if size else "give"
    raise UserError(f"net {name!r} cannot read pictures of {width}x{height} ({error}): {fix} another net") from error


def _refusal(net: nn.Module, input_shape: tuple[int, int, int], device: torch.device | str) -> Exception | None:
    """Returns what a net raises in evaluation where it gets one picture of zeros."""
    tensors = chain(net.named_parameters(), net.named_buffers())
    try:
        with evaluating(net), torch.device(device):
            functional_call(net, {name: tensor.to(device) for name, tensor in tensors}, torch.zeros(1, *input_shape))
    except Exception as error:
        return error
    return None


def _torchvision_names() -> list[str]:
    # list_models() without a module also gives detection, segmentation and video, which do not classify pictures.
    names = torchvision.models.list_models(module=torchvision.models)
    return [f"torchvision/{name}" for name in names]


def _torchvision_builder(model: str, channels: int) -> Builder:
    name = f"torchvision/{model}"
    if name not in _torchvision_names():
        raise UserError(_unknown(name, _torchvision_names()))
    if channels != 3:
        raise UserError(
            f"net {name!r} reads pictures of 3 channels but these have {channels}: take 'timm/{model}', which reads "
            f"any number, or one of {', '.join(NETS)}"
        )
    return torchvision.models.get_model_builder(model)


def _timm_builder(model: str) -> Builder:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"net 'timm/{model}' needs timm: pip install 'tnlayers[timm]'") from error
    if not timm.is_model(model):
        raise UserError(_unknown(f"timm/{model}", [f"timm/{name}" for name in timm.list_models()]))

    @wraps(timm.model_entrypoint(model))
    def build(**arguments: Any) -> nn.Module:
        if "checkpoint_path" in arguments:
            raise UserError("option 'checkpoint_path' is not taken; load weights with --model.init_from")
        return timm.create_model(model, **arguments)

    return build


def _unknown(name: str, known: Iterable[str]) -> str:
    """Returns a sentence of the name, the known ones that it resembles, and where all of them are."""
    bare = {full.rpartition("/")[2]: full for full in reversed(list(known))}
    near = [bare[match] for match in get_close_matches(name.rpartition("/")[2], bare)]
    hint = f"did you mean {' or '.join(near)}, " if near else "expected "
    return (
        f"unknown net {name!r}: {hint}{'or ' if near else ''}one of {', '.join(NETS)}, torchvision/<name> with a name "
        "from torchvision.models.list_models() or timm/<name> with one from timm.list_models()"
    )


def _option_names(builder: Builder) -> set[str]:
    """Returns the optional arguments of `builder` and of the network class that it hands further ones to."""
    signature = inspect.signature(builder)
    names = {key for key, value in signature.parameters.items() if value.default is not value.empty}
    built = signature.return_annotation
    if inspect.isclass(built) and issubclass(built, nn.Module):
        names |= _option_names(built)
    return names
