"""The load of every expert as a file that other programs read."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor


def write_loads(
    path: Path, loads: Mapping[str, Tensor], layers: Sequence[str], of: Mapping[str, object] | None = None
) -> Path:
    """Writes a CSV that is never half a one: a line for each expert, ``layer,expert`` and a load.

    Args:
        path: Of the file; its folder is made.
        loads: By the name of a column ``[M, E]``, tokens over the mean of the layer: 1 is even; NaN where there is no
            expert.
        layers: Names of the layers.
        of: What every line begins with, by the names of columns.

    Returns:
        The path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    columns = {name: load_ME.detach().double().cpu().tolist() for name, load_ME in loads.items()}
    every = next(iter(columns.values()))
    with part.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*(of or {}), "layer", "expert", *columns])
        for layer, name in enumerate(layers):
            for expert, load in enumerate(every[layer]):
                if load == load:
                    rows.writerow(
                        [
                            *(of or {}).values(),
                            name,
                            expert,
                            *(f"{column[layer][expert]:.4f}" for column in columns.values()),
                        ]
                    )
    return part.replace(path)
