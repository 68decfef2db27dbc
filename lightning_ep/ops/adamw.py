"""The update of AdamW, for gradients that are multiplied by a number on the way."""

from __future__ import annotations

import math
import struct
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


class Numbers(NamedTuple):
    """Those of `Rule` that an update is computed with, each rounded to fp32, as they reach a GPU."""

    lr: float
    decay: float
    log_beta1: float
    log_beta2: float
    beta1: float
    beta2: float
    rest1: float
    rest2: float
    eps: float


class Rule(NamedTuple):
    """The numbers of AdamW, as `torch.optim.AdamW` names them."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    def numbers(self) -> Numbers:
        """What kernels are given."""
        (beta1, beta2), lr = self.betas, self.lr
        logs = [math.log(beta) if beta > 0 else -math.inf for beta in self.betas]
        exact = (lr, lr * self.weight_decay, *logs, beta1, beta2, 1 - beta1, 1 - beta2, self.eps)
        return Numbers(*struct.unpack("9f", struct.pack("9f", *exact)))


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

            triton_adamw.adamw_(*update, factor, rule.numbers())
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

        triton_adamw.adamw_(*update, factor, rule.numbers(), elements)
    else:
        adamw_rounded_twin_(update, rule, factor, elements)


def adamw_rounded_twin_(update: Update, rule: Rule, factor: Tensor | None, elements: Elements) -> None:
    """Defines `adamw_rounded_`."""
    param, grad, exp_avg, exp_avg_sq, step = update
    numbers = rule.numbers()
    count = step.double()
    step_size = (numbers.lr / (1.0 - torch.exp(count * numbers.log_beta1))).float()
    correction = torch.sqrt(1.0 - torch.exp(count * numbers.log_beta2)).float()
    g = grad.float()
    if factor is not None:
        g = g * factor.float()
    m = exp_avg.float() * numbers.beta1 + g * numbers.rest1
    v = exp_avg_sq.float() * numbers.beta2 + g * g * numbers.rest2
    p = param.float()
    p = p - p * numbers.decay
    # One division, where torch has two: the kernel is bound by its arithmetic.
    p = p - step_size * (m / (v.sqrt() * (1.0 / correction) + numbers.eps))
    random_numbers = random_bits_twin(elements, param.numel(), step)
    for target, exact, bits in zip((param, exp_avg, exp_avg_sq), (p, m, v), random_numbers, strict=True):
        if target.dtype == torch.bfloat16:
            bits = bits.view(param.shape).masked_fill(p.isnan(), 0)  # NaN, of moments too, must not carry
            exact = round_stochastically_twin(exact, bits)
        target.copy_(exact)
