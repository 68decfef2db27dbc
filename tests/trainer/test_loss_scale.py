"""What a loss is divided by: means by the ranks, sums by nothing before their gradients are divided by the terms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_ep import ParallelLayout
from lightning_ep.trainer.loss_scale import at_step, denominator_of, into_backward, mean_of_sum

LAYOUT = ParallelLayout(6, ep=3, fsdp=2)


class _Sums(LightningModule):
    def gradient_denominator(self) -> Tensor:
        return torch.tensor(8.0)


class _SumsSometimes(LightningModule):
    sums = False

    @property
    def gradient_denominator(self) -> Callable[[], Tensor] | None:
        return (lambda: torch.tensor(4.0)) if self.sums else None


def test_a_module_says_whether_it_sums() -> None:
    sometimes = _SumsSometimes()
    assert [denominator_of(module) for module in (LightningModule(), sometimes)] == [None, None]
    assert at_step(sometimes) is None
    sometimes.sums = True
    assert [at_step(module) for module in (_Sums(), sometimes)] == [0.125, 0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_mean(dtype: torch.dtype) -> None:
    accumulated = 3
    x = torch.tensor(1.0, dtype=dtype, requires_grad=True)
    sums = into_backward(x / accumulated, _Sums(), LAYOUT, accumulated)
    assert torch.autograd.grad(sums, x)[0] == 1  # exactly, in bf16 too: the terms divide the gradients
    means = into_backward(x / accumulated, LightningModule(), LAYOUT, accumulated)
    assert torch.autograd.grad(means, x)[0].item() == pytest.approx(
        1 / 18, rel=1e-6 if dtype == torch.float32 else 1e-2
    )


def test_a_sum_whose_terms_are_known_is_a_mean_before_backward() -> None:
    losses, terms = torch.rand(LAYOUT.world_size), torch.tensor(40.0)
    scaled = [into_backward(mean_of_sum(loss, terms, LAYOUT), LightningModule(), LAYOUT, 1) for loss in losses]
    assert sum(scaled).item() == pytest.approx((losses.sum() / terms).item(), rel=1e-6)
