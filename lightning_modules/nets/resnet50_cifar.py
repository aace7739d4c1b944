"""ResNet-50 for small pictures."""

from torch import nn
from torchvision.models import resnet50

__all__ = ["resnet50_cifar"]


def resnet50_cifar(*, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """torchvision's ResNet-50 with a 3x3 stem of stride 1 and no max-pool.

    ImageNet's stem would shrink 32x32 to 8x8 before the first block; this one leaves it at 32x32.

    Args:
        num_classes: number of outputs.
        input_shape: (channels, height, width).
    """
    net: nn.Module = resnet50(weights=None, num_classes=num_classes)
    net.conv1 = nn.Conv2d(input_shape[0], 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net
