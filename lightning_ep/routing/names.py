"""What layers are called in pictures and messages."""

from __future__ import annotations

import re
from collections.abc import Sequence


def short_names(layers: Sequence[str]) -> list[str]:
    """The number of each layer where that tells them apart, else their names."""
    numbers = [re.findall(r"\.(\d+)(?=\.|$)", name) for name in layers]
    short = [found[0] if len(found) == 1 else "" for found in numbers]
    return short if "" not in short and len(set(short)) == len(short) else list(layers)
