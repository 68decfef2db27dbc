"""The update of AdamW, for gradients that are multiplied by a number on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ep.ops import kernels
from lightning_ep.ops.scale import scale_


class Update(NamedTuple):
    """What one parameter's update reads and writes.

    Attributes:
        param: The parameter.
        grad: Its gradient, of any floating-point dtype.
        exp_avg: First moment.
        exp_avg_sq: Second moment.
        step: fp32, 0-dim, on the same device: the number of updates, this one included.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


class Rule(NamedTuple):
    """The numbers of AdamW, as `torch.optim.AdamW` names them."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def adamw_(updates: Sequence[Update], rule: Rule, factor: Tensor | None) -> None:
    """Updates parameters and moments in place (Loshchilov and Hutter, 2019), in fp32 at least.

    Where there are kernels, every large tensor is read and written once: the gradient is multiplied as it is read and
    stays as it was. Other gradients may be multiplied in place.

    Args:
        updates: One per parameter.
        rule: The same for all of them.
        factor: What gradients are multiplied by, 0-dim on their device; None for one.
    """
    rest = []
    for update in updates:
        if kernels.runs_on_large(*update):
            from lightning_ep.ops.kernels import adamw as triton_adamw

            triton_adamw.adamw_(*update, factor, *rule)
        else:
            rest.append(update)
    by_kind: dict[tuple[torch.device, torch.dtype], list[Update]] = {}  # torch's kernel takes one dtype at a time
    for update in rest:
        by_kind.setdefault((update.param.device, update.param.dtype), []).append(update)
    for updates in by_kind.values():
        adamw_twin_(updates, rule, factor)


def adamw_twin_(updates: Sequence[Update], rule: Rule, factor: Tensor | None) -> None:
    """Defines `adamw_`, for parameters of one dtype on one device; few launches for many small tensors."""
    params, grads, exp_avgs, exp_avg_sqs, steps = (list(tensors) for tensors in zip(*updates, strict=True))
    grads = [grad.to(param.dtype) for param, grad in zip(params, grads, strict=True)]
    if factor is not None:
        scale_(grads, factor)
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=rule.lr,
        beta1=rule.betas[0],
        beta2=rule.betas[1],
        weight_decay=rule.weight_decay,
        eps=rule.eps,
        amsgrad=False,
        maximize=False,
    )
