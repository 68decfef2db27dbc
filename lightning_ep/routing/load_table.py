"""The load of every expert as a file that other programs read."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
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
    of = of or {}
    loads_MEC = torch.stack([load_ME.detach().double().cpu() for load_ME in loads.values()], dim=-1)
    with part.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*of, "layer", "expert", *loads])
        for name, loads_EC in zip(layers, loads_MEC, strict=True):
            for expert, loads_C in enumerate(loads_EC):
                if not loads_C[0].isnan():
                    rows.writerow([*of.values(), name, expert, *(f"{load:.4f}" for load in loads_C.tolist())])
    return part.replace(path)
