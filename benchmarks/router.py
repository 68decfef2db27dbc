"""Routers with a given popularity of experts, the same for every trainer, and the popularity that results."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EXPONENT = 0.25  # the most popular of 128 experts then gets about five times the mean, top-8


def zipf_bias(num_experts: int, layer: int) -> Tensor:
    """A bias of router logits under which popularity falls with rank like Zipf's law, fp32 ``[E]``.

    Which expert is how popular is a permutation of the layer's own, so that popular ones are spread over EP ranks at
    random. Logits of random weights have a standard deviation of 0.9 at hidden size 2048, beside which the exponent
    must be seen.
    """
    order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(layer))
    return -_EXPONENT * torch.log(torch.arange(1, num_experts + 1, dtype=torch.float32))[order]


def skew_transformers_router(gate: Any, layer: int) -> None:
    """Gives a transformers Qwen3-MoE router (``Qwen3MoeTopKRouter``) a fixed bias of its logits.

    It has no parameter for one, so its forward is replaced by the same lines with a bias.
    """
    bias = zipf_bias(gate.num_experts, layer)
    on_device: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def forward(hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden_TH = hidden_TH.reshape(-1, gate.hidden_dim)
        key = (hidden_TH.device, hidden_TH.dtype)
        if key not in on_device:
            on_device[key] = bias.to(*key)
        logits_TE = F.linear(hidden_TH, gate.weight, on_device[key])
        weights_TK, ids_TK = F.softmax(logits_TE, dtype=torch.float, dim=-1).topk(gate.top_k, dim=-1)
        if gate.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return logits_TE, weights_TK.to(logits_TE.dtype), ids_TK

    gate.forward = forward


def prepare_transformers_routers(model: Any, router: str) -> Popularity:
    """Skews the routers of a transformers Qwen3-MoE if ``router`` says so, and counts what they choose."""
    gates = [layer.mlp.gate for layer in model.model.layers]
    if router == "skewed":
        for index, gate in enumerate(gates):
            skew_transformers_router(gate, index)
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
