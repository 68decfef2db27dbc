"""What every test gets: quiet offline libraries, one thread, a fixed seed, and the environment put back afterwards."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import ranks
from tests.rows import RowFailures

_PROCESSES = {"run_ranks", "row_failures", "run_cell", "subprocess", "multiprocessing", "TwoNodes"}
"""What tests that start processes name, themselves or through functions and fixtures of ``tests``."""


def _starts_processes(function: Callable[..., Any], seen: set[Callable[..., Any]]) -> bool:
    function = inspect.unwrap(function)
    if not inspect.isfunction(function) or function in seen:
        return False
    seen.add(function)
    names = _names(function.__code__)
    if names & _PROCESSES:
        return True
    called = [function.__globals__.get(name) for name in names]
    return any(_starts_processes(f, seen) for f in called if str(getattr(f, "__module__", "")).startswith("tests."))


def _names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return {*code.co_names, *(name for function in inner for name in _names(function))}


def _is_quick(item: pytest.Item) -> bool:
    """Whether a test needs no ranks and is not marked as anything that takes long."""
    if not isinstance(item, pytest.Function) or any(map(item.get_closest_marker, ("slow", "gpu", "fault_injection"))):
        return False
    if set(item.fixturenames) & _PROCESSES:
        return False
    fixtures = [
        definition.func for definitions in item._fixtureinfo.name2fixturedefs.values() for definition in definitions
    ]
    seen: set[Callable[..., Any]] = set()
    return not any(_starts_processes(function, seen) for function in (item.function, *fixtures))


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if _is_quick(item):
            item.add_marker("quick")
    if "fault_injection" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("fault_injection"):
                item.add_marker(pytest.mark.skip(reason="long: run with -m fault_injection"))
    if os.environ.get("LIGHTNING_EP_TEST_DEVICE") != "cuda":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs LIGHTNING_EP_TEST_DEVICE=cuda"))


def pytest_collection_finish(session: pytest.Session) -> None:
    # Started early: its imports run beside the first tests.
    if not session.config.option.collectonly and any(
        item.get_closest_marker("quick") is None for item in session.items
    ):
        ranks.start_fork_server()


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    """Undoes what Lightning and the Trainer leave in the process."""
    environment = dict(os.environ)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(autouse=True, scope="module")
def _ranks_of_the_module() -> Iterator[None]:
    yield
    ranks.dismiss_ranks()


@pytest.fixture(scope="module")
def row_failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RowFailures:
    """Runs those rows of the module that were asked for (see tests/rows.py)."""
    items = (item for item in request.session.items if item.module is request.module and hasattr(item, "callspec"))
    wanted = {item.callspec.params.get("name") for item in items}
    names = [name for name in request.module.row if name in wanted]
    return RowFailures(request.module.__name__, names, tmp_path_factory.mktemp("rows"))
