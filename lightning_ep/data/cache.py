"""Where prepared data lies, and how processes find it that have not prepared it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from lightning.pytorch import LightningDataModule

from lightning_ep.distributed.agreement import agree, from_all_ranks, join


def cache_root(cache_dir: str | None) -> Path:
    """The directory with what was prepared: the one that is given, $LIGHTNING_EP_CACHE, or ~/.cache/lightning_ep."""
    return Path(cache_dir or os.environ.get("LIGHTNING_EP_CACHE") or "~/.cache/lightning_ep").expanduser()


def find_prepared(data: LightningDataModule, prepared: str | None, locate: Callable[[], str], root: Path) -> Path:
    """The directory of what was prepared; every process of the Trainer must call it.

    Who has prepared it tells the others, for whom finding out would mean to read all of the rows.

    Args:
        data: The data module.
        prepared: Name of what this process has prepared, if it has.
        locate: Finds the name out.
        root: Where it is.

    Raises:
        ValueError: On every rank, if nodes have prepared different data.
        FileNotFoundError: On every rank, if it is not there on one.
    """
    trainer = data.trainer
    together = trainer is not None and trainer.world_size > 1
    if trainer is not None and together:
        prepares = trainer.local_rank == 0 if data.prepare_data_per_node else trainer.is_global_zero
        names = {name for name in from_all_ranks(prepared if prepares else None) if name is not None}
        if len(names) > 1:
            raise ValueError(
                f"The nodes have prepared different data, {' and '.join(sorted(names))} in {root}: their sources, "
                "tokenizers or versions of packages differ. Let them be the same."
            )
        prepared = names.pop() if names else None
    directory = root / (prepared or locate())
    missing = None if directory.exists() else str(directory)
    if together:
        agree(None, missing, _not_there)
    elif missing:
        raise _not_there({0: missing})
    return directory


def _not_there(missing: Mapping[int, str]) -> FileNotFoundError:
    return FileNotFoundError(
        f"{join(missing, len(missing))} does not exist on this process. Call prepare_data() first (a Trainer does), "
        "and let sources and cache_dir be the same on all processes of a node."
    )
