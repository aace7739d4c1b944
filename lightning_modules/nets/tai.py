"""The dense CIFAR-10 networks of Tai, Xiao, Zhang, Wang, E, "Convolutional neural networks with low-rank
regularization", 2015.

The spatial convolutions are conv1, conv2, conv3: those that the paper makes low-rank, with one BatchNorm after each pair.
The 1x1 ones have other names. Shapes: N pictures, C channels, H rows, W columns, K classes.
Arxiv: https://arxiv.org/abs/1511.06067; details as in the authors' code, https://github.com/chengtaipu/lowrankcnn.
"""

from collections import OrderedDict
from math import ceil

from torch import nn

from lightning_modules.nets.shapes import require_size

__all__ = ["tai_cnn", "tai_nin"]


def tai_cnn(*, num_classes: int, input_shape: tuple[int, int, int], batch_norm: bool = True) -> nn.Module:
    """The baseline: three 5x5 convolutions, a 1x1 one and two linear layers: (N, C, H, W) -> (N, K).

    Args:
        num_classes: K.
        input_shape: (C, H, W); the paper's are 3x32x32, which gives fc1 its 64 * 4 * 4 inputs.
        batch_norm: puts a BatchNorm after each 5x5 convolution, in place of its bias.
    """
    channels, height, width = input_shape
    return nn.Sequential(
        OrderedDict(
            **stage(1, channels, 96, size=5, batch_norm=batch_norm),
            pool1=halve(),
            **stage(2, 96, 128, size=5, batch_norm=batch_norm),
            pool2=halve(),
            **stage(3, 128, 256, size=5, batch_norm=batch_norm),
            pool3=halve(),
            pointwise=nn.Conv2d(256, 64, 1),
            relu4=nn.ReLU(),
            flatten=nn.Flatten(),
            dropout1=nn.Dropout(),
            fc1=nn.Linear(64 * ceil(height / 8) * ceil(width / 8), 256),
            relu5=nn.ReLU(),
            dropout2=nn.Dropout(),
            fc2=nn.Linear(256, num_classes),
        )
    )


def tai_nin(*, num_classes: int, input_shape: tuple[int, int, int], batch_norm: bool = True) -> nn.Module:
    """Network in network: three times a spatial convolution and two 1x1 ones: (N, C, H, W) -> (N, K).

    Args:
        num_classes: K.
        input_shape: (C, H, W), at least 4x4; the paper's are 3x32x32.
        batch_norm: puts a BatchNorm after each spatial convolution, in place of its bias.

    Source: Lin, Chen, Yan, "Network in network", 2013, arXiv 1312.4400; the second pool averages and no ReLU follows
    the last layer, as in Tai et al.'s code.
    """
    require_size("tai_nin", input_shape, 4)
    return nn.Sequential(
        OrderedDict(
            **stage(1, input_shape[0], 192, 160, 96, size=5, batch_norm=batch_norm),
            pool1=nn.MaxPool2d(3, stride=2, ceil_mode=True),
            dropout1=nn.Dropout(),
            **stage(2, 96, 192, 192, 192, size=5, batch_norm=batch_norm),
            pool2=nn.AvgPool2d(3, stride=2, ceil_mode=True),
            dropout2=nn.Dropout(),
            **stage(3, 192, 192, 192, size=3, batch_norm=batch_norm),
            mlp3_2=nn.Conv2d(192, num_classes, 1),
            average=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
        )
    )


def stage(place: int, channels: int, width: int, *mlp: int, size: int, batch_norm: bool) -> dict[str, nn.Module]:
    """Makes a convolution of `size` x `size` and 1x1 ones of the widths `mlp`, with a ReLU after each."""
    layers: dict[str, nn.Module] = {}
    layers[f"conv{place}"] = nn.Conv2d(channels, width, size, padding=size // 2, bias=not batch_norm)
    if batch_norm:
        layers[f"bn{place}"] = nn.BatchNorm2d(width)
    layers[f"relu{place}"] = nn.ReLU()
    for step, outputs in enumerate(mlp, start=1):
        layers[f"mlp{place}_{step}"] = nn.Conv2d(width, outputs, 1)
        layers[f"relu{place}_{step}"] = nn.ReLU()
        width = outputs
    return layers


def halve() -> nn.Module:
    # ceil_mode keeps the last pixel of an odd size.
    return nn.MaxPool2d(2, ceil_mode=True)
