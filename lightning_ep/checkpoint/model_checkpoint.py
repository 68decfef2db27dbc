"""The two places where Lightning's ModelCheckpoint touches files itself instead of asking the strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ep.checkpoint.saver import Checkpoints

_METHODS = ("_link_checkpoint", "file_exists")


class AdoptedCallbacks:
    """Every ModelCheckpoint of a run: swaps its ``last`` link atomically, and sees checkpoints being written behind.

    Args:
        trainer: Its Trainer.
        checkpoints: What writes them.
    """

    def __init__(self, trainer: Trainer, checkpoints: Checkpoints) -> None:
        self._callbacks = [c for c in trainer.callbacks if isinstance(c, ModelCheckpoint)]  # type: ignore[attr-defined]
        for callback in self._callbacks:
            _adopt(callback, checkpoints)

    def release(self) -> None:
        """Leaves the callbacks as they were."""
        for callback in self._callbacks:
            for name in _METHODS:
                vars(callback).pop(name, None)


def _adopt(callback: ModelCheckpoint, checkpoints: Checkpoints) -> None:
    def link(trainer: Trainer, filepath: str, linkpath: str) -> None:
        # Lightning removes the old link first, and links to what an asynchronous save has not written yet.
        checkpoints.link(Path(linkpath), Path(filepath))

    def file_exists(filepath: Any, trainer: Trainer) -> bool:
        # By this Lightning finds a name that is free.
        pending = checkpoints.pending
        return (pending is not None and pending == Path(filepath)) or type(callback).file_exists(
            callback, filepath, trainer
        )

    callback._link_checkpoint = link  # type: ignore[method-assign]
    callback.file_exists = file_exists  # type: ignore[method-assign]
