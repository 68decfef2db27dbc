"""Printing by one process for all, beside a progress bar."""

from __future__ import annotations

from typing import Any


def print_once(trainer: Any, text: str) -> None:
    """Print on a Trainer's first process only, above its progress bar if there is one."""
    if trainer.is_global_zero:
        bar = trainer.progress_bar_callback
        (bar.print if bar is not None else print)(text)
