"""What was measured of routing in the course of a run, in bounded memory, and what is wrong in it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ep.routing.metrics import Measures
from lightning_ep.routing.words import ranges

LATEST = 10  # steps that are looked at together, for what is wrong
_KEPT = 256  # entries; of the last 256 to 128 times as many logged steps
_BY_CHANCE = 32  # tokens: an expert that should have got as many and got none did not miss them by chance
_COLLAPSED = 1.1  # times the experts that a token goes to: tokens all go to the same ones
_OF_ALL = 1 / 8  # of the experts of a layer, that no more take part is a collapse, too


@dataclass
class Entry:
    """One logged step, or several that were merged.

    Attributes:
        first: The first step.
        last: The last one.
        measures: On the CPU; means over these steps, and of tokens their sum.
        number: How many steps were logged.
    """

    first: int
    last: int
    measures: Measures
    number: int = 1


class Finding(NamedTuple):
    """Something that is wrong with a layer.

    Attributes:
        layer: Its index.
        dead: Its experts that got no token, though they should have got many.
        number: How many it has.
        effective: How many would take its tokens if they shared them evenly.
        collapsed: Whether that is hardly more than a token goes to.
    """

    layer: int
    dead: list[int]
    number: int
    effective: float
    collapsed: bool

    def sentence(self, layer: str) -> str:
        """What is wrong, of a layer that is called so."""
        experts = f"expert{'s' if len(self.dead) > 1 else ''} {ranges(self.dead)} of {self.number}"
        if not self.collapsed:
            return f"in layer {layer} {experts} got no token"
        idle = f" ({experts} got none)" if self.dead else ""
        return f"layer {layer} has collapsed to about {self.effective:.1f} of {self.number} experts{idle}"


class History:
    """Measures by step; once there are too many, neighbours are merged, so that a run of any length is kept."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._latest: deque[Entry] = deque(maxlen=LATEST)
        self._number = 0
        self._each = 1  # logged steps of a full entry

    def __len__(self) -> int:
        """How many steps were added."""
        return self._number

    def add(self, step: int, measures: Measures) -> None:
        """Adds those of a step, on the CPU."""
        self._number += 1
        self._latest.append(Entry(step, step, measures))
        new = Entry(step, step, measures)
        if self.entries and self.entries[-1].number < self._each:
            self.entries[-1] = merged([self.entries[-1], new])
        else:
            self.entries.append(new)
        if len(self.entries) > _KEPT:
            self.entries = [merged(self.entries[place : place + 2]) for place in range(0, len(self.entries), 2)]
            self._each *= 2

    def latest(self) -> Entry:
        """The last ten steps as one, or as many as there are."""
        return merged(list(self._latest))

    def spans(self, most: int) -> list[Entry]:
        """The whole of it in so many parts at most, each merged to one."""
        number = min(most, len(self.entries))
        bounds = [round(part * len(self.entries) / number) for part in range(number + 1)] if number else []
        return [merged(self.entries[a:b]) for a, b in itertools.pairwise(bounds)]


def merged(entries: Sequence[Entry]) -> Entry:
    """One entry for several that follow one another."""
    numbers_N = torch.tensor([entry.number for entry in entries], dtype=torch.float64)

    def mean(name: str) -> Tensor:
        values = torch.stack([getattr(entry.measures, name) for entry in entries])
        weights = numbers_N.view(-1, *[1] * (values.dim() - 1)) * ~values.isnan()  # of steps with tokens
        return (values.nan_to_num(nan=0.0) * weights).sum(0) / weights.sum(0)

    means = {name: mean(name) for name in vars(entries[0].measures) if name not in ("dead_ME", "tokens_M")}
    dead_ME = torch.stack([entry.measures.dead_ME for entry in entries]).all(0)
    tokens_M = torch.stack([entry.measures.tokens_M for entry in entries]).sum(0)
    measures = Measures(dead_ME=dead_ME, tokens_M=tokens_M, **means)
    return Entry(entries[0].first, entries[-1].last, measures, int(numbers_N.sum()))


def findings(measures: Measures) -> list[Finding]:
    """Layers that have collapsed, or have experts that got no token though they should have got many."""
    found = []
    for layer, effective in enumerate(measures.effective_M.tolist()):
        loads_E = measures.load_ME[layer]
        number, top_k = int((~loads_E.isnan()).sum()), measures.top_k_M[layer].item()
        expected = measures.tokens_M[layer].item() * top_k / max(1, number)
        dead = measures.dead_ME[layer].nonzero().flatten().tolist() if expected >= _BY_CHANCE else []
        collapsed = expected >= _BY_CHANCE and effective <= max(_COLLAPSED * top_k, _OF_ALL * number) < number
        if dead or collapsed:
            found.append(Finding(layer, dead, number, effective, collapsed))
    return found
