"""What the quick start needs and no training does: a corpus that is on every machine, and a baseline to beat."""

from lightning_ep.data.examples.bigram import BigramBaseline, bigram_cross_entropy

__all__ = ["BigramBaseline", "bigram_cross_entropy"]
