"""What layers and experts are called in pictures, reports and warnings."""

from __future__ import annotations

import re
from collections.abc import Sequence


def short_names(layers: Sequence[str]) -> list[str]:
    """The number of each layer where that tells them apart, else their names."""
    numbers = [re.findall(r"\.(\d+)(?=\.|$)", name) for name in layers]
    short = [found[0] if len(found) == 1 else "" for found in numbers]
    return short if "" not in short and len(set(short)) == len(short) else list(layers)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in words: ``3, 5 to 9``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
