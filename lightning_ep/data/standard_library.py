"""The source files of the Python standard library: text that is on every machine."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

# Tests, tables of characters and help texts are no source code to learn from, and distributions leave some of the rest
# out.
_STDLIB_SKIP = {
    *("test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "encodings", "pydoc_data", "__phello__"),
    *("site-packages", "dist-packages", "__pycache__"),
}


def standard_library() -> list[Path]:
    """Source files of the running Python's standard library."""
    found = walk(Path(sysconfig.get_paths()["stdlib"]), lambda name: name in _STDLIB_SKIP)
    return [path for path in found if path.suffix == ".py"]


def walk(root: Path, skip: Callable[[str], bool]) -> Iterator[Path]:
    """The files below a directory but those, and what is in directories, of names to skip."""
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if not skip(name)]  # site-packages may hold 100,000 files: do not enter
        yield from (Path(directory, name) for name in files if not skip(name))
