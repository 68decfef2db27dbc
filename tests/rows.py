"""Rows: many short runs, one after the other in the same two ranks, so that each costs a fraction of a second.

A test module holds ``row = Rows()``, registers functions with ``@row()`` and ends with

    @pytest.mark.parametrize("name", row)
    def test_works_or_is_refused(name: str, row_failures: RowFailures) -> None:
        row_failures.check(name)
"""

from __future__ import annotations

import importlib
import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.ranks import run_ranks
from tests.reference import grad_or_zero, relative_error, tiny_model
from tests.tiny import TinyModule, loader, quiet

WORLD, STEPS = 2, 2
Row = Callable[[Path], None]


class Rows(dict[str, Row]):
    """The rows of a test module by name, the built-in callbacks of Lightning that they cover, and which are slow."""

    def __init__(self) -> None:
        super().__init__()
        self.covered: set[str] = set()
        self.slow: set[str] = set()

    def __call__(self, *callbacks: str, slow: bool = False) -> Callable[[Row], Row]:
        """Registers a row, the built-in callbacks that it covers, and whether it is marked `slow`."""

        def register(function: Row) -> Row:
            self[function.__name__] = function
            self.covered.update(callbacks)
            self.slow.update([function.__name__] if slow else [])
            return function

        return register


class RowFailures:
    """What became of the rows of a module: by rank and row, the traceback or, where it passed, nothing."""

    def __init__(self, module: str, names: list[str], root: Path) -> None:
        self._ranks = run_ranks(WORLD, _worker, module, names, root, init_process_group=False, timeout=100)

    def check(self, name: str) -> None:
        assert len(self._ranks) == WORLD
        ended = [rows.get(name, "the row did not run") for rows in self._ranks]
        assert not any(ended), "\n".join(f"rank {rank}: {error}" for rank, error in enumerate(ended) if error)


def _worker(module: str, names: list[str], root: Path) -> dict[str, str]:
    """Runs the rows and returns of each the traceback on this rank, empty if it passed."""
    row: Rows = importlib.import_module(module).row
    ended: dict[str, str] = {}
    for index, name in enumerate(names):
        _state_of_process()
        start = time.perf_counter()
        try:
            row[name](root / name)
            ended[name] = ""
        except BaseException:  # a failed checkpoint is no Exception
            ended[name] = traceback.format_exc()
        print(f"row {name}: {time.perf_counter() - start:.2f} s", flush=True)
        if hung := _others_hang(index):
            raise AssertionError(f"rank(s) {hung} hang in row {name}, which here {ended[name] or 'passed'}")
    return ended


def _state_of_process() -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


def _others_hang(index: int) -> list[int]:
    """Ranks that do not arrive here; through the store, since a rank that failed alone left a collective unmatched."""
    if not dist.is_initialized():
        return []
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    store.set(f"row-{index}-{rank}", "")
    missing = []
    for other in range(dist.get_world_size()):
        try:
            store.wait([f"row-{index}-{other}"], timedelta(seconds=10))
        except dist.DistStoreError:
            missing.append(other)
    return missing


def agreed(value: Any) -> bool:
    """Whether all ranks have the same value."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(other == value for other in values)


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """The body raises an error that holds all of ``words``: what was found, the rule, what to do instead."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        missing = [word for word in words if not re.search(word, str(error))]
        if missing:
            raise AssertionError(f"the message does not say {missing}: {error}") from error
    else:
        raise AssertionError("was not refused")


def fit(root: Path, module: L.LightningModule | None = None, **overrides: Any) -> tuple[L.Trainer, Any]:
    """Two optimizer steps, validated after the epoch; checks that they happened and that the ranks agree."""
    module = TinyModule() if module is None else module
    if not {"max_epochs", "max_steps", "fast_dev_run"} & overrides.keys():
        overrides["max_epochs"] = 1
    size = STEPS * WORLD * 2 * overrides.get("accumulate_grad_batches", 1)
    trainer = quiet(root, **overrides)
    trainer.fit(module, loader(size), loader(4, first=100))
    assert trainer.state.finished
    check(trainer, module)
    return trainer, module


def check(trainer: L.Trainer, module: L.LightningModule, steps: int = STEPS) -> None:
    assert trainer.global_step == steps, f"{trainer.global_step} optimizer steps"
    start = tiny_model(**module.overrides).state_dict()
    for name, param in module.model.named_parameters():
        full = whole(param)
        assert full.isfinite().all(), name
        assert agreed(full.sum().item()), name
        if name.endswith(("gate_up_proj", "q_proj.weight", "lm_head.weight")) and steps:
            assert not torch.equal(full, start[name]), f"{name} has not moved"


def whole(param: Tensor) -> Tensor:
    """A copy of all of it, on the CPU; every rank must call this."""
    return (param.detach().full_tensor() if isinstance(param, DTensor) else param.detach()).cpu().clone()


def wrong_gradients(plain: Iterable[tuple[str, Tensor]], sharded: Iterable[Tensor], tolerance: float) -> list[str]:
    """Parameters whose summed gradients are not one process's, when every rank has had the same batch."""
    return wrong_sums({name: grad_or_zero(param) for name, param in plain}, sharded, tolerance)


def wrong_sums(expected: dict[str, Tensor], sharded: Iterable[Tensor], tolerance: float) -> list[str]:
    """The same with the one process's gradients, in the order of the parameters."""
    world, wrong = dist.get_world_size(), []
    for (name, grad), param in zip(expected.items(), sharded, strict=True):
        found = torch.zeros_like(grad) if param.grad is None else whole(param.grad) / world
        if not (error := relative_error(found, grad)) <= tolerance:
            wrong.append(f"{name} {error:.1e}")
    return wrong
