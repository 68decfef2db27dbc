"""Ctrl-C: the first one is noted, for a checkpoint at the next step; a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType

EXIT_CODE = 128 + signal.SIGINT  # what a shell says of an interrupted program
_END = 0  # no signal has this number
_ONE_PRESS = 1.0  # seconds; launchers may forward what the terminal has sent already


class Interrupts:
    """Counts SIGINT in a thread: Python runs no handler while the main thread waits in a collective.

    Does nothing where the interrupt has another meaning: in an interactive interpreter or a notebook, outside of the
    main thread, and where SIGINT is ignored (a job in the background) or has a handler of the user's.

    Args:
        first: Called in the thread at the first one.
        second: Called in the thread at the next, before the process ends.
    """

    def __init__(self, first: Callable[[], None], second: Callable[[], None]) -> None:
        self._first = first
        self._second = second
        self._pipe: tuple[int, int] | None = None
        self._previous = -1
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Takes SIGINT over, until `end`."""
        theirs = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        if theirs or hasattr(sys, "ps1") or threading.current_thread() is not threading.main_thread():
            return
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        signal.signal(signal.SIGINT, _noted_elsewhere)
        self._previous = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        _begun.add(self)
        self._thread = threading.Thread(target=self._count, args=(self._pipe[0],), daemon=True, name="interrupts")
        self._thread.start()

    def end(self) -> None:
        """Puts back what was there before `begin`."""
        if self._pipe is None:
            return
        signal.set_wakeup_fd(self._previous)
        if signal.getsignal(signal.SIGINT) is _noted_elsewhere:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _begun.discard(self)
        os.write(self._pipe[1], bytes([_END]))  # closing it does not end the thread while a worker has it open, too
        os.close(self._pipe[1])
        self._pipe = None
        if self._thread is not None:
            self._thread.join()

    def _count(self, pipe: int) -> None:
        last = None
        while (number := os.read(pipe, 1)) and number[0] != _END:
            if number[0] != signal.SIGINT:
                continue
            now = time.monotonic()
            if last is None:
                self._first()
            elif now - last > _ONE_PRESS:
                self._second()
                os._exit(EXIT_CODE)
            last = last or now
        os.close(pipe)


_begun: weakref.WeakSet[Interrupts] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """Workers of a loader that are forked would write into the pipe, too."""
    if _begun:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_to_parent)


def _noted_elsewhere(signum: int, frame: FrameType | None) -> None:
    pass
