"""Where Lightning's ModelCheckpoint touches files itself, or decides by what only its own rank has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ep.checkpoint.saver import Checkpoints
from lightning_ep.distributed.decisions import check_shared

_METHODS = ("_link_checkpoint", "_save_last_checkpoint", "file_exists", "_monitor_candidates")


class AdoptedCallbacks:
    """Every ModelCheckpoint of a run: what it links, sees on the disk, decides by and makes names of.

    It swaps its ``last`` link atomically, also one of an earlier run, sees checkpoints being written behind, and has
    rank 0's metrics everywhere.

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

    warned = False

    def file_exists(filepath: Any, trainer: Trainer) -> bool:
        # By this Lightning finds a name that is free.
        nonlocal warned
        path, pending = Path(filepath), checkpoints.pending
        if pending is not None and pending == path:
            return True
        if not type(callback).file_exists(callback, filepath, trainer):
            return False
        links = callback.save_last == "link"
        is_link = links and trainer.is_global_zero and path.is_symlink()
        if links and trainer.strategy.reduce_boolean_decision(is_link, all=False):
            return False  # what it points to stays when it moves, so that `last` is the newest of all runs
        is_last = callback.save_last and path.stem == callback.CHECKPOINT_NAME_LAST
        if is_last and str(path) != callback.last_model_path and not warned:
            warned = True
            rank_zero_warn(
                f"{path} is another run's and stays: the last checkpoint of this run gets the next name, as "
                f"{path.stem}-v1.ckpt. "
                + (
                    "It is a checkpoint itself and no link, which would move on: give it another name."
                    if links
                    else 'With ModelCheckpoint(save_last="link") `last` is the newest of all runs.'
                )
            )
        return True

    def monitor_candidates(trainer: Trainer) -> dict[str, Any]:
        # By these it decides, and makes the names of files: a metric that is not synced would give each rank its own.
        candidates = type(callback)._monitor_candidates(callback, trainer)
        return check_shared(candidates, [callback.monitor] if callback.monitor else [])

    def save_last(trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        if callback.save_last == "link" and callback.save_top_k != 0 and not callback._last_checkpoint_saved:
            # The end of a run that has saved nothing: Lightning would make `last` itself a checkpoint, which stays
            # where it is when later runs link to theirs.
            callback._save_checkpoint(
                trainer, callback._get_metric_interpolated_filepath_name(monitor_candidates, trainer)
            )
        type(callback)._save_last_checkpoint(callback, trainer, monitor_candidates)

    callback._save_last_checkpoint = save_last  # type: ignore[method-assign]
    callback._monitor_candidates = monitor_candidates  # type: ignore[method-assign]
    callback._link_checkpoint = link  # type: ignore[method-assign]
    callback.file_exists = file_exists  # type: ignore[method-assign]
