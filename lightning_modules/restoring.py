"""What a trainer loads of a checkpoint, and what is said where that does not fit."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from lightning_modules.classifier import ImageClassifier
from tnlayers import CheckpointError
from tnlayers.errors import UserError, message

__all__ = ["Restoring"]


class Restoring(_CheckpointConnector):
    """Loads like Lightning's own part of a trainer; where a file does not fit it raises a `CheckpointError` that names the file.

    Lightning has no public hook around its loading. Hooks of modules and callbacks are not loading: their errors stay what they are.
    """

    def restore_model(self) -> None:
        with self._loading(self.trainer.strategy, "load_model_state_dict"):
            super().restore_model()

    def restore_callbacks(self) -> None:
        with ExitStack() as stack:
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                stack.enter_context(self._loading(callback, "load_state_dict"))
            super().restore_callbacks()

    def restore_training_state(self) -> None:
        with self._told():
            super().restore_training_state()

    @contextmanager
    def _loading(self, owner: object, method: str) -> Iterator[None]:
        """Within this block the method tells its errors as those of the checkpoint."""
        setattr(owner, method, self._told()(getattr(owner, method)))
        try:
            yield
        finally:
            delattr(owner, method)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            path = self.trainer.ckpt_path
            ours = isinstance(self.trainer.lightning_module, ImageClassifier)
            fix = (
                f"start from its weights instead: --model.init_from {path}"
                if ours
                else "begin anew without --ckpt_path"
            )
            raise CheckpointError(
                f"{path} cannot be resumed ({type(error).__name__}: {message(error)}); {fix}"
            ) from error
