"""Routers that a family does not declare: found by what stands beside the experts, and not run twice."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from lightning_ep import ParallelLayout, parallelize
from lightning_ep.transformers_adapter import experts_modules, routers
from tests.hub.every_family import auto_class_of, tiny_config_of
from tests.ranks import assert_ranks_agree, device, here
from tests.reference import batches, relative_error

UNDECLARED = {"deepseek_v4": "gate", "ernie4_5_vl_moe": "gate"}  # hash routers; those of text and of vision


def _model(family: str) -> PreTrainedModel:
    config = tiny_config_of(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto_class_of(config).from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for name, param in model.named_parameters():
                if "norm" not in name:
                    param.normal_(std=0.1)
            for name, table in model.named_buffers():
                if name.endswith("tid2eid"):
                    table.copy_(torch.arange(table.numel()).view_as(table) % 4)
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("family", UNDECLARED)
def test_every_experts_module_has_its_router(family: str) -> None:
    model = _model(family)
    expected = {name.replace(".experts", f".{UNDECLARED[family]}") for name in experts_modules(model)}
    assert {name for name, child in model.named_modules() if child in routers([model])} == expected


def _recomputes(family: str, mode: Any) -> list[str]:
    rank, data = dist.get_rank(), batches(2, 2)
    plain, sharded = _model(family), _model(family)
    sum(plain(**batch, use_cache=False).loss for batch in data).backward()
    parallelize(sharded, ParallelLayout.resolve(2, "auto", 2, 2), device(), activation_checkpointing=mode)
    calls: list[str] = []
    for name, child in sharded.named_modules():
        if child in routers([sharded]):
            child.register_forward_hook(lambda *_, name=name: calls.append(name))
    loss = sharded(**here(data[rank]), use_cache=False).loss
    routed = sorted(calls)
    loss.backward()
    wrong = [] if routed and sorted(calls) == routed else [f"routers ran: {routed}, then {calls}"]
    for (name, param), expected in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is None or expected.grad.norm() < 1e-4:
            continue  # experts for images, and sums that all but cancel
        # Hyper-connections (attn_hc, ffn_hc, hc_head) enlarge what any order of sums differs by: up to 1.2e-5 between
        # kinds of CPU, and 6.7e-6 between one and two threads of plain transformers.
        tolerance = 5e-5 if re.search(r"(_|\b)hc(_|\b)", name) else 1e-5
        if not (error := relative_error(param.grad.full_tensor(), expected.grad)) <= tolerance:
            wrong.append(f"{name}: {error:.1e}")
    return wrong


@pytest.mark.parametrize("mode", [pytest.param("selective", marks=pytest.mark.slow), "full"])
@pytest.mark.parametrize("family", UNDECLARED)
def test_their_layers_are_recomputed_without_routing_again(family: str, mode: str) -> None:
    assert_ranks_agree(2, _recomputes, family, mode)
