"""The command ``lightning-ep perplexity``: how well a trained model predicts a text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from lightning_ep.cli.generation import model_length
from lightning_ep.cli.opened import Opened, opened
from lightning_ep.data.conversations import half_of_a_character
from lightning_ep.data.corpus import read_text
from lightning_ep.loss import summed_loss
from lightning_ep.ops.cross_entropy import IGNORE, shifted


def perplexity(
    checkpoint: str,
    file: str,
    sequence_length: int | None = None,
    **opening: Any,
) -> None:
    """Prints a model's perplexity on a file: the exponential of the mean loss of all its tokens.

    Every document is tokenized as the tokenizer does it, and every token but its first is predicted once, from what is
    before it in its window. Windows follow one another with one token in common. Under torchrun the model is sharded
    over all processes: torchrun --nproc-per-node 8 -m lightning_ep perplexity ...

    Args:
        checkpoint: A training checkpoint, a directory in the hub's layout (an export), or the id of a model on the hub.
        file: A text file, which is one document, or JSON lines (.jsonl) with one document each under "text".
        sequence_length: Tokens of a window. Default: the positions that the model was made for.
        **opening: Options of `opened`.

    Raises:
        ValueError: If the file is not as described, or has no token to predict.
        CheckpointError: If there is no such checkpoint, it is damaged, or it has no tokenizer.
    """
    if sequence_length is not None and sequence_length < 2:
        raise ValueError(f"sequence_length={sequence_length} must be at least 2: a token, and one to predict from it.")
    documents = read_documents(Path(file))
    with opened(checkpoint, **opening) as found:
        length = sequence_length or model_length(found.model.config)
        if math.isinf(length):
            raise ValueError("the model's configuration does not say how long its sequences are: --sequence_length.")
        loss, tokens = mean_loss(found, documents, int(length))
        if found.rank == 0:
            print(
                f"perplexity {math.exp(loss):.7g}, loss {loss:.7g} nats per token: {tokens:,} tokens of "
                f"{len(documents):,} document{'s' if len(documents) > 1 else ''} in windows of {length:,}"
            )


def read_documents(path: Path) -> list[str]:
    """The texts of a file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line of JSON lines is none with a "text"; names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    content = read_text(path)
    if path.suffix not in (".jsonl", ".ndjson"):
        return [content]
    documents = []
    # Not `splitlines`: it also cuts at separators that JSON allows inside of strings.
    for number, line in enumerate(content.removeprefix("\ufeff").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}.") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f'{path}, line {number}: a document is an object with "text".')
        if problem := half_of_a_character(row["text"]):
            raise ValueError(f"{path}, line {number}: {problem}")
        documents.append(row["text"])
    return documents


def windows_of(ids: Sequence[int], length: int) -> list[Sequence[int]]:
    """Windows in which every token but the first is predicted once: each begins with the last token before."""
    return [ids[start : start + length] for start in range(0, len(ids) - 1, length - 1)]


def batches_of(windows: Iterable[Sequence[int]], length: int) -> list[list[Sequence[int]]]:
    """Batches of windows of like lengths, the longest first, each of at most ``length`` tokens with its padding."""
    batches: list[list[Sequence[int]]] = []
    for window in sorted(windows, key=len, reverse=True):
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0]) <= length:
            batches[-1].append(window)
        else:
            batches.append([window])
    return batches


@torch.no_grad()
def mean_loss(found: Opened, documents: Sequence[str], length: int) -> tuple[float, int]:
    """The mean loss in nats over all predicted tokens, and their number; every rank must call it.

    Raises:
        ValueError: If there are none.
    """
    ids = [found.tokenizer(text, verbose=False)["input_ids"] for text in documents]
    batches = batches_of([window for document in ids for window in windows_of(document, length)], length)
    if not batches:
        raise ValueError("no document has two tokens, so that there is none to predict.")
    ranks = found.layout.data_world_size
    mine = batches[found.layout.data_rank(found.rank) :: ranks]
    sums = torch.zeros(2, dtype=torch.float64, device=found.device)
    for step in tqdm(range(math.ceil(len(batches) / ranks)), "perplexity", leave=False, disable=found.rank != 0):
        # A rank without a batch of its own takes part for its experts, with one of which nothing is counted.
        ids_BS, targets_BS = _tensors(mine[step] if step < len(mine) else batches[-1], found.device)
        if step >= len(mine):
            targets_BS = torch.full_like(targets_BS, IGNORE)
        loss, _ = summed_loss(found.model, targets_BS, {"input_ids": ids_BS})
        sums += torch.stack([loss.double(), (targets_BS != IGNORE).sum().double()])
    dist.all_reduce(sums)
    # Ranks of `tp` have counted the same tokens, as often in both sums.
    return (sums[0] / sums[1]).item(), int(sums[1].item()) // (found.layout.world_size // ranks)


def _tensors(windows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and targets, int64 ``[B, S]`` each. Padding is behind, where causal attention does not see it."""
    size = len(windows[0])
    ids_BS = torch.zeros(len(windows), size, dtype=torch.int64)
    labels_BS = torch.full((len(windows), size), IGNORE)
    for row, window in enumerate(windows):
        ids_BS[row, : len(window)] = labels_BS[row, : len(window)] = torch.tensor(window)
    return ids_BS.to(device), shifted(labels_BS).to(device)
