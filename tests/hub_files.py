"""Tiny checkpoints of several families, written by transformers as the hub has them, and sharded models to compare."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightning_ep import ParallelLayout
from tests.reference import tiny_model

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GROUPED = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},  # other names
    "olmoe": {"num_experts": 4},
    "glm4_moe": _GROUPED,  # a dense layer, shared experts, a persistent buffer
    "deepseek_v3": {**_GROUPED, **_MLA},
    "granitemoe": {"num_local_experts": 4},  # fused experts
    "gpt_oss": {
        "num_local_experts": 4,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "inkling2_text": {"n_routed_experts": 4, "num_experts": 4},  # gate and up interleaved: not boxes
}


def family_model(model_type: str) -> PreTrainedModel:
    """A model of that family with random weights, biases and buffers."""
    config = AutoConfig.for_model(model_type, **{**_COMMON, **FAMILIES[model_type]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for tensor in model.state_dict().values():
            if not tensor.any():
                tensor.normal_(std=0.02)
    model.set_experts_implementation("eager")
    return model


def write_checkpoint(path: Path, fused: bool = False, sharded: bool = True, **overrides: Any) -> PreTrainedModel:
    """Writes a tiny Qwen3-MoE: in the hub's layout or (fused) the model's, into many files or one."""
    model = tiny_model(**overrides)
    model.save_pretrained(path, save_original_format=not fused, max_shard_size="40KB" if sharded else "1GB")
    return model


def layout(ep: int, tp: int = 1) -> ParallelLayout:
    world = dist.get_world_size()
    return ParallelLayout.resolve(ep, "auto", world, world, tp=tp)


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer, whole and on the CPU. Every rank must call it."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
        for name, tensor in module.state_dict().items()
    }


@contextmanager
def refused_in_one_line(kind: type[Exception], match: str) -> Iterator[list[BaseException]]:
    """The body, a command line, ends with one line about an error of that kind, which is in the list afterwards."""
    found: list[BaseException] = []
    with pytest.raises(SystemExit) as ended:
        yield found
    cause = ended.value.__context__
    assert ended.value.code == 2
    assert isinstance(cause, kind)
    assert re.search(match, str(cause)), cause
    found.append(cause)
