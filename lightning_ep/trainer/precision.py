"""Precision of sharded models, and gradient clipping that is exact across meshes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins.precision.utils import _convert_fp_tensor, _DtypeContextManager
from lightning.fabric.utilities.types import Steppable
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ep.distributed.shards import local_tensor
from lightning_ep.fsdp.accumulation import reduce_kept_gradients
from lightning_ep.fsdp.passes import release_gathered
from lightning_ep.moe.master_weights import widen_gradient
from lightning_ep.ops.norm import sum_of_squares
from lightning_ep.ops.scale import scale_
from lightning_ep.trainer.adamw import AdamW

ShardedPrecisionName = Literal["32-true", "bf16-mixed", "bf16-true"]
_SHARDED_WITH = "_lightning_ep_precision"  # attribute of a module


class ShardedPrecision(Precision):
    """Precision of a model under FSDP2: dtypes of shards, compute and reduction, and the scaling of gradients.

    ======================  ============  =========  =====================
    ``precision``           shards        compute    gradient reduction
    ======================  ============  =========  =====================
    ``"32-true"``           fp32          fp32       fp32
    ``"bf16-mixed"``        fp32          bf16       fp32 (FSDP2's policy, not autocast)
    ``"bf16-true"``         bf16          bf16       fp32, stored as bf16
    ======================  ============  =========  =====================

    Buffers keep their dtype: rotary frequencies in bf16 would be wrong by whole turns at position 1024.

    Args:
        precision: One of the names above.

    Raises:
        ValueError: For any other precision, naming the choices.
    """

    def __init__(self, precision: ShardedPrecisionName = "32-true") -> None:
        if precision not in ("32-true", "bf16-mixed", "bf16-true"):
            raise ValueError(
                f"precision={precision!r} is not supported by ExpertParallelStrategy; choose '32-true', 'bf16-mixed' "
                "or 'bf16-true'. fp16 needs loss scaling across meshes, which does not exist yet; bf16 has fp32's "
                "range and needs none."
            )
        self.precision = precision
        self.param_dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32

    @property
    def mp_policy(self) -> MixedPrecisionPolicy:
        """FSDP2's policy."""
        if self.precision == "32-true":
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def note_sharded(self, module: nn.Module) -> None:
        """Remembers on a module that it was sharded with this precision."""
        setattr(module, _SHARDED_WITH, self.precision)

    def check_sharded(self, module: nn.Module) -> None:
        """Raises ValueError if a module was sharded with another precision, which cannot be changed any more."""
        found = getattr(module, _SHARDED_WITH, self.precision)
        if found != self.precision:
            raise ValueError(
                f"{type(module).__name__} was sharded with precision={found!r} by an earlier run, and this Trainer has "
                f"precision={self.precision!r}. Pass the same, or build the module anew (a checkpoint loads with any)."
            )

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        for param in module.parameters():
            if param.is_floating_point() and param.dtype != self.param_dtype:
                param.data = param.data.to(self.param_dtype)
        return module

    @override
    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return _DtypeContextManager(self.param_dtype)

    @override
    def module_init_context(self) -> AbstractContextManager[Any]:
        return self.tensor_init_context()

    @override
    def convert_input(self, data: Any) -> Any:
        if self.precision != "bf16-true":
            return data
        return apply_to_collection(data, function=_convert_fp_tensor, dtype=Tensor, dst_type=self.param_dtype)

    @override
    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: LightningModule, optimizer: Steppable | None, *args: Any, **kwargs: Any
    ) -> None:
        # Gradients are sums over all ranks, tensor-parallel peers included; the mean of the losses enters backward
        # here, once. Of sums Lightning has taken a mean over the window already.
        trainer = model.trainer
        if gradient_denominator(model) is None:
            tensor = tensor / trainer.strategy.layout.loss_world_size  # type: ignore[attr-defined]
        else:
            tensor = tensor * trainer.accumulate_grad_batches
        try:
            super().backward(tensor, model, optimizer, *args, **kwargs)
        except BaseException:
            release_gathered(model)
            raise

    @override
    def _after_closure(self, model: LightningModule, optimizer: Steppable) -> None:
        # Before on_before_optimizer_step, so that callbacks and clipping see the gradients of the step.
        if model.trainer.accumulate_grad_batches > 1 or not model.automatic_optimization:
            reduce_kept_gradients(model)
        denominator = gradient_denominator(model)
        if denominator is not None:
            scale_gradients(self.main_params(optimizer), 1 / denominator())  # type: ignore[arg-type]
        super()._after_closure(model, optimizer)

    @override
    def _clip_gradients(
        self,
        model: LightningModule | nn.Module,
        optimizer: Steppable,
        clip_val: int | float | None = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        # Where nothing of the user's runs between this and the update, the step may do it. Elsewhere something may
        # look at the clipped gradients, clip them once more or add to them.
        theirs = any(is_overridden(name, model) for name in ("configure_gradient_clipping", "clip_gradients"))
        by_norm = clip_val is not None and clip_val > 0 and gradient_clip_algorithm != "value"
        if by_norm and not theirs and model.automatic_optimization:
            clip_in_step_(optimizer, clip_val)  # type: ignore[arg-type]
        else:
            super()._clip_gradients(model, optimizer, clip_val, gradient_clip_algorithm)

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        clip_grad_norm_(self.main_params(optimizer), clip_val)

    @override
    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        params = list(self.main_params(optimizer))
        for param in params:
            widen_gradient(param)
        grads = _local_gradients(params)
        if grads:
            torch._foreach_clamp_min_(grads, -clip_val)
            torch._foreach_clamp_max_(grads, clip_val)


def gradient_denominator(model: LightningModule) -> Callable[[], Tensor] | None:
    """The module's ``gradient_denominator`` method, if it has one.

    A LightningModule that returns *sums* as losses defines ``gradient_denominator() -> Tensor``: called once per
    optimizer step, on every rank, it returns the global number of summed terms in the accumulation window, by which
    the strategy divides the gradients. Modules without it return means, as Lightning expects; so do those in which it
    is a property that is None in that step.
    """
    return getattr(model, "gradient_denominator", None)


def _local_gradients(params: Iterable[Tensor]) -> list[Tensor]:
    local = [local_tensor(param.grad) for param in params if param.grad is not None]
    return [grad for grad in local if grad.numel() > 0]


@torch.no_grad()
def scale_gradients(params: Iterable[Tensor], factor: Tensor) -> None:
    """Multiplies every gradient in place by a number, a 0-dim tensor on their device."""
    params = list(params)
    for param in params:
        widen_gradient(param)
    grads = _local_gradients(params)
    if grads:
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
