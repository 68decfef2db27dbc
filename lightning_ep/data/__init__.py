"""LightningDataModules, the loader they share, and the bigram baseline."""

from lightning_ep.data.bigram import bigram_cross_entropy
from lightning_ep.data.loader import ResumableLoader, data_ranks
from lightning_ep.data.text import TextDataModule

__all__ = [
    "ResumableLoader",
    "TextDataModule",
    "bigram_cross_entropy",
    "data_ranks",
]
