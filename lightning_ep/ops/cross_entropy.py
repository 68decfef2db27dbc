"""Cross entropy of a linear head that never holds all logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_ep.ops import kernels
from lightning_ep.ops.scale import scale_, scaled

IGNORE = -100
"""Label of a token that is no target, as in torch and transformers."""

_CHUNK = 4096  # tokens; 1.2 GiB of bf16 logits at a vocabulary of 152k, and GEMMs at full speed


def shifted(labels_BS: Tensor) -> Tensor:
    """The target of every position: the next label, and none for the last position."""
    return F.pad(labels_BS[:, 1:], (0, 1), value=IGNORE)


@dataclass(frozen=True)
class VocabularyShard:
    """Which classes a weight holds, where several share them (Megatron-LM, Shoeybi et al., 2019).

    Attributes:
        start: The first class of this shard.
        gather: Stacks a tensor of every shard, ``[...]`` to ``[num_shards, ...]``, on all of them.
    """

    start: int
    gather: Callable[[Tensor], Tensor]


def linear_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    ignore_index: int = IGNORE,
    shard: VocabularyShard | None = None,
    per_token: bool = False,
) -> Tensor:
    """Sum over tokens of the cross entropy of ``hidden @ weight.T``, in fp32.

    Logits exist for one chunk of tokens at a time; their gradient takes their place in the forward already, and with
    it those of ``hidden`` and ``weight`` are accumulated, so that backward only scales them (as in Liger kernel, Hsu et
    al., 2024). The weight's is accumulated in fp32.

    Args:
        hidden_TH: ``[T, H]``.
        weight_VH: ``[V, H]``, in the dtype of ``hidden_TH``.
        targets_T: int64 ``[T]``, class of each token, or ``ignore_index``. Any other number raises RuntimeError on a
            CPU and makes the loss and the gradients NaN on a GPU.
        ignore_index: Tokens with this target add nothing.
        shard: The weight is one of several shards of the classes, and all of them call this function with the same
            tokens. Numbers that are no class make the loss NaN on every device then.
        per_token: Return every token's cross entropy in place of their sum, for a weight that is not trained: its
            gradient could not be made before those of the tokens are known.

    Returns:
        0-dim fp32 tensor (float64 for float64 inputs), or ``[T]`` if ``per_token``; the same from every shard. The
        gradient of ``hidden_TH`` is this shard's part of a sum over the shards.

    Raises:
        ValueError: If losses of tokens are asked for, and the weight wants a gradient.
    """
    gradients = (torch.is_grad_enabled() and (hidden_TH.requires_grad, weight_VH.requires_grad)) or (False, False)
    if per_token and gradients[1]:
        raise ValueError("linear_cross_entropy has no gradient of a weight for losses of single tokens: freeze it.")
    return _LinearCrossEntropy.apply(hidden_TH, weight_VH, targets_T, ignore_index, gradients, shard, per_token)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets_T: Tensor,
        ignore_index: int,
        gradients: tuple[bool, bool],
        shard: VocabularyShard | None,
        per_token: bool,
    ) -> Tensor:
        of_hidden, of_weight = gradients
        accumulate = torch.promote_types(hidden_TH.dtype, torch.float32)
        losses_T = torch.empty(hidden_TH.shape[0], dtype=accumulate, device=hidden_TH.device)
        grad_TH = torch.empty_like(hidden_TH) if of_hidden else None
        grad_VH = torch.empty_like(weight_VH, dtype=accumulate) if of_weight else None
        num_tokens = hidden_TH.shape[0]
        buffer_CV = hidden_TH.new_empty(min(num_tokens, _CHUNK), weight_VH.shape[0])  # one, for all chunks
        for start in range(0, num_tokens, _CHUNK):
            part = slice(start, min(start + _CHUNK, num_tokens))
            logits_CV = torch.mm(hidden_TH[part], weight_VH.t(), out=buffer_CV[: part.stop - start])
            if shard is None:
                cross_entropy_(logits_CV, targets_T[part], losses_T[part], ignore_index, of_hidden or of_weight)
            else:
                _sharded(logits_CV, targets_T[part], losses_T[part], ignore_index, of_hidden or of_weight, shard)
            if grad_TH is not None:
                torch.mm(logits_CV, weight_VH, out=grad_TH[part])
            if grad_VH is not None:
                _accumulate_outer(grad_VH, logits_CV, hidden_TH[part], first=start == 0)
        if grad_VH is not None and num_tokens == 0:
            grad_VH.zero_()
        ctx.grads, ctx.weight_dtype = (grad_TH, grad_VH), weight_VH.dtype
        return losses_T if per_token else losses_T.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("Trying to run backward through linear_cross_entropy a second time.")
        (grad_TH, grad_VH), ctx.grads = ctx.grads, None
        if grad_TH is not None and grad.ndim == 0:
            scale_([grad_TH], grad)
        elif grad_TH is not None:
            grad_TH.mul_(grad.unsqueeze(1))  # a token's loss depends on its own row only
        if grad_VH is not None and grad_VH.dtype == ctx.weight_dtype:
            scale_([grad_VH], grad)
        elif grad_VH is not None:
            grad_VH = scaled(grad_VH, grad, ctx.weight_dtype)
        return grad_TH, grad_VH, None, None, None, None, None


def _accumulate_outer(out_VH: Tensor, x_CV: Tensor, y_CH: Tensor, first: bool) -> None:
    """``out += x.T @ y``, or ``out = x.T @ y`` the ``first`` time, accumulated in the dtype of ``out``."""
    beta = 0 if first else 1  # zero reads nothing
    if out_VH.dtype == x_CV.dtype:
        out_VH.addmm_(x_CV.t(), y_CH, beta=beta)
    elif out_VH.is_cuda:
        torch.addmm(out_VH, x_CV.t(), y_CH, out_dtype=out_VH.dtype, beta=beta, out=out_VH)
    else:
        out_VH.addmm_(x_CV.t().to(out_VH.dtype), y_CH.to(out_VH.dtype), beta=beta)


def cross_entropy_(logits_TV: Tensor, targets_T: Tensor, losses_T: Tensor, ignore_index: int, gradient: bool) -> None:
    """Writes the losses of rows of logits, computed in at least fp32, and puts their gradient in the logits' place.

    Args:
        logits_TV: ``[T, V]``, overwritten if ``gradient``.
        targets_T: int64 ``[T]``.
        losses_T: ``[T]``, written; zero where the target is ``ignore_index``.
        ignore_index: Such tokens have no loss and a zero gradient.
        gradient: Whether to write the gradient of the sum of the losses.
    """
    if kernels.runs_on(logits_TV):
        from lightning_ep.ops.kernels import cross_entropy as triton_cross_entropy

        triton_cross_entropy.cross_entropy_(logits_TV, targets_T, losses_T, ignore_index, gradient)
    else:
        cross_entropy_twin_(logits_TV, targets_T, losses_T, ignore_index, gradient)


def cross_entropy_twin_(
    logits_TV: Tensor, targets_T: Tensor, losses_T: Tensor, ignore_index: int, gradient: bool
) -> None:
    """Defines `cross_entropy_`, in PyTorch."""
    log_probs_TV = torch.log_softmax(logits_TV.to(losses_T.dtype), dim=1)
    ignored_T1 = (targets_T == ignore_index).unsqueeze(1)
    index_T1 = targets_T.unsqueeze(1).masked_fill(ignored_T1, 0)
    losses_T.copy_(log_probs_TV.gather(1, index_T1).neg().masked_fill(ignored_T1, 0).squeeze(1))
    if gradient:
        one_hot_TV = torch.zeros_like(log_probs_TV).scatter_(1, index_T1, 1)
        logits_TV.copy_((log_probs_TV.exp() - one_hot_TV).masked_fill(ignored_T1, 0))


def _sharded(
    logits_TV: Tensor, targets_T: Tensor, losses_T: Tensor, ignore_index: int, gradient: bool, shard: VocabularyShard
) -> None:
    """`cross_entropy_` for the logits of one shard of the classes, with one exchange of three numbers per token."""
    ignored_T, own_T = targets_T == ignore_index, targets_T - shard.start
    own_T = own_T.masked_fill(ignored_T, -1)
    largest_ST, total_ST, chosen_ST = shard.gather(softmax_statistics(logits_TV, own_T, losses_T.dtype)).unbind(1)
    largest_T = largest_ST.amax(0)
    normalizer_T = largest_T + (total_ST * (largest_ST - largest_T).exp()).sum(0).log()
    chosen_T = chosen_ST.amax(0)
    # A target that no shard has: nothing can be raised here without waiting for the device.
    normalizer_T = normalizer_T.masked_fill(chosen_T.isneginf() & ~ignored_T, torch.nan)
    losses_T.copy_((normalizer_T - chosen_T).masked_fill(ignored_T, 0))
    if gradient:
        softmax_gradient_(logits_TV, own_T, normalizer_T.masked_fill(ignored_T, torch.inf))


def softmax_statistics(logits_TV: Tensor, targets_T: Tensor, dtype: torch.dtype) -> Tensor:
    """What other shards of the classes need to know of these logits.

    Args:
        logits_TV: ``[T, V]``.
        targets_T: int64 ``[T]``; numbers outside of 0 to V - 1 are classes of other shards, or none.
        dtype: At least fp32, in which it is computed.

    Returns:
        ``[3, T]``: per row the largest logit, the sum of exp(logit - largest), and the target's logit, -inf if it is
        not here.
    """
    if kernels.runs_on(logits_TV):
        from lightning_ep.ops.kernels import cross_entropy as triton_cross_entropy

        return triton_cross_entropy.softmax_statistics(logits_TV, targets_T)
    return softmax_statistics_twin(logits_TV, targets_T, dtype)


def softmax_statistics_twin(logits_TV: Tensor, targets_T: Tensor, dtype: torch.dtype) -> Tensor:
    """Defines `softmax_statistics`, in PyTorch."""
    x_TV = logits_TV.to(dtype)
    largest_T = x_TV.amax(1)
    here_T = (targets_T >= 0) & (targets_T < x_TV.shape[1])
    chosen_T = x_TV.gather(1, targets_T.where(here_T, 0).unsqueeze(1)).squeeze(1).masked_fill(~here_T, -torch.inf)
    return torch.stack([largest_T, (x_TV - largest_T.unsqueeze(1)).exp().sum(1), chosen_T])


def softmax_gradient_(logits_TV: Tensor, targets_T: Tensor, normalizer_T: Tensor) -> None:
    """Replaces logits by exp(logit - normalizer), minus one at the target.

    Args:
        logits_TV: ``[T, V]``, overwritten.
        targets_T: As in `softmax_statistics`.
        normalizer_T: ``[T]`` in at least fp32: the logarithm of the sum of exp(logit) over all classes; inf makes the
            row zero.
    """
    if kernels.runs_on(logits_TV):
        from lightning_ep.ops.kernels import cross_entropy as triton_cross_entropy

        triton_cross_entropy.softmax_gradient_(logits_TV, targets_T, normalizer_T)
    else:
        softmax_gradient_twin_(logits_TV, targets_T, normalizer_T)


def softmax_gradient_twin_(logits_TV: Tensor, targets_T: Tensor, normalizer_T: Tensor) -> None:
    """Defines `softmax_gradient_`, in PyTorch."""
    probs_TV = (logits_TV.to(normalizer_T.dtype) - normalizer_T.unsqueeze(1)).exp()
    classes_V = torch.arange(logits_TV.shape[1], device=logits_TV.device)
    logits_TV.copy_(probs_TV - (classes_V == targets_T.unsqueeze(1)).to(probs_TV.dtype))
