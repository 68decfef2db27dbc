"""What only a GPU shows: how often the host waits for it."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist

from lightning_ep import ParallelLayout, parallelize
from tests.distributed import device, run_ranks
from tests.reference import tiny_model

pytestmark = pytest.mark.gpu


def _count_syncs(ep: int) -> tuple[int, int]:
    """Host synchronisations of one forward and one backward of a MoE layer in bf16, after a warm-up."""
    world = dist.get_world_size()
    model = tiny_model(num_hidden_layers=1).to(torch.bfloat16)
    parallelize(model, ParallelLayout.resolve(ep, "auto", world, world), device())
    block = model.model.layers[0].mlp
    model.model.layers[0].unshard()
    hidden = torch.randn(4, 16, 32, device=device(), dtype=torch.bfloat16, requires_grad=True)
    counts = []
    for _ in range(2):
        counts = []
        out = None
        for run in ("forward", "backward"):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                if run == "forward":
                    out = block(hidden)
                else:
                    out.sum().backward()
                torch.cuda.set_sync_debug_mode("default")
            counts.append(sum("synchroniz" in str(w.message) for w in caught))
    return counts[0], counts[1]


@pytest.mark.parametrize(("world", "ep", "expected"), [(1, 1, (0, 0)), (2, 2, (1, 0))])
def test_the_host_waits_once_per_forward(world: int, ep: int, expected: tuple[int, int]) -> None:
    assert run_ranks(world, _count_syncs, ep) == [expected] * world
