"""LightningDataModules, the loader they share, and the bigram baseline."""

from lightning_ep.data.bigram import bigram_cross_entropy
from lightning_ep.data.loader import ResumableLoader, data_ranks
from lightning_ep.data.resume import close_finished_epoch, match_batches
from lightning_ep.data.text import TextDataModule

__all__ = [
    "ResumableLoader",
    "TextDataModule",
    "bigram_cross_entropy",
    "close_finished_epoch",
    "data_ranks",
    "match_batches",
]
