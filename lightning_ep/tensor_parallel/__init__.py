"""Tensor parallelism of attention and dense MLPs, the vocabulary, and sequence-parallel regions between them.

One rule makes the gradients right: what all ranks of the group hold alike (a norm's weight, the router, logits, a loss)
has a gradient that is *this rank's part of a sum*. So tensor-parallel ranks are to gradients what data ranks are:
parameters sum over all ranks, losses are divided by the number of all ranks, and nobody needs to know where a module
sits.
"""

from lightning_ep.tensor_parallel.apply import apply_tensor_plan
from lightning_ep.tensor_parallel.plan import tensor_plan

__all__ = ["apply_tensor_plan", "tensor_plan"]
