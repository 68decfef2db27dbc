"""A token's way through a mixture-of-experts layer."""
