"""The smallest pictures that a network can read."""

from tnlayers.errors import UserError

__all__ = ["require_size"]


def require_size(net: str, input_shape: tuple[int, int, int], least: int) -> None:
    """Refuses pictures so small that `net` would leave no pixel of them.

    Raises:
        UserError: if (channels, height, width) has a height or width below `least`.
    """
    if min(input_shape[1:]) < least:
        raise UserError(
            f"input_shape is {tuple(input_shape)}, but {net} needs pictures of at least {least}x{least}: smaller ones "
            "vanish on the way"
        )
