"""CaffeNet, Caffe's version of AlexNet: Krizhevsky, Sutskever, Hinton, "ImageNet classification with deep convolutional
neural networks", 2012.

Shapes: N pictures, C channels, H rows, W columns, K classes.
"""

from collections import OrderedDict

from torch import nn

from lightning_modules.nets.shapes import require_size

__all__ = ["caffenet"]


def caffenet(*, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """Five convolutions, three of them in two groups, and three linear layers: (N, C, H, W) -> (N, K).

    Args:
        num_classes: K.
        input_shape: (C, H, W), at least 39x39; Caffe's are 3x227x227, which gives fc6 its 256 * 6 * 6 inputs.
    """
    require_size("caffenet", input_shape, 39)
    channels, height, width = input_shape
    # conv1 leaves (size - 11) // 4 + 1 pixels and each of three pools halves them.
    rows, columns = (((size - 11) // 4 + 1) // 8 for size in (height, width))
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 96, 11, stride=4),
            relu1=nn.ReLU(),
            pool1=pool(),
            norm1=nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75),
            conv2=nn.Conv2d(96, 256, 5, padding=2, groups=2),
            relu2=nn.ReLU(),
            pool2=pool(),
            norm2=nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75),
            conv3=nn.Conv2d(256, 384, 3, padding=1),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(384, 384, 3, padding=1, groups=2),
            relu4=nn.ReLU(),
            conv5=nn.Conv2d(384, 256, 3, padding=1, groups=2),
            relu5=nn.ReLU(),
            pool5=pool(),
            flatten=nn.Flatten(),
            fc6=nn.Linear(256 * rows * columns, 4096),
            relu6=nn.ReLU(),
            dropout6=nn.Dropout(),
            fc7=nn.Linear(4096, 4096),
            relu7=nn.ReLU(),
            dropout7=nn.Dropout(),
            fc8=nn.Linear(4096, num_classes),
        )
    )


def pool() -> nn.Module:
    # Caffe rounds a pool's output size up.
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)
