"""What works but costs memory or time that nobody need spend: a warning with the cost and what to do instead."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_ep import transformers_adapter as adapter
from lightning_ep.layout import ParallelLayout

_LARGE_MODEL_BYTES = 2**30


def warn_if_ep_crosses_nodes(module: nn.Module, layout: ParallelLayout, ranks_per_node: int) -> None:
    """Warns of EP groups whose ranks are on more than one node, with what the models in ``module`` send there."""
    group = max(layout.expert_groups(), key=lambda group: _most_elsewhere(group, ranks_per_node))
    elsewhere = _most_elsewhere(group, ranks_per_node)
    if elsewhere == 0:
        return
    for model in adapter.pretrained_models(module).values():
        config = model.config.get_text_config(decoder=True)
        rows, row = min(getattr(config, "num_experts_per_tok", None) or elsewhere, elsewhere), 2 * config.hidden_size
        rank_zero_warn(
            f"EP groups such as ranks {group[0]} to {group[-1]} cross nodes of {ranks_per_node} processes: in every "
            f"MoE layer of {type(model).__name__} a token goes to other nodes in up to {rows} rows of {row / 1024:.3g} "
            "KiB (bf16), 4 times per step (there and back, forward and backward): up to "
            f"{4 * rows * row / 1024:.3g} KiB per token and layer. ep='auto' (here {ranks_per_node}) keeps tokens "
            "inside a node."
        )


def _most_elsewhere(group: list[int], ranks_per_node: int) -> int:
    """The most ranks of ``group`` that are not on the node of one of its ranks."""
    nodes = [rank // ranks_per_node for rank in group]
    return len(nodes) - min(nodes.count(node) for node in nodes)


def say_if_documents_need_a_mask(module: nn.Module, device: torch.device) -> None:
    """Says of models on a GPU that are given packed documents why their attention makes a mask of all pairs of tokens.

    Args:
        module: A module whose models are sharded.
        device: Where they compute.
    """
    for model in adapter.pretrained_models(module).values() if device.type == "cuda" else ():
        if not adapter.is_told_documents(model):
            reason = adapter.why_not_bounds(model) or "it does not compute in bf16"
            rank_zero_info(
                f"Batches have packed documents, for which {type(model).__name__} makes a mask of all pairs of tokens "
                f"of a row, which takes memory and time by the square of its length: {reason}."
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
