"""The calls of another thread, read while it runs."""

from __future__ import annotations

import gc
import sys
import threading
import time
from pathlib import Path

from lightning_ep.distributed.stacks import calls_of, own_calls


def _inner(started: threading.Event, go_on: threading.Event) -> None:
    started.set()
    go_on.wait()


def _outer(started: threading.Event, go_on: threading.Event) -> None:
    _inner(started, go_on)


def test_a_thread_that_waits_is_seen_with_its_lines() -> None:
    started, go_on = threading.Event(), threading.Event()
    thread = threading.Thread(target=_outer, args=(started, go_on))
    thread.start()
    started.wait()
    time.sleep(0.1)
    assert thread.ident is not None
    ours = [call for call in calls_of(thread.ident) if call.file == __file__]
    go_on.set()
    thread.join()
    lines = Path(__file__).read_text().splitlines()
    assert [call.function for call in ours] == ["_inner", "_outer"]
    assert [lines[call.number - 1].strip() for call in ours] == ["go_on.wait()", "_inner(started, go_on)"]
    assert str(ours[0]) == f"{__file__}:{ours[0].number} in _inner: `go_on.wait()`"
    assert calls_of(thread.ident) == []


def test_a_thread_sees_its_own_calls_without_this_one() -> None:
    ours = [call for call in own_calls() if call.file == __file__]
    assert [call.function for call in ours] == ["test_a_thread_sees_its_own_calls_without_this_one"]


def test_threads_may_run_while_they_are_read() -> None:
    """In Python 3.11 frames of a running thread that are walked by another crash the process now and then."""

    def deep(depth: int) -> int:
        return 0 if depth == 0 else sum(deep(depth - 1) for _ in range(1))

    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            deep(20)

    thread = threading.Thread(target=run)
    thread.start()
    assert thread.ident is not None
    interval, seen = sys.getswitchinterval(), set()
    for _ in range(100):
        seen.add(len(calls_of(thread.ident)))
    ended.set()
    thread.join()
    assert len(seen) > 3, "the thread did not move"
    assert sys.getswitchinterval() == interval
    assert gc.isenabled()
