"""The small CNN of compression papers.

Shapes: N pictures, C channels, H rows, W columns, K classes.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from tnlayers.errors import UserError

__all__ = ["CNN4"]


class CNN4(nn.Module):
    """Four 3x3 convolutions with BatchNorm and ReLU, then two linear layers: (N, C, H, W) -> (N, K).

    Pictures are halved after the second and the fourth convolution, then averaged to 2x2, so any size will do.

    Args:
        num_classes: K.
        input_shape: (C, H, W).
        widths: output channels of conv1 to conv4.
        hidden: outputs of fc1.

    Raises:
        UserError: unless `widths` is four positive numbers and `hidden` is one.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        input_shape: tuple[int, int, int],
        widths: Sequence[int] = (32, 64, 64, 128),
        hidden: int = 128,
    ) -> None:
        super().__init__()
        if not isinstance(widths, Sequence) or len(widths) != 4 or not all(map(_is_width, widths)):
            raise UserError(
                f"widths is {widths}, but cnn4 has four convolutions: give four positive numbers such as [32, 64, 64, 128]"
            )
        if not _is_width(hidden):
            raise UserError(f"hidden is {hidden}, but cnn4's fc1 needs an output: give a positive number such as 128")
        width1, width2, width3, width4 = widths
        self.conv1 = nn.Conv2d(input_shape[0], width1, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width1)
        self.conv2 = nn.Conv2d(width1, width2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width2)
        self.conv3 = nn.Conv2d(width2, width3, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width3)
        self.conv4 = nn.Conv2d(width3, width4, 3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(width4)
        self.relu = nn.ReLU()
        # ceil_mode keeps the last pixel: a 1x1 picture stays 1x1 instead of vanishing.
        self.halve = nn.MaxPool2d(2, ceil_mode=True)
        self.average = nn.AdaptiveAvgPool2d(2)
        self.fc1 = nn.Linear(4 * width4, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.halve(self.relu(self.bn2(self.conv2(x))))
        x = self.relu(self.bn3(self.conv3(x)))
        x = self.halve(self.relu(self.bn4(self.conv4(x))))
        x = self.average(x).flatten(1)
        return self.fc2(self.relu(self.fc1(x)))


def _is_width(value: object) -> bool:
    return isinstance(value, int) and value >= 1
