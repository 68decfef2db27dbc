"""The command line ``lightning-ep``: Lightning's commands on a YAML recipe, and those that need no Trainer."""

from __future__ import annotations

import importlib
import os
import sys
import warnings

from jsonargparse import auto_cli

from lightning_ep.cli import training

PROG = "lightning-ep"

COMMANDS: dict[str, str] = {
    "consolidate": "lightning_ep.cli.consolidate:consolidate",
    "export": "lightning_ep.cli.export:export",
}
"""Commands that run without a Trainer: the name, and ``module:function`` to call. The function's signature and
docstring become the command's options and help; its module is imported only when the command is called."""


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
    if arguments and arguments[0] in COMMANDS:
        module, _, function = COMMANDS[arguments[0]].partition(":")
        command = getattr(importlib.import_module(module), function)
        auto_cli(command, args=arguments[1:], prog=f"{PROG} {arguments[0]}")
        return
    training.run(args, PROG, COMMANDS)


def _import_from_working_directory() -> None:
    """Finds the user's own modules from the console script as ``python -m`` does."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
