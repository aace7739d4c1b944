"""Labelled pictures as Lightning data modules."""

from lightning_modules.data.base import ImageData
from lightning_modules.data.digits import Digits
from lightning_modules.data.downloads import CIFAR10, CIFAR100, FashionMNIST
from lightning_modules.data.folders import Folders

__all__ = ["CIFAR10", "CIFAR100", "Digits", "FashionMNIST", "Folders", "ImageData"]
