"""Sorts what Lightning collects for a checkpoint into tensors that are sharded and objects that rank 0 writes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_ep.checkpoint import optimizers
from lightning_ep.checkpoint.files import META
from lightning_ep.checkpoint.metadata import HEADER, RANKS, header, refuse_sharded_metadata, serialize
from lightning_ep.checkpoint.tensor_files import State
from lightning_ep.layout import ParallelLayout


def pack_directory(
    checkpoint: dict[str, Any],
    module: LightningModule,
    layout: ParallelLayout,
    rank_states: list[dict[str, Any]],
    files: Mapping[str, bytes],
    writes: bool,
) -> tuple[State, dict[str, bytes]]:
    """Returns the tensors in nested dicts and the contents of the other files.

    Args:
        checkpoint: As Lightning dumps it, with the strategy's weights and optimizer states by name.
        module: The module that it describes.
        layout: The layout of this run.
        rank_states: `rank_state` of every rank.
        files: `companion_files` of the run, on the rank that writes.
        writes: Whether this rank writes the other files.
    """
    rest = dict(checkpoint)
    weights = rest.pop("state_dict")
    state: State = {"state_dict": {name: value for name, value in weights.items() if isinstance(value, Tensor)}}
    head = header(module, layout, files)
    head["extra_state"] = {name: value for name, value in weights.items() if not isinstance(value, Tensor)}
    if "optimizer_states" in rest:
        head[optimizers.CLASSES] = optimizers.classes(module.trainer)
        head["optimizers"] = []
        for number, named in enumerate(rest.pop("optimizer_states")):
            tensors, description = optimizers.split(named, module)
            state[f"optimizer_{number}"] = {"state": tensors}
            head["optimizers"].append(description)
    content = {**rest, HEADER: head}
    refuse_sharded_metadata(content)
    return state, {META: serialize(content), RANKS: serialize(rank_states)} if writes else {}


def pack_file(
    checkpoint: dict[str, Any],
    module: LightningModule,
    layout: ParallelLayout,
    rank_states: list[dict[str, Any]],
    files: Mapping[str, bytes],
) -> dict[str, Any]:
    """Returns the contents of a checkpoint in one file, which nobody else changes any more."""
    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    refuse_sharded_metadata(rest)
    tensors: dict[str, Any] = {k: checkpoint[k] for k in ("state_dict", "optimizer_states") if k in checkpoint}
    head = header(module, layout, files)
    if "optimizer_states" in tensors:
        head[optimizers.CLASSES] = optimizers.classes(module.trainer)
        head[optimizers.PARAMETERS] = optimizers.groups_by_name(module.trainer)
    return {**copy.deepcopy(rest), **tensors, HEADER: head, "ranks": rank_states}
