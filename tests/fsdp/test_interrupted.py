"""What follows a forward or backward that raised is what would have followed without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lightning_ep import ParallelLayout, expert_plan, parallelize
from lightning_ep.fsdp import groups as layer_groups
from lightning_ep.fsdp.accumulation import set_gradient_sync
from lightning_ep.loss import summed_loss
from lightning_ep.ops.cross_entropy import shifted
from tests.ranks import assert_ranks_agree, device, run_ranks
from tests.reference import batches, tiny_model
from tests.rows import wrong_gradients

FORWARD = ["embed_tokens", "layers.1.mlp", "layers.1", "layers.3", "norm"]
BACKWARD = ["embed_tokens", "layers.1.mlp", "layers.1", "layers.3"]


class _Interrupted(BaseException):
    """As KeyboardInterrupt is."""


@contextmanager
def _gathers_arrive_late() -> Iterator[None]:
    """What is gathered ahead on GPUs is still on its way when the host goes on."""
    unshard = FSDPParamGroup.unshard

    def late(group: FSDPParamGroup, async_op: bool = False) -> None:
        if device().type == "cuda":
            with torch.cuda.stream(group.comm_ctx.all_gather_stream):
                torch.cuda._sleep(10**7)  # some 5 ms
        unshard(group, async_op)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FSDPParamGroup, "unshard", late)
        yield


class _Pair:
    """One process's model and the same one sharded, with the parameters that an optimizer would hold."""

    def __init__(self, ep: int, together: bool = False, mode: Any = "none") -> None:
        world = dist.get_world_size()
        self.models: list[Any] = [tiny_model(num_hidden_layers=4), tiny_model(num_hidden_layers=4)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer_groups, "_GROUPED_PARAMETERS", 10**9 if together else 0)
            layout = ParallelLayout.resolve(ep, "auto", world, world)
            parallelize(self.models[1], layout, device(), activation_checkpointing=mode)
        self.params = [dict(model.named_parameters()) for model in self.models]

    def step(self, model: Any, seed: int, fused: bool = False) -> None:
        """Forward and backward, on the same tokens on every rank."""
        ids = batches(1, 2, seed=seed)[0]["input_ids"].to(next(iter(model.parameters())).device)
        if fused:
            loss, _ = summed_loss(model, shifted(ids), {"input_ids": ids})
        else:
            logits = model(input_ids=ids, use_cache=False).logits.float()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), shifted(ids).flatten(), reduction="sum")
        (loss / ids.numel()).backward()

    def interrupted_step(self, where: str, backward: bool, fused: bool = False) -> None:
        """One of the sharded model that raises at the end of a module's forward, or at its backward's beginning."""

        def interrupt(*_: Any) -> None:
            raise _Interrupted

        module = self.models[1].model.get_submodule(where)
        register = module.register_full_backward_pre_hook if backward else module.register_forward_hook
        hook = register(interrupt)
        with pytest.raises(_Interrupted), _gathers_arrive_late():
            self.step(self.models[1], 1, fused)
        hook.remove()

    def update(self) -> None:
        """As an optimizer does, of which the model knows nothing, with gradients set to zero."""
        with torch.no_grad():
            for param in (*self.params[0].values(), *self.params[1].values()):
                param.grad = None
                param.mul_(0.9)

    def wrong(self) -> list[str]:
        """Parameters whose gradients differ."""
        assert self.params[0].keys() == self.params[1].keys()
        return wrong_gradients(self.params[0].items(), self.params[1].values(), 1e-5)


def _next_step(ep: int, together: bool, fused: bool, mode: str) -> list[str]:
    pair, wrong = _Pair(ep, together, mode), []
    for backward, places in ((False, FORWARD), (True, BACKWARD)):
        for where in places:
            pair.interrupted_step(where, backward, fused)
            if not backward and not all(isinstance(param, DTensor) for param in pair.models[1].parameters()):
                wrong.append(f"{where}: still gathered")
            pair.update()
            for model in pair.models:
                pair.step(model, 2, fused)
            wrong += [f"{where}, {backward=}: {param}" for param in pair.wrong()]
            pair.update()
    return wrong


_SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("ep", "together", "fused"),
    [
        *((2, True, False), (2, False, True), (1, False, False)),
        *(pytest.param(*case, marks=_SLOW) for case in ((2, True, True), (2, False, False), (1, False, True))),
    ],
)
def test_the_next_step(ep: int, together: bool, fused: bool) -> None:
    assert_ranks_agree(2, _next_step, ep, together, fused, "none")


@pytest.mark.parametrize("mode", [pytest.param("selective", marks=_SLOW), "full"])
def test_the_next_step_of_layers_that_are_recomputed(mode: str) -> None:
    assert_ranks_agree(2, _next_step, 2, False, False, mode)


def _window(backward: bool) -> list[str]:
    pair, (plain, sharded) = _Pair(1), (None, None)
    plain, sharded = pair.models
    set_gradient_sync(sharded, False)
    pair.step(sharded, 0)
    pair.interrupted_step("layers.1", backward)
    if backward:  # what has come before is lost for layers that have not been reached, so the window starts again
        for param in pair.params[1].values():
            param.grad = None
    else:
        pair.step(plain, 0)
    set_gradient_sync(sharded, True)
    for model in pair.models:
        pair.step(model, 2)
    return pair.wrong()


@pytest.mark.parametrize("backward", [False, True])
def test_an_accumulation_window(backward: bool) -> None:
    assert_ranks_agree(2, _window, backward)


def _other_entrance() -> list[str]:
    pair = _Pair(2)

    def head_sum(model: Any, ids: Tensor) -> Tensor:
        return model.lm_head(model.model(input_ids=ids, use_cache=False).last_hidden_state).square().mean()

    plain, sharded = pair.models
    sharded.head_sum = head_sum.__get__(sharded)
    register_fsdp_forward_method(sharded, "head_sum")
    ids = batches(1, 2)[0]["input_ids"].to(device())

    def interrupt(*_: Any) -> None:
        raise _Interrupted

    hook = sharded.model.norm.register_forward_hook(interrupt)
    with pytest.raises(_Interrupted):
        sharded.head_sum(ids)
    hook.remove()
    pair.update()
    sharded.head_sum(ids).backward()
    head_sum(plain, ids.cpu()).backward()
    return pair.wrong()


def test_methods_that_are_forwards_too() -> None:
    assert_ranks_agree(2, _other_entrance)


class _Around(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.gain = model, nn.Parameter(torch.full((4,), 2.0))

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        output.logits = output.logits * self.gain.mean()
        return output


def _root_around() -> list[str]:
    pair = _Pair(2)
    models = [_Around(model) for model in pair.models]
    root: Any = fully_shard(models[1].to(device()))
    root.set_gradient_divide_factor(1.0)
    root.set_force_sum_reduction_for_comms(True)
    pair.params = [dict(model.named_parameters()) for model in models]
    for model in models:
        pair.step(model, 0)
        pair.step(model, 2)
    return pair.wrong()


def test_a_root_of_the_users_around_ours_goes_on() -> None:
    assert_ranks_agree(2, _root_around)


def _experts_of_the_users() -> list[bool]:
    """Experts spread by the plan alone, under a `fully_shard` and a checkpoint of the user's that stops late."""
    mesh = init_device_mesh(device().type, (dist.get_world_size(), 1), mesh_dim_names=("fsdp", "ep"))
    model = tiny_model().to(device())
    plan = expert_plan(model)
    parallelize_module(model, mesh["ep"], plan)
    experts = [model.get_submodule(name) for name in plan]
    for module in experts:
        fully_shard(module, mesh=mesh["fsdp"], shard_placement_fn=lambda _: Shard(1))
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        fully_shard(layer, mesh=mesh["fsdp"])
    fully_shard(model, mesh=mesh["fsdp"])
    ids = batches(1, 2)[0]["input_ids"].to(device())
    with set_checkpoint_early_stop(False):
        model(input_ids=ids, use_cache=False).logits.square().mean().backward()
    # Gathered, they are DTensors of the experts' mesh alone.
    return [param.device_mesh.ndim == 2 for module in experts for param in module.parameters()]


def test_experts_that_a_users_checkpoint_runs_again_are_shards_after_backward() -> None:
    shards = run_ranks(2, _experts_of_the_users)
    assert all(shards[0])
    assert all(shards[1])
