"""The steps that shard a model say so where their order is wrong, by name, before they change anything."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor.parallel import ParallelStyle
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from lightning_ep import ParallelLayout, expert_plan, parallelize
from lightning_ep.parallelize import Steps, check
from tests.hub.every_family import tiny_config_of
from tests.moe.test_own_plan import _decoder
from tests.ranks import assert_ranks_agree, device, here, run_ranks
from tests.reference import VOCAB, batches, relative_error, tiny_model
from tests.rows import wrong_gradients


class _WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.head = tiny_model(), nn.Linear(4, 4)


def _spread(steps: Steps) -> None:
    for experts in steps.experts:
        steps.spread_experts(experts)


def _dense(steps: Steps) -> None:
    _spread(steps)
    steps.shard_dense(steps.models[0])


def _first_experts(steps: Steps) -> nn.Module:
    return next(iter(steps.experts))


# Name of the step, what it needs, the steps before, and the step itself.
ORDERS: list[tuple[str, str, Callable[[Steps], Any], Callable[[Steps], Any]]] = [
    ("freeze_empty", "whole parameters", _spread, lambda s: s.freeze_empty()),
    ("hold_factors_per_expert", "adapters as PEFT builds", _spread, lambda s: s.hold_factors_per_expert()),
    ("cast_constants", "whole models", _spread, lambda s: s.cast_constants()),
    ("broadcast_weights", "whole weights", _spread, lambda s: s.broadcast_weights()),
    ("split_matrices", "FSDP has not taken over", _dense, lambda s: s.split_matrices(s.models[0], {})),
    ("split_matrices", "experts that are whole", _spread, lambda s: s.split_matrices(s.models[0], {})),
    ("spread_experts", "FSDP has not taken over", _dense, lambda s: s.spread_experts(_first_experts(s))),
    ("wrap_layers", "experts that are spread", lambda s: None, lambda s: s.wrap_layers(s.models[0], "full", False)),
    ("wrap_layers", "FSDP has not taken over", _dense, lambda s: s.wrap_layers(s.models[0], "full", False)),
    ("shard_dense", "experts that are spread", lambda s: None, lambda s: s.shard_dense(s.models[0])),
    ("shard_beside", "under FSDP", _spread, lambda s: s.shard_beside()),
    ("sum_gradients", r"to be sharded, and \['head.weight', 'head.bias'\]", _dense, lambda s: s.sum_gradients()),
]


def _out_of_order(index: int) -> None:
    name, needed, before, step = ORDERS[index]
    world, module = dist.get_world_size(), _WithHead()
    layout = ParallelLayout.resolve(world, "auto", world, world)
    meshes = layout.build_meshes(device().type)
    steps = Steps(module, meshes, device(), expert_plan(module), MixedPrecisionPolicy())
    before(steps)
    with pytest.raises(RuntimeError, match=f"^{name} needs .*{needed}.*out of order"):
        step(steps)


def _all_out_of_order() -> None:
    for index in range(len(ORDERS)):
        _out_of_order(index)


def test_every_step_says_what_it_needs() -> None:
    names = {name for name, *_ in ORDERS}
    assert names == {name for name in vars(Steps) if not name.startswith("_")}
    run_ranks(2, _all_out_of_order)


def _other_style() -> None:
    class Other(ParallelStyle):
        def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
            return module

    model, layout = tiny_model(), ParallelLayout(2, ep=2)
    plan = {name: Other() for name in expert_plan(model)}
    steps = Steps(model, layout.build_meshes(device().type), device(), plan, MixedPrecisionPolicy())
    with pytest.raises(ValueError, match=r"Other in the plan spreads no experts. Use lightning_ep.ExpertParallel"):
        steps.spread_experts(_first_experts(steps))


def test_a_style_that_spreads_nothing_is_named() -> None:
    run_ranks(2, _other_style)


def _buffer_of_each_rank() -> list[float]:
    """As the bias of a router that balances without a loss, which user code may have changed on a rank."""
    model, rank, world = tiny_model(), dist.get_rank(), dist.get_world_size()
    router = model.model.layers[0].mlp.gate
    router.register_buffer("bias", torch.full((3,), 5.0 + rank))
    parallelize(model, ParallelLayout(world, ep=world), device())
    return router.bias.tolist()


def test_buffers_in_memory_are_those_of_rank_0_everywhere() -> None:
    assert run_ranks(2, _buffer_of_each_rank) == [[5.0, 5.0, 5.0]] * 2


class _Mine(Qwen3MoeForCausalLM):
    """A class in a file where transformers finds no experts."""


def _own_class() -> float:
    from tests.reference import tiny_config

    torch.manual_seed(0)
    model, world = _Mine(tiny_config()), dist.get_world_size()
    plain = deepcopy(model)
    parallelize(model, ParallelLayout(world, ep=world), device())
    batch = batches(1, 2)[0]
    expected = plain(**batch, use_cache=False).loss
    found = model(**here(batch), use_cache=False).loss
    return relative_error(found.detach().cpu(), expected.detach())


def test_a_model_class_of_the_users_runs_its_experts_over_ranks() -> None:
    assert max(run_ranks(2, _own_class)) < 1e-5


class _Delegating(ParallelStyle):
    """A style of the user's around ours, with a check of its own."""

    def __init__(self, inner: ParallelStyle) -> None:
        super().__init__()
        self.inner = inner

    def validate(self, module: nn.Module, num_ranks: int) -> None:
        raise ValueError(f"my own check for {num_ranks} ranks")

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        return self.inner._apply(module, device_mesh)


def test_a_style_of_the_users_is_asked_before_anything_changes() -> None:
    model = tiny_model()
    plan = {name: _Delegating(style) for name, style in expert_plan(model).items()}
    with pytest.raises(ValueError, match="my own check for 2 ranks"):
        check(model, ParallelLayout(2, ep=2), plan)


def _without_shared_experts() -> float:
    """Matrices of no shared experts, which DeepSeek-V3 has where a config says zero of them."""
    torch.manual_seed(0)
    config: Any = tiny_config_of("deepseek_v3")
    config.n_shared_experts = 0
    model = AutoModelForCausalLM.from_config(config)
    model.set_experts_implementation("eager")
    plain, world, batch = deepcopy(model), dist.get_world_size(), batches(1, 2)[0]
    assert any(param.numel() == 0 for param in plain.parameters())
    plain(**batch, use_cache=False).loss.backward()
    parallelize(model, ParallelLayout(world, ep=world), device())
    (model(**here(batch), use_cache=False).loss / world).backward()
    expected = {name: param.grad for name, param in plain.named_parameters() if param.numel() > 0}
    found = {name: param.grad.full_tensor() for name, param in model.named_parameters() if param.numel() > 0}
    return max(relative_error(found[name], grad) for name, grad in expected.items() if grad is not None)


def test_parameters_without_numbers_are_left_alone() -> None:
    assert max(run_ranks(2, _without_shared_experts)) < 1e-5


class _Holds(nn.Module):
    """Has no forward: its user calls what it holds, as a LightningModule's steps do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.Module()
        self.heads.value = nn.Sequential(nn.Linear(VOCAB, 4), nn.Tanh(), nn.Linear(4, 1))


def _loss_of_parts(module: Any, whole_head: bool) -> Tensor:
    ids = batches(1, 2)[0]["input_ids"].to(device())
    output = module.model(ids)
    hidden: Tensor = output if isinstance(output, Tensor) else output.logits
    for part in [module.heads.value] if whole_head else module.heads.value:
        hidden = part(hidden)
    return hidden.square().mean()


def _trains_parts() -> list[str]:
    world, wrong = dist.get_world_size(), []
    plans: list[tuple[Any, Any]] = [(tiny_model, None), (_decoder, {"model.layers.*.moe.experts": "experts"})]
    for build, plan in plans:
        torch.manual_seed(0)
        plain = _Holds(build()).to(device())
        sharded = deepcopy(plain)
        parallelize(sharded, ParallelLayout(world, ep=world), device(), plan=plan)
        for module in (plain, sharded):
            # Parts of a list of layers one by one: of a model of plain PyTorch they are called as a whole.
            _loss_of_parts(module, whole_head=plan is not None).backward()
        wrong += wrong_gradients(plain.named_parameters(), sharded.parameters(), 1e-5)
    return wrong


@pytest.mark.parametrize("world", [1, 2])
def test_modules_without_a_forward_are_looked_into(world: int) -> None:
    assert_ranks_agree(world, _trains_parts)


def test_parameters_that_no_forward_comes_to_are_refused_by_name() -> None:
    module = _WithHead()
    module.prompts = nn.ParameterList([torch.zeros(4, 32)])
    with pytest.raises(ValueError, match=r"the parameter prompts\.0 of ParameterList belongs to no submodule"):
        check(module, ParallelLayout(2, ep=2), expert_plan(module))
