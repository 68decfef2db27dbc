"""Checkpoints of training: complete or not there, on any layout, at once or behind the training."""
