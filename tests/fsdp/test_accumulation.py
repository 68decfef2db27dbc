"""Accumulation windows whose last backward does not come to all parts of a model; norms of broken gradients."""

from __future__ import annotations

import torch

from lightning_ep import ParallelLayout, parallelize
from lightning_ep.fsdp.accumulation import reduce_kept_gradients, set_gradient_sync
from lightning_ep.trainer.clipping import clip_grad_norm_
from tests.ranks import assert_ranks_agree, device, run_ranks
from tests.reference import batches, tiny_model
from tests.rows import wrong_gradients

LAYERS = 3


def _early_exit(ep: int, fsdp: int, replicate: int, world: int) -> list[str]:
    plain, sharded = tiny_model(num_hidden_layers=LAYERS), tiny_model(num_hidden_layers=LAYERS)
    parallelize(sharded, ParallelLayout.resolve(ep, fsdp, world, world, replicate), device())
    wrong: list[str] = []
    for window, depths in enumerate(((LAYERS, 1), (LAYERS, LAYERS), (1, LAYERS), (2, 1))):
        for model, where in ((plain, torch.device("cpu")), (sharded, device())):
            model.zero_grad()
            for last, depth in enumerate(depths):
                if model is sharded:
                    set_gradient_sync(model, bool(last))
                model.config.num_hidden_layers = depth  # as in models with early exits
                batch = {key: value.to(where) for key, value in batches(1, 2, seed=last)[0].items()}
                model(**batch, use_cache=False).loss.backward()
        reduce_kept_gradients(sharded)
        found = wrong_gradients(plain.named_parameters(), sharded.parameters(), 1e-5)
        wrong += [f"window {window}: {param}" for param in found]
    return wrong


def test_an_early_exit_in_one_micro_batch() -> None:
    for ep, fsdp, replicate in ((4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)):
        assert_ranks_agree(4, _early_exit, ep, fsdp, replicate, 4)


def _nan(norm_type: float, rank: int) -> float:
    param = torch.nn.Parameter(torch.ones(3, device=device()))
    value = float("nan") if torch.distributed.get_rank() == rank else 1.0
    param.grad = torch.full((3,), value, device=device())
    return clip_grad_norm_([param], 1.0, norm_type).item()


def test_a_gradient_that_is_no_number_on_one_rank_is_in_every_norm() -> None:
    for norm_type in (1.0, 2.0, float("inf")):
        for rank in (0, 1):
            norms = run_ranks(2, _nan, norm_type, rank)
            assert not any(torch.isfinite(torch.tensor(norms))), (norm_type, rank, norms)
