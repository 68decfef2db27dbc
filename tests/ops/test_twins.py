"""What the PyTorch twins promise of rounding, in float64: kernels are compared with them, and CPUs run them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ep.ops.activation import activate_backward_twin, activate_twin
from lightning_ep.ops.cross_entropy import cross_entropy_twin_, softmax_gradient_twin_, softmax_statistics_twin
from lightning_ep.ops.expert_form import Activation, ExpertBias
from lightning_ep.ops.grouped_mm import grouped_mm_twin
from lightning_ep.ops.low_rank import outer_twin_, project_twin
from lightning_ep.ops.norm import sum_of_squares_twin
from lightning_ep.ops.permute import gather_sum_twin
from tests.reference import relative_error

_ONE_ROUNDING = 2.0**-8  # of bf16, relative


def _rounded_once(found: Tensor, exact: Tensor) -> bool:
    assert found.dtype == torch.bfloat16
    return bool(((found.double() - exact).abs() <= 1.01 * _ONE_ROUNDING * exact.abs() + 1e-6).all())


def test_rows_in_bf16_are_summed_in_fp32() -> None:
    rows = torch.tensor([[256.0], [1.0]]).bfloat16()
    assert rows[0] + rows[1] == 256, "one after the other, in bf16, the small ones are lost"
    places = torch.tensor([[0, 1, 1], [1, -1, 0]])
    assert gather_sum_twin(rows, places, torch.bfloat16).tolist() == [[258.0], [256.0]]
    assert gather_sum_twin(rows, places, torch.float32).tolist() == [[258.0], [257.0]]


# What some family has, by its names: SwiGLU, DeepSeek-V4's, Gemma 4's, gpt-oss's, Nemotron-H's.
ACTIVATIONS: dict[str, tuple[Activation, bool, Callable[[Tensor, Tensor], Tensor]]] = {
    "swiglu": (Activation(), False, lambda gate, up: F.silu(gate) * up),
    "clamped": (Activation(limit=1.0), False, lambda gate, up: F.silu(gate.clamp(max=1.0)) * up.clamp(-1.0, 1.0)),
    "geglu": (Activation("gelu_tanh"), False, lambda gate, up: F.gelu(gate, approximate="tanh") * up),
    "gpt_oss": (
        Activation(interleaved=True, alpha=1.702, limit=1.0, up_offset=1.0),
        True,
        lambda gate, up: (c := gate.clamp(max=1.0)) * torch.sigmoid(1.702 * c) * (up.clamp(-1.0, 1.0) + 1),
    ),
    "relu2": (Activation("relu2", gated=False), True, lambda x, _: F.relu(x).square()),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_in_bf16_are_rounded_once(name: str) -> None:
    how, biased, function = ACTIVATIONS[name]
    generator = torch.Generator().manual_seed(0)
    widths = (32 if how.gated else 16, 16)
    h_PF, grad_PI = (torch.randn(64, width, generator=generator).bfloat16() for width in widths)
    weights_NK, slot_P = torch.rand(40, 2, generator=generator), torch.randperm(80, generator=generator)[:64].int()
    ids_NK, bias_EF = torch.randint(0, 3, (40, 2), generator=generator), torch.randn(3, widths[0], generator=generator)
    bias = ExpertBias(bias_EF.bfloat16(), ids_NK) if biased else None
    h, weights = h_PF.double().requires_grad_(), weights_NK.double().requires_grad_()
    shifted = h if bias is None else h + bias.bias_EF.double()[ids_NK.flatten()[slot_P.long()]]
    gate, up = (shifted[:, ::2], shifted[:, 1::2]) if how.interleaved else (shifted[:, :16], shifted[:, -16:])
    out = function(gate, up) * weights.flatten()[slot_P.long()].unsqueeze(1)
    out.backward(grad_PI.double())
    assert _rounded_once(activate_twin(h_PF, weights_NK, slot_P, how, bias), out.detach())
    grad_h, again, grad_weights = activate_backward_twin(grad_PI, h_PF, weights_NK, slot_P, how, bias)
    assert _rounded_once(again, out.detach())
    assert h.grad is not None
    assert weights.grad is not None
    assert _rounded_once(grad_h, h.grad)
    assert relative_error(grad_weights, weights.grad) < 1e-6


def test_losses_of_logits_in_bf16_are_those_of_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TV = (4 * torch.randn(16, 200, generator=generator)).bfloat16()
    targets_T = torch.randint(0, 200, (16,), generator=generator)
    exact = logits_TV.double().requires_grad_()
    expected_T = torch.nn.functional.cross_entropy(exact, targets_T, reduction="none")
    expected_T.sum().backward()
    assert exact.grad is not None
    largest_T, total_T, chosen_T = softmax_statistics_twin(logits_TV, targets_T, torch.float32)
    normalizer_T = largest_T + total_T.log()
    assert relative_error(normalizer_T - chosen_T, expected_T.detach()) < 1e-6
    shard_TV, losses_T = logits_TV.clone(), torch.empty(16)
    softmax_gradient_twin_(shard_TV, targets_T, normalizer_T)
    assert _rounded_once(shard_TV, exact.grad)
    cross_entropy_twin_(logits_TV, targets_T, losses_T, -100, gradient=True)
    assert relative_error(losses_T, expected_T.detach()) < 1e-6
    assert _rounded_once(logits_TV, exact.grad)


def test_norms_of_gradients_in_bf16_are_those_of_fp32() -> None:
    grads = [torch.randn(50, 40, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in range(3)]
    expected = torch.cat([grad.double().flatten() for grad in grads]).square().sum()
    assert relative_error(sum_of_squares_twin(grads), expected) < 1e-6


def test_low_rank_products_in_bf16_are_summed_in_fp32_and_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((60, 24), (60, 5), (3, 24, 32), (3, 5, 32))
    x, low, weight, factor = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    offsets, row_P = torch.tensor([20, 20, 60], dtype=torch.int32), torch.arange(59, -1, -1, dtype=torch.int32)
    expected, projected = torch.empty(60, 32).double(), torch.empty(60, 32).double()
    gradients = torch.zeros(3, 24, 5).double()
    for expert, rows in enumerate((slice(0, 20), slice(20, 20), slice(20, 60))):
        projected[rows] = x[rows].double() @ weight[expert].double()
        expected[rows] = projected[rows] + low[rows].double() @ factor[expert].double()
        gradients[expert] = x.flip(0)[rows].double().t() @ low[rows].double()
    assert _rounded_once(grouped_mm_twin(x, weight, offsets, (low, factor)), expected)
    assert _rounded_once(project_twin(x, weight, 0.25, offsets), 0.25 * projected)
    found = torch.full((3, 24, 5), float("nan"))
    outer_twin_(found, x, low, offsets, row_P)
    assert relative_error(found, gradients) < 1e-6
