"""What is done to a decoder layer: activation checkpointing and compilation."""
