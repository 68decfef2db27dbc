"""The directive ``command``: a command of ``lightning-ep`` and what it prints, while the site is built."""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
from typing import Any
from unittest import mock

from docutils import nodes
from docutils.parsers.rst import Directive


class Command(Directive):
    """Shows what ``lightning-ep WORDS...`` prints. A command that ends with anything but 0 is an error of the page."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        line = self.arguments[0]
        text = f"$ lightning-ep {line}\n{printed(shlex.split(line))}"
        return [nodes.literal_block(text, text, language="text")]


def printed(words: list[str]) -> str:
    """What the command writes to stdout, in this process: it has imported the package already."""
    from lightning_ep import cli

    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), mock.patch.object(sys, "argv", ["lightning-ep"]):
        try:
            cli.main(words)
        except SystemExit as end:
            code = int(end.code or 0)
    if code:
        raise RuntimeError(f"lightning-ep {shlex.join(words)} ended with {code}")
    return out.getvalue()


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("command", Command)
    return {"parallel_read_safe": True}
