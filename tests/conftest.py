"""What every test gets: quiet offline libraries, one thread, a fixed seed, and the environment put back afterwards."""

from __future__ import annotations

import dis
import functools
import gc
import inspect
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from types import CodeType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # imported where they are used: pytest-xdist's controller, which runs no test, does without torch
    from tests.rows import RowFailures

pytest_plugins = ["tests.record"]

_PROCESSES = {"run_ranks", "row_failures", "run_cell", "subprocess", "multiprocessing", "TwoNodes"}
"""What tests that start processes name, themselves or through functions and fixtures of ``tests``."""
_DEVICES = {"run_ranks", "row_failures", "device", "accelerator", "DEVICE"}
"""What tests name that use a GPU with LIGHTNING_EP_TEST_DEVICE=cuda."""
_HOST = {
    *(
        "cli",
        "data",
        "docs",
        "planner",
        "distributed.test_failures",
        "test_configurations",
        "test_multinode",
        "test_ranks",
    ),
    *("checkpoint.test_files", "checkpoint.test_resumed_loaders", "checkpoint.test_resumed_programs"),
    *("checkpoint.test_saves_of_users", "hub.test_export", "trainer.test_flags", "trainer.test_loaders"),
    *("trainer.test_steering", "trainer.test_user_loaders", "trainer.test_watched_gradients"),
}
"""Folders and modules whose ranks show on GPUs what they show on CPUs: files, loaders, decisions, messages."""
_NOT_OF_THE_HOST = {"data.test_validation_sources"}
"""Modules in these folders that do more."""
_ADAPTERS = {"LoRA", "add_adapter", "adapted_by_peft", "lora_like_peft", "peft", "put_in"}
"""What tests name that put PEFT's modules into models."""
_ON_CUDA = os.environ.get("LIGHTNING_EP_TEST_DEVICE") == "cuda"


def _reaches(item: pytest.Item, names: set[str]) -> bool:
    """Whether a test names one of these, itself or through functions and fixtures of ``tests``."""
    if not isinstance(item, pytest.Function):
        return True
    if set(item.fixturenames) & names:
        return True
    fixtures = [
        definition.func for definitions in item._fixtureinfo.name2fixturedefs.values() for definition in definitions
    ]
    return any(_names_reached(function) & names for function in (item.function, *fixtures))


@functools.cache
def _names_reached(function: Callable[..., Any]) -> frozenset[str]:
    """Names of other scopes that a function uses, itself or through functions of ``tests``."""
    reached: set[str] = set()
    seen: set[Callable[..., Any]] = set()
    waiting = [function]
    while waiting:
        function = inspect.unwrap(waiting.pop())
        if inspect.isfunction(function) and function not in seen:
            seen.add(function)
            reached |= (used := _names(function.__code__))
            called = (function.__globals__.get(name) for name in used)
            waiting += [f for f in called if str(getattr(f, "__module__", "")).startswith("tests.")]
    return frozenset(reached)


@functools.cache
def _names(code: CodeType) -> frozenset[str]:
    """Names of other scopes that a function uses: not attributes, which may be called alike."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    own = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "IMPORT_NAME")}
    return frozenset({*own, *(name for function in inner for name in _names(function))})


def _row(item: Any) -> str | None:
    return item.callspec.params.get("name") if hasattr(item, "callspec") else None


def _module(item: Any) -> str:
    return item.module.__name__.removeprefix("tests.")


def _is_left_out(item: pytest.Item, config: pytest.Config) -> bool:
    """Tests that run only when they are asked for, by their mark or by name; on GPUs also those that use none."""
    if any("::" in argument and item.nodeid.startswith(argument) for argument in config.args):
        return False
    long = [mark for mark in ("slow", "fault_injection") if item.get_closest_marker(mark)]
    if not all(mark in config.option.markexpr for mark in long):
        return True
    if _ON_CUDA and item.get_closest_marker("gpu") is None:
        module = _module(item)
        of_host = module not in _NOT_OF_THE_HOST and not _HOST.isdisjoint({module, module.partition(".")[0]})
        return of_host or not _reaches(item, _DEVICES)
    if _ON_CUDA:
        return False
    return item.get_closest_marker("gpu") is not None


def pytest_configure() -> None:
    # A shell that starts pytest in the background has it ignore Ctrl-C, and with it all that tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Of what imports make, next to nothing can be collected: they do without, and no test looks at it again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and _row(item) in getattr(getattr(item.module, "row", None), "slow", ()):
            item.add_marker("slow")
    left_out = [item for item in items if _is_left_out(item, config)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    adapting = [item for item in items if _reaches(item, _ADAPTERS)]
    if adapting:
        from tests.reference import why_no_adapters

        if (reason := why_no_adapters()) is not None:
            for item in adapting:
                item.add_marker(pytest.mark.skip(reason=reason))
    long: Counter[str] = Counter()
    for item in items:
        # With a limit of its own a test says that it is long.
        marked = any(map(item.get_closest_marker, ("slow", "gpu", "fault_injection", "timeout")))
        if marked or _ON_CUDA or _reaches(item, _PROCESSES):  # on a GPU kernels are compiled in the test's process
            long[_module(item)] += 1
        else:
            item.add_marker("quick")
    # Modules with most tests in processes of their own come first, so that no worker of pytest-xdist is left with one.
    items.sort(key=lambda item: -long[_module(item)])


def pytest_collection_finish(session: pytest.Session) -> None:
    # Started early: its imports run beside the first tests.
    if not session.config.option.collectonly and any(
        item.get_closest_marker("quick") is None for item in session.items
    ):
        from tests import ranks

        ranks.start_fork_server()


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    """Undoes what Lightning and the Trainer leave in the process."""
    import torch
    import torch.distributed as dist
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    environment, rank = dict(os.environ), rank_zero_only.rank
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    rank_zero_only.rank = rank
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(autouse=True, scope="module")
def _ranks_of_the_module() -> Iterator[None]:
    yield
    from tests import ranks

    ranks.dismiss_ranks()


@pytest.fixture(scope="module")
def row_failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RowFailures:
    """Runs those rows of the module that were asked for (see tests/rows.py)."""
    from tests.rows import RowFailures

    items = (item for item in request.session.items if item.module is request.module and hasattr(item, "callspec"))
    wanted = {_row(item) for item in items}
    names = [name for name in request.module.row if name in wanted]
    return RowFailures(request.module.__name__, names, tmp_path_factory.mktemp("rows"))
