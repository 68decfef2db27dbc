"""A norm behind each expert, whose weight all experts share: one parameter, through which rows of every rank go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ep import ParallelLayout, clip_grad_norm_, parallelize
from lightning_ep.fsdp.accumulation import set_gradient_sync
from tests.multimodal import multimodal_model, text_batch
from tests.ranks import assert_ranks_agree, device, here
from tests.reference import relative_error

FAMILY = "muse_spark_text"
SHARED = "mlp.experts.post_expert_norm.weight"
MICRO_BATCHES, STEPS, LR, MAX_NORM = 2, 2, 0.5, 0.05


def _model(one_rank: bool) -> Any:
    """A tiny model; with ``one_rank`` its routers choose the first two experts alone, which are on one rank."""
    model = multimodal_model(FAMILY).double()  # single steps are rounded by no more than what the family has in fp32
    for name, param in model.named_parameters():
        if name.endswith(SHARED):
            nn.init.normal_(param, 1.0, 0.2, generator=torch.Generator().manual_seed(1))
    for module in model.modules():
        bias = getattr(module, "e_score_correction_bias", None)
        if one_rank and bias is not None:
            bias[:2] += 10
    return model


def _loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    hidden = model(batch["input_ids"], use_cache=False)[0]
    return (hidden * torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device)).square().mean()


def _batch(step: int, micro: int, rank: int) -> dict[str, Any]:
    return text_batch(100 * step + 10 * micro + rank)


def _train(model: Any, ranks: range, max_norm: float) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of these ranks' batches, and the gradients of the first step, clipped."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses, grads = [], {}
    for step in range(STEPS):
        for micro in range(MICRO_BATCHES):
            set_gradient_sync(model, enabled=micro == MICRO_BATCHES - 1)
            for rank in ranks:
                loss = _loss(model, here(_batch(step, micro, rank)))
                loss.backward()
                losses.append(loss.item())
        norm = clip_grad_norm_(model.parameters(), max_norm)
        assert norm > max_norm
        grads = grads or {
            name: _whole(param.grad) for name, param in model.named_parameters() if param.grad is not None
        }
        optimizer.step()
        optimizer.zero_grad()
    return losses, grads


def _whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone()


def _differences(ep: int, mode: Any, one_rank: bool) -> list[str]:
    rank, world = dist.get_rank(), dist.get_world_size()
    # On the same device, since gradients make 1e-4 of how another one rounds what the family computes in fp32.
    plain, sharded = _model(one_rank).to(device()), _model(one_rank)
    losses, wanted = _train(plain, range(world), MAX_NORM)
    parallelize(sharded, ParallelLayout.resolve(ep, "auto", world, world), device(), activation_checkpointing=mode)
    found, grads = _train(sharded, range(rank, rank + 1), MAX_NORM)
    wrong = [
        f"loss {one}, not {other}"
        for one, other in zip(found, losses[rank::world], strict=True)
        if abs(one / other - 1) > 1e-5
    ]
    if not any(name.endswith(SHARED) and grad.norm() > 1e-4 for name, grad in wanted.items()):
        wrong.append("the norm that experts share has no gradient to compare")
    wrong += [
        f"gradient of {name}: {error:.1e}"
        for name, grad in wanted.items()
        if not (error := relative_error(grads[name], grad)) <= 1e-5 and grad.norm() > 1e-6
    ]
    pairs = zip(sharded.named_parameters(), plain.parameters(), strict=True)
    wrong += [
        f"{name}: {error:.1e}"
        for (name, param), other in pairs
        if not (error := relative_error(_whole(param), other)) <= 1e-5
    ]
    return wrong


@pytest.mark.parametrize(
    ("world", "ep", "mode", "one_rank"),
    [
        (2, 2, "none", False),
        (2, 1, "full", False),
        (2, 2, "full", True),  # a rank whose experts get no token
        (4, 2, "none", False),
        pytest.param(4, 4, "selective", False, marks=pytest.mark.slow),
        pytest.param(4, 2, "full", True, marks=pytest.mark.slow),
    ],
)
def test_it_trains_as_on_one_process(world: int, ep: int, mode: str, one_rank: bool) -> None:
    assert_ranks_agree(world, _differences, ep, mode, one_rank)
