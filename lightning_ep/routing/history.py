"""What was measured of routing in the course of a run, in bounded memory, and what is wrong in it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ep.routing.metrics import Measures

_KEPT = 256  # entries; of the last 256 to 128 times as many logged steps
_BY_CHANCE = 32  # tokens: an expert that should have got as many and got none did not miss them by chance
_COLLAPSED = 1.25  # times the experts that a token goes to at least, or an eighth of all


@dataclass
class Entry:
    """One logged step, or several that were merged.

    Attributes:
        first: The first step.
        last: The last one.
        measures: On the CPU; means over these steps, and of tokens their sum.
    """

    first: int
    last: int
    measures: Measures


class Finding(NamedTuple):
    """Something that is wrong with a layer.

    Attributes:
        layer: Its index.
        experts: Those without a token.
        effective: How many experts would take its tokens if they shared them evenly.
        collapsed: Whether that is hardly more than a token goes to.
    """

    layer: int
    experts: list[int]
    effective: float
    collapsed: bool


class History:
    """Measures by step; once there are too many, neighbours are merged, so that a run of any length is kept."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._each = 1  # logged steps of an entry
        self._in_last = 0

    def add(self, step: int, measures: Measures) -> None:
        """Adds those of a step, on the CPU."""
        if self.entries and self._in_last < self._each:
            self.entries[-1] = merged([self.entries[-1], Entry(step, step, measures)], [self._in_last, 1])
            self._in_last += 1
        else:
            self.entries.append(Entry(step, step, measures))
            self._in_last = 1
        if len(self.entries) > _KEPT:
            pairs = zip(self.entries[::2], self.entries[1::2], strict=False)
            odd = self.entries[-1:] if len(self.entries) % 2 else []
            self.entries = [merged(list(pair)) for pair in pairs] + odd
            self._in_last += 0 if odd else self._each
            self._each *= 2

    def spans(self, most: int) -> list[Entry]:
        """The whole of it in so many parts at most, each merged to one."""
        number = min(most, len(self.entries))
        bounds = [round(part * len(self.entries) / number) for part in range(number + 1)] if number else []
        return [merged(self.entries[a:b]) for a, b in itertools.pairwise(bounds)]


def merged(entries: Sequence[Entry], weights: Sequence[float] | None = None) -> Entry:
    """One entry for several that follow one another."""
    weights_N = torch.tensor(weights or [1.0] * len(entries), dtype=torch.float64)
    weights_N = weights_N / weights_N.sum()

    def mean(name: str) -> Tensor:
        values = torch.stack([getattr(entry.measures, name) for entry in entries])
        return (values * weights_N.view(-1, *[1] * (values.dim() - 1))).sum(0)

    means = {name: mean(name) for name in Measures._fields if name not in ("dead_ME", "tokens_M")}
    dead_ME = torch.stack([entry.measures.dead_ME for entry in entries]).all(0)
    tokens_M = torch.stack([entry.measures.tokens_M for entry in entries]).sum(0)
    return Entry(entries[0].first, entries[-1].last, Measures(dead_ME=dead_ME, tokens_M=tokens_M, **means))


def findings(measures: Measures) -> list[Finding]:
    """Layers that have collapsed, or have experts that got no token though they should have got many."""
    found = []
    for layer, effective in enumerate(measures.effective_M.tolist()):
        loads_E = measures.load_ME[layer]
        number, top_k = int((~loads_E.isnan()).sum()), measures.top_k_M[layer].item()
        expected = measures.tokens_M[layer].item() * top_k / max(1, number)
        dead = measures.dead_ME[layer].nonzero().flatten().tolist() if expected >= _BY_CHANCE else []
        collapsed = expected >= _BY_CHANCE and effective <= _COLLAPSED * max(top_k, number / 8) < number
        if dead or collapsed:
            found.append(Finding(layer, dead, effective, collapsed))
    return found
