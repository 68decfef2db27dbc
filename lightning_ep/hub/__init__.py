"""Hugging Face weights: streamed into shards, written out of them; what is on meta gets its values here."""
