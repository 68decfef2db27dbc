"""What a thread is executing, seen from another one."""

from __future__ import annotations

import faulthandler
import linecache
import os
import re
import sys
from dataclasses import dataclass
from types import FrameType

_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")
_CALL = re.compile(r'  File "(.*)", line (\d+|\?\?\?) in (.*)')


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
    calls: list[Call] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        calls.append(Call(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return calls


class Stacks:
    """Reads the calls of other threads.

    Not from `sys._current_frames`: its frames go on to run while they are walked, and Python 3.11 crashes of that
    (SIGSEGV in `PyFrame_GetBack`, seen here; python/cpython#111363). `faulthandler` writes them down in one go, in C,
    with the interpreter's lock held.
    """

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("stacks"), "w+b")

    def calls(self, thread: int) -> list[Call]:
        """Those that a thread, by its `threading.get_ident`, is in: the innermost 100, innermost first.

        Returns:
            Nothing for a thread that has ended.
        """
        self._file.seek(0)
        self._file.truncate()
        faulthandler.dump_traceback(self._file, all_threads=True)
        self._file.seek(0)
        found: dict[int, list[Call]] = {}
        calls: list[Call] = []
        for line in self._file.read().decode(errors="replace").splitlines():
            if begins := _THREAD.match(line):
                calls = found[int(begins[1], 16)] = []
            elif call := _CALL.match(line):
                calls.append(Call(call[1], int(call[2]) if call[2].isdigit() else 0, call[3]))
        return found.get(thread, [])
