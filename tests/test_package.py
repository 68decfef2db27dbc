"""What is published: the wheel and the source distribution hold what a run without a clone needs.

`.ci/run` installs the wheel and trains the quick start from it.
"""

from __future__ import annotations

import email
import os
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.ranks import REPOSITORY

PACKAGES = ("lightning_ep", "lightning_ep_start")
RECIPES = {path.name for path in (REPOSITORY / "recipes").iterdir()}


def _build(tree: Path, folder: Path) -> Path:
    """A folder with the wheel and the source distribution of a tree."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(REPOSITORY, tmp_path_factory.mktemp("dist"))


def _wheel(folder: Path) -> zipfile.ZipFile:
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def _modes(folder: Path) -> dict[str, int]:
    """Files of the wheel, with their modes, which pip restores."""
    with _wheel(folder) as archive:
        return {info.filename: info.external_attr >> 16 for info in archive.infolist()}


def test_the_wheel_holds_code_types_data_and_recipes_and_nothing_else(built: Path) -> None:
    held = _modes(built)
    files = {path.relative_to(REPOSITORY) for name in PACKAGES for path in (REPOSITORY / name).rglob("*.*")}
    ours = {str(path) for path in files if "__pycache__" not in path.parts}
    recipes = {f"lightning_ep/recipes/{name}" for name in RECIPES}
    assert "lightning_ep/py.typed" in ours
    assert {name for name in held if ".dist-info/" not in name} == ours | recipes
    assert all(bool(held[name] & stat.S_IXUSR) == name.endswith(".sh") for name in recipes)


def test_recipes_are_found_beside_an_installed_package(built: Path, tmp_path: Path) -> None:
    with _wheel(built) as archive:
        archive.extractall(tmp_path / "site")
    code = "import lightning_ep_start.recipes as r; print(*r.files().values(), sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    found = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True).split()
    assert {Path(file) for file in found} == {tmp_path / "site" / "lightning_ep" / "recipes" / name for name in RECIPES}


def test_the_source_distribution_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (tree,) = (tmp_path / "source").iterdir()
    assert {"constraints.txt", "constraints-next.txt", "LICENSE", "README.md", "tests"} <= set(os.listdir(tree))
    assert _modes(_build(tree, tmp_path / "again")) == _modes(built)


def _bounds(built: Path, library: str, extra: str) -> SpecifierSet:
    """What an installation with this extra asks of a library."""
    with _wheel(built) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    found = SpecifierSet()
    for line in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(line)
        if requirement.name == library and (not requirement.marker or requirement.marker.evaluate({"extra": extra})):
            found &= requirement.specifier
    return found


@pytest.mark.parametrize("library", ["jsonargparse", "lightning", "peft", "transformers"])
def test_libraries_whose_next_version_may_break_the_package_are_bounded_above(built: Path, library: str) -> None:
    assert not _bounds(built, library, "lora").contains("1000.0")


def test_both_pinned_minors_of_transformers_are_taken_and_the_second_not_yet_with_adapters(built: Path) -> None:
    first, second = (_pinned(name) for name in ("constraints.txt", "constraints-next.txt"))
    assert all(_bounds(built, "transformers", "").contains(version) for version in (first, second))
    assert [_bounds(built, "transformers", "lora").contains(version) for version in (first, second)] == [True, False]


def _pinned(file: str) -> str:
    (line,) = (line for line in (REPOSITORY / file).read_text().splitlines() if line.startswith("transformers=="))
    return line.partition("==")[2]
