"""The networks that experiments start from, all built by name through `build_net`."""

from lightning_modules.nets.build import NETS, build_net
from lightning_modules.nets.caffenet import caffenet
from lightning_modules.nets.cnn4 import CNN4
from lightning_modules.nets.garipov import garipov_conv, garipov_conv_fc
from lightning_modules.nets.resnet50_cifar import resnet50_cifar
from lightning_modules.nets.resnet_cifar import CIFARResNet
from lightning_modules.nets.tai import tai_cnn, tai_nin
from lightning_modules.nets.vgg16_cifar import vgg16_cifar

__all__ = [
    "CNN4",
    "NETS",
    "CIFARResNet",
    "build_net",
    "caffenet",
    "garipov_conv",
    "garipov_conv_fc",
    "resnet50_cifar",
    "tai_cnn",
    "tai_nin",
    "vgg16_cifar",
]
