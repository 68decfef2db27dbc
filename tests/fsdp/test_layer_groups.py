"""Layers that FSDP gathers together are right, too, where forward or backward goes through some of them only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from lightning_ep import ParallelLayout, parallelize
from lightning_ep.fsdp import groups as layer_groups
from tests.ranks import assert_ranks_agree, device, run_ranks
from tests.reference import batches, tiny_model
from tests.rows import wrong_gradients

LAYERS = 4


def _models(ep: int | None = None) -> tuple[Any, Any]:
    """One process's model, and the same sharded: its layers are one group, unless there is another ``ep``."""
    plain, sharded = tiny_model(num_hidden_layers=LAYERS), tiny_model(num_hidden_layers=LAYERS)
    world = dist.get_world_size()
    parallelize(sharded, ParallelLayout.resolve(ep or world, "auto", world, world), device())
    if ep is not None:
        return plain, sharded
    layers = sharded.model.layers
    assert all(isinstance(layer, FSDPModule) for layer in layers)
    assert len({layer._get_fsdp_state() for layer in layers}) == 1
    return plain, sharded


def _step(model: Any, hidden: int | None, where: torch.device) -> None:
    """Forward and backward on the same tokens on every rank, with a loss on one layer's output or on the logits."""
    ids = batches(1, 2)[0]["input_ids"].to(where)
    output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    (output.logits if hidden is None else output.hidden_states[hidden]).square().mean().backward()


def _far(plain: Any, sharded: Any, tolerance: float = 1e-5) -> list[str]:
    return wrong_gradients(plain.named_parameters(), sharded.parameters(), tolerance)


def _middle(hidden: int) -> list[str]:
    plain, sharded = _models()
    for _ in range(2):
        _step(plain, hidden, torch.device("cpu"))
        _step(sharded, hidden, device())
    return _far(plain, sharded)


def test_a_loss_on_hidden_states_in_the_middle() -> None:
    for hidden in (1, 3):
        assert_ranks_agree(2, _middle, hidden)


def _exit(training: bool) -> list[str]:
    plain, sharded = _models()
    for model, where in ((plain, torch.device("cpu")), (sharded, device())):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 if model is plain else 0.1 / dist.get_world_size())
        for depth in (LAYERS, 2, LAYERS):
            # As in models with early exits; what is behind has no gradient in that step.
            model.config.num_hidden_layers = depth
            with torch.set_grad_enabled(training or depth == LAYERS):
                if training or depth == LAYERS:
                    _step(model, None, where)
                else:
                    model(input_ids=batches(1, 2)[0]["input_ids"].to(where), use_cache=False)
            optimizer.step()
        optimizer.zero_grad()
        _step(model, None, where)
    return _far(plain, sharded, 1e-3)  # three steps of a GPU; weights of the step before are off by about 1


def test_a_forward_that_ends_in_the_middle() -> None:
    for training in (True, False):
        assert_ranks_agree(2, _exit, training)


def _alone(ep: int | None) -> list[str]:
    """A probe of single layers, before and after an update, with and without gradients."""
    plain, sharded = _models(ep)
    found: list[list[float]] = []
    for model, where in ((plain, torch.device("cpu")), (sharded, device())):
        params = list(model.parameters())
        ids = batches(1, 2)[0]["input_ids"].to(where)
        positions = torch.arange(ids.shape[1], device=where)[None]
        _step(model, None, where)
        found.append([])
        for index in (1, 3, 0, 2):
            hidden = torch.full((*ids.shape, 32), 0.1, device=where)
            kwargs = {"position_embeddings": model.model.rotary_emb(hidden, positions), "attention_mask": None}
            for training in (False, True):
                with torch.set_grad_enabled(training):
                    output = model.model.layers[index](hidden, position_ids=positions, **kwargs)
                    loss = (output if isinstance(output, torch.Tensor) else output[0]).square().mean()
                found[-1].append(loss.item())
                if training:
                    loss.backward()
                with torch.no_grad():
                    for param in params:
                        param.mul_(0.9)
        _step(model, None, where)
    wrong = _far(plain, sharded)
    if found[1] != pytest.approx(found[0], rel=1e-5):
        wrong.append(f"losses {found[1]} in place of {found[0]}")
    return wrong


@pytest.mark.parametrize("ep", [None, 1])
def test_layers_that_are_called_by_themselves(ep: int | None) -> None:
    assert_ranks_agree(2, _alone, ep)


def _embedding_first(ep: int | None) -> list[str]:
    """As with soft prompts."""
    plain, sharded = _models(ep)
    for model, where in ((plain, torch.device("cpu")), (sharded, device())):
        for _ in range(2):
            embedded = model.get_input_embeddings()(batches(1, 2)[0]["input_ids"].to(where))
            model(inputs_embeds=embedded, use_cache=False).logits.square().mean().backward()
    return _far(plain, sharded)


@pytest.mark.parametrize("ep", [None, 1])
def test_an_embedding_that_is_called_before_the_model(ep: int | None) -> None:
    assert_ranks_agree(2, _embedding_first, ep)


def _dtypes() -> list[torch.dtype]:
    model, world = tiny_model(num_hidden_layers=LAYERS), dist.get_world_size()
    rotary, seen = model.model.rotary_emb, []
    plain = rotary.forward
    rotary.forward = lambda *args, **kwargs: tuple(table.float() for table in plain(*args, **kwargs))  # as in ernie4_5
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    parallelize(model, ParallelLayout.resolve(world, "auto", world, world), device(), mp_policy=policy)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["position_embeddings"][0].dtype), with_kwargs=True
        )
    _step(model, None, device())
    return seen


def test_every_layer_of_a_group_gets_its_inputs_in_the_compute_dtype() -> None:
    assert run_ranks(2, _dtypes) == [[torch.bfloat16] * LAYERS] * 2


def _frozen(names: tuple[str, ...]) -> list[str]:
    plain, sharded = _models()
    for model, where in ((plain, torch.device("cpu")), (sharded, device())):
        for name, param in model.named_parameters():
            param.requires_grad_(not any(word in name for word in names))
        for _ in range(2):
            _step(model, None, where)
    return _far(plain, sharded)


@pytest.mark.parametrize("names", [("embed_tokens", "layers.0."), ("layers.1.", "layers.2."), ("layers.3.", "norm")])
def test_frozen_layers_among_others(names: tuple[str, ...]) -> None:
    assert_ranks_agree(2, _frozen, names)


@pytest.mark.parametrize(
    ("limit", "expected"), [(0, [1, 1, 1, 1, 1]), (3, [1, 2, 1, 1]), (4, [3, 1, 1]), (9, [1, 4]), (99, [5])]
)
def test_sizes_decide(limit: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_groups, "_GROUPED_PARAMETERS", limit)
    layers = [torch.nn.Linear(size, 1, bias=False) for size in (1, 2, 1, 5, 1)]
    # One larger than the limit is a group, too.
    assert [len(group) for group in layer_groups.group_layers(layers, set())] == expected
