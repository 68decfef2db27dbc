"""Which experts run on the fused path, and that the others train just as exactly on transformers' kernels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from transformers import PreTrainedModel

from lightning_ep import ExpertParallelStrategy, ParallelLayout, expert_plan, parallelize
from lightning_ep.fsdp.groups import shard_experts, sum_gradients, unmanaged_experts
from lightning_ep.moe.dispatch import LocalDispatcher
from lightning_ep.moe.expert_parallel import ExpertParallel
from lightning_ep.moe.function import moe_forward
from lightning_ep.ops.fused_experts import FusedExperts
from lightning_ep.parallelize import check
from lightning_ep.transformers_adapter import experts_modules, why_not_fused
from tests.ranks import assert_ranks_agree, device, run_ranks
from tests.reference import batches, family_model, relative_error
from tests.tiny import quiet

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "pad_token_id": 0,
    "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8},
    "mixtral": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8},
    "gpt_oss": {"num_local_experts": 8, "sliding_window": 8},
}
REASONS = {"gpt_oss": "its experts have biases"}


def _model(family: str) -> PreTrainedModel:
    return family_model(family, {**SIZES, **FAMILIES[family]})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_path_is_chosen_by_declared_flags(family: str) -> None:
    reasons = {why_not_fused(module) for module in experts_modules(_model(family)).values()}
    assert reasons == {REASONS.get(family)}


def test_fused_by_name_is_refused_before_anything_is_sharded() -> None:
    model = _model("gpt_oss")
    style = next(iter(expert_plan(model, experts_implementation="fused").values()))
    assert isinstance(style, ExpertParallel)
    with pytest.raises(ValueError, match=r"experts_implementation='fused' cannot serve .*biases.* Use 'auto'"):
        style.validate(next(iter(experts_modules(model).values())), 2)


def test_other_activations_and_gates_are_not_fused() -> None:
    module = next(iter(experts_modules(_model("qwen3_moe")).values()))
    module.act_fn = nn.GELU()
    assert why_not_fused(module) == "its activation is GELU, not SiLU"


def _gradients(family: str, ep: int) -> list[str]:
    rank, world = dist.get_rank(), dist.get_world_size()
    data = batches(world, 2)
    expected = _model(family)
    sum(expected(**batch).loss for batch in data).backward()
    model = _model(family)
    parallelize(model, ParallelLayout.resolve(ep, "auto", world, world), device())
    model(**{key: value.to(device()) for key, value in data[rank].items()}).loss.backward()
    wrong = []
    for (name, param), reference in zip(model.named_parameters(), expected.parameters(), strict=True):
        grad: Tensor = param.grad.full_tensor()
        wanted = reference.grad if reference.grad is not None else torch.zeros_like(reference)
        # Where the true gradient is all but zero (a key bias shifts every score alike) only noise is left.
        if not (relative_error(grad, wanted) <= 1e-5 or (grad.cpu() - wanted).norm() <= 1e-7):
            wrong.append(f"{name}: {relative_error(grad, wanted):.1e}")
    return wrong


@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_moe"])
def test_gradients_equal_one_process(family: str, world: int, ep: int) -> None:
    assert_ranks_agree(world, _gradients, family, ep)


def _rounding(ep: int) -> float:
    """How far the experts' output is from that of the same bf16 experts with fp32 routing weights, on one process."""
    world = dist.get_world_size()
    reference = next(iter(experts_modules(_model("qwen3_moe")).values())).to(device(), torch.bfloat16)
    model = _model("qwen3_moe")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    parallelize(model, ParallelLayout.resolve(ep, "auto", world, world), device(), mp_policy=policy)
    torch.manual_seed(dist.get_rank())
    hidden = torch.randn(16, 32, device=device()).bfloat16()
    # All but one: as bf16 it would be 1.
    ids, weights = torch.randint(0, 8, (16, 1), device=device()), torch.full((16, 1), 1 - 2**-9, device=device())
    experts = next(iter(experts_modules(model).values()))
    if isinstance(experts, FSDPModule):
        experts.set_modules_to_forward_prefetch([])  # called outside of the model, which they would need
    with torch.no_grad():
        found = experts(hidden, ids, weights)
        expected = moe_forward(
            LocalDispatcher(8), FusedExperts(8), hidden, ids, weights, [reference.gate_up_proj, reference.down_proj]
        )
    return relative_error(found, expected)


@pytest.mark.parametrize("ep", [1, 2])
def test_routing_weights_in_fp32_stay_so_on_every_layout(ep: int) -> None:
    # Routers of the DeepSeek kind compute in fp32, under FSDP with bf16 too.
    assert max(run_ranks(2, _rounding, ep)) < 1e-3


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (
            peft.LoraConfig(target_modules="all-linear"),
            "mlp.gate.weight, which belongs to no experts",
        ),  # as PEFT has it
        (peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["experts"]), "a ModulesToSaveWrapper around the"),
    ],
)
def test_what_cannot_be_split_with_experts_is_refused_by_name(config: peft.LoraConfig, what: str) -> None:
    adapted = peft.get_peft_model(_model("qwen3_moe"), config)
    with pytest.raises(ValueError, match=what):
        check(adapted, ParallelLayout(2, ep=2), expert_plan(adapted))


def _kernels_by_name(family: str, ep: int) -> list[str]:
    """Every kernel that the experts interface has for this device, on the user's own FSDP and on ours."""
    rank, world = dist.get_rank(), dist.get_world_size()
    data = batches(world, 2)
    expected = _model(family)
    sum(expected(**batch).loss for batch in data).backward()
    batch = {key: value.to(device()) for key, value in data[rank].items()}
    wrong = []
    for name in ("auto", "eager", "batched_mm", "grouped_mm", *(["fused"] if family not in REASONS else [])):
        for by_hand in (False, True):
            model = _model(family)
            for module in experts_modules(model).values():
                module.config = copy.copy(module.config)  # as where layers have configs of their own
            plan, sizes = expert_plan(model, name), ParallelLayout.resolve(ep, "auto", world, world)
            if by_hand:
                meshes = sizes.build_meshes(device().type)
                parallelize_module(model.to(device()), meshes.expert["ep"], plan)
                for experts in experts_modules(model).values():
                    shard_experts(experts, meshes, MixedPrecisionPolicy(), device())
                ignored = {param for module in unmanaged_experts(model) for param in module.parameters()}
                fully_shard(model, mesh=meshes.dense_shards, ignored_params=ignored)
                sum_gradients(model)
            else:
                parallelize(model, sizes, device(), plan=plan)
            # What a user's callback or `generate` does: on classes that FSDP made it sets something, or nothing.
            type(model)._can_set_experts_implementation_cached_value = name != "eager"
            model.set_experts_implementation("eager")
            model(**batch).loss.backward()
            pairs = zip(model.named_parameters(), expected.parameters(), strict=True)
            errors = {n: relative_error(p.grad.full_tensor(), q.grad) for (n, p), q in pairs if q.grad.norm() > 1e-6}
            worst = max(errors, key=lambda key: errors[key])
            if not errors[worst] <= 1e-5:
                wrong.append(f"{name}, by hand {by_hand}: {worst} {errors[worst]:.1e}")
    return wrong


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_kernels_named_in_the_plan_run_whatever_a_config_says(family: str, ep: int) -> None:
    assert_ranks_agree(2, _kernels_by_name, family, ep)


def test_a_kernel_named_beside_a_plan_is_refused(tmp_path: Path) -> None:
    strategy = ExpertParallelStrategy(plan=expert_plan(_model("qwen3_moe")), experts_implementation="eager")
    with pytest.raises(ValueError, match=r"'eager' beside a plan .* `expert_plan\(model, 'eager'\)`"):
        quiet(tmp_path, strategy=strategy)
