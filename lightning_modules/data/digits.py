"""The 1,797 handwritten digits that come with scikit-learn."""

from typing import Literal

import torch

from lightning_modules.data.base import Augment, ImageData
from lightning_modules.data.pictures import Pictures, PictureSet

__all__ = ["Digits"]

CLASS_NAMES = [str(digit) for digit in range(10)]


class Digits(ImageData):
    """Grey 8x8 digits of ten classes, without a download: 1,437 for training and a fixed 360 for the test.

    Source: Alpaydin and Kaynak, "Optical recognition of handwritten digits", 1998.
    """

    class_names = CLASS_NAMES
    input_shape = (1, 8, 8)
    mean = (0.3054,)
    std = (0.3760,)
    augment: Augment = "none"
    padding = 1

    def load(self, part: Literal["train", "test"]) -> PictureSet:
        # Here, since every command imports this file and few need scikit-learn, which takes long to import.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        values, labels = load_digits(return_X_y=True)
        indices = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)
        chosen = indices[0] if part == "train" else indices[1]
        # Stored as 0..16.
        pictures = torch.from_numpy(values[chosen]).mul(255 / 16).round().to(torch.uint8)
        return Pictures(pictures.view(-1, 1, 8, 8), torch.from_numpy(labels[chosen]).long())
