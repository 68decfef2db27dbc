"""Rules for sharded tensors that torch lacks; importing this module registers them."""

from __future__ import annotations

import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

_Rule = tuple[list[Placement], list[Placement]]  # placements of the output and of the input, on one mesh dimension


@register_sharding(torch.ops.aten._is_any_true.default)
def _is_any_true(tensor: torch.Tensor) -> list[_Rule]:
    """Lets anomaly detection (``torch.autograd.detect_anomaly``) look for NaN in the gradients of experts.

    Each rank asks its own shard: a rank that finds NaN raises, and that ends the job on all.
    """
    shards: list[_Rule] = [([Partial("max")], [Shard(dim)]) for dim in range(tensor.ndim)]
    return [([Replicate()], [Replicate()]), *shards]
