"""Plants faults in a copy of the package, one at a time, and sees that a test of the default run fails for each.

    python -m tests.mutations [NAME ...]

The faults are of the kind that training survives, silently wrong: a gradient off by a thousandth, a lost micro-batch, a
stale weight. A fault that no test notices is a missing test. `tests/test_mutations.py` holds the table to the code.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

from tests.planted_faults import MUTATIONS, Mutation

REPOSITORY = Path(__file__).resolve().parents[1]
_COPIED = ("lightning_ep", "lightning_ep_start", "tests", "benchmarks", "recipes", "docs", "pyproject.toml")
_SECONDS = 150  # of one test; pytest's own limit is 120
_SHOWN = 40  # lines of what pytest says
# A fault that makes code fail or hang by itself is noticed by anybody, and a hang may be that of a busy machine.
_NOT_SILENT = re.compile(
    r"\b(NameError|ImportError|ModuleNotFoundError|SyntaxError|AttributeError|TypeError): |still running after|Timeout"
)


class Moved(Exception):
    """The text that a mutation replaces is not there once."""


def planted(mutation: Mutation, root: Path = REPOSITORY) -> str:
    """The file of a mutation as it is with the fault.

    Raises:
        Moved: If the text that it replaces is not there exactly once: the code has changed, and the table must follow.
    """
    text = (root / "lightning_ep" / mutation.file).read_text()
    if (count := text.count(mutation.before)) != 1:
        raise Moved(
            f"{mutation.name}: lightning_ep/{mutation.file} has {count} times, and not once, the text\n"
            f"{mutation.before}\nChange the entry of tests/planted_faults.py as the code has changed."
        )
    changed = text.replace(mutation.before, mutation.after)
    compile(changed, mutation.file, "exec")
    return changed


def _copy(source: Path, target: Path) -> None:
    """All that tests need, compiled files included, which name the time of what they were made from."""
    target.mkdir()
    for name in _COPIED:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        else:
            shutil.copy2(source / name, target / name)


def _run(tree: Path, tests: Iterable[str]) -> tuple[dict[str, str], str]:
    """Runs tests of a tree; the outcome of each, with how it failed, and what pytest said."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    report = tree / "report.xml"
    nodes = [f"tests/{test}" for test in tests]
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-o", "junit_family=xunit1"]
    command = [sys.executable, "-m", "pytest", *options, *nodes]
    where = [sys.executable, "-c", "import importlib.util as i; print(i.find_spec('lightning_ep').origin)"]
    origin = subprocess.run(where, cwd=tree, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(origin) == tree / "lightning_ep" / "__init__.py", f"{origin} would be imported instead of {tree}"
    limit = _SECONDS * len(nodes)
    ended = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=limit)
    output = ended.stdout + ended.stderr
    if ended.returncode not in (0, 1):  # 2 and more: not collected, wrong options, interrupted
        return {}, output
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        failures = [f"{child.tag}: {child.get('message')}" for child in case if child.tag != "system-out"]
        outcomes[f"{case.get('file')}::{case.get('name')}".removeprefix("tests/")] = (failures or ["passed"])[0]
    return outcomes, output


def verdict_of(outcome: str | None) -> str:
    """``caught``, ``survived``, or why neither can be said."""
    if outcome == "passed":
        return "survived"
    if outcome is None or not outcome.startswith("failure: "):
        return f"error ({(outcome or 'the test did not run').splitlines()[0][:100]})"
    loud = _NOT_SILENT.search(outcome)
    return f"error (not a silent fault: {loud[0]})" if loud else "caught"


def main(names: list[str]) -> int:
    """Runs the mutations of these names, by default all; returns how many were not caught."""
    known = {mutation.name: mutation for mutation in MUTATIONS}
    if unknown := set(names) - known.keys():
        raise SystemExit(f"There are no mutations {sorted(unknown)}, only {sorted(known)}.")
    chosen = [known[name] for name in names] or list(MUTATIONS)
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        root = Path(folder).resolve()
        _copy(REPOSITORY, root / "sound")
        start = time.monotonic()
        outcomes, output = _run(root / "sound", sorted({mutation.test for mutation in chosen}))
        if wrong := [m.test for m in chosen if outcomes.get(m.test) != "passed"]:
            raise SystemExit(f"{output}\nWithout a fault these must pass, and do not:\n" + "\n".join(sorted({*wrong})))
        print(f"{len(outcomes)} tests pass without a fault ({time.monotonic() - start:.0f} s)", flush=True)
        width = max(len(mutation.name) for mutation in chosen)
        print(f"{'mutation':{width}}  seconds  verdict   test")
        return sum(_report(mutation, root, width) != "caught" for mutation in chosen)


def _report(mutation: Mutation, root: Path, width: int) -> str:
    tree, start, output = root / mutation.name, time.monotonic(), ""
    _copy(root / "sound", tree)
    try:
        (tree / "lightning_ep" / mutation.file).write_text(planted(mutation, tree))
        outcomes, output = _run(tree, [mutation.test])
        verdict = verdict_of(outcomes.get(mutation.test))
    except (Moved, subprocess.TimeoutExpired) as error:
        verdict = f"error ({error})"
    shutil.rmtree(tree)
    print(f"{mutation.name:{width}}  {time.monotonic() - start:7.1f}  {verdict:8}  {mutation.test}", flush=True)
    if verdict.startswith("error"):
        print(*output.splitlines()[-_SHOWN:], sep="\n")
    return verdict


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutations to run (default: all)")
    sys.exit(min(1, main(parser.parse_args().names)))
