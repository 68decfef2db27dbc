"""Whether a command of a page could run: its program is known, its options exist. Only what prints is run."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import io
import shlex
import tomllib
from collections.abc import Iterator
from unittest import mock

from lightning_ep import cli
from lightning_ep_start import COMMANDS, DATA_COMMANDS, TRAINER_COMMANDS
from tests.docs.pages import ROOT

OTHERS = {"curl", "git", "hf", "lm_eval", "mypy", "pre-commit", "ruff", "sbatch", "tar", "transformers", "vllm"}
"""Programs of others, whose options are not looked at."""


def why_not(line: str) -> str:
    """What is wrong with a command line; empty if nothing is."""
    words = shlex.split(line, comments=True)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            for part in _parts(words):
                _parse(part)
        except SystemExit as end:
            return said.getvalue() if end.code else ""
        except (ValueError, ImportError) as error:
            return str(error)
    return ""


def _parts(words: list[str]) -> Iterator[list[str]]:
    """Commands joined by ``&&`` and pipes, without the variables in front, the files behind ``>``, and a last ``&``."""
    part: list[str] = []
    for word in [*words, "&&"]:
        if word in ("&&", "|", "&"):
            while part and "=" in part[0]:
                part = part[1:]
            part = part[: part.index(">")] if ">" in part else part
            if part:
                yield part
            part = []
        else:
            part.append(word)


def _parse(words: list[str]) -> None:
    program, *rest = words
    if "/bin/" in program and "venv" in program:  # of an environment that the page makes
        program = program.rpartition("/")[2]
    if program == "lightning-ep":
        _ours(rest)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args(rest)
        if "-m" in rest:
            module = rest.index("-m")
            _module(rest[module + 1], rest[module + 2 :])
    elif program in ("python", "python3") and rest[:1] == ["-m"]:
        _module(rest[1], rest[2:])
    elif program == "python" and rest[0] == "-c":
        compile(rest[1], "page", "exec")
    elif program == "python":
        _exists(rest[0])
    elif program == "pytest":
        for word in rest:
            if word.startswith("tests/"):
                _exists(word.partition("::")[0])
    elif program == "pip":
        _extras(rest)
    elif program in (".", "cd"):
        pass
    elif "/" in program:
        _exists(program)
    elif program not in OTHERS:
        raise ValueError(f"the program {program!r} is not known: see tests/docs/command_lines.py")


def _ours(words: list[str]) -> None:
    """Our commands up to where they would begin to work."""
    if words[0] in DATA_COMMANDS:
        first = [] if words[1].startswith("-") else ["--config"]
        words = ["fit", *first, *words[1:]]
    parsed = words[0] in (*TRAINER_COMMANDS, *COMMANDS)
    cli.main([*words, "--print_config"] if parsed and "--help" not in words else words)


_OF_THE_SITE = ("sphinx",)  # the extra `docs` installs it, which README's command for the tests does without


def _module(name: str, words: list[str]) -> None:
    if name == "lightning_ep":
        _ours(words)
        return
    if importlib.util.find_spec(name) is None and name not in _OF_THE_SITE:
        raise ValueError(f"there is no module {name}")
    if not name.startswith("benchmarks."):
        return
    module = importlib.import_module(name)
    if inspect.signature(module.main).parameters:
        with (
            mock.patch.object(argparse.ArgumentParser, "parse_args", _only_parse),
            mock.patch("sys.argv", [name, *words]),
            contextlib.suppress(_ParsedError),
        ):
            module.main()
    elif words:
        raise ValueError(f"{name} takes no options")


class _ParsedError(Exception):
    """All options exist."""


def _only_parse(self: argparse.ArgumentParser, args: list[str] | None = None, namespace: None = None) -> None:
    _, unknown = self.parse_known_args(args, namespace)
    if unknown:
        self.error(f"unrecognized arguments: {' '.join(unknown)}")
    raise _ParsedError


def _exists(path: str) -> None:
    if not (ROOT / path).exists():
        raise ValueError(f"there is no {path}")


def _extras(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        name, bracket, extras = word.rstrip("]").partition("[")
        if bracket and name in (".", "lightning-ep"):
            unknown = set(extras.split(",")) - set(project["optional-dependencies"])
            if unknown:
                raise ValueError(f"there are no extras {sorted(unknown)}")
