"""Context parallelism: sequences split over ranks, with exact attention by exchanging heads for tokens."""

from lightning_ep.context_parallel.attention import check, use_context_parallel_attention, whole_sequences
from lightning_ep.context_parallel.documents import Documents, find_documents
from lightning_ep.context_parallel.exchange import SequencePeers
from lightning_ep.context_parallel.sequence import SequencePiece, documents_of, piece_of, shard_sequence

__all__ = [
    "Documents",
    "SequencePeers",
    "SequencePiece",
    "check",
    "documents_of",
    "find_documents",
    "piece_of",
    "shard_sequence",
    "use_context_parallel_attention",
    "whole_sequences",
]
