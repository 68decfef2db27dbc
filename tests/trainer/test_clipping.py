"""Norms and clipping of gradients on any meshes are those of the whole gradients, each counted once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_ep.trainer.clipping import clip_grad_norm_
from tests.ranks import assert_ranks_agree, device
from tests.reference import relative_error

ORDERS = (1.0, 2.0, 3.0, math.inf)


def _gradients() -> list[Tensor]:
    """Whole gradients, the same on every rank; a plain one, and those of parameters with copies and without."""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(8, 6, generator=generator).to(device()) for _ in range(6)]
    mesh = init_device_mesh(device().type, (2, 2), mesh_dim_names=("outer", "inner"))
    placed = [whole[0]]
    for grad, placements in zip(
        whole[1:4],
        ([Shard(0), Replicate()], [Replicate(), Shard(1)], [Shard(0), Shard(1)]),
        strict=True,
    ):
        placed.append(distribute_tensor(grad, mesh, placements))
    # On a mesh of two of the four ranks; the others have the same.
    placed += [distribute_tensor(whole[4], mesh["inner"], [Shard(0)])]
    placed += [distribute_tensor(whole[5], mesh["inner"], [Replicate()])]
    return placed


def _full(grad: Tensor) -> Tensor:
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def _clipped() -> list[str]:
    wrong = []
    for order in ORDERS:
        params = []
        for grad in _gradients():
            params.append(nn.Parameter(torch.zeros_like(grad)))
            params[-1].grad = grad
        before = [_full(param.grad).double() for param in params]  # type: ignore[arg-type]
        expected = torch.cat([grad.flatten() for grad in before]).norm(order)
        norm = clip_grad_norm_(params, 0.5, order)
        if not relative_error(norm, expected) < 1e-6:
            wrong.append(f"the norm of order {order} is {norm.item()} and not {expected.item()}")
        for index, (param, grad) in enumerate(zip(params, before, strict=True)):
            if not relative_error(_full(param.grad), grad * 0.5 / expected) < 1e-5:  # type: ignore[arg-type]
                wrong.append(f"gradient {index}, clipped by the norm of order {order}")
    return wrong


def test_norms_of_every_order_count_copies_once() -> None:
    assert_ranks_agree(4, _clipped)


@pytest.mark.parametrize("order", ORDERS)
def test_a_norm_below_the_bound_changes_nothing(order: float) -> None:
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.tensor([0.1, -0.2, 0.0])
    clip_grad_norm_([param], 1.0, order)
    assert param.grad.tolist() == torch.tensor([0.1, -0.2, 0.0]).tolist()
