"""Benchmarks of lightning_ep beside its peers; run from the repository root. Not part of the wheel."""
