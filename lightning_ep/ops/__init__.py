"""Single-device maths: permutations of rows and the local experts. Knows no process group."""
