"""Parameters that only some ranks' batches use, beside others that all use: gradients are those of one process."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from lightning_ep import ParallelLayout, expert_plan, parallelize
from lightning_ep.fsdp.accumulation import reduce_kept_gradients, set_gradient_sync
from tests import multimodal
from tests.multimodal import multimodal_model, text_batch
from tests.ranks import assert_ranks_agree, device, here
from tests.reference import VOCAB, relative_error, tiny_model

# By window and micro-batch: the branches that two ranks take. Nobody takes "b" in the first window, "a" in the third.
TURNS = [[("a", "")], [("a", "b")], [("b", "b")], [("", ""), ("b", "a")], [("ab", "")]]
# "b" comes in the last micro-batch of a window only, "a" in the first only.
AFTER = [[("a", "a"), ("b", "b")], [("a", ""), ("", "b")]]
ALWAYS = [[("ab", "ab")], [("ab", "ab")], [("a", "b")]]


class _Branches(nn.Module):
    """A layer of a transformers model with two branches in its group of FSDP, taken as the batch says."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.taken = layer, ""
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.layer(*args, **kwargs)
        for name in self.taken:
            hidden = hidden + self.get_submodule(name)(hidden)
        return hidden

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in ("layer", "a", "b") else getattr(super().__getattr__("layer"), name)


def _model(plain: bool) -> Any:
    model: Any = tiny_model(num_hidden_layers=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.model.layers[1] = _Branches(model.model.layers[1])
    model._no_split_modules = ["_Branches", "Qwen3MoeDecoderLayer"]
    return _Around(model) if plain else model


class _Around(nn.Module):
    """What no transformers model is, for those who shard it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = model.model.layers  # type: ignore[union-attr]
        self.embed, self.head = nn.Embedding(VOCAB, 32), nn.Linear(32, VOCAB)
        self.rotary = model.model.rotary_emb  # type: ignore[union-attr]

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        hidden = self.embed(input_ids)
        places = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=self.rotary(hidden, places), position_ids=places)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())


def _loss(model: Any, taken: str, seed: int, where: torch.device) -> Tensor:
    (branches,) = (child for child in model.modules() if isinstance(child, _Branches))
    branches.taken = taken
    ids = torch.randint(0, VOCAB, (1, 8), generator=torch.Generator().manual_seed(seed)).to(where)
    out = model(input_ids=ids, labels=ids)
    return out if isinstance(out, Tensor) else out.loss


def _trains(turns: list[Any], plain: bool, replicate: int, bf16: bool = False) -> list[str]:
    world, rank = dist.get_world_size(), dist.get_rank()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        one = _model(plain)
        torch.manual_seed(2)
        sharded = _model(plain)
    layout = ParallelLayout.resolve(min(world, 2) // replicate, "auto", world, world, replicate)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else None
    tolerance = 0.5 if bf16 else 2e-5  # near-ties in routers send tokens elsewhere
    plan = expert_plan(_model(False), layout)
    names = {name.replace("model.layers", "layers"): "experts" for name in plan} if plain else None
    parallelize(sharded, layout, device(), plan=names, mp_policy=policy)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.005, weight_decay=0.3) for model in (one, sharded)]
    wrong: list[str] = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for number, window in enumerate(turns):
            for index, taken in enumerate(window):
                for other in range(world):
                    _loss(one, taken[other % 2], 100 * number + 10 * index + other, torch.device("cpu")).backward()
                set_gradient_sync(sharded, index == len(window) - 1)
                _loss(sharded, taken[rank % 2], 100 * number + 10 * index + rank, device()).backward()
            reduce_kept_gradients(sharded)
            for (name, expected), param in zip(one.named_parameters(), sharded.parameters(), strict=True):
                if (expected.grad is None) != (param.grad is None) and "experts" not in name:
                    wrong.append(f"window {number}: {name} {'has' if expected.grad is None else 'lacks'} a gradient")
                elif expected.grad is not None:
                    error = relative_error(param.grad.full_tensor(), expected.grad)
                    wrong += [] if error <= tolerance else [f"window {number}: gradient of {name} {error:.1e}"]
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for (name, expected), param in zip(one.named_parameters(), sharded.parameters(), strict=True):
        if not relative_error(param.full_tensor(), expected.detach()) <= tolerance:
            wrong.append(f"weights of {name}")
    said = [str(warning.message) for warning in told if "have no gradient on this rank" in str(warning.message)]
    if bool(said) != (turns == ALWAYS):
        wrong.append(f"warned: {said}")
    return wrong


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("world", "replicate"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_branches_in_turns(plain: bool, world: int, replicate: int) -> None:
    assert_ranks_agree(world, _trains, TURNS, plain, replicate)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_what_only_the_last_of_a_window_uses_in_bf16(world: int, plain: bool) -> None:
    assert_ranks_agree(world, _trains, AFTER, plain, 1, True)


def test_a_branch_left_out_for_the_first_time_later_is_told() -> None:
    assert_ranks_agree(2, _trains, ALWAYS, False, 1)


def _compresses() -> list[str]:
    rank, lengths = dist.get_rank(), (40, 300)
    with pytest.MonkeyPatch.context() as patch:
        one, sharded = multimodal_model("deepseek_v4").double(), multimodal_model("deepseek_v4").double()
        one.to(device())  # what its compressors choose is near a tie for another kind of device
        parallelize(sharded, ParallelLayout.resolve(2, 1, 2, 2), device())
        for other, length in enumerate(lengths):
            patch.setattr(multimodal, "_LENGTH", length)
            batch = here(text_batch(other))
            one(**batch, use_cache=False).loss.backward()
            if other == rank:
                mine = batch
        sharded(**mine, use_cache=False).loss.backward()
    return [
        name
        for (name, expected), param in zip(one.named_parameters(), sharded.parameters(), strict=True)
        if "experts" not in name
        and ((expected.grad is None) != (param.grad is None)
             or (expected.grad is not None and not relative_error(param.grad.full_tensor(), expected.grad) <= 1e-6))
    ]  # fmt: skip


def test_compressors_that_short_sequences_do_not_use() -> None:
    assert_ranks_agree(2, _compresses)
