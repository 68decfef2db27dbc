"""What every trainer is given alike: tokens, random weights, and a count of what its routers choose."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import string
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.cells import CHATS, RANDOM, SIZES, Cell


def batches(cell: Cell, count: int) -> Iterator[dict[str, Tensor]]:
    """Tokens on the CPU; every trainer gets the same ones on the same rank, but for ranks that share them."""
    seed = int(os.environ.get("RANK", "0")) // cell.sharing
    generator = torch.Generator().manual_seed(seed)
    chats = itertools.cycle(_chats(cell, count, seed) if cell.data != RANDOM else [{}])
    for batch in itertools.islice(chats, count):
        ids = torch.randint(0, SIZES[cell.sizes]["vocab_size"], (cell.batch, cell.sequence), generator=generator)
        if cell.data == RANDOM:
            yield {"input_ids": ids, "labels": ids}
        elif cell.data == CHATS:
            yield batch
        else:
            yield {**batch, "input_ids": ids, "labels": ids.where(batch["labels"] != -100, -100)}


def _chats(cell: Cell, count: int, seed: int) -> list[dict[str, Tensor]]:
    """At least ``count`` batches, or one, that `ChatDataModule` packs of generated conversations.

    They have 1 to 4 turns; at 4,096 tokens per window questions have about 40 and answers about 150 words, or tokens.
    """
    from lightning_ep.data import ChatDataModule
    from lightning_ep.data.corpus import train_tokenizer

    draw = random.Random(seed)
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 8))) for _ in range(150)]
    left, rows = 1.2 * count * cell.batch * cell.sequence, []
    while left > 0:
        messages = []
        for role, median in [("user", cell.sequence / 100), ("assistant", cell.sequence / 27)] * draw.randint(1, 4):
            length = 1 + int(draw.lognormvariate(math.log(median), 0.8))
            messages.append({"role": role, "content": " ".join(draw.choices(words, k=length))})
            left -= length
        rows.append(json.dumps({"messages": messages}))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "chats.jsonl").write_text("\n".join(rows))
        train_tokenizer(iter([" ".join(words)] * 5), min(2048, SIZES[cell.sizes]["vocab_size"])).save_pretrained(folder)
        data = ChatDataModule(
            source=f"{folder}/chats.jsonl", tokenizer=folder, cache_dir=folder, chat_template="plain", num_proc=1,
            sequence_length=cell.sequence, batch_size=cell.batch, validation_fraction=0.0,
        )  # fmt: skip
        data.prepare_data()
        data.setup()
        return list(data.train_dataloader())


def leave_out_exchanges() -> None:
    """Replaces the all-to-all of this process: every rank receives what it sends, counts and rows, without a copy."""

    def stay(output: Tensor, input: Tensor, *splits: Any, group: Any = None, async_op: bool = False) -> Any:
        if not async_op:
            output.copy_(input)  # the counts, which are a view
            return None
        assert output.shape == input.shape, f"{tuple(input.shape)} rows are sent, {tuple(output.shape)} received"
        output.set_(input)  # type: ignore[call-overload]
        return SimpleNamespace(wait=lambda: True, is_completed=lambda: True)  # work that was over when it began

    dist.all_to_all_single = stay  # type: ignore[assignment]


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
