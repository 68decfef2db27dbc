"""What works but costs memory or time that nobody need spend: a warning with the cost and what to do instead."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_ep.layout import ParallelLayout

_LARGE_MODEL_BYTES = 2**30


def warn_if_ep_crosses_nodes(layout: ParallelLayout, ranks_per_node: int) -> None:
    """Warns of EP groups whose ranks are on more than one node."""
    crossing = [group for group in layout.expert_groups() if len({r // ranks_per_node for r in group}) > 1]
    if crossing:
        rank_zero_warn(
            f"EP groups such as ranks {crossing[0]} cross nodes of {ranks_per_node} processes: every MoE layer "
            "sends its tokens over the network, 4 times per step (hidden_size * 2 bytes in bf16 per token and rank "
            f"that serves it). ep='auto' (here {ranks_per_node}) keeps them inside a node."
        )


def warn_if_large_in_memory(module: nn.Module, layout: ParallelLayout, ranks_per_node: int) -> None:
    """Warns of a large model that every rank has built in full, before it is sharded."""
    size = sum(p.numel() * p.element_size() for p in module.parameters() if not p.is_meta)
    if size > _LARGE_MODEL_BYTES and layout.world_size > 1:
        rank_zero_warn(
            f"The model was built in memory: {size / 2**30:.1f} GiB on each of {ranks_per_node} ranks of a "
            f"node, {size * ranks_per_node / 2**30:.1f} GiB in all, before it is sharded. "
            "`lightning_ep.from_pretrained(path)` reads every rank's shards only; to train from scratch, "
            "`lightning_ep.from_config(config)` allocates shards only."
        )
