"""VGG-16 for small pictures."""

from collections import OrderedDict

from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from lightning_modules.nets.shapes import require_size

__all__ = ["vgg16_cifar"]


def vgg16_cifar(*, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """torchvision's VGG-16 convolutions with BatchNorm, and a head 512 -> 4096 -> 4096 -> K: (N, C, H, W) -> (N, K).

    fc1 and fc2 hold 2^21 and 2^24 weights: the layers that Qing, Li, Zhou, Ran, "Compressing neural networks using
    tensor networks with exponentially fewer variational parameters", 2023, arXiv 2305.06058, encode.

    Args:
        num_classes: K.
        input_shape: (C, H, W), at least 32x32.

    Source: Simonyan, Zisserman, "Very deep convolutional networks for large-scale image recognition", 2014,
    arXiv 1409.1556, configuration D.
    """
    require_size("vgg16_cifar", input_shape, 32)
    features = make_layers(cfgs["D"], batch_norm=True)
    if input_shape[0] != 3:
        features[0] = nn.Conv2d(input_shape[0], 64, 3, padding=1)
    return nn.Sequential(
        OrderedDict(
            features=features,
            average=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc1=nn.Linear(512, 4096),
            relu1=nn.ReLU(),
            dropout1=nn.Dropout(),
            fc2=nn.Linear(4096, 4096),
            relu2=nn.ReLU(),
            dropout2=nn.Dropout(),
            fc3=nn.Linear(4096, num_classes),
        )
    )
