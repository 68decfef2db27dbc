"""The table of planted faults fits the code and the tests of today; `python -m tests.mutations` plants them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations import REPOSITORY, Moved, planted, verdict_of
from tests.planted_faults import MUTATIONS, Mutation

NOT_BY_DEFAULT = ("slow", "gpu", "fault_injection")


def _tests_of(request: pytest.FixtureRequest, file: str) -> dict[str, list[str]]:
    """The tests of a file by the last part of their ids, with the names of their marks."""
    module = pytest.Module.from_parent(request.session, path=REPOSITORY / "tests" / file)
    return {item.name: [mark.name for mark in item.iter_markers()] for item in module.collect()}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_text_that_a_fault_replaces_is_there_once(mutation: Mutation) -> None:
    planted(mutation)


@pytest.mark.parametrize("file", sorted({mutation.test.partition("::")[0] for mutation in MUTATIONS}))
def test_the_tests_that_must_fail_run_by_default(request: pytest.FixtureRequest, file: str) -> None:
    found = _tests_of(request, file)
    for name in [m.test.partition("::")[2] for m in MUTATIONS if m.test.partition("::")[0] == file]:
        assert name in found, f"tests/{file} has no test {name}, which tests/planted_faults.py names"
        assert not set(found[name]) & set(NOT_BY_DEFAULT), f"{name} does not run by default: name another test"


def test_names_are_told_apart() -> None:
    names = [mutation.name for mutation in MUTATIONS]
    assert len(names) == len(set(names)) >= 20


def test_code_that_has_moved_is_named(tmp_path: Path) -> None:
    (tmp_path / "lightning_ep").mkdir()
    (tmp_path / "lightning_ep" / "code.py").write_text("a = 1\nb = a + a\n")

    def text(before: str) -> str:
        return planted(Mutation("fault", "code.py", before, "2", "test.py::test"), tmp_path)

    assert text("1") == "a = 2\nb = a + a\n"
    for before, times in (("c", 0), ("a", 3)):
        with pytest.raises(Moved, match=f"fault: lightning_ep/code.py has {times} times"):
            text(before)


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        ("passed", "survived"),
        ("failure: AssertionError: 1.001 is not 1", "caught"),
        ("failure: tests.ranks.RankFailure: rank 1 of 2 raised AssertionError: other weights", "caught"),
        ("failure: NameError: name 'x' is not defined", "error"),
        ("failure: tests.ranks.RankFailure: rank 0 of 2 raised ImportError: no such name", "error"),
        ("failure: AssertionError: rank 0: Traceback ...\nAttributeError: no such name", "error"),
        ("failure: tests.ranks.RankFailure: ranks [0] of 2 were still running after 90 s", "error"),
        ("error: failed on setup", "error"),
        ("skipped: no GPU", "error"),
        (None, "error"),
    ],
)
def test_only_a_test_that_fails_has_caught_a_fault(outcome: str | None, expected: str) -> None:
    assert verdict_of(outcome).split()[0] == expected
