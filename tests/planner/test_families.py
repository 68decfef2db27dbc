"""What configurations say: published sizes, and the parameters and FLOPs of transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_ep import LoRA, add_adapter
from lightning_ep.planner import active_parameters, find_model, flops_per_token, num_parameters, read_widths
from lightning_ep.planner.counts import attention_adapters, expert_adapters
from lightning_ep.planner.families import FAMILIES, shipped

ALL = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
GROUPS = {"n_group": 1, "topk_group": 1}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "num_key_value_heads": 4}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 3,
}  # fmt: skip
SHARED = {"shared_expert_intermediate_size": 24}
EXPERTS = {"num_experts": 8, "moe_intermediate_size": 12}
ROUTED = {"n_routed_experts": 8, "moe_intermediate_size": 12, "intermediate_size": 40}
TINY: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {**EXPERTS, "head_dim": 8}),
    ("qwen3_moe", {**EXPERTS, "mlp_only_layers": [1], "attention_bias": True, "tie_word_embeddings": True}),
    ("qwen3_moe", {**EXPERTS, "intermediate_size": 40, "decoder_sparse_step": 2}),
    ("qwen2_moe", {**EXPERTS, "num_experts": 6, **SHARED}),
    ("qwen3_next", {**EXPERTS, "head_dim": 10, **SHARED, **LINEAR}),
    ("mixtral", {"num_local_experts": 4, "intermediate_size": 20}),
    ("olmoe", {"num_experts": 8, "intermediate_size": 20}),
    ("olmoe", {"num_experts": 8, "intermediate_size": 20, "attention_bias": True}),
    ("gpt_oss", {"num_local_experts": 4, "intermediate_size": 20, "head_dim": 6, "sliding_window": 8}),
    ("glm4_moe", {**ROUTED, "head_dim": 10, "first_k_dense_replace": 2, "attention_bias": True, **GROUPS}),
    ("glm4_moe", {**ROUTED, "head_dim": 10, "use_qk_norm": True, **GROUPS}),
    ("deepseek_v2", {**ROUTED, "q_lora_rank": None, "first_k_dense_replace": 1, "n_shared_experts": 2, **LATENT}),
    ("deepseek_v3", {**ROUTED, "q_lora_rank": 24, "first_k_dense_replace": 1, **LATENT, **GROUPS}),
]


def _config(kind: str, settings: dict[str, Any]) -> Any:
    return AutoConfig.for_model(kind, **{**ALL, "num_experts_per_tok": 2, **settings})


def _on_meta(config: Any) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _elements(model: torch.nn.Module) -> int:
    return sum(param.numel() for param in dict.fromkeys(model.parameters()))


@pytest.mark.parametrize(("kind", "settings"), TINY)
def test_parameters_of_every_family_are_those_of_its_models(kind: str, settings: dict[str, Any]) -> None:
    config = _config(kind, settings)
    widths, layers = read_widths(config.to_dict())
    model = _on_meta(config)
    assert num_parameters(widths, layers) == _elements(model)
    # Experts that a token does not go to, of which there are 2 fewer than all in each layer that has some.
    experts = [p for name, p in model.named_parameters() if ".experts." in name and p.shape[0] == widths.experts]
    assert experts
    idle = sum(param.numel() // widths.experts * (widths.experts - 2) for param in experts)
    assert num_parameters(widths, layers) - active_parameters(widths, layers) == idle


def test_every_family_is_counted() -> None:
    assert {kind for kind, _ in TINY} == set(FAMILIES)


@pytest.mark.parametrize(("kind", "settings"), [case for case in TINY if case[0] != "qwen3_next"])
def test_flops_of_every_family_are_those_that_torch_counts(kind: str, settings: dict[str, Any]) -> None:
    config = _config(kind, settings)
    widths, layers = read_widths(config.to_dict())
    config._attn_implementation = "eager"  # whose products are seen, and full where ours are causal
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    tokens = torch.randint(0, 96, (1, 16))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    seen = layers * (16 - 17 / 2)  # positions beyond the causal half, or beyond a window of 8 tokens
    if widths.windowed:
        seen += layers / 2 * (17 / 2 - (8 * 9 / 2 + 8 * 8) / 16)
    masked = 2 * (widths.query + widths.value) * seen
    assert counter.get_total_flops() == pytest.approx(16 * (flops_per_token(widths, layers, 16) / 3 + masked))


@pytest.mark.parametrize("name", shipped())
def test_shipped_models_have_the_size_that_is_published(name: str) -> None:
    model, published = find_model(name), shipped()[name]["published"]
    total = num_parameters(model.widths, model.layers) / 1e9
    active = active_parameters(model.widths, model.layers) / 1e9
    embedding = model.widths.vocab * model.widths.hidden / 1e9
    assert total == pytest.approx(published["total"], rel=0.01)
    # Cards count neither embedding nor head, one of them, or both; some round 3.6 down to 3.
    closest = min(abs(active - out * embedding - published["active"]) for out in (0, 1, 2))
    assert closest < 0.03 * published["active"] or (name.startswith("Qwen/Qwen3-Next") and 3 < active < 4)


@pytest.mark.parametrize("name", shipped())
def test_shipped_models_have_the_parameters_of_transformers_at_full_size(name: str) -> None:
    model = find_model(name)
    config = dict(model.config)
    built = _on_meta(AutoConfig.for_model(config.pop("model_type"), **config))
    assert num_parameters(model.widths, model.layers) == _elements(built)


def test_adapters_are_those_that_peft_makes() -> None:
    peft = pytest.importorskip("peft")
    for kind, settings, targets in (
        ("qwen3_moe", TINY[0][1], ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("deepseek_v3", TINY[-1][1], ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]),
    ):
        config = _config(kind, settings)
        adapted = peft.get_peft_model(_on_meta(config), peft.LoraConfig(r=4, target_modules=targets))
        trained = sum(param.numel() for param in adapted.parameters() if param.requires_grad)
        assert attention_adapters(*read_widths(config.to_dict()), 4) == trained


def test_adapters_of_experts_are_those_of_the_package() -> None:
    config = _config(*TINY[0])
    adapted = add_adapter(_on_meta(config), LoRA(r=4))
    trained = sum(param.numel() for param in adapted.parameters() if param.requires_grad)
    widths, layers = read_widths(config.to_dict())
    assert attention_adapters(widths, layers, 4) + expert_adapters(widths, layers, 4) == trained
    model = find_model("Qwen/Qwen3-30B-A3B")
    assert expert_adapters(model.widths, model.layers, 8) == pytest.approx(315e6, rel=0.002)  # docs/start/lora.md


def test_a_model_is_found_by_id_short_name_file_directory_and_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = find_model("Qwen/Qwen3-30B-A3B")
    assert find_model("qwen3-30b-a3b") == given
    (tmp_path / "config.json").write_text(json.dumps(given.config))
    snapshot = tmp_path / "hub" / "models--me--mine" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({**given.config, "num_hidden_layers": 3}))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in (str(tmp_path), str(tmp_path / "config.json")):
        assert (find_model(name).widths, find_model(name).layers) == (given.widths, 48)
    assert (find_model("me/mine").widths, find_model("me/mine").layers) == (given.widths, 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "there is no model .*Qwen/Qwen3-235B-A22B.*openai/gpt-oss-20b"),
        ("{", "is no JSON"),
        ("[]", "holds no configuration"),
        ('{"model_type": "llama"}', "model_type='llama' is not planned; known are qwen3_moe"),
        (
            '{"model_type": "mixtral", "hidden_size": 4}',
            r"num_hidden_layers=None: a positive integer must say its layers",
        ),
    ],
)
def test_what_is_no_model_says_what_is(config: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    if config is not None:
        file.write_text(config)
    with pytest.raises(ValueError, match=message):
        find_model(str(file))
