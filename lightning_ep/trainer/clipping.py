"""Norms and scaling of gradients that are exact across meshes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.optim import Optimizer

from lightning_ep.distributed.shards import local_tensor
from lightning_ep.moe.master_weights import widen_gradient
from lightning_ep.ops.norm import sum_of_squares
from lightning_ep.ops.scale import scale_
from lightning_ep.trainer.adamw import AdamW


def _local_gradients(params: Iterable[Tensor]) -> list[Tensor]:
    """This rank's parts of the gradients that there are, those without elements left out."""
    local = [local_tensor(param.grad) for param in params if param.grad is not None]
    return [grad for grad in local if grad.numel() > 0]


def _widened_gradients(params: Iterable[Tensor]) -> list[Tensor]:
    """The same in their parameters' dtypes, to be changed in place."""
    params = list(params)
    for param in params:
        widen_gradient(param)
    return _local_gradients(params)


@torch.no_grad()
def scale_gradients(params: Iterable[Tensor], factor: Tensor) -> None:
    """Multiplies every gradient in place by a number, a 0-dim tensor on their device."""
    if grads := _widened_gradients(params):
        scale_(grads, factor)


def _replicas(grad: Tensor, known: dict[Any, int]) -> int:
    """How many ranks hold the same elements as this one; asked once for each kind of placement."""
    key = (id(grad.device_mesh), grad.placements) if isinstance(grad, DTensor) else None
    if key not in known:
        known[key] = _count_replicas(grad)
    return known[key]


def _count_replicas(grad: Tensor) -> int:
    world = dist.get_world_size() if dist.is_initialized() else 1
    if not isinstance(grad, DTensor):
        return world
    if any(isinstance(placement, Partial) for placement in grad.placements):
        raise RuntimeError(f"a gradient with placements {grad.placements} has not been reduced yet.")
    sizes = zip(grad.device_mesh.shape, grad.placements, strict=True)
    # Not the product over replicated dimensions: the mesh need not have all ranks (tensor-parallel peers of a norm).
    return world // math.prod(size for size, placement in sizes if not isinstance(placement, Replicate))


@torch.no_grad()
def global_grad_norm(params: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """Norm of all gradients as if they were one vector, over parameters on any number of meshes.

    Every rank must call it, also one that holds no gradient. Unlike `torch.nn.utils.get_total_norm` it needs no common
    mesh: each rank sums its own elements, weighted by one over their copies, and one all-reduce adds the ranks.

    Args:
        params: Parameters; those without a gradient count as zero.
        norm_type: The p of the p-norm, ``inf`` included.

    Returns:
        0-dim fp32 tensor on the parameters' device, the same on every rank; not finite if any gradient is not.
    """
    params = list(params)
    device = params[0].device if params else torch.device("cpu")
    # By dtype too: torch's fast norms are of one.
    groups: dict[tuple[int, str], list[Tensor]] = {}
    known: dict[Any, int] = {}
    for param in params:
        if param.grad is not None:
            groups.setdefault((_replicas(param.grad, known), str(param.grad.dtype)), []).append(param)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for (replicas, _), group in sorted(groups.items()):
        grads = _local_gradients(group)
        if not grads:
            continue
        if norm_type == 2.0:
            total += sum_of_squares(grads) / replicas
            continue
        dtype = torch.promote_types(grads[0].dtype, torch.float32)
        norms = torch.stack(torch._foreach_norm(grads, norm_type, dtype=dtype)).double()
        if math.isinf(norm_type):
            # Backends differ in what the larger of NaN and a number is.
            total = torch.maximum(total, norms.max().nan_to_num(nan=math.inf, posinf=math.inf))
        else:
            total += norms.pow(norm_type).sum() / replicas
    if dist.is_initialized():
        dist.all_reduce(total, op=dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM)
    return (total if math.isinf(norm_type) else total.pow(1.0 / norm_type)).float()


@torch.no_grad()
def clip_grad_norm_(
    params: Iterable[Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Scales gradients in place so that their global norm is at most ``max_norm``.

    As `torch.nn.utils.clip_grad_norm_`, for parameters on different meshes. Every rank must call it.

    Args:
        params: Parameters, DTensors on any meshes.
        max_norm: The bound; ``inf`` only computes the norm.
        norm_type: The p of the p-norm.
        error_if_nonfinite: Raise instead of spreading a non-finite norm (on all ranks alike).

    Returns:
        The norm before clipping, a 0-dim fp32 tensor, the same on every rank.

    Raises:
        RuntimeError: If ``error_if_nonfinite`` and the norm is not finite.
    """
    params = list(params)
    norm = global_grad_norm(params, norm_type)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(
            f"the gradient norm of order {norm_type} is {norm.item()}, so gradients cannot be clipped; look for the "
            "step's loss, or pass error_if_nonfinite=False to go on."
        )
    if not math.isinf(max_norm):
        scale_gradients(params, _clip_factor(norm, max_norm))
    return norm


@torch.no_grad()
def clip_in_step_(optimizer: Optimizer, max_norm: float) -> Tensor:
    """`clip_grad_norm_` of all parameters of an optimizer whose step follows, with nothing in between.

    `lightning_ep.AdamW` scales gradients as its step reads them: until then they are not clipped.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if not isinstance(optimizer, AdamW) or math.isinf(max_norm):
        return clip_grad_norm_(params, max_norm)
    norm = global_grad_norm(params)
    optimizer.multiply_gradients(_clip_factor(norm, max_norm))
    return norm


def _clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def clip_grad_value_(params: Iterable[Tensor], bound: float) -> None:
    """Clamps every element of the gradients to ``[-bound, bound]``, in place."""
    if grads := _widened_gradients(params):
        torch._foreach_clamp_min_(grads, -bound)
        torch._foreach_clamp_max_(grads, bound)


def norms_of_gradients(module: nn.Module, norm_type: float | str, group_separator: str) -> dict[str, Tensor]:
    """What `lightning.pytorch.utilities.grad_norm` returns; where gradients are shards, every rank must call it.

    Raises:
        ValueError: If ``norm_type`` is not positive.
    """
    norm_type = float(norm_type)
    if norm_type <= 0:
        raise ValueError(f"`norm_type` must be a positive number or 'inf' (infinity norm). Got {norm_type}")
    norms = {
        f"grad_{norm_type}_norm{group_separator}{name}": _norm(param.grad.detach(), norm_type)
        for name, param in module.named_parameters()
        if param.grad is not None
    }
    if norms:
        norms[f"grad_{norm_type}_norm_total"] = torch.stack(list(norms.values())).norm(norm_type)
    return norms


def _norm(grad: Tensor, norm_type: float) -> Tensor:
    norm = grad.float().norm(norm_type)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
