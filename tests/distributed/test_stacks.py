"""The calls of another thread, read while it runs."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from lightning_ep.distributed.stacks import Call, Stacks, own_calls


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
    ours = [call for call in Stacks().calls(thread.ident) if call.file == __file__]
    go_on.set()
    thread.join()
    lines = Path(__file__).read_text().splitlines()
    assert [call.function for call in ours] == ["_inner", "_outer"]
    assert [lines[call.number - 1].strip() for call in ours] == ["go_on.wait()", "_inner(started, go_on)"]
    assert str(ours[0]) == f"{__file__}:{ours[0].number} in _inner: `go_on.wait()`"
    assert Stacks().calls(thread.ident) == []


def test_a_thread_sees_itself_alike_both_ways() -> None:
    here = own_calls()
    seen = Stacks().calls(threading.get_ident())
    tests = [call for call in here if call.file == __file__]
    assert [call.function for call in tests] == ["test_a_thread_sees_itself_alike_both_ways"]
    # `calls` itself is innermost; this function has gone one line further.
    assert [call for call in seen if call.file == __file__] == [Call(__file__, tests[0].number + 1, tests[0].function)]
    assert seen[2:] == here[1:100]


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
    stacks, seen = Stacks(), set()
    for _ in range(2000):
        seen.add(len(stacks.calls(thread.ident)))
    ended.set()
    thread.join()
    assert len(seen) > 3, "the thread did not move"
