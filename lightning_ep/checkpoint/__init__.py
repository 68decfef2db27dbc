"""Weights and train state on disk."""
