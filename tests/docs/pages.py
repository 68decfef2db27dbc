"""The blocks of the pages, and what a comment above each says of how it is looked at.

<!-- run: tests/cli/test_lora_page.py::test_name -->      that test runs it, or compares it with what is printed
<!-- excerpt: lightning_ep/layout.py -->                  its lines are in that file
<!-- printed: lightning_ep/layout.py -->                  a message of that file, with the numbers of some run
<!-- read: it takes 8 GPUs -->                            not run, for that reason; options and imports exist
"""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("[!_]*/**/*.md")),
)
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[^`\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_COMMENT = re.compile(r"<!-- (run|excerpt|printed|read): (.+) -->")
_FILE = re.compile(r"`([\w-]+\.(?:yaml|jsonl|py))`")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: The page, from the root of the repository.
        line: The line of its fence.
        language: As the fence says; empty for drawings.
        text: What is in it.
        how: ``run``, ``excerpt``, ``printed`` or ``read``; empty where no comment says.
        by: The test, the file or the reason.
        file: The file that it is, where the paragraph above names one.
    """

    page: str
    line: int
    language: str
    text: str
    how: str
    by: str
    file: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def extension(name: str) -> Any:
    """A program of docs/_ext as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / "_ext" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def blocks(page: str, language: str | None = None) -> list[Block]:
    """The blocks of a page in order, or those of one language. Directives of the site (``{name}``) are none."""
    text = (ROOT / page).read_text()
    found = []
    for match in _FENCE.finditer(text):
        if match["language"].startswith("{"):
            continue
        above = text[: match.start()].rstrip("\n").split("\n")
        comment = _COMMENT.fullmatch(above[-1].strip())
        words = "\n".join(above[: -1 if comment else None]).rstrip().rpartition("\n\n")[2]
        named = _FILE.search(words)
        indent = match["indent"]
        inside = "".join(line.removeprefix(indent) for line in match["text"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start()) + 1
        how, by = comment.groups() if comment else ("", "")
        found.append(Block(page, line, match["language"], inside, how, by, named[1] if named else None))
    return [block for block in found if language is None or block.language == language]


def block(page: str, start: str) -> str:
    """The text of the one block of a page that begins so."""
    (found,) = [block.text for block in blocks(page) if block.text.startswith(start)]
    return found


def commands(block: Block) -> list[str]:
    """The command lines of a shell block, each with its continuations, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
