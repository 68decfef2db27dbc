"""Random weights: the model's own rules, the same on every layout, no two experts alike."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.precision.utils import _DtypeContextManager
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.models.qwen3_moe import Qwen3MoeForCausalLM

from lightning_ep import ParallelLayout, from_config, parallelize
from lightning_ep.hub.initialize import materialize
from tests.distributed import device, run_ranks
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
