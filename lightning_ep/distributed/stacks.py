"""What a thread is executing, seen from another one."""

from __future__ import annotations

import gc
import linecache
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_ALONE = 0.05  # seconds; a stack is read in a hundredth of that


@dataclass(frozen=True)
class Call:
    """A function that a thread is in: its file, its name, and the line that it has come to."""

    file: str
    number: int
    function: str

    def __str__(self) -> str:
        source = linecache.getline(self.file, self.number).strip()
        return f"{self.file}:{self.number} in {self.function}" + (f": `{source}`" if source else "")


def own_calls() -> list[Call]:
    """The calls that this thread is in, innermost first, without this one."""
    return _calls(sys._getframe(1))


def calls_of(thread: int) -> list[Call]:
    """Those that another thread, by its `threading.get_ident`, is in, innermost first; none if it has ended.

    All other threads stand still meanwhile. Frames that go on to run while they are walked crash Python 3.11 now and
    then (SIGSEGV in `PyFrame_GetBack`, seen here; python/cpython#111363). `faulthandler` is no way around: it does not
    lock the list of threads, and crashes where one is just being made (seen here, too).
    """
    with _no_other_thread_runs():
        return _calls(sys._current_frames().get(thread))


def _calls(frame: FrameType | None) -> list[Call]:
    calls: list[Call] = []
    while frame is not None:
        calls.append(Call(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return calls


@contextmanager
def _no_other_thread_runs() -> Iterator[None]:
    """Keeps the interpreter's lock: others ask for it after they have waited for the switch interval, made long."""
    interval, collects = sys.getswitchinterval(), gc.isenabled()
    gc.disable()  # it may run anything
    sys.setswitchinterval(_ALONE)
    try:
        time.sleep(0)  # gives the lock away once: who waits for it now has the long interval before them
        yield
    finally:
        sys.setswitchinterval(interval)
        if collects:
            gc.enable()
