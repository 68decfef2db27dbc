"""The house keeps its shape: imports point down, private names stay in their rooms, a file answers one question.

`docs/reference/architecture.md` shows the rooms; this says in which order they lie.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lightning_ep

PACKAGE = Path(lightning_ep.__file__).parent
ROOMS = [  # from the top to the ground; an import points to a later line, or stays in its room
    ["__main__"],
    ["cli"],
    ["lightning_ep"],  # the public names
    ["dpo"],
    ["causal_lm"],
    ["strategy"],
    ["trainer"],
    ["callbacks"],
    ["data"],
    ["parallelize"],
    ["adapters"],
    ["checkpoint"],
    ["hub"],
    ["loss"],
    ["routing"],
    ["layers"],
    ["fsdp"],
    ["tensor_parallel", "context_parallel"],
    ["moe"],
    ["transformers_adapter"],
    ["distributed"],
    ["planner"],
    ["layout"],
    ["process_groups"],
    ["ops"],
]
_FACES = ("__main__", "lightning_ep")  # no rooms to look into
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
# Where the private names of a library may be used, beside rooms that only say so in a comment.
PRIVATE_ROOMS = {
    "lightning": {"strategy", "trainer", "checkpoint"},
    "transformers": {"transformers_adapter"},
    "torch.distributed.fsdp": {"fsdp"},
}
LONGEST = 400  # lines; a longer file is asked whether it is still one thing, and named here if it is
ONE_THING = {"strategy.py": 550}  # what Lightning calls of a strategy is one class there


def _files() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name, without ``lightning_ep.`` in front."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found["lightning_ep" if name == "__init__" else name] = ast.parse(path.read_text())
    return found


FILES = _files()


def _imports(tree: ast.Module) -> Iterator[str]:
    """What a file imports, at its head or inside of functions: modules, and names in modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _own_imports(tree: ast.Module) -> set[str]:
    """Modules of the package that a file imports."""
    found = set()
    for name in _imports(tree):
        if name == "lightning_ep":
            found.add(name)
        elif name.startswith("lightning_ep."):
            inner = name.removeprefix("lightning_ep.")
            while inner not in FILES:  # names in modules
                inner = inner.rpartition(".")[0] or "lightning_ep"
            found.add(inner)
    return found


def _room(module: str) -> str:
    return module.partition(".")[0]


def test_every_file_is_in_a_room() -> None:
    assert {_room(module) for module in FILES} == set(FLOOR)


def test_imports_point_down() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, tree in FILES.items()
        for other in _own_imports(tree)
        if _room(module) != _room(other) and FLOOR[_room(module)] >= FLOOR[_room(other)]
    ]
    assert not wrong, wrong


def test_no_files_import_each_other_in_a_circle() -> None:
    # A package's face hands names of its own files on; that is no circle.
    graph = {m: {o for o in _own_imports(tree) if not m.startswith(f"{o}.")} for m, tree in FILES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, naming it


@pytest.mark.parametrize(
    ("rooms", "library"),
    [
        (("moe", "ops", "transformers_adapter", "layout"), "lightning"),
        (("ops",), "torch.distributed"),
        (("ops",), "transformers"),
        (("planner",), "torch"),
        (("planner",), "lightning"),
        (("planner",), "transformers"),
    ],
)
def test_rooms_that_do_not_know_a_library(rooms: tuple[str, ...], library: str) -> None:
    wrong = [
        f"{module} imports {name}"
        for module, tree in FILES.items()
        if _room(module) in rooms
        for name in _imports(tree)
        if name == library or name.startswith(f"{library}.")
    ]
    assert not wrong, wrong


def _private_names(library: str) -> set[str]:
    from tests.test_private_dependencies import PRIVATE

    inside = (f"{library}.", f"{library}:")
    entries = [entry.partition(":") for entry in PRIVATE if entry.startswith(inside)]
    return {part for _, _, path in entries for part in path.split(".") if part.startswith("_")}


@pytest.mark.parametrize("library", PRIVATE_ROOMS)
def test_private_names_stay_in_their_rooms(library: str) -> None:
    names = _private_names(library)
    assert names
    # The same name may be private to two libraries, or be our own: `self._apply`.
    elsewhere = {
        n
        for other in ("torch", "lightning", "transformers")
        if not library.startswith(other)
        for n in _private_names(other)
    }
    wrong = []
    for module, tree in FILES.items():
        if _room(module) in PRIVATE_ROOMS[library]:
            continue
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        stored = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
        own |= {n.attr for n in stored if isinstance(n.value, ast.Name) and n.value.id == "self"}
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        used |= {part for name in _imports(tree) if name.startswith(library) for part in name.split(".")}
        wrong += [f"{module} uses {name}" for name in sorted((used & names) - own - elsewhere)]
    assert not wrong, wrong


MAP = Path(__file__).parents[1] / "docs" / "reference" / "architecture.md"


def test_the_map_shows_the_rooms_in_their_order() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \| [^|]+ \|$", MAP.read_text(), re.MULTILINE)
    shown = [[name.removesuffix("/").removesuffix(".py") for name in re.findall(r"`([^`]+)`", row)] for row in rows]
    shown = [names for names in shown if names[0] in FLOOR]
    assert [name for names in shown for name in names] == [r for rooms in ROOMS for r in rooms if r not in _FACES]


def test_the_map_names_what_exists() -> None:
    text = re.sub(r"\s+", " ", MAP.read_text())
    entries = [
        (file, name)
        for file, names in re.findall(r"`([\w/]+\.py)(?:: ([\w., ]+))?`", text)
        for name in names.split(", ")
    ]
    assert len(entries) > 100
    for file, name in entries:
        found = [PACKAGE / file, PACKAGE.parent / file] if "/" in file else list(PACKAGE.rglob(file))
        paths = [path for path in found if path.is_file()]
        assert paths, f"{file} does not exist"
        if name:
            defined = [
                node.name
                for node in ast.walk(ast.parse(paths[0].read_text()))
                if isinstance(node, ast.FunctionDef | ast.ClassDef)
            ]
            assert set(name.split(".")) <= set(defined), f"{file}: {name}"
    for module in FILES:
        if module not in FLOOR and "kernels" not in module and (PACKAGE / f"{module.replace('.', '/')}.py").exists():
            assert f"{module.rpartition('.')[2]}.py`" in text, f"{module} is not on the map"


def test_a_name_means_one_thing() -> None:
    found: dict[str, list[str]] = {}
    for module in FILES:
        if "." in module:
            found.setdefault(module.rpartition(".")[2], []).append(module)
    twins = {"ops.kernels"}  # each kernel is called like the module of `ops` that defines it
    repeated = {n: where for n, where in found.items() if len({w.rpartition(".")[0] for w in where} - twins) > 1}
    assert set(repeated) == {
        "adamw",  # the optimizer, and its arithmetic
        "export",  # the command, and what it shares with the callback
    }, repeated


def test_a_file_is_one_thing() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    long = {name: length for name, length in lengths.items() if length > ONE_THING.get(name, LONGEST)}
    assert not long, long


def test_tests_mirror_the_rooms() -> None:
    tests = Path(__file__).parent
    folders = {path.parent.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")} - {"."}
    assert folders - {"benchmarks", "docs"} == {room for room in FLOOR if (PACKAGE / room).is_dir()}
