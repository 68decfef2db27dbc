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
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_ep import ExpertParallelStrategy, ParallelLayout, expert_plan, parallelize
from lightning_ep.fsdp.groups import shard_experts, sum_gradients, unmanaged_experts
from lightning_ep.moe.dispatch import LocalDispatcher
from lightning_ep.moe.expert_parallel import ExpertParallel
from lightning_ep.moe.function import moe_forward
from lightning_ep.ops.expert_form import Activation, ExpertForm
from lightning_ep.ops.fused_experts import FusedExperts
from lightning_ep.parallelize import check
from lightning_ep.transformers_adapter import experts_modules, fused_form, local_experts_function, why_not_fused
from tests.hub.every_family import auto_class_of, tiny_config_of
from tests.ranks import assert_ranks_agree, device, here, run_ranks
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


def _model(family: str) -> PreTrainedModel:
    return family_model(family, {**SIZES, **FAMILIES[family]})


# By family: what its experts have that Mixtral's have not.
FORMS: dict[str, ExpertForm] = {
    "mixtral": ExpertForm(),
    "beam": ExpertForm(),  # whose gate function computes in fp32, as ours does
    "lfm2_moe": ExpertForm(),
    "aria_text": ExpertForm(is_transposed=True),
    "gpt_oss": ExpertForm(Activation(interleaved=True, alpha=1.702, limit=7.0, up_offset=1.0), True, True),
    "openai_privacy_filter": ExpertForm(Activation(alpha=1.702, limit=7.0, up_offset=1.0), True, True),
    "minimax_m3_vl_text": ExpertForm(Activation(alpha=1.702, limit=7.0, up_offset=1.0)),
    "deepseek_v4": ExpertForm(Activation(limit=10.0)),
    "glm5_next_text": ExpertForm(Activation(limit=10.0)),
    "hy_v4": ExpertForm(Activation(limit=10.0)),
    "gemma4_text": ExpertForm(Activation("gelu_tanh")),
    "nemotron_h": ExpertForm(Activation("relu2", gated=False)),
}
REASONS = {
    "inkling2_text": "its activation is Inkling2SoftcappedSwiGLU, which has no fused kernel",
    "muse_spark_text": "its experts end with a norm",
    "step3p7": "its class is not declared with `use_experts_implementation`",
}


def _one_experts_module(family: str) -> nn.Module:
    config = tiny_config_of(family)
    with torch.device("meta"):
        model = auto_class_of(config).from_config(config)
    return next(iter(experts_modules(model).values()))


@pytest.mark.parametrize("family", FORMS)
def test_fused_experts_equal_those_of_the_family(family: str) -> None:
    """Output and every gradient, with projections on both sides of the clamps."""
    torch.manual_seed(0)
    module = _one_experts_module(family).to_empty(device="cpu").double()
    form, names = fused_form(module)
    assert form == FORMS[family]
    for param in module.parameters():
        nn.init.normal_(param)
    num_experts, params = module.num_experts, [module.get_parameter(name) for name in names]
    hidden_size = params[0].shape[1 if form.is_transposed else 2]
    ids = torch.stack([torch.randperm(num_experts)[:2] for _ in range(12)])
    hidden, weights, grad = torch.randn(12, hidden_size), torch.rand(12, 2), torch.randn(12, hidden_size)
    leaves = [t.double().requires_grad_() for t in (hidden, weights)]
    eager = local_experts_function(module, "eager")(module, leaves[0], ids, leaves[1])
    expected = [eager, *torch.autograd.grad(eager, [*leaves, *params], grad.double())]
    out = moe_forward(
        LocalDispatcher(num_experts), FusedExperts(num_experts, (), form), leaves[0], ids, leaves[1], params
    )
    found = [out, *torch.autograd.grad(out, [*leaves, *params], grad.double())]
    # Some families compute in fp32 whatever they are given.
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-6


@pytest.mark.parametrize("family", REASONS)
def test_what_is_not_fused_says_why(family: str) -> None:
    assert why_not_fused(_one_experts_module(family)) == REASONS[family]


def test_fused_by_name_is_refused_before_anything_is_sharded() -> None:
    module = _one_experts_module("inkling2_text")
    with pytest.raises(ValueError, match=r"experts_implementation='fused' cannot serve .*Softcapped.* Use 'auto'"):
        ExpertParallel(experts_implementation="fused").validate(module, 2)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_what_an_activation_computes_is_asked_and_not_its_name(family: str) -> None:
    module = _one_experts_module(family)
    if family == "gpt_oss":
        module.limit = 3.0  # type: ignore[assignment]
        assert fused_form(module)[0].activation.limit == 3.0
        module._apply_gate = lambda h: 1.01 * type(module)._apply_gate(module, h)  # type: ignore[attr-defined]
        assert why_not_fused(module) == "its activation is that of GptOssExperts, which has no fused kernel"
    else:
        module.act_fn = nn.GELU()
        assert why_not_fused(module) == "its activation is GELU, which has no fused kernel"


def _gradients(family: str, ep: int) -> list[str]:
    rank, world = dist.get_rank(), dist.get_world_size()
    data = batches(world, 2)
    expected = _model(family)
    sum(expected(**batch).loss for batch in data).backward()
    model = _model(family)
    parallelize(model, ParallelLayout.resolve(ep, "auto", world, world), device())
    model(**here(data[rank])).loss.backward()
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


# Those that `AutoModelForCausalLM` builds, and are not in FAMILIES.
TRAINED = [family for family in FORMS if family not in ("openai_privacy_filter", "glm5_next_text", *FAMILIES)]
# In fp32 their gradients move by more than 1e-5 between two ways to compute GELU, or a sum.
IN_DOUBLE = ("gemma4_text", "hy_v4")


def _tiny(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config_of(family), attn_implementation="eager")
    for param in model.parameters():
        if param.ndim > 1:
            nn.init.normal_(param, std=0.1)
    model.set_experts_implementation("eager")
    return model.double() if family in IN_DOUBLE else model


def _gradients_of_form(family: str) -> list[str]:
    rank, world = dist.get_rank(), dist.get_world_size()
    data = batches(world, 2)
    expected = _tiny(family)
    reference = sum(expected(**batch).loss for batch in data)
    reference.backward()
    wrong = []
    for mode in ("none", "full"):
        model = _tiny(family)
        parallelize(model, ParallelLayout.resolve(world, "auto", world, world), device(), activation_checkpointing=mode)
        loss = model(**here(data[rank])).loss
        loss.backward()
        dist.all_reduce(total := loss.detach().clone())
        if not abs(total.item() - reference.item()) <= 1e-5 * reference.item():
            wrong.append(f"{mode}: loss {total.item()}, not {reference.item()}")
        for (name, param), other in zip(model.named_parameters(), expected.parameters(), strict=True):
            if other.grad is None or other.grad.norm() < 1e-6:
                continue
            error = relative_error(param.grad.full_tensor(), other.grad)
            if not error <= 1e-5:
                wrong.append(f"{mode}, {name}: {error:.1e}")
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("family", TRAINED)
def test_models_of_every_form_train_like_one_process(family: str) -> None:
    assert_ranks_agree(2, _gradients_of_form, family)


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
    batch = here(data[rank])
    wrong = []
    for name in ("auto", "eager", "batched_mm", "grouped_mm", "fused"):
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
