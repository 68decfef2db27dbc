"""LightningDataModules, and the loader they share."""

from lightning_ep.data.resumable_loader import ResumableLoader, data_ranks
from lightning_ep.data.text import TextDataModule

__all__ = [
    "ResumableLoader",
    "TextDataModule",
    "data_ranks",
]
