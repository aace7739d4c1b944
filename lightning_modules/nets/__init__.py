"""The networks that experiments start from, all built by name through `build_net`."""

from lightning_modules.nets.build import NETS, build_net
from lightning_modules.nets.cnn4 import CNN4
from lightning_modules.nets.resnet50_cifar import resnet50_cifar
from lightning_modules.nets.resnet_cifar import CIFARResNet

__all__ = ["CNN4", "NETS", "CIFARResNet", "build_net", "resnet50_cifar"]
