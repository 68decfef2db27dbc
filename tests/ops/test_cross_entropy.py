"""The loss of a linear head that never holds all logits, against PyTorch's on float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_ep.ops import cross_entropy
from lightning_ep.ops.cross_entropy import linear_cross_entropy
from tests.ranks import device
from tests.reference import relative_error


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 6e-3)]
)
@pytest.mark.parametrize(("tokens", "ignored"), [(7, 0), (21, 5), (21, 21), (0, 0)])
def test_loss_and_gradients(
    tokens: int, ignored: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK", 8)  # several chunks, the last one short
    torch.manual_seed(tokens + ignored)
    hidden = torch.randn(tokens, 16, device=device()).to(dtype).requires_grad_()
    weight = torch.randn(40, 16, device=device()).to(dtype).requires_grad_()
    targets = torch.randint(0, 40, (tokens,), device=device())
    targets[torch.randperm(tokens)[:ignored]] = -100
    loss = linear_cross_entropy(hidden, weight, targets)
    (loss * 3).backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = F.cross_entropy(F.linear(*exact), targets, reduction="sum")
    (expected * 3).backward()
    assert relative_error(loss, expected) < tolerance
    assert relative_error(hidden.grad, exact[0].grad) < tolerance
    assert relative_error(weight.grad, exact[1].grad) < tolerance
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets), loss)


def test_a_head_in_bf16_is_rounded_where_it_is_stored_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The softmax of bf16 logits is that of fp32; chunks, of which there are many, are added in fp32."""
    monkeypatch.setattr(cross_entropy, "_CHUNK", 2)
    torch.manual_seed(0)
    hidden = torch.randn(512, 16, device=device()).bfloat16()
    weight = torch.randn(40, 16, device=device()).bfloat16().requires_grad_()
    targets = torch.randint(0, 40, (512,), device=device())
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    logits = F.linear(hidden, weight.detach())
    assert relative_error(loss.detach(), F.cross_entropy(logits.double(), targets, reduction="sum")) < 2e-5
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(F.linear(hidden.double(), exact), targets, reduction="sum").backward()
    assert relative_error(weight.grad, exact.grad) < 5e-3  # 3e-3 are of the logits


def test_a_frozen_head_has_no_gradient() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8)
    targets = torch.tensor([1, 2, 3, -100])
    linear_cross_entropy(hidden, weight, targets).backward()
    expected = hidden.detach().clone().requires_grad_()
    F.cross_entropy(F.linear(expected, weight), targets, reduction="sum").backward()
    assert weight.grad is None
    assert relative_error(hidden.grad, expected.grad) < 1e-6


def test_losses_of_tokens_have_gradients_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK", 4)
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 8, device=device(), requires_grad=True), torch.randn(10, 8, device=device())
    targets = torch.tensor([1, 2, 3, -100, 5, 0, 9, -100, 4], device=device())
    factors = torch.randn(9, device=device())
    losses = linear_cross_entropy(hidden, weight, targets, per_token=True)
    (losses * factors).sum().backward()
    exact = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(F.linear(exact, weight.double()), targets, reduction="none")
    (expected * factors.double()).sum().backward()
    assert relative_error(losses, expected) < 1e-6
    assert relative_error(hidden.grad, exact.grad) < 1e-6
    with pytest.raises(ValueError, match="no gradient of a weight for losses of single tokens"):
        linear_cross_entropy(hidden, weight.requires_grad_(), targets, per_token=True)


@pytest.mark.parametrize("target", [-1, 10])
def test_a_target_that_does_not_exist_is_an_error(target: int) -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(torch.randn(2, 8), torch.randn(10, 8), torch.tensor([1, target]))
