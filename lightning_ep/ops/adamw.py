"""The update of AdamW, for gradients that are multiplied by a number on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ep.ops import kernels
from lightning_ep.ops.rounding import Elements, random_bits_twin, round_stochastically_twin
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


def adamw_rounded_(update: Update, rule: Rule, factor: Tensor | None, elements: Elements) -> None:
    """The same in place for one parameter, computed in fp32, with what is stored in bf16 rounded stochastically.

    Bit for bit a function of the numbers that come in, of ``elements`` and of the step: however a parameter is cut into
    parts, and whatever device computes them, the parts are those of the whole.

    Args:
        update: The parameter and its moments are fp32 or bf16, each for itself.
        rule: See `adamw_`.
        factor: See `adamw_`.
        elements: Which elements of the whole parameter these are, and the key of its random bits.
    """
    if update.param.numel() == 0:
        return
    # Of every size: were small parts left to the twin, a kernel's last bit would depend on the layout.
    if kernels.runs_on(*update) and all(tensor.is_contiguous() for tensor in update):
        from lightning_ep.ops.kernels import adamw as triton_adamw

        triton_adamw.adamw_(*update, factor, *rule, elements)
    else:
        adamw_rounded_twin_(update, rule, factor, elements)


def adamw_rounded_twin_(update: Update, rule: Rule, factor: Tensor | None, elements: Elements) -> None:
    """Defines `adamw_rounded_`."""
    param, grad, exp_avg, exp_avg_sq, step = update
    # Kernels get numbers of the host in fp32, and count steps in fp64.
    lr, (beta1, beta2) = rule.lr, rule.betas
    count = step.double()
    logs = [_fp32(math.log(beta)) if beta > 0 else -math.inf for beta in rule.betas]
    step_size = (_fp32(lr) / (1.0 - torch.exp(count * logs[0]))).float()
    correction = torch.sqrt(1.0 - torch.exp(count * logs[1])).float()
    g = grad.float()
    if factor is not None:
        g = g * factor.float()
    m = exp_avg.float() * beta1 + g * (1 - beta1)
    v = exp_avg_sq.float() * beta2 + g * g * (1 - beta2)
    p = param.float()
    p = p - p * (lr * rule.weight_decay)
    p = p - step_size * (m / (v.sqrt() / correction + rule.eps))
    bits = random_bits_twin(elements, param.numel(), step).view(param.shape)
    for target, exact, shift in ((param, p, 0), (exp_avg, m, 16), (exp_avg_sq, v, 32)):
        in_bf16 = target.dtype == torch.bfloat16
        target.copy_(round_stochastically_twin(exact, bits >> shift) if in_bf16 else exact)


def _fp32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()
