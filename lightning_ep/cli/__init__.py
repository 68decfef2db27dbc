"""The command line ``lightning-ep``: Lightning's commands on a YAML recipe, and those that need no Trainer."""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, get_type_hints

from jsonargparse import auto_cli

from lightning_ep.cli import recipe_data, training
from lightning_ep.cli.mistakes import OneLineParser, refusal
from lightning_ep_start import COMMANDS, DATA_COMMANDS, answer, fail, recipes

PROG = "lightning-ep"

__all__ = ["COMMANDS", "PROG", "main"]


def main(args: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: The arguments, by default those of the process. When a run has more than one process on this node and
            no launcher such as torchrun, Lightning starts the others with the arguments *of the process*.
    """
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")  # Lightning 2.6 meets torch 2.13
    training.quiet_other_ranks()
    _import_from_working_directory()
    arguments = sys.argv[1:] if args is None else args
    answer(arguments)
    if arguments[0] in COMMANDS:
        module, _, function = COMMANDS[arguments[0]].partition(":")
        command = getattr(importlib.import_module(module), function)
        try:
            # Without a description of the parser's own, it is the function's.
            prog = f"{PROG} {arguments[0]}"
            words = _with_values(command, arguments[1:])
            auto_cli(command, args=words, prog=prog, description=None, parser_class=OneLineParser)
        except (ValueError, RuntimeError, OSError) as error:
            if (cause := refusal(error)) is None:
                raise
            fail(str(cause))
        return
    if arguments[0] in DATA_COMMANDS:
        recipe_data.run(recipes.with_files(recipes.with_flag(arguments)))
        return
    training.run(recipes.with_files(arguments), PROG)


def _with_values(command: Callable[..., Any], words: list[str]) -> list[str]:
    """The words of a command line as jsonargparse takes them.

    ``true`` stands behind every option that is said or not and stands alone, and what is named in front of options
    behind the checkpoint is one list, where the command takes one.
    """
    kinds = get_type_hints(command)
    flags = {f"--{name}" for name, kind in kinds.items() if kind is bool}
    if list[str] in kinds.values():
        named = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
        words = [*words[:1], *([json.dumps(words[1:named])] if named > 1 else []), *words[max(1, named) :]]
    values = ("true", "false", "yes", "no")
    found = []
    for word, following in zip(words, [*words, ""][1:], strict=True):
        found += [word, "true"] if word in flags and following.lower() not in values else [word]
    return found


def _import_from_working_directory() -> None:
    """Finds the user's own modules from the console script as ``python -m`` does."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
