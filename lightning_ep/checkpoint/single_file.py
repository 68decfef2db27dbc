"""Checkpoints in one file: rank 0 writes full tensors, every rank reads its part of them."""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_ep.checkpoint.optimizers import BUILD_THE_SAME_GROUPS, continued_groups
from lightning_ep.distributed.shards import local_region, local_tensor
from lightning_ep.hub.errors import CheckpointError


def gather(tensors: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    """Full copies on the CPU, one at a time; every rank must call it.

    Args:
        tensors: Tensors, sharded or not, and other values.
        keep: Whether this rank gets them; the others get nothing.
    """
    full = {}
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            value = whole.detach().to("cpu", copy=True) if keep else None
        if keep:
            full[name] = value
    return full


def gather_optimizer(optimizer: Optimizer, keep: bool) -> dict[str, Any]:
    """``optimizer.state_dict()`` with full tensors, as an optimizer on one process has it; every rank must call it."""
    state = optimizer.state_dict()
    full = {number: gather(values, keep) for number, values in state["state"].items()}
    # A copy: training may go on before it is written, and a learning rate may be a tensor.
    return {"state": full, "param_groups": copy.deepcopy(state["param_groups"])} if keep else {}


def check_file(path: Path) -> None:
    """Reads a file in full and raises CheckpointError if it is not as it was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {error}. Use another checkpoint.") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: {damaged} in it has the wrong checksum. Use another checkpoint.")


@torch.no_grad()
def fill(target: Tensor, full: Tensor) -> None:
    """Copies this rank's part of a full tensor."""
    local_tensor(target).copy_(local_region(target).of(full))


def load_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Gives an optimizer the state that `gather_optimizer` returned, sharded as its parameters are now.

    Raises:
        CheckpointError: If the optimizer holds other parameters.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    counts = [len(group["params"]) for group in saved["param_groups"]]
    held = [len(group["params"]) for group in optimizer.param_groups]
    if counts != held:
        raise CheckpointError(
            f"{type(optimizer).__name__} has groups of {held} parameters, the checkpoint of {counts}. "
            f"{BUILD_THE_SAME_GROUPS}"
        )
    state = {}
    for number, values in saved["state"].items():
        param = params[number].detach()
        state[number] = {key: _like(value, param) for key, value in values.items()}
    optimizer.load_state_dict({"state": state, "param_groups": continued_groups(optimizer, saved["param_groups"])})


def _like(value: Any, param: Tensor) -> Any:
    if not isinstance(value, Tensor) or not isinstance(param, DTensor) or value.shape != param.shape or param.ndim == 0:
        return value.clone() if isinstance(value, Tensor) else value
    shard = torch.empty_like(param, dtype=value.dtype)
    fill(shard, value)
    return shard
