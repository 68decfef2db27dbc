"""LightningDataModules, and the loader they share."""

from lightning_ep.data.packed_data import PackedDataModule
from lightning_ep.data.preparation import Rows, Samples
from lightning_ep.data.resumable_loader import ResumableLoader, data_ranks
from lightning_ep.data.text import TextDataModule

__all__ = [
    "PackedDataModule",
    "ResumableLoader",
    "Rows",
    "Samples",
    "TextDataModule",
    "data_ranks",
]
