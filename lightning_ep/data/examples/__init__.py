"""What the quick starts need and no training does: texts and chats that are on every machine, a baseline to beat."""

from lightning_ep.data.examples.bigram import BigramBaseline, bigram_cross_entropy
from lightning_ep.data.examples.docstrings import DocstringChats

__all__ = ["BigramBaseline", "DocstringChats", "bigram_cross_entropy"]
