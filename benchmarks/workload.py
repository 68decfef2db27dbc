"""What every trainer is given alike: tokens, random weights, and a count of what its routers choose."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cells import SIZES, Cell


def batches(cell: Cell, count: int) -> Iterator[dict[str, Tensor]]:
    """Random tokens on the CPU; every trainer gets the same ones on the same rank, but for ranks that share them."""
    generator = torch.Generator().manual_seed(int(os.environ.get("RANK", "0")) // cell.sharing)
    for _ in range(count):
        ids = torch.randint(0, SIZES[cell.sizes]["vocab_size"], (cell.batch, cell.sequence), generator=generator)
        yield {"input_ids": ids, "labels": ids}


@torch.no_grad()
def fill_parameters(model: nn.Module, device: torch.device, std: float = 0.02) -> None:
    """Allocates parameters that are on meta and draws all of them on the device: ones for norms, normal for the rest.

    Seconds faster than any trainer's own initialisation, and the same distribution for all of them. Buffers stay.
    """
    # fn is called with parameters and buffers; `_apply` is how `to_empty` allocates, also under FSDP2.
    model._apply(lambda t: torch.empty_like(t, device=device) if isinstance(t, nn.Parameter) and t.is_meta else t)
    generator = torch.Generator(device).manual_seed(int(os.environ.get("RANK", "0")))
    for param in model.parameters():
        local = getattr(param, "to_local", lambda p=param: p)()
        if param.ndim == 1:
            local.fill_(1.0)
        else:
            local.normal_(std=std, generator=generator)


class Popularity:
    """Counts what routers of a transformers Qwen3-MoE choose, until it is read once; after that it costs nothing."""

    def __init__(self, model: Any) -> None:
        gates = [layer.mlp.gate for layer in model.model.layers]
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
