"""What a checkpoint holds besides tensors, and how it is mapped onto the ranks of another run."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ep import transformers_adapter as adapter
from lightning_ep.checkpoint.files import FORMAT
from lightning_ep.checkpoint.loader_position import positions
from lightning_ep.hub.companions import companions, tokenizer_of
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.frozen_base import describe_bases
from lightning_ep.hub.source import source_directory
from lightning_ep.layout import ParallelLayout

HEADER = "lightning_ep"
RANKS = "ranks.pt"
_COUNTERS = ("ready", "started", "processed", "completed")


def header(module: nn.Module, layout: ParallelLayout, files: Mapping[str, bytes]) -> dict[str, Any]:
    """What identifies a checkpoint of ours, what its model is, and what lies beneath its adapters.

    Args:
        module: The module; the configuration of each transformers model in it is kept.
        layout: The layout of this run.
        files: Those of `companion_files`.
    """
    configs = {}
    for name, model in adapter.pretrained_models(module).items():
        # As transformers' `save_pretrained` does.
        configs[name] = {**model.config.to_dict(), "architectures": [adapter.model_class(model).__name__]}
    return {
        "format": FORMAT,
        "layout": {**asdict(layout), "data_world_size": layout.data_world_size},
        "configs": configs,
        "bases": describe_bases(module),
        "files": dict(files),
    }


def companion_files(module: LightningModule) -> dict[str, bytes]:
    """The files that go with the one transformers model of a run (`companions`); none if it has several.

    Raises nothing: a checkpoint is worth more than its tokenizer, so that what cannot be saved is left out with a
    warning.
    """
    models = list(adapter.pretrained_models(module).values())
    if len(models) != 1:
        return {}
    try:
        files = companions(models[0], tokenizer_of(module.trainer), source_directory(models[0]))
        return {name: content for name, content in files.items() if not _is_code(name)}
    except Exception as error:
        rank_zero_warn(
            f"Checkpoints of this run hold no tokenizer, which cannot be saved ({type(error).__name__}: {error}): "
            "commands that read them need --model with the directory or hub id of one."
        )
        return {}


def saved_files(content: Mapping[str, Any], path: Path) -> dict[str, bytes]:
    """What `companion_files` was when a checkpoint was saved, from what it holds beside tensors.

    Raises:
        CheckpointError: If somebody has put code among them, or names of files elsewhere.
    """
    found: dict[str, bytes] = content.get(HEADER, {}).get("files", {})
    for name in found:
        if _is_code(name) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{path} holds a file {name!r}, which has no place beside a model. Do not trust it.")
    return found


def _is_code(name: str) -> bool:
    return name.endswith(".py")


def check_header(found: Mapping[str, Any] | None, path: Path) -> None:
    """Raises CheckpointError if a newer version wrote the checkpoint."""
    version = (found or {}).get("format", FORMAT)
    if version > FORMAT:
        raise CheckpointError(f"{path} has format {version}, and this lightning_ep reads up to {FORMAT}: upgrade it.")


def refuse_sharded_metadata(value: Any, where: str = "checkpoint") -> None:
    """Raises CheckpointError if user code put sharded tensors where only rank 0's objects are saved."""
    if isinstance(value, DTensor):
        raise CheckpointError(
            f"{where} is a sharded tensor, but what hooks add to a checkpoint is saved by rank 0 alone. Add "
            "`tensor.full_tensor()` instead, or register the tensor as a buffer of the module."
        )
    if isinstance(value, Mapping):
        for key, item in value.items():
            refuse_sharded_metadata(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            refuse_sharded_metadata(item, f"{where}[{index}]")


def serialize(value: Any) -> bytes:
    """As `torch.save` writes it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def deserialize(path: Path, weights_only: bool | None, mmap: bool = False) -> Any:
    """Loads a file of `torch.save`; by default only tensors and plain values, since other objects can run code.

    Raises:
        CheckpointError: If it is no such file or holds other objects.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only is not False, mmap=mmap)
    except pickle.UnpicklingError as error:
        if weights_only is False:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        names = ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or error
        raise CheckpointError(
            f"{path} holds objects other than tensors and plain values: {names}. They may run code when loaded: if you "
            "trust whoever wrote the checkpoint, pass weights_only=False (beside ckpt_path, or to the command)."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {error}") from error


# ---------------------------------------------------------------------------------------------------- per rank


def rank_state(checkpoint: Mapping[str, Any], trainer: Trainer, device: torch.device) -> dict[str, Any]:
    """What differs between ranks: the position in the data, and random generators."""
    key = datamodule_key(trainer)
    return {
        "loops": checkpoint["loops"],
        "datamodule": checkpoint.get(key) if key is not None else None,
        "loaders": positions(trainer),
        "random": random_state(device),
    }


def datamodule_key(trainer: Trainer) -> str | None:
    """Under which name Lightning keeps the state of the datamodule."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    return None if datamodule is None else type(datamodule).__qualname__


def random_state(device: torch.device) -> dict[str, Any]:
    """State of the generators of Python, numpy and torch, as tensors and plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, gauss_next = random.getstate()
    return {
        "python": [version, list(words), gauss_next],
        "numpy": [str(name), torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Puts the generators where `random_state` found them."""
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def entry_of(
    ranks: list[dict[str, Any]], saved: Mapping[str, Any], rank: int, layout: ParallelLayout
) -> dict[str, Any]:
    """What `rank_state` gave on the rank whose batches this one gets; on another number of data ranks rank 0's.

    Args:
        ranks: What it gave on every rank.
        saved: The layout of those.
        rank: This rank.
        layout: This run's layout.
    """
    if saved["data_world_size"] != layout.data_world_size:
        return ranks[0]
    if len(ranks) == layout.world_size:
        return ranks[rank]
    sharing = len(ranks) // saved["data_world_size"]  # ranks that saved the same batches
    return ranks[layout.data_rank(rank) * sharing]


def place_ranks(
    metadata: dict[str, Any], ranks: list[dict[str, Any]], trainer: Trainer, rank: int, layout: ParallelLayout
) -> dict[str, Any] | None:
    """Puts this rank's position in the data into ``metadata``; returns its random state, if it has one here.

    On the same number of data ranks each takes its own, and its random state if the ranks are as many, too. On another
    number a position that is the same on every rank counts samples of the whole job and is kept; Lightning's count of
    batches is scaled to this run's data ranks.

    Raises:
        CheckpointError: If the positions differ.
    """
    saved = metadata[HEADER]["layout"]
    key = datamodule_key(trainer)
    same_data = saved["data_world_size"] == layout.data_world_size
    same = same_data and len(ranks) == layout.world_size
    entry = entry_of(ranks, saved, rank, layout)
    if not same_data:
        for other, state in enumerate(ranks):
            if not equal(state["loops"], entry["loops"]) or not equal(state["datamodule"], entry["datamodule"]):
                raise CheckpointError(
                    f"the data position of rank {other} differs from rank 0's, so it means something only on the "
                    f"{saved['data_world_size']} data ranks that saved it, and this run has {layout.data_world_size}. "
                    f"Resume with {saved['data_world_size']}, or use a loader whose state counts samples of the whole "
                    "job, as lightning_ep.data.ResumableLoader does."
                )
        _scale_batches(entry["loops"], saved["data_world_size"], layout.data_world_size)
    metadata["loops"] = entry["loops"]
    if key is not None and entry["datamodule"] is not None:
        metadata[key] = entry["datamodule"]
    if not same:
        batches = "" if same_data else ", and equal global batches need batch_size to be scaled"
        rank_zero_warn(
            f"The checkpoint was saved by {len(ranks)} ranks, {saved['data_world_size']} of them with different data, "
            f"and is resumed on {layout.world_size}, {layout.data_world_size} with different data: random generators "
            f"(dropout) start anew{batches}."
        )
    return entry["random"] if same else None


def _scale_batches(loops: dict[str, Any], saved: int, here: int) -> None:
    # A loader without a state starts its epoch anew in any case (Lightning warns), so rounding loses nothing more.
    current = loops["fit_loop"]["epoch_loop.batch_progress"]["current"]
    shift = current["ready"] * saved // here - current["ready"]
    for counter in _COUNTERS:
        current[counter] += shift


def equal(one: Any, other: Any) -> bool:
    """Whether two nested structures of plain values and tensors are the same."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)
