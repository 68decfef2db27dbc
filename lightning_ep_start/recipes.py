"""The recipes that come with the package: what ``--config NAME`` stands for, and ``lightning-ep recipes``."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from typing_extensions import override

from lightning_ep_start import DATA_COMMANDS, did_you_mean, fail, say

_FLAGS = ("--config", "-c")
_NAME = re.compile(r"[\w-]+")  # no path and no YAML


def files() -> dict[str, Path]:
    """The files by what they are called: a recipe without its ``.yaml``, a script that starts one by its whole name."""
    root = Path(__file__).parents[1]
    folders = (root / "lightning_ep" / "recipes", root / "recipes")  # in a wheel (see pyproject.toml), in a clone
    found = next((folder for folder in folders if folder.is_dir()), folders[0])
    recipes = {path.stem: path for path in sorted(found.glob("*.yaml"))}
    return recipes | {path.name: path for path in sorted(found.glob("*.sh"))}


def names() -> list[str]:
    """What ``--config`` takes in place of a file."""
    return [name for name, path in files().items() if path.suffix == ".yaml"]


def summary(path: Path) -> str:
    """The first line of a file's comment, which says in a sentence what it is for."""
    comments = (line for line in path.read_text().splitlines() if not line.startswith("#!"))
    return next(comments).removeprefix("#").strip()


def check(arguments: list[str]) -> None:
    """Ends the program if a command with a Trainer is told of no model, or is given a recipe that does not exist."""
    for _, value in _configs(arguments):
        file_of(value)
    says_what = (*_FLAGS, "--model", "--help", "-h", "--print_config")
    if not any(word.startswith(says_what) or word.partition("=")[0].endswith(".help") for word in arguments[1:]):
        flag = "" if arguments[0] in DATA_COMMANDS else "--config with "
        fail(
            f"{arguments[0]} needs {flag}a YAML file or {'with ' * bool(flag)}the name of a recipe "
            f"({', '.join(names())}), or --model and --data."
        )


def with_flag(arguments: list[str]) -> list[str]:
    """The arguments of a command that takes a recipe by itself, with ``--config`` in front of that."""
    bare = len(arguments) > 1 and not arguments[1].startswith("-")
    return [arguments[0], "--config", *arguments[1:]] if bare else arguments


def with_files(arguments: list[str]) -> list[str]:
    """The arguments of a command, with files in place of the names of recipes.

    ``--config NAME`` is the file NAME, or else NAME.yaml, or else the recipe that comes with the package. Where a
    recipe has the name of a file of the user's, a line says so.
    """
    result = list(arguments)
    for position, value in _configs(arguments):
        file = file_of(value)
        if file != value and value in names() and not Path(file).is_absolute():
            say(f"--config {value} is the file {file} here, not the recipe of that name.")
        result[position] = result[position].removesuffix(value) + file
    return result


def _configs(arguments: list[str]) -> Iterator[tuple[int, str]]:
    """The values of ``--config``, each with the position of the argument that it is or that it ends."""
    for position, word in enumerate(arguments):
        flag, equals, value = word.partition("=")
        if flag in _FLAGS and equals:
            yield position, value
        elif position and arguments[position - 1] in _FLAGS:
            yield position, word


def file_of(value: str) -> str:
    """The file that a value of ``--config`` stands for; one of the user's with a slash, so that it is no name again."""
    if not _NAME.fullmatch(value):
        path = Path(value)
        if path.suffix == ".yaml" and path.stem in names() and "://" not in value and not path.exists():
            fail(f"there is no file {value} here; --config {path.stem} takes the recipe that comes with the package.")
        return value
    for own in (value, f"{value}.yaml"):
        if Path(own).is_file():
            return f"./{own}"
    if value not in names():
        fail(
            f"there is no file {value} or {value}.yaml here, and no recipe of that name"
            f"{did_you_mean(value, names())}: {', '.join(names())}."
        )
    return str(files()[value].absolute())


def main(arguments: list[str]) -> None:
    """Runs ``lightning-ep recipes``.

    Args:
        arguments: Those after the command's name.
    """
    parser = Parser(
        prog="lightning-ep recipes",
        description="Lists the recipes that come with this package, and the scripts that start them on several nodes. "
        "`lightning-ep fit --config NAME` runs one.",
    )
    actions = parser.add_subparsers(dest="action", metavar="{show,copy}")
    for action, what in (("show", "print a file"), ("copy", "copy a file, to change it")):
        inner = actions.add_parser(action, help=what, description=f"{what.capitalize()}.")
        inner.add_argument("name", help="as `lightning-ep recipes` lists it")
        if action == "copy":
            inner.add_argument("directory", nargs="?", default=".", help="where to; default: here")
    options = parser.parse_args(arguments)
    if options.action is None:
        width = max(map(len, files()))
        print("\n".join(f"{name:<{width}}  {summary(path)}" for name, path in files().items()))
    elif options.action == "show":
        sys.stdout.write(_shipped(options.name).read_text())
    else:
        _copy(_shipped(options.name), Path(options.directory))


def _shipped(name: str) -> Path:
    name = name.removesuffix(".yaml")
    if name not in files():
        fail(f"there is no recipe {name!r}{did_you_mean(name, files())}: {', '.join(files())}.")
    return files()[name]


def _copy(source: Path, directory: Path) -> None:
    target = directory / source.name
    if target.exists():
        fail(f"{target} exists already. Remove it, or name another directory.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)  # a script stays executable
    except OSError as error:
        fail(f"{source.name} cannot be copied to {directory}: {error}.")
    print(f"lightning-ep fit --config {target}" if target.suffix == ".yaml" else target)


class Parser(argparse.ArgumentParser):
    """Ends with one line, as the other commands do."""

    @override
    def error(self, message: str) -> NoReturn:
        fail(message)
