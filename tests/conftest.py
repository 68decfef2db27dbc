"""What every test gets: quiet offline libraries, one thread, a fixed seed, and the environment put back afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests import distributed
from tests.rows import RowFailures


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "fault_injection" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("fault_injection"):
                item.add_marker(pytest.mark.skip(reason="long: run with -m fault_injection"))
    if os.environ.get("LIGHTNING_EP_TEST_DEVICE") != "cuda":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs LIGHTNING_EP_TEST_DEVICE=cuda"))


def pytest_collection_finish(session: pytest.Session) -> None:
    modules = {getattr(item, "module", None) for item in session.items}
    # Started early: its imports run beside the first tests.
    if not session.config.option.collectonly and any(hasattr(m, "run_ranks") or hasattr(m, "row") for m in modules):
        distributed.start_fork_server()


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


@pytest.fixture(scope="module")
def row_failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RowFailures:
    """Runs those rows of the module that were asked for (see tests/rows.py)."""
    items = (item for item in request.session.items if item.module is request.module and hasattr(item, "callspec"))
    wanted = {item.callspec.params.get("name") for item in items}
    names = [name for name in request.module.row if name in wanted]
    return RowFailures(request.module.__name__, names, tmp_path_factory.mktemp("rows"))
