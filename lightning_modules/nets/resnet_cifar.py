"""The CIFAR residual networks: He, Zhang, Ren, Sun, "Deep residual learning for image recognition", 2015, section 4.2.

Shapes: N pictures, C channels, H rows, W columns, K classes. Arxiv: https://arxiv.org/abs/1512.03385.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from tnlayers.errors import UserError

__all__ = ["CIFARResNet", "cifar_resnet"]


class Block(nn.Module):
    """relu(shortcut(x) + residual(x)): (N, C, H, W) -> (N, width, H / stride, W / stride)."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = width - in_channels
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(self.shortcut(x) + residual)

    def shortcut(self, x: Tensor) -> Tensor:
        """The paper's option A, free of parameters: drops pixels and surrounds the channels with zeros."""
        if self.new_channels == 0:
            return x
        before = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))


class CIFARResNet(nn.Module):
    """A residual network of three stages of 16, 32 and 64 channels: (N, C, H, W) -> (N, K).

    State-dict keys are those of the checkpoints published with github.com/akamaster/pytorch_resnet_cifar10,
    less their `module.` prefix.

    Args:
        num_classes: K.
        input_shape: (C, H, W).
        depth: layers with weights, 6 n + 2 for n blocks a stage: 20, 32, 44, 56.

    Raises:
        UserError: unless depth is 6 n + 2.

    Source: He et al. 2015, section 4.2; weights are drawn as in He et al., "Delving deep into rectifiers", 2015.
    """

    def __init__(self, *, num_classes: int, input_shape: tuple[int, int, int], depth: int = 20) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise UserError(f"depth is {depth}, but a CIFAR ResNet has 6 n + 2 layers: give 20, 32, 44 or 56")
        num_blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(input_shape[0], 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = make_stage(16, 16, 1, num_blocks)
        self.layer2 = make_stage(16, 32, 2, num_blocks)
        self.layer3 = make_stage(32, 64, 2, num_blocks)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.average(x).flatten(1))


def make_stage(in_channels: int, width: int, stride: int, num_blocks: int) -> nn.Sequential:
    first = Block(in_channels, width, stride)
    return nn.Sequential(first, *(Block(width, width, 1) for _ in range(num_blocks - 1)))


def cifar_resnet(depth: int) -> Callable[..., nn.Module]:
    """Returns the builder of the CIFAR ResNet of one depth."""

    def build(*, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
        return CIFARResNet(num_classes=num_classes, input_shape=input_shape, depth=depth)

    return build
