"""Hugging Face checkpoints: streamed into shards, and exported from them."""
