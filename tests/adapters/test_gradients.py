"""Gradients of adapters equal PEFT's on one process: families, idle experts and ranks, modules trained whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ep import expert_plan, parallelize
from tests.hub_files import layout
from tests.parity import _adapted as adapted
from tests.parity import as_peft, lora_like_peft
from tests.ranks import assert_ranks_agree, device, here
from tests.reference import adapted_by_peft, batches, family_model, grad_or_zero, relative_error

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "pad_token_id": 0,
    "max_position_embeddings": 64,
}  # fmt: skip
QWEN = ("qwen3_moe", {"num_experts": 8})
# Every token is the same, so that all of them go to one expert: the others, and a rank of two, get none.
ONE_EXPERT = {"num_experts": 8, "num_experts_per_tok": 1}
NEW_TOKENS = {"modules_to_save": ["embed_tokens", "lm_head"]}
CASES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"model": QWEN},
    "mixtral": {"model": ("mixtral", {"num_local_experts": 8})},
    "gpt_oss": {"model": ("gpt_oss", {"num_local_experts": 8, "sliding_window": 8})},
    "one expert gets all tokens": {"model": ("qwen3_moe", ONE_EXPERT), "one_token": True, "where": "experts"},
    "one expert of transformers' kernels": {"model": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 1}),
                                            "one_token": True, "where": "experts",
                                            "implementation": "eager"},
    "the down projection alone": {"model": QWEN, "where": "down"},
    "rsLoRA, other ranks for some": {"model": QWEN, "options": {"use_rslora": True, "rank_pattern": {"q_proj": 5}}},
    "whole vocabulary with new tokens": {"model": QWEN, "resize": 136, "options": NEW_TOKENS},
    "DoRA": {"model": QWEN, "where": "attention", "options": {"use_dora": True}},
    "the router whole": {"model": QWEN, "options": {"modules_to_save": ["gate"]}},
    "a tied vocabulary": {"model": ("qwen3_moe", {"num_experts": 8, "tie_word_embeddings": True}),
                          "options": {"modules_to_save": ["embed_tokens"]}, "of_peft": {"ensure_weight_tying": True}},
}  # fmt: skip


def _model(case: dict[str, Any]) -> Any:
    family, config = case["model"]
    model = family_model(family, {**SIZES, **config})
    if "resize" in case:
        torch.manual_seed(1)
        model.resize_token_embeddings(case["resize"], mean_resizing=False)
    return model


def _data(case: dict[str, Any], world: int) -> list[dict[str, Tensor]]:
    found = batches(world, 2)
    for batch in found if case.get("one_token") else []:
        batch["input_ids"] = torch.full_like(batch["input_ids"], 7)
    return found


def _gradients(name: str, ep: int) -> list[str]:
    case, rank, world = CASES[name], dist.get_rank(), dist.get_world_size()
    where, options = case.get("where", "both"), case.get("options", {})
    data = _data(case, world)
    expected = adapted_by_peft(_model(case), where, **options, **case.get("of_peft", {}))
    sum(expected(**batch).loss for batch in data).backward()
    if where == "down":  # a user's own peft
        model: Any = adapted_by_peft(_model(case), where, **options)
    else:
        model = adapted(_model(case), lora_like_peft(where, **options))
    plan = expert_plan(model, case.get("implementation", "auto"))
    parallelize(model, layout(ep), device(), plan=plan)
    model(**here(data[rank])).loss.backward()
    found = {key: param.grad for key, param in model.named_parameters() if param.requires_grad}
    wanted = {key: grad_or_zero(param) for key, param in expected.named_parameters() if param.requires_grad}
    wrong = [f"frozen or trained: {sorted(found.keys() ^ wanted.keys())}"] if found.keys() != wanted.keys() else []
    idle = 0
    for key in found.keys() & wanted.keys():
        if found[key] is None:
            wrong.append(f"{key} has no gradient")
            continue
        whole = found[key].full_tensor()
        idle += int((whole.flatten(1) == 0).all(1).sum()) if whole.ndim == 3 else 0
        if relative_error(as_peft(key, whole), wanted[key]) > 1e-5:
            wrong.append(f"{key}: {relative_error(as_peft(key, whole), wanted[key]):.1e}")
    if case.get("one_token") and idle != 2 * 4 * 7:  # layers, factors, experts
        wrong.append(f"{idle} factors of experts have a gradient of zero")
    return wrong


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_pefts(name: str) -> None:
    assert_ranks_agree(2, _gradients, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "ep"), [(2, 1), (4, 4), (4, 2)])
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_pefts_on_every_layout(name: str, world: int, ep: int) -> None:
    assert_ranks_agree(world, _gradients, name, ep)
