"""Single-device maths: local experts, permutations, routing metadata, the loss. Knows no process group."""
