"""Tensors as torch.distributed.checkpoint files: every rank writes and reads its shards, on any layout."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    _split_by_size_and_type,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from typing_extensions import override

from lightning_ep.checkpoint.files import ChecksumFile, FileRecord, checksum
from lightning_ep.distributed.agreement import join
from lightning_ep.hub.errors import CheckpointError

State = dict[str, Any]
"""Nested dicts whose leaves are tensors; keys of a leaf are joined by dots in the files."""

Saved = tuple[torch.Size, torch.dtype]
"""Shape and dtype of a saved tensor."""

INDEX = ".metadata"
WEIGHTS = "state_dict."
"""What the names of the module's tensors in the files begin with."""

_SAFE = {
    "torch.distributed.checkpoint.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath"),
    "pathlib._local": ("Path", "PosixPath"),  # their place in Python 3.13
}


def flatten(state: State, prefix: str = "") -> dict[str, Tensor]:
    """Tensors by their names in the files."""
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def write_shards(
    state: State, local: Mapping[str, Tensor], directory: Path, group: dist.ProcessGroup | None, threads: int
) -> dict[str, FileRecord]:
    """Writes a state; every rank must call it.

    Args:
        state: What to write; of sharded tensors only shapes and placements are read.
        local: This rank's elements of every tensor, by flat name, on any device.
        directory: An existing directory.
        group: A group with a CPU backend.
        threads: Files that this rank writes at a time.

    Returns:
        Files of this rank.

    Raises:
        CheckpointError: On all ranks, if any failed.
    """
    writer = _Writer(directory, threads)
    try:
        with torch.no_grad():
            save(state, storage_writer=writer, planner=_Planner(local), process_group=group)
    except CheckpointException as exception:
        raise _unwrap(exception, dist.get_world_size(group)) from exception
    records = dict(writer.records)
    if dist.get_rank(group) == 0:
        records[INDEX] = checksum(directory / INDEX)
    return records


def read_shards(
    state: State, reader: SafeReader, group: dist.ProcessGroup | None = None, no_dist: bool = False
) -> None:
    """Fills the tensors of a state in place, whatever layout wrote the files.

    Args:
        state: Tensors in nested dicts.
        reader: What reads the directory.
        group: A group with a CPU backend, of which every rank must call this.
        no_dist: There is no group: this process reads for itself.

    Raises:
        CheckpointError: On all ranks, if any failed.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.distributed is disabled")  # said although asked for
            load(state, storage_reader=reader, planner=DefaultLoadPlanner(), process_group=group, no_dist=no_dist)
    except CheckpointException as exception:
        raise _unwrap(exception, 1 if no_dist else dist.get_world_size(group)) from exception


def _unwrap(exception: CheckpointException, num_ranks: int) -> CheckpointError:
    errors = {rank: f"{type(error).__name__}: {error}" for rank, (error, _) in exception.failures.items()}
    return CheckpointError(join(errors, num_ranks))


class _Planner(DefaultSavePlanner):
    """Takes the data from host copies, so that training may go on with the tensors themselves."""

    def __init__(self, local: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._local = local

    @override
    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._local[index.fqn]


class _Writer(FileSystemWriter):
    """Files as torch's own reader knows them, with checksums, and none lost to an error in a thread.

    torch's writer prints exceptions of its threads and goes on without their files.
    """

    def __init__(self, directory: Path, threads: int) -> None:
        super().__init__(directory)
        self._directory = directory
        self._threads = threads
        self.records: dict[str, FileRecord] = {}

    @override
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        parts = [part for part in _split_by_size_and_type(self._threads, list(plan.items)) if part]
        names = [f"{plan.storage_data.prefix}{index}.distcp" for index in range(len(parts))]
        results: list[WriteResult] = []
        with ThreadPoolExecutor(max(1, len(parts))) as pool:
            for written in pool.map(lambda name, part: self._write_file(name, part, planner), names, parts):
                results += written
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write_file(self, name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        results = []
        with torch.no_grad(), ChecksumFile(self._directory / name) as file:
            for item in items:
                start = file.tell()
                data = planner.resolve_data(item)
                assert isinstance(data, Tensor)
                # A view's whole storage would be written.
                data = data.cpu()
                if data.untyped_storage().nbytes() != data.nbytes:
                    data = data.clone()
                torch.save(data, file)  # type: ignore[arg-type]
                length = file.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
        self.records[name] = file.record
        return results


class SafeReader(FileSystemReader):
    """Reads the index, once, without running code that somebody put into it; tensors are weights-only loads anyway."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._metadata: Metadata | None = None

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            data = (Path(self.path) / INDEX).read_bytes()
            self._metadata = _SafeUnpickler(io.BytesIO(data)).load()
        assert self._metadata is not None
        return self._metadata

    def index(self) -> dict[str, TensorStorageMetadata]:
        """Sizes and dtypes of the tensors in the files, by flat name."""
        entries = self.read_metadata().state_dict_metadata
        return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    def weights(self) -> dict[str, Saved]:
        """What is saved of the module, by name there."""
        weights = {n.removeprefix(WEIGHTS): entry for n, entry in self.index().items() if n.startswith(WEIGHTS)}
        return {name: (entry.size, entry.properties.dtype) for name, entry in weights.items()}


def _member(kind: Any, name: str) -> Any:
    """A member of an enumeration, for which the pickles of Python 3.11.2 (Debian 12) call `getattr`."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise CheckpointError(
        f"the index {INDEX} of the checkpoint asks {kind} for {name!r}: it may run code. Do not use it."
    )


class _SafeUnpickler(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _SAFE.get(module, ()):
            raise CheckpointError(
                f"the index {INDEX} of the checkpoint names {module}.{name}, which no checkpoint of lightning_ep does: "
                "it may run code. Do not use it."
            )
        return super().find_class(module, name)
