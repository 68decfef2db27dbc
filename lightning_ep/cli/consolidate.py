"""One file from a checkpoint directory, for tools and processes that know nothing of shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_ep.checkpoint import files
from lightning_ep.checkpoint.metadata import HEADER, RANKS, deserialize
from lightning_ep.checkpoint.optimizers import PARAMETERS
from lightning_ep.checkpoint.resume import split_key
from lightning_ep.checkpoint.saved_weights import open_verified
from lightning_ep.checkpoint.tensor_files import WEIGHTS, SafeReader, read_shards
from lightning_ep.hub.errors import CheckpointError


def consolidate(checkpoint: str, output: str, weights_only: bool = True) -> None:
    """Writes a checkpoint directory as one file, which ``load_from_checkpoint`` and any strategy read.

    It needs one process, no GPU, and host memory for all weights and optimizer states.

    Args:
        checkpoint: The directory.
        output: The file to write.
        weights_only: Refuse a checkpoint that holds objects other than tensors and plain values, which may run code.

    Raises:
        CheckpointError: If there is none, or if it is damaged.
    """
    directory = open_verified(Path(checkpoint))
    if not directory.is_dir():
        raise CheckpointError(f"{checkpoint} is one file already.")
    content: dict[str, Any] = deserialize(directory / files.META, weights_only)
    head = content[HEADER]
    reader = SafeReader(directory)
    flat = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in reader.index().items()}
    read_shards(flat, reader, no_dist=True)
    weights = {n.removeprefix(WEIGHTS): value for n, value in flat.items() if n.startswith(WEIGHTS)}
    content["state_dict"] = {**weights, **head.pop("extra_state")}
    if "optimizers" in head:
        descriptions = head.pop("optimizers")
        content["optimizer_states"] = [_numbered(flat, f"optimizer_{i}.state.", d) for i, d in enumerate(descriptions)]
        head[PARAMETERS] = [[group["params"] for group in d["param_groups"]] for d in descriptions]
        content["ranks"] = deserialize(directory / RANKS, weights_only=True)
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = files.hidden(target)
    try:
        with files.ChecksumFile(staged) as file:
            torch.save(content, file)  # type: ignore[arg-type]
        files.publish(staged, target)
    finally:
        files.delete(staged)


def _numbered(flat: dict[str, Any], prefix: str, description: dict[str, Any]) -> dict[str, Any]:
    """Optimizer state as `torch.optim.Optimizer.state_dict` has it."""
    groups = description["param_groups"]
    names = [name for group in groups for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {numbers[name]: dict(v) for name, v in description["values"].items()}
    for full_name, tensor in flat.items():
        if full_name.startswith(prefix):
            name, key = split_key(full_name.removeprefix(prefix))
            state.setdefault(numbers[name], {})[key] = tensor
    return {
        "state": dict(sorted(state.items())),
        "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups],
    }
