"""The two places where Lightning's ModelCheckpoint touches files itself instead of asking the strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ep.checkpoint.saver import Checkpoints


def adopt(trainer: Trainer, checkpoints: Checkpoints) -> None:
    """Lets every ModelCheckpoint swap its ``last`` link atomically and see checkpoints that are still being written."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint):
            _adopt(callback, checkpoints)


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
