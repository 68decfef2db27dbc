"""What is wrong with a checkpoint: collected, agreed on by all ranks, raised as one error."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lightning_ep.distributed.agreement import agree
from lightning_ep.hub.errors import CheckpointError

_LISTED = 40


class Problems:
    """Findings by kind, in the order in which they were added.

    Args:
        headline: First line of the error.
    """

    def __init__(self, headline: str) -> None:
        self.headline = headline
        self._found: dict[str, list[str]] = {}

    def add(self, kind: str, *findings: str) -> None:
        """Notes findings of a kind (``"missing"``, ``"files"``, ...)."""
        self._found.setdefault(kind, []).extend(findings)

    @property
    def found(self) -> bool:
        """Whether anything was noted on this rank."""
        return any(self._found.values())

    def raise_on_all_ranks(self) -> None:
        """Raises `CheckpointError` on every rank if any rank has found something. Every rank must call it."""
        agree(None, self._found if self.found else None, self._error)

    def _error(self, found_by_rank: Mapping[int, dict[str, list[str]]]) -> CheckpointError:
        merged: dict[str, dict[str, None]] = {}
        for found in found_by_rank.values():
            for kind, findings in found.items():
                merged.setdefault(kind, {}).update(dict.fromkeys(findings))
        lines = [line for kind, findings in merged.items() if findings for line in _section(kind, list(findings))]
        return CheckpointError("\n".join([self.headline, *lines]))


def _section(kind: str, findings: list[str]) -> list[str]:
    """Every finding on a line of its own; many of one form (another layer, another expert) on one."""
    lines = [f"  {kind} ({len(findings)}):"]
    if len(findings) <= _LISTED:
        return lines + [f"    {finding}" for finding in findings]
    forms: dict[str, list[str]] = {}
    for finding in findings:
        forms.setdefault(re.sub(r"\d+", "*", finding), []).append(finding)
    for form, members in forms.items():
        lines.append(f"    {members[0]}" if len(members) == 1 else f"    {form}: {len(members)}, as {members[0]}")
    return lines
