"""What a step makes of losses: means, sums, in windows, of parts of the module; at ep=2, against a plain loop."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ep import CausalLM, ExpertParallelStrategy
from tests.ranks import device
from tests.reference import batches, tiny_config, tiny_model
from tests.rows import WORLD, RowFailures, Rows, refused, whole
from tests.tiny import SMALL, quiet

row = Rows()
LR = 0.1
Batch = dict[str, Tensor]
FLAGS: dict[str, Any] = {"use_distributed_sampler": False, "num_sanity_val_steps": 0, "max_epochs": 1}


class _Module(L.LightningModule):
    """The mean loss of a plain model, and a value head that may be used."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = None
        self.head = _head()

    def configure_model(self) -> None:
        if self.model is None:
            self.model = tiny_model(**SMALL)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


class _CausalLM(CausalLM):
    def __init__(self) -> None:
        config = tiny_config(**SMALL)
        super().__init__(config, pretrained=False, optimizer=lambda params: torch.optim.SGD(params, lr=LR))

    def configure_model(self) -> None:
        if self.model is None:
            self.model = tiny_model(**SMALL)


def _head() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Linear(32, 1)


def _sum(model: Any, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum")


def _tokens(batch: Batch) -> Tensor:
    return (batch["labels"][:, 1:] != -100).sum()


def _penalty(model: Any, batch: Batch) -> Tensor:
    return model(input_ids=batch["input_ids"]).logits.square().mean()


def _fit(root: Path, module: Any, data: list[Batch], **flags: Any) -> None:
    share = data[int(os.environ["RANK"]) :: WORLD]
    quiet(root, **{**FLAGS, **flags}).fit(module, DataLoader(share, batch_size=None))  # type: ignore[arg-type]


def _loop(data: list[Batch], window: int, loss: Callable[[Any, nn.Linear, list[Batch]], Tensor]) -> nn.ModuleDict:
    """One process; ``loss`` is that of all ranks' batches of a window, micro-batch by micro-batch."""
    modules = nn.ModuleDict({"model": tiny_model(**SMALL), "head": _head()})
    optimizer = torch.optim.SGD(modules.parameters(), lr=LR)
    for start in range(0, len(data), window * WORLD):
        optimizer.zero_grad()
        loss(modules["model"], modules["head"], data[start : start + window * WORLD]).backward()
        optimizer.step()
    return modules


def _same(module: Any, reference: nn.ModuleDict) -> None:
    tolerance = 1e-5 if device().type == "cpu" else 3e-5  # the reference's sums are a CPU's, in another order
    for name, param in module.named_parameters():
        expected = reference.get_parameter(name).detach()
        # A bias that goes to and fro comes back to almost nothing, of which 1e-8 is much.
        assert (whole(param) - expected).norm() < tolerance * expected.norm() + 1e-8, name


class _Sums(_Module):
    """As docs/operate/training.md has it."""

    tokens: Any = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.tokens = self.tokens + _tokens(batch)
        return _sum(self.model, batch)

    def gradient_denominator(self) -> Tensor:
        tokens, self.tokens = self.tokens.clone(), 0
        dist.all_reduce(tokens)
        return tokens


@row()
def sums_of_a_users_module(root: Path) -> None:
    data = batches(12, 2, padded=True)
    for window in (1, 2, 3):
        _fit(root, module := _Sums(), data, accumulate_grad_batches=window)
        expected = _loop(data, window, lambda model, _, all: sum(_sum(model, b) for b in all) / sum(map(_tokens, all)))
        _same(module, expected)


@row()
def sums_are_refused_with_manual_optimization(root: Path) -> None:
    class Manual(_Sums):
        automatic_optimization = False

    with refused("gradient_denominator", "manual_backward"):
        _fit(root, Manual(), batches(2, 2))


@row()
def a_subclass_of_causal_lm_with_means_of_its_own(root: Path) -> None:
    class Mean(_CausalLM):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return self.model(**batch).loss  # type: ignore[misc]

    data = batches(12, 2)
    for window in (1, 3):
        _fit(root, module := Mean(), data, accumulate_grad_batches=window)
        _same(module, _loop(data, window, lambda model, _, all: sum(model(**b).loss for b in all) / len(all)))


@row()
def a_subclass_of_causal_lm_that_adds_a_mean(root: Path) -> None:
    class Adds(_CausalLM):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + _penalty(self.model, batch)

    data = batches(8, 2, padded=True)
    _fit(root, module := Adds(), data)

    def loss(model: Any, _: nn.Linear, all: list[Batch]) -> Tensor:
        return sum(_sum(model, b) for b in all) / sum(map(_tokens, all)) + sum(_penalty(model, b) for b in all) / WORLD

    _same(module, _loop(data, 1, loss))


@row()
def a_subclass_of_causal_lm_that_adds_to_the_sums_of_a_window(root: Path) -> None:
    class Adds(_CausalLM):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            penalty = _penalty(self.model, batch) * _tokens(batch)
            return super().training_step(batch, batch_idx) + penalty

    data = batches(12, 2, padded=True)
    warns = pytest.warns(match="CausalLM.training_step returns the \\*sum\\*")
    with warns if os.environ["RANK"] == "0" else nullcontext():
        _fit(root, module := Adds(), data, accumulate_grad_batches=2)

    def loss(model: Any, _: nn.Linear, all: list[Batch]) -> Tensor:
        return sum(_sum(model, b) + _penalty(model, b) * _tokens(b) for b in all) / sum(map(_tokens, all))

    _same(module, _loop(data, 2, loss))


@row()
def an_epoch_that_is_left_inside_of_a_window(root: Path) -> None:
    """Its tokens do not count in the next one, as its gradients do not."""

    class Leaves(_CausalLM):
        def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:
            return -1 if self.current_epoch == 0 and batch_idx == 1 else None

    data = batches(4, 2)
    _fit(root, module := Leaves(), data, accumulate_grad_batches=2, max_epochs=2)
    _fit(root, straight := _CausalLM(), data, accumulate_grad_batches=2)
    for (name, param), other in zip(module.named_parameters(), straight.parameters(), strict=True):
        assert torch.equal(whole(param), whole(other)), name


@row()
def a_value_head_in_some_batches_of_a_window(root: Path) -> None:
    """As with DDP that looks for unused parameters."""
    data = batches(12, 2)

    def loss(model: Any, head: nn.Linear, batch: Batch, used: bool) -> Tensor:
        output = model(**batch, output_hidden_states=True)
        return output.loss + ((head(output.hidden_states[-1]) - 1).square().mean() if used else 0)

    for used in ((True, False, False), (False, True, False), (False, False, True)):

        class Sometimes(_Module):
            def training_step(self, batch: Batch, batch_idx: int, used: tuple[bool, ...] = used) -> Tensor:
                return loss(self.model, self.head, batch, used[batch_idx % 3])

        def window(model: Any, head: nn.Linear, all: list[Batch], used: tuple[bool, ...] = used) -> Tensor:
            return sum(loss(model, head, b, used[i // WORLD]) for i, b in enumerate(all)) / len(all)  # type: ignore

        _fit(root, module := Sometimes(), data, accumulate_grad_batches=3)
        _same(module, _loop(data, 3, window))


@row()
def a_batch_without_labels_is_refused(root: Path) -> None:
    for rest in ({}, {"labels": None}):
        with refused("'input_ids'", "no labels", "Add `labels`"):
            _fit(root, _CausalLM(), [{"input_ids": batch["input_ids"], **rest} for batch in batches(2, 2)])


@row()
def another_layout_or_precision_in_a_second_run_is_refused(root: Path) -> None:
    _fit(root, module := _Module(), batches(2, 2))
    for flags, words in (
        ({"strategy": ExpertParallelStrategy(ep=2, cp=2)}, ("cp=1", "cp=2", "anew")),
        ({"strategy": ExpertParallelStrategy(ep=1)}, ("ep=2", "ep=1", "anew")),
        ({"precision": "bf16-true"}, ("32-true", "bf16-true", "anew")),
    ):
        with refused(*words):
            _fit(root, module, batches(2, 2), **flags)
    _fit(root, module, batches(2, 2))


@pytest.mark.parametrize("name", row)
def test_works_or_is_refused(name: str, row_failures: RowFailures) -> None:
    row_failures.check(name)
