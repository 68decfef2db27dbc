"""What is wrong with a command line, in one line: the cause and the nearest name."""

from __future__ import annotations

import importlib
import re
import traceback
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from lightning_ep_start import did_you_mean, fail

_FOUND = re.compile(
    r"(?:[\w.]+: )*there is no (?:option|key) '[\w.-]+'(?P<of> of [\w.]+)?(?P<near> \(did you mean [^)]*\))?"
)
_NOISE = re.compile(
    r"Does not validate against any of .*|Subtypes: .*|Errors:|- Expected a <class 'NoneType'>|- (?=\S)|"
    r"Given value type: .*|Given value: .*|Problem with given class_path '[^']*':|Parser key \"[^\"]*\":|"
    r"\.? ?Got value: Namespace.*"
)
_EXPECTED = re.compile(r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[(.*?)\])\.?")


class OneLineParser(LightningArgumentParser):
    """Ends with one line, where jsonargparse shows all options and every type that a value might have had."""

    @override
    def format_help(self, *args: Any, **kwargs: Any) -> str:
        # How jsonargparse writes a list; here its items are words of their own (`cli.main`).
        return super().format_help(*args, **kwargs).replace("[ITEM,...]", "names ... ")

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        text = explain(str(message), [option[2:] for option in re.findall(r"--[\w.]+", parser.format_usage())])
        if not self.exit_on_error:  # the parser of a class, one of those that a value may be of
            super().error(text, ex)
        fail(text)


def explain(message: str, options: list[str]) -> str:
    """One line of an error of jsonargparse.

    Args:
        message: What it says, with one line or more for every member of a union of types, and perhaps what this
            function has made of the error of a parser inside.
        options: The options that there are, without dashes.
    """
    message = re.sub(r"Type typing.Callable.* expects a function or a callable class: ", "", message)
    keys = re.findall(r'Parser key "([^"]+)"', message)
    where = f"{keys[0]}: " if keys else ""
    if inner := _FOUND.search(message):
        classes = re.findall(r"class_path[ =]'([\w.]+)'", message)
        of = f" of {classes[-1]}" if classes and not inner["of"] else ""
        near = inner["near"] or ""
        return f"{where}{inner[0].removesuffix(near)}{of}{near}"
    for pattern, what in (
        (r"Option '([\w.]+)' is not accepted", "option"),
        (r"does not accept option '([\w.]+)'", "key"),
        (r"[Uu]nrecognized arguments: --([\w.]+)", "option"),
        (r"[Kk]ey '([\w.]+)' is not expected", "key"),
    ):
        if found := re.search(pattern, message):
            return f"{where}there is no {what} {found[1]!r}{did_you_mean(found[1], options)}"
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        names = dir(importlib.import_module(found[1]))
        return f"{where}there is no {found[1]}.{found[2]}{did_you_mean(found[2], names)}"
    rest = _EXPECTED.sub("|expected \\1\\2", re.sub(r"\s+", " ", _NOISE.sub(" ", message)))
    rest = rest.replace(" Got value:", "; given:")
    given = re.search(r"Given value: (?!NestedArg)(.*)", message)
    alternatives = [part.strip() for part in rest.split("|") if part.strip()]
    return f"{where}{', or '.join(alternatives)}{f'; given: {given[1]}' if given else ''}"


def refusal(error: BaseException) -> BaseException | None:
    """The error, or a cause of it, that a line of this package has raised, which then says what to do."""
    cause: BaseException | None = error
    while cause is not None:
        frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
        if frames and frames[-1].f_globals.get("__name__", "").startswith("lightning_ep."):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None
