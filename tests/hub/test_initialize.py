"""Random weights: the model's own rules, the same on every layout, no two experts alike."""

from __future__ import annotations

import peft
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.precision.utils import _DtypeContextManager
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.models.qwen3_moe import Qwen3MoeForCausalLM

from lightning_ep import ParallelLayout, from_config, parallelize
from lightning_ep.hub.initialize import materialize
from tests.ranks import device, run_ranks
from tests.reference import tiny_config


def _weights(ep: int, seed: int, tp: int = 1) -> dict[str, Tensor]:
    world = dist.get_world_size()
    model = from_config(tiny_config(tie_word_embeddings=True, mlp_only_layers=[0], pad_token_id=70))
    parallelize(model, ParallelLayout.resolve(ep, "auto", world, world, tp=tp), device(), seed=seed)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return {
        **{name: p.detach().full_tensor().cpu() for name, p in model.named_parameters()},
        **{name: b.cpu() for name, b in model.named_buffers()},
    }


def test_one_seed_gives_one_model_on_every_layout() -> None:
    reference = run_ranks(1, _weights, 1, 3)[0]
    for world, ep, tp in [(2, 2, 1), (2, 1, 1), (4, 2, 1), (4, 1, 1), (2, 1, 2), (4, 4, 2)]:
        for found in run_ranks(world, _weights, ep, 3, tp):
            assert found.keys() == reference.keys()
            for name, value in reference.items():
                assert torch.equal(found[name], value), f"{name} at world={world}, ep={ep}, tp={tp}"
    name = "model.embed_tokens.weight"
    assert not torch.equal(run_ranks(1, _weights, 1, 4)[0][name], reference[name]), "another seed, another model"


def test_the_models_own_rules_are_followed() -> None:
    found = run_ranks(1, _weights, 1, 3)[0]
    torch.manual_seed(0)
    expected = Qwen3MoeForCausalLM(tiny_config(tie_word_embeddings=True, mlp_only_layers=[0], pad_token_id=70))
    for name, param in expected.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(found[name], torch.ones_like(param)), name
        else:
            assert found[name].std().item() == pytest.approx(0.02, rel=0.2), name
            assert abs(found[name].mean().item()) < 0.005, name
    for name, buffer in expected.named_buffers():
        assert torch.equal(found[name], buffer), name
    experts = found["model.layers.1.mlp.experts.gate_up_proj"].flatten(1)
    similar = torch.corrcoef(experts).fill_diagonal_(0).abs().max().item()
    assert similar < 0.2, "two experts drew from one stream"
    layers = [found[f"model.layers.{i}.self_attn.q_proj.weight"].flatten() for i in range(2)]
    assert torch.corrcoef(torch.stack(layers))[0, 1].abs().item() < 0.2


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    materialize(from_config(tiny_config()), torch.device("cpu"), seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_weights_do_not_depend_on_the_default_dtype() -> None:
    expected, found = from_config(tiny_config()), from_config(tiny_config())
    materialize(expected, torch.device("cpu"), seed=1)
    found.to(torch.bfloat16)
    with _DtypeContextManager(torch.bfloat16):
        materialize(found, torch.device("cpu"), seed=1)
    for (name, value), (_, full) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert value.dtype is torch.bfloat16
        assert torch.equal(value, full.bfloat16()), name


def test_a_module_without_a_rule_is_named() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with torch.device("meta"):
        module = nn.ModuleDict({"head": Head(), "linear": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match=r"head \(Head\).*reset_parameters"):
        materialize(module, torch.device("cpu"), seed=1)


def test_generators_of_other_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    materialize(from_config(tiny_config()), torch.device("cpu"), seed=1)
    assert not seeded
    torch.manual_seed(0)
    assert seeded, "else this test sees nothing"


# -------------------------------------------------------------------------------- modules with rules of their own


class _Head(nn.Module):
    """Its last layer starts at zero, whatever the layer itself would do."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(32, 32), nn.Linear(32, 3)
        self.scale = nn.Parameter(torch.empty(3))
        self.register_buffer("steps", torch.empty(2, dtype=torch.long), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.scale, 0.5)
        self.steps.copy_(torch.arange(2))


def _with_heads(built_by_us: bool) -> nn.Module:
    config = tiny_config()
    with torch.device("meta"):
        model = from_config(config) if built_by_us else Qwen3MoeForCausalLM(config)
        model.probe = _Head()
        beside = nn.ModuleDict({"head": _Head(), "attention": nn.MultiheadAttention(32, 2), "norm": nn.LayerNorm(32)})
    return nn.ModuleDict({"model": model, "beside": beside})


@pytest.mark.parametrize("built_by_us", [True, False])
def test_modules_that_initialise_themselves_keep_their_rule(built_by_us: bool) -> None:
    module = _with_heads(built_by_us)
    materialize(module, torch.device("cpu"), seed=1)
    for head in (module["model"].probe, module["beside"]["head"]):
        assert not head.out.weight.any()
        assert (head.scale == 0.5).all()
        assert head.steps.tolist() == [0, 1]
        limit = 32**-0.5  # of nn.Linear: uniform, also its bias, which a Qwen3 would set to zero
        assert 0.9 * limit < head.hidden.weight.abs().max() <= limit
        assert head.out.bias.any()
    attention = module["beside"]["attention"]
    assert not attention.out_proj.bias.any(), "set by the attention, not by its layer"
    assert attention.in_proj_weight.std().item() == pytest.approx((2 / (32 + 96)) ** 0.5, rel=0.1)
    assert module["model"].lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_head_in_place_of_the_models_is_no_module_of_the_models() -> None:
    model = from_config(tiny_config())
    with torch.device("meta"):
        model.lm_head = nn.Linear(32, 5)
    materialize(model, torch.device("cpu"), seed=1)
    assert 0.9 * 32**-0.5 < model.lm_head.weight.abs().max() <= 32**-0.5
    assert model.model.layers[0].self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_integers_that_no_rule_fills_are_named() -> None:
    class Counter(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("ids", torch.arange(3))

    with torch.device("meta"):
        module = nn.ModuleDict({"counter": Counter()})
    with pytest.raises(ValueError, match=r"counter\.ids is on the meta device"):
        materialize(module, torch.device("cpu"), seed=1)


# -------------------------------------------------------------------------------- PEFT


def _adapted(config: peft.PeftConfig, built_by_us: bool = True, inside: bool = False) -> nn.Module:
    if built_by_us:
        model = from_config(tiny_config())
    else:
        with torch.device("meta"):
            model = Qwen3MoeForCausalLM(tiny_config())
    if not inside:
        return peft.get_peft_model(model, config)
    model.add_adapter(config)
    return model


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("built_by_us", [True, False])
@pytest.mark.parametrize("how", [True, False, "gaussian"])
def test_lora_starts_as_peft_starts_it(how: bool | str, built_by_us: bool, inside: bool) -> None:
    targets = ["q_proj", "embed_tokens"] if how else ["q_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=how)
    expected = dict(peft.get_peft_model(Qwen3MoeForCausalLM(tiny_config()), config).named_parameters())
    model = _adapted(config, built_by_us, inside)
    materialize(model, torch.device("cpu"), seed=1)
    found = {name if not inside else f"base_model.model.{name}": param for name, param in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, param in found.items():
        reference = expected[name]
        assert param.any().item() == reference.any().item(), name
        if reference.any():
            assert param.std().item() == pytest.approx(reference.std().item(), rel=0.3), name
            assert param.abs().max().item() == pytest.approx(reference.abs().max().item(), rel=0.5), name
    adapters = [param.flatten() for name, param in found.items() if "lora_A" in name]
    assert len(adapters) == 2
    assert torch.corrcoef(torch.stack(adapters))[0, 1].abs() < 0.4, "two layers drew from one stream"


def test_whole_modules_that_peft_trains_start_as_the_models() -> None:
    model = _adapted(
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "post_attention_layernorm"])
    )
    materialize(model, torch.device("cpu"), seed=1)
    wrapped = model.base_model.model.lm_head
    assert wrapped.original_module.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(wrapped.modules_to_save["default"].weight, wrapped.original_module.weight)
    assert wrapped.modules_to_save["default"].weight.requires_grad
    assert wrapped.modules_to_save["default"].weight is not wrapped.original_module.weight


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="orthogonal"), "init_lora_weights='orthogonal'"),
        (peft.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False), "init_lora_weights=False"),
        (peft.LoraConfig(target_modules=["q_proj"], use_dora=True), "a variant of LoRA"),
        (peft.VeraConfig(target_modules=["q_proj"]), "q_proj"),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "prompt_encoder"),
    ],
)
def test_adapters_that_start_from_values_that_are_not_there_are_named(config: peft.PeftConfig, what: str) -> None:
    with pytest.raises(ValueError, match=rf"{what}.*build the base model in memory"):
        materialize(_adapted(config), torch.device("cpu"), seed=1)
