"""Accumulation windows whose last backward does not come to all parts of a model; norms of broken gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ep import ParallelLayout, parallelize
from lightning_ep.fsdp.accumulation import reduce_kept_gradients, set_gradient_sync
from lightning_ep.trainer.clipping import clip_grad_norm_
from tests.ranks import assert_ranks_agree, device, run_ranks
from tests.reference import batches, grad_or_zero, tiny_model
from tests.rows import wrong_sums

LAYERS = 3


WINDOWS = ((LAYERS, 1), (LAYERS, LAYERS), (1, LAYERS), (2, 1))
"""How many layers run in each micro-batch of a window, as in models with early exits."""


def _backward(model: PreTrainedModel, depth: int, seed: int, where: torch.device) -> None:
    model.config.num_hidden_layers = depth
    batch = {key: value.to(where) for key, value in batches(1, 2, seed=seed)[0].items()}
    model(**batch, use_cache=False).loss.backward()


def _early_exit(layouts: list[tuple[int, int, int]], expected: list[dict[str, Tensor]]) -> list[str]:
    wrong: list[str] = []
    for layout in layouts:
        ep, fsdp, replicate = layout
        model = tiny_model(num_hidden_layers=LAYERS)
        parallelize(model, ParallelLayout.resolve(ep, fsdp, 4, 4, replicate), device())
        for window, (depths, one_process) in enumerate(zip(WINDOWS, expected, strict=True)):
            model.zero_grad()
            for last, depth in enumerate(depths):
                set_gradient_sync(model, bool(last))
                _backward(model, depth, last, device())
            reduce_kept_gradients(model)
            found = wrong_sums(one_process, model.parameters(), 1e-5)
            wrong += [f"{layout}, window {window}: {param}" for param in found]
    return wrong


def test_an_early_exit_in_one_micro_batch() -> None:
    expected = []
    for depths in WINDOWS:
        plain = tiny_model(num_hidden_layers=LAYERS)
        for last, depth in enumerate(depths):
            _backward(plain, depth, last, torch.device("cpu"))
        expected.append({name: grad_or_zero(param) for name, param in plain.named_parameters()})
    assert_ranks_agree(4, _early_exit, [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)], expected)


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
