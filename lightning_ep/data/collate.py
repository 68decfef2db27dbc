"""Windows on disk become batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_ep.data.preparation import WINDOWS
from lightning_ep.data.windows import COLUMNS, fill_window
from lightning_ep.transformers_adapter import filling

if TYPE_CHECKING:
    from datasets import Dataset

Collate = Callable[[list[dict[str, torch.Tensor]]], dict[str, torch.Tensor]]
"""Makes a batch of windows."""


def open_windows(directory: Path) -> Dataset:
    """What `lightning_ep.data.preparation.prepare` made, mapped into memory; items are dicts of int64 tensors."""
    from datasets import Dataset

    return Dataset.from_file(str(directory / WINDOWS)).with_format("torch")


class FilledUp:
    """A dataset of windows and behind them empty ones, which no loss counts, up to a multiple.

    So ranks see each window once, however many there are, and take equally many of equal size.

    Args:
        windows: The dataset.
        multiple: What its length will be a multiple of.
        sequence_length: Tokens of a window.
        pad_token_id: What empty ones hold.
    """

    def __init__(self, windows: Dataset, multiple: int, sequence_length: int, pad_token_id: int) -> None:
        self._windows = windows
        self._size = -(-len(windows) // multiple) * multiple
        empty = fill_window([], sequence_length, pad_token_id)
        self._empty = {name: torch.from_numpy(values).long() for name, values in zip(COLUMNS, empty, strict=True)}

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._windows[index] if index < len(self._windows) else self._empty


def stacked(windows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of windows: ``[batch, sequence]`` each."""
    return {name: torch.stack([window[name] for window in windows]) for name in windows[0]}


def without_positions(windows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch whose documents see those before them."""
    return with_mask(stacked(windows))


def with_mask(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch with a mask for padding, ``[batch, sequence]``, in place of the positions, which said it before.

    In one of nothing but padding all counts: a balancing loss would divide by zero.
    """
    counts = ~filling(batch["input_ids"], batch["position_ids"])
    without = {name: values for name, values in batch.items() if name != "position_ids"}
    return {**without, "attention_mask": (counts | ~counts.any()).long()}
