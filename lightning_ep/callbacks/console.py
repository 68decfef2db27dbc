"""Printing beside a progress bar."""

from __future__ import annotations

from lightning.pytorch import Trainer


def print_once(trainer: Trainer, text: str) -> None:
    """Print on the first process only, above the progress bar if there is one."""
    if trainer.is_global_zero:
        bar = trainer.progress_bar_callback
        (bar.print if bar is not None else print)(text)
