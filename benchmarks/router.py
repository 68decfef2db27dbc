"""Routers with a given popularity of experts, the same for every trainer, and the popularity that results."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from benchmarks.cells import Cell

_EXPONENT = 0.25  # the most popular of 128 experts then gets about five times the mean, top-8


def zipf_bias(num_experts: int, layer: int) -> Tensor:
    """A bias of router logits under which popularity falls with rank like Zipf's law, fp32 ``[E]``.

    Which expert is how popular is a permutation of the layer's own, so that popular ones are spread over EP ranks at
    random. Logits of random weights have a standard deviation of 0.9 at hidden size 2048, beside which the exponent
    must be seen.
    """
    order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(layer))
    return -_EXPONENT * torch.log(torch.arange(1, num_experts + 1, dtype=torch.float32))[order]


def change_transformers_router(gate: Any, weight_EH: Tensor | None = None, bias_E: Tensor | None = None) -> None:
    """Adds constants to a transformers Qwen3-MoE router (``Qwen3MoeTopKRouter``), which has no parameters for them.

    Args:
        gate: The router; its class is replaced by one that has its lines with these in them.
        weight_EH: Added to its weight.
        bias_E: Added to its logits.
    """
    assert "forward" not in vars(gate), "the class's forward would not be called"
    # Buffers, so that compiled layers share one graph.
    gate.register_buffer("weight_EH", weight_EH, persistent=False)
    gate.register_buffer("bias_E", bias_E, persistent=False)
    gate.__class__ = _ChangedRouter


class _ChangedRouter(Qwen3MoeTopKRouter):
    weight_EH: Tensor | None
    bias_E: Tensor | None

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden_TH = hidden_TH.reshape(-1, self.hidden_dim)
        weight_EH = self.weight if self.weight_EH is None else self.weight + self.weight_EH.to(self.weight.dtype)
        logits_TE = F.linear(hidden_TH, weight_EH, None if self.bias_E is None else self.bias_E.to(hidden_TH.dtype))
        weights_TK, ids_TK = F.softmax(logits_TE, dtype=torch.float, dim=-1).topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return logits_TE, weights_TK.to(logits_TE.dtype), ids_TK


def prepare_transformers_routers(model: Any, cell: Cell, device: torch.device) -> Popularity:
    """Skews the routers of a transformers Qwen3-MoE if the cell says so, and counts what they choose.

    In a rehearsal all ranks have the same shard of a router, and every token would go to all of them: random weights
    beside the gathered ones tell the experts apart again.
    """
    gates = [layer.mlp.gate for layer in model.model.layers]
    for index, gate in enumerate(gates):
        weight_EH = bias_E = None
        if cell.router == "skewed":
            bias_E = zipf_bias(gate.num_experts, index).to(device)
        if cell.rehearse:
            generator = torch.Generator(device).manual_seed(index)
            weight_EH = 0.02 * torch.randn(gate.num_experts, gate.hidden_dim, generator=generator, device=device)
        if weight_EH is not None or bias_E is not None:
            change_transformers_router(gate, weight_EH, bias_E)
    return Popularity(gates)


class Popularity:
    """Counts what transformers' routers choose until it is read, once; after that it costs nothing."""

    def __init__(self, gates: Iterable[nn.Module]) -> None:
        gates = list(gates)
        self._counts: list[Tensor | None] = [None] * len(gates)
        self._hooks = [gate.register_forward_hook(partial(self._count, index)) for index, gate in enumerate(gates)]

    def _count(self, layer: int, gate: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        counts_E = torch.bincount(output[2].reshape(-1), minlength=gate.num_experts)  # type: ignore[arg-type]
        total_E = self._counts[layer]
        self._counts[layer] = counts_E if total_E is None else total_E + counts_E

    def read(self) -> float:
        """Tokens of the most popular expert over the mean, averaged over layers; stops counting."""
        for hook in self._hooks:
            hook.remove()
        return max_over_mean(count for count in self._counts if count is not None)


def max_over_mean(counts: Iterable[Tensor]) -> float:
    """Largest over mean number of tokens per expert, averaged over layers; counts are ``[E]`` each."""
    ratios = [(count_E.max() / count_E.float().mean()).item() for count_E in counts]
    return sum(ratios) / len(ratios)
