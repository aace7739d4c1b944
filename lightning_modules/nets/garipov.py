"""The dense networks of Garipov, Podoprikhin, Novikov, Vetrov, "Ultimate tensorization: compressing convolutional and
FC layers alike", 2016.

Shapes: N pictures, C channels, H rows, W columns, K classes. Arxiv: https://arxiv.org/abs/1611.03214; details as in the
authors' code, https://github.com/timgaripov/TensorNet-TF.
"""

from collections import OrderedDict
from math import ceil

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Permute

from lightning_modules.nets.shapes import require_size

__all__ = ["SameMaxPool", "garipov_conv", "garipov_conv_fc"]


class SameMaxPool(nn.Module):
    """TensorFlow's SAME max-pool, 3x3 with stride 2: (N, C, H, W) -> (N, C, ceil(H / 2), ceil(W / 2))."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        # SAME pads an odd size at both ends and an even one only at its end; that is where ceil_mode's last window goes.
        return F.max_pool2d(x, 3, stride=2, padding=(height % 2, width % 2), ceil_mode=True)


def garipov_conv(*, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """The paper's *conv*: six 3x3 convolutions, the last two unpadded, and a linear layer: (N, C, H, W) -> (N, K).

    Args:
        num_classes: K.
        input_shape: (C, H, W), at least 17x17; the paper's are 3x32x32.
    """
    require_size("garipov_conv", input_shape, 17)
    return nn.Sequential(
        OrderedDict(
            **convolutions(input_shape[0], last_padding=0),
            average=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(128, num_classes, bias=False),
        )
    )


def garipov_conv_fc(*, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """The paper's *conv-FC*: six padded 3x3 convolutions and three linear layers: (N, C, H, W) -> (N, K).

    Args:
        num_classes: K.
        input_shape: (C, H, W); the paper's are 3x32x32, which gives fc1 its 8 * 8 * 128 inputs.
    """
    channels, height, width = input_shape
    return nn.Sequential(
        OrderedDict(
            **convolutions(channels, last_padding=1),
            # TensorFlow's order (rows, columns, channels), so that fc1's modes 8, 8, (8, 16) are just these.
            channels_last=Permute([0, 2, 3, 1]),
            flatten=nn.Flatten(),
            fc1=nn.Linear(ceil(height / 4) * ceil(width / 4) * 128, 1536, bias=False),
            bn_fc1=nn.BatchNorm1d(1536),
            relu_fc1=nn.ReLU(),
            fc2=nn.Linear(1536, 512, bias=False),
            bn_fc2=nn.BatchNorm1d(512),
            relu_fc2=nn.ReLU(),
            fc3=nn.Linear(512, num_classes),
        )
    )


def convolutions(channels: int, last_padding: int) -> dict[str, nn.Module]:
    """Makes conv1_1 to conv3_2 with their BatchNorms, ReLUs and pools; `last_padding` is that of conv3_1 and conv3_2."""
    layers: dict[str, nn.Module] = {}
    for block, width, padding in ((1, 64, 1), (2, 128, 1), (3, 128, last_padding)):
        for name in (f"{block}_1", f"{block}_2"):
            layers[f"conv{name}"] = nn.Conv2d(channels, width, 3, padding=padding, bias=False)
            layers[f"bn{name}"] = nn.BatchNorm2d(width)
            layers[f"relu{name}"] = nn.ReLU()
            channels = width
        if block < 3:
            layers[f"pool{block}"] = SameMaxPool()
    return layers
