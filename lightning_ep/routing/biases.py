"""Biases on what routers choose, which balance experts without a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.distributed.shards import local_region, local_tensor
from lightning_ep.routing.observe import MoELayer


def give_biases(layers: Sequence[MoELayer]) -> None:
    """Gives routers whose family has no biases a buffer of zeros, on router logits; before the model is sharded.

    Raises:
        ValueError: If a router has none and computes in a way in which there is no place for it.
    """
    bare = [layer for layer in layers if adapter.correction_bias(layer.router, layer.block) is None]
    for layer in bare:
        if (reason := adapter.why_no_selection_bias(layer.router)) is not None:
            raise ValueError(
                f"BiasUpdates has no place in {layer.name}: {reason}. Use BalancingLoss, or a family with biases "
                "(the DeepSeek kind) or with plain softmax routers (the Qwen3 kind)."
            )
    for layer in bare:
        assert layer.router is not None
        adapter.add_selection_bias(layer.router, layer.num_experts)


def give_saved_biases(model: PreTrainedModel, saved: Mapping[str, tuple[Sequence[int], Any]], prefix: str) -> None:
    """Gives routers the biases that a checkpoint has for them and their family has no place for, to be filled from it.

    Args:
        model: A model.
        saved: Shape, and what else, of the tensors of the checkpoint.
        prefix: What is in front of the model's names there.
    """
    inside = {name.removeprefix(prefix): shape for name, (shape, _) in saved.items() if name.startswith(prefix)}
    for name, router in adapter.selection_biases(model, inside).items():
        adapter.add_selection_bias(router, inside[name][0])


def bias_of(layer: MoELayer) -> Tensor:
    """The biases of a layer, ``[E]`` or ``[1, E]``: a buffer, or a parameter that no optimizer trains."""
    found = adapter.correction_bias(layer.router, layer.block)
    assert found is not None, f"{layer.name} has no biases"
    if not found.is_floating_point() or found.dtype.itemsize < 4:
        raise ValueError(
            f"The biases of {layer.name} are {found.dtype}, in which steps of BiasUpdates are lost. Use precision="
            "'bf16-mixed'."
        )
    return found


@torch.no_grad()
def update_biases(layers: Sequence[MoELayer], counts_LE: Tensor, rate: float) -> Tensor:
    """One step of the sign rule, the same on every rank.

    Args:
        layers: The layers.
        counts_LE: int64 ``[L, E]``, tokens that came to each expert since the last step, over all ranks.
        rate: The step.

    Returns:
        The largest magnitude of this rank's biases, 0-dim.
    """
    largest = []
    for layer, counts_E in zip(layers, counts_LE, strict=True):
        counts_E = counts_E[: layer.num_experts].double()
        steps_E = rate * torch.sign(counts_E.mean() - counts_E)
        bias = bias_of(layer)
        region, mine = local_region(bias), local_tensor(bias)
        mine += region.of(steps_E.to(mine.dtype).view(bias.shape))
        largest.append(mine.abs().amax() if mine.numel() else mine.new_zeros(()))
    return torch.stack(largest).amax()
