"""What the planner counts, against arithmetic by hand, a model of transformers, and routers drawn at random."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lightning_ep.planner import (
    QWEN3_30B_A3B,
    Case,
    dense_peak,
    flops_per_token,
    num_parameters,
    read_widths,
    rows_sent,
)

TINY = Qwen3MoeConfig(
    vocab_size=128,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    moe_intermediate_size=16,
    num_experts=8,
    num_experts_per_tok=4,
    tie_word_embeddings=False,
)  # type: ignore[call-arg]


def _elements(model: torch.nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def test_parameters_are_those_of_a_model() -> None:
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(TINY)
    assert num_parameters(*read_widths(TINY.to_dict())) == _elements(model)


def test_parameters_of_30b_a3b_are_those_of_its_configuration() -> None:
    config = Qwen3MoeConfig(  # of Qwen/Qwen3-30B-A3B on the hub
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
    )  # type: ignore[call-arg]
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    assert read_widths(config.to_dict()) == (QWEN3_30B_A3B, 48)
    assert num_parameters(QWEN3_30B_A3B, 48) == _elements(model)


def test_flops_count_causal_attention_and_active_experts() -> None:
    # By hand for one layer of Qwen3-30B-A3B at 4,096 tokens, forward, in multiply-adds per token:
    projections = 2048 * 4096 + 2 * 2048 * 512 + 4096 * 2048  # q; k and v; o
    core = 2 * 4096 * 2048.5  # scores and values, 32 heads of 128, half of the 4,097 positions
    experts = 8 * (2048 * 768 + 2048 * 768 + 768 * 2048)
    head = flops_per_token(QWEN3_30B_A3B, 0, 4096)
    assert flops_per_token(QWEN3_30B_A3B, 1, 4096) - head == pytest.approx(
        3 * 2 * (projections + core + 2048 * 128 + experts)
    )
    assert head == 3 * 2 * 2048 * 151_936


def test_flops_are_those_that_torch_counts_in_a_model() -> None:
    config = Qwen3MoeConfig(**{**TINY.to_dict(), "num_experts": 4, "num_experts_per_tok": 4})
    config._attn_implementation = "eager"  # whose products are seen, and full where ours are causal
    config._experts_implementation = "eager"
    model = Qwen3MoeForCausalLM(config)
    tokens = torch.randint(0, 128, (1, 16))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False).logits.sum().backward()
    widths, _ = read_widths(config.to_dict())
    # Three layers, forward and backward: positions that attention looks at beyond its causal half.
    masked = 3 * 3 * 2 * 2 * 32 * (16 - 17 / 2) * 16
    assert counter.get_total_flops() == 16 * flops_per_token(widths, 3, 16) + masked


def test_rows_go_to_every_other_rank_that_holds_an_expert_of_the_token() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(20_000, 128, generator=generator).topk(8).indices
    for ep in (2, 4, 8, 16):
        owners = torch.nn.functional.one_hot(chosen // (128 // ep), ep).amax(1)
        assert rows_sent(QWEN3_30B_A3B, ep) == pytest.approx(owners[:, 1:].sum(1).double().mean().item(), rel=0.01)


def test_ranks_that_share_sequences_count_their_tokens_once() -> None:
    alone = Case(QWEN3_30B_A3B, 12, 1, 65_536, 2, ep=2)
    assert alone.tokens == 65_536
    assert dataclasses.replace(alone, cp=2).tokens == 32_768


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ep": 3}, "ep=3 does not divide ranks=8"),
        ({"cp": 16}, "cp=16 does not divide ranks=8"),
        ({"replicate": 4, "ep": 4}, "ep=4 times replicate=4 does not divide ranks=8"),
        ({"replicate": 4, "tp": 4}, "tp=4 does not divide ranks=2 of a copy"),
        ({"skew": 0.9}, "skew=0.9: the busiest rank has at least the mean"),
        ({"ranks": 256, "ep": 256}, "ep=256 does not divide the 128 experts"),
        ({"precision": "32-true"}, "precision='32-true' is not planned"),
        ({"recompute": "all"}, "recompute='all' does not exist"),
    ],
)
def test_cases_that_do_not_exist_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(QWEN3_30B_A3B, 48, **{"batch": 4, "sequence": 4096, "ranks": 8, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_dense_peak_is_that_of_the_very_card(name: str, peak: float | None) -> None:
    assert dense_peak(name) == peak
