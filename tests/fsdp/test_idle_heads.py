"""Modules beside the model that only some ranks' steps call: training equals one process on all ranks' batches."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_ep import ParallelLayout, parallelize
from lightning_ep.fsdp.accumulation import reduce_kept_gradients, set_gradient_sync
from lightning_ep.fsdp.optional_parts import parts_in
from tests.ranks import assert_ranks_agree, device, here
from tests.reference import batches, relative_error, tiny_model
from tests.tiny import TinyModule, quiet

# By window and micro-batch: which of two ranks use the head, and how often.
TURNS = [[(1, 0), (0, 2)], [(0, 0), (0, 0)], [(0, 1), (0, 0)], [(0, 0), (1, 1)], [(0, 0), (2, 0)]]


class WithHeads(nn.Module):
    """A model and, beside it, a head that a call may use, and one that every call uses."""

    def __init__(self, detached: bool = False) -> None:
        super().__init__()
        self.model: Any = tiny_model()
        torch.manual_seed(3)
        self.often = nn.Linear(32, 1)
        self.value = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1))
        self.detached = detached

    def forward(self, times: int, **batch: Tensor) -> Tensor:
        output = self.model(**batch, output_hidden_states=True, use_cache=False)
        hidden = output.hidden_states[-1].detach() if self.detached else output.hidden_states[-1]
        loss: Tensor = output.loss + self.often(output.hidden_states[-1]).square().mean()
        for time in range(times):
            loss = loss + self.value(hidden[:, time:]).square().mean()
        return loss


def _lora() -> nn.Module:
    module = WithHeads()
    module.model.requires_grad_(False)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(4)
    module.model = peft.get_peft_model(module.model, config)
    return module


def _probe() -> nn.Module:
    module = WithHeads()
    module.model.requires_grad_(False)
    return module


BUILT: dict[str, Callable[[], nn.Module]] = {
    "all of it trains": WithHeads,
    "the head sees detached states": lambda: WithHeads(detached=True),
    "adapters and heads train": _lora,
    "heads train alone": _probe,
}


def _trains(built: str, mode: Any = "none", replicate: int = 1) -> list[str]:
    rank, world = dist.get_rank(), dist.get_world_size()
    plain, sharded = BUILT[built](), BUILT[built]()
    sizes = ParallelLayout.resolve(2, "auto", world, world, replicate)
    parallelize(sharded, sizes, device(), activation_checkpointing=mode)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.005, weight_decay=0.1) for module in (plain, sharded)]
    wrong: list[str] = []
    data = iter(batches(len(TURNS) * 2 * world, 2))
    for number, window in enumerate(TURNS):
        for index, times in enumerate(window):
            mine = [next(data) for _ in range(world)]
            for other, batch in enumerate(mine):
                plain(times[other % 2], **batch).backward()
            set_gradient_sync(sharded, index == len(window) - 1)
            sharded(times[rank % 2], **here(mine[rank])).backward()
            with torch.no_grad():  # what a rollout or a reference does in between
                found = sharded(0, **here(mine[0]))
            if number == 0 and index == 0 and not relative_error(found, plain(0, **mine[0])) <= 1e-5:
                wrong.append("a forward without gradients")
        reduce_kept_gradients(sharded)
        for (name, expected), param in zip(plain.named_parameters(), sharded.parameters(), strict=True):
            if not isinstance(param, DTensor):
                wrong.append(f"window {number}: {name} is gathered")
            elif (expected.grad is None) != (param.grad is None):
                wrong.append(f"window {number}: {name} {'has' if expected.grad is None else 'lacks'} a gradient")
            elif expected.grad is not None and not relative_error(param.grad.full_tensor(), expected.grad) <= 2e-5:
                wrong.append(f"window {number}: {name} {relative_error(param.grad.full_tensor(), expected.grad):.1e}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return wrong


@pytest.mark.parametrize("built", BUILT)
def test_heads_in_turns(built: str) -> None:
    assert_ranks_agree(2, _trains, built)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "mode", "replicate"), [(2, "full", 1), (4, "none", 1), (4, "none", 2)])
def test_heads_in_turns_on_other_layouts(world: int, mode: str, replicate: int) -> None:
    assert_ranks_agree(world, _trains, "all of it trains", mode, replicate)


class _Valued(TinyModule):
    """Its head is used on rank 0 in training and, once, in validation."""

    def configure_model(self) -> None:
        super().configure_model()
        if not hasattr(self, "value"):
            torch.manual_seed(3)
            self.value = nn.Linear(32, 1)
            self.gathered: list[str] = []

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        self.gathered += [name for name, param in self.named_parameters() if not isinstance(param, DTensor)]
        output = self.model(input_ids=batch["input_ids"], labels=batch["labels"], output_hidden_states=True)
        value = self.value(output.hidden_states[-1]).square().mean() if int(os.environ["RANK"]) == 0 else 0.0
        return output.loss + value


def _fit(root: Path) -> list[str]:
    module = _Valued()
    data = [{"id": torch.zeros(1, dtype=torch.long), **batch} for batch in batches(4, 1)]
    trainer = quiet(root, max_epochs=2, use_distributed_sampler=False, gradient_clip_val=1.0)
    trainer.fit(module, DataLoader(data, batch_size=None), DataLoader(data[:2], batch_size=None))
    assert trainer.global_step == 8
    moved = module.value.weight.full_tensor().cpu()
    torch.manual_seed(3)
    assert not torch.equal(moved, nn.Linear(32, 1).weight.detach())
    assert parts_in(module)
    return module.gathered


def test_in_training_and_validation_of_a_trainer(tmp_path: Path) -> None:
    assert_ranks_agree(2, _fit, tmp_path, init_process_group=False)
