"""What is adapted, what is refused and when, where adapters start, and files to and from PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_ep import CausalLM, LoRA, add_adapter, from_config, from_pretrained, parallelize
from lightning_ep.hub.errors import CheckpointError
from tests.hub.every_family import auto_class_of, tiny_config_of
from tests.hub_files import full_state, layout, write_checkpoint
from tests.parity import as_peft, lora_like_peft
from tests.ranks import assert_ranks_agree, device
from tests.reference import adapted_by_peft, family_model, relative_error, tiny_config, tiny_model

# ---------------------------------------------------------------------------------------------------- what is adapted


def test_by_default_all_of_attention_and_the_experts_are_adapted_and_nothing_else() -> None:
    model = add_adapter(from_config(tiny_config(mlp_only_layers=[0])), LoRA())
    adapted = {name.partition(".lora_")[0] for name, param in model.named_parameters() if param.requires_grad}
    attention = {f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qkvo"}
    experts = {"model.layers.1.mlp.experts", "model.layers.1.mlp.experts.base_layer"}
    assert adapted == attention | experts
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 32, 0.0)
    assert set(config.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert set(config.target_parameters) == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_attention_is_found_in_other_families(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, num_hidden_layers=2))
    add_adapter(model, LoRA(experts=family != "deepseek_v3"))
    adapted = {
        name.split(".lora_")[0].split(".")[-1] for name, param in model.named_parameters() if param.requires_grad
    }
    expected = {
        "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj", "experts", "base_layer"},
        "gpt_oss": {"q_proj", "k_proj", "v_proj", "o_proj", "experts", "base_layer"},
        "deepseek_v3": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
    }
    assert adapted == expected[family]


def test_a_model_that_a_family_declares_to_be_one_block_is_no_attention() -> None:
    with torch.device("meta"):
        config = tiny_config_of("qwen3_omni_moe")
        model = add_adapter(auto_class_of(config).from_config(config), LoRA(experts=False))
    adapted = {name.split(".lora_")[0] for name, param in model.named_parameters() if param.requires_grad}
    assert "talker.code_predictor.model.layers.0.self_attn.q_proj" in adapted
    assert not [name for name in adapted if ".mlp." in name]


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, r"lora_dropout=0\.1\) is not possible for experts.*experts=False"),
        ({"use_dora": True, "lora_bias": True}, r"use_dora=True, lora_bias=True\) is not possible for experts"),
        ({"r": 0}, "rank must be 1 or more"),
        ({"init_lora_weights": "pissa"}, "'pissa'.*computed from weights"),
        ({"target_modules": "all-linear"}, "would adapt routers"),
        ({"target_modules": [], "experts": False}, "adapts nothing"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, r"ends in 'v_prj' \(did you mean v_proj"),
        ({"modules_to_save": ["embed_token"]}, r"modules_to_save\): .* 'embed_token' \(did you mean embed_tokens"),
    ],
)
def test_names_of_no_module_are_refused_with_those_that_are_near(options: dict[str, Any], message: str) -> None:
    model = from_config(tiny_config())
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        add_adapter(model, LoRA(**options))
    assert [name for name, _ in model.named_parameters()] == before


def test_other_versions_of_peft_and_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "__version__", "0.22.0")
    with pytest.raises(ImportError, match=r"peft 0\.22\.0 .*0\.21.*pip install 'peft==0\.21\.\*'"):
        add_adapter(from_config(tiny_config()), LoRA())


def test_a_second_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="has an adapter already"):
        add_adapter(adapted_by_peft(tiny_model(), "both"), LoRA())


def test_the_learning_rate_is_ten_times_that_of_full_fine_tuning() -> None:
    rates = []
    for adapter in (None, LoRA()):
        module = CausalLM(tiny_config(), pretrained=False, adapter=adapter)
        module.model = module._adapted(tiny_model())
        optimizer: Any = module.configure_optimizers()
        rates.append(optimizer.param_groups[0]["lr"])
        held = {id(param) for group in optimizer.param_groups for param in group["params"]}
        assert held == {id(param) for param in module.parameters() if param.requires_grad}
    assert rates == [1e-5, pytest.approx(1e-4)]


# ---------------------------------------------------------------------------------------------------- where they start


def _start(ep: int) -> dict[str, Tensor]:
    model = add_adapter(from_config(tiny_config()), LoRA(r=2))
    parallelize(model, layout(ep), device(), seed=3)
    return {name: as_peft(name, value) for name, value in full_state(model).items()}


def _starts() -> list[str]:
    wrong, (one, other) = [], (_start(1), _start(2))
    plain = from_config(tiny_config())
    parallelize(plain, layout(2), device(), seed=3)
    base = {name.replace(".base_layer", ""): value for name, value in one.items() if "lora_" not in name}
    for found, expected, what in ((one, other, "layouts"), (base, full_state(plain), "with and without adapters")):
        if found.keys() != expected.keys() or not all(torch.equal(found[name], expected[name]) for name in found):
            wrong.append(f"{what} begin with other weights")
    for name, value in one.items():
        if ".lora_" not in name:
            continue
        bound = value.shape[1] ** -0.5  # PEFT's for A: uniform, by the number of features that come in
        if "lora_B" in name and value.any():
            wrong.append(f"{name} is not zero")
        if "lora_A" in name and not (
            0.8 * bound < value.abs().max() <= bound and abs(value.std() / bound - 0.577) < 0.1
        ):
            wrong.append(f"{name} is not drawn by PEFT's rule: {value.abs().max()} of {bound}, {value.std()}")
        if "experts" in name and "lora_A" in name and len(value.unique()) < 0.99 * value.numel():
            wrong.append(f"experts of {name} begin alike")
    return wrong


def test_adapters_start_by_pefts_rule_and_alike_on_every_layout() -> None:
    assert_ranks_agree(2, _starts)


# ---------------------------------------------------------------------------------------------------- files


def _round_trip(root: Path, family: str, config: dict[str, Any]) -> list[str]:
    """PEFT's file is read, sharded, and written again; both are loaded by PEFT."""
    wrong = []
    model = from_pretrained(root / "base") if family == "qwen3_moe" else _in_memory(family, config)
    add_adapter(model, LoRA(pretrained=str(root / "adapter")))
    parallelize(model, layout(2), device())
    model.save_pretrained(root / "again")
    if dist.get_rank() == 0:
        before, after = (load_file(root / name / "adapter_model.safetensors") for name in ("adapter", "again"))
        if before.keys() != after.keys():
            wrong.append(f"names differ: {sorted(before.keys() ^ after.keys())}")
        wrong += [
            f"{name} differs" for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])
        ]
    return wrong


def _in_memory(family: str, config: dict[str, Any]) -> Any:
    return tiny_model() if family == "qwen3_moe" else family_model(family, config)


GPT_OSS = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize(("family", "config"), [("qwen3_moe", {}), ("gpt_oss", GPT_OSS)])
def test_pefts_files_are_read_and_written_bit_for_bit(tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    write_checkpoint(tmp_path / "base")
    adapted_by_peft(_in_memory(family, config), "both").save_pretrained(tmp_path / "adapter")
    for wrong in run_all(_round_trip, tmp_path, family, config):
        assert not wrong, wrong
    plain, again = _in_memory(family, config), _in_memory(family, config)
    plain.load_adapter(str(tmp_path / "adapter"))
    again.load_adapter(str(tmp_path / "again"))
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert relative_error(again(ids).logits, plain(ids).logits) == 0


def run_all(function: Any, *args: Any) -> list[list[str]]:
    from tests.ranks import run_ranks

    return run_ranks(2, function, *args)


def test_adapters_of_another_method_or_shape_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    peft.get_peft_model(model, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])).save_pretrained(
        tmp_path / "ia3"
    )
    adapted_by_peft(tiny_model(num_experts=4), "experts").save_pretrained(tmp_path / "small")
    for name, message in (("ia3", "not of LoRA"), ("small", "does not fit Qwen3MoeForCausalLM: (?s:.)*size mismatch"),
                          ("none", "cannot be had from the hub|no adapter")):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            add_adapter(tiny_model(), LoRA(pretrained=str(tmp_path / name)))


def test_what_adapts_like_peft_says_the_same() -> None:
    ours = lora_like_peft("both").config(tiny_model())
    theirs = adapted_by_peft(tiny_model(), "both").peft_config["default"]
    assert set(ours.target_modules) == set(theirs.target_modules)
    assert set(ours.target_parameters) == set(theirs.target_parameters)


@pytest.mark.parametrize(
    ("family", "left_out"),
    [("afmoe", "gate_proj"), ("deepseek_v4", "o_a_proj"), ("nemotron_h", "out_proj"), ("jamba", "dt_proj")],
)
def test_the_default_leaves_out_what_peft_cannot_adapt_in_attention(family: str, left_out: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config_of(family))
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert any(name.endswith(f".{left_out}") for name in linear), "the model has none"
    add_adapter(model, LoRA(r=2, experts=False))
    adapted = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted
    assert left_out not in adapted
