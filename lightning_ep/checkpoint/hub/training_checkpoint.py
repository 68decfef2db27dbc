"""Reads tensors of a training checkpoint one at a time, without a process group and without unpickling objects."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from typing_extensions import override

from lightning_ep.checkpoint.errors import CheckpointError

METADATA_NAME = "meta.pt"
"""What Lightning calls the part of a distributed checkpoint that is not sharded."""


class TrainingCheckpoint:
    """The tensors of a checkpoint of ExpertParallelStrategy, distributed or in one file.

    Attributes:
        tensors: Shape and dtype of the module's parameters and buffers, by their name in the LightningModule.
        configs: Config of every transformers model in the module as a dict, by its name there; empty if unknown.

    Args:
        path: The directory of a distributed checkpoint, or a file.

    Raises:
        CheckpointError: If ``path`` is neither.
    """

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    configs: dict[str, dict[str, Any]]

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: dict[str, Tensor] | None = None
        self._reader: _Reader | None = None
        if (path / METADATA_NAME).exists() and (path / ".metadata").exists():
            self._open_directory()
        elif path.is_file():
            self._open_file()
        else:
            raise CheckpointError(
                f"{path} is no checkpoint: neither a file nor a directory with {METADATA_NAME} and .metadata (one that "
                "was interrupted while it was saved lacks them)."
            )

    def read(self, name: str) -> Tensor:
        """One tensor, whole, on the CPU."""
        if self._file is not None:
            return self._file[name]
        shape, dtype = self.tensors[name]
        tensor = torch.empty(shape, dtype=dtype)
        assert self._reader is not None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # said although asked for
            load({f"state_dict.{name}": tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

    def _open_directory(self) -> None:
        self._reader = _Reader(self._path)
        entries = self._reader.read_metadata().state_dict_metadata
        self.tensors = {
            key.removeprefix("state_dict."): (tuple(entry.size), entry.properties.dtype)
            for key, entry in entries.items()
            if key.startswith("state_dict.") and isinstance(entry, TensorStorageMetadata)
        }
        try:
            self.configs = _configs(torch.load(self._path / METADATA_NAME, map_location="cpu", weights_only=True))
        except pickle.UnpicklingError:
            self.configs = {}  # hyperparameters may be of any class; the command asks for --config then

    def _open_file(self) -> None:
        try:
            checkpoint = torch.load(self._path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{self._path} holds objects other than tensors and plain values, and loading these can run any code. "
                "If you trust it, rewrite it once: `c = torch.load(path, weights_only=False); "
                f"torch.save({{'state_dict': c['state_dict']}}, new_path)`, and pass --config. ({error})"
            ) from error
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            raise CheckpointError(f"{self._path} is no checkpoint of Lightning: it has no 'state_dict'.")
        self._file = checkpoint["state_dict"]
        self.tensors = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._file.items()}
        self.configs = _configs(checkpoint)


def _configs(checkpoint: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return checkpoint.get("lightning_ep", {}).get("configs", {})


class _Reader(FileSystemReader):
    """Reads the metadata once, and builds no other objects from it than those that torch writes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            with open(Path(self.path) / ".metadata", "rb") as stream:
                self._metadata = _MetadataUnpickler(stream).load()
        if getattr(self._metadata, "storage_meta", None) is None:
            self._metadata.storage_meta = StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return self._metadata


class _MetadataUnpickler(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _IN_METADATA and not is_dtype:
            raise CheckpointError(
                f".metadata of the checkpoint names {module}.{name}, which torch does not write there."
            )
        return super().find_class(module, name)


_IN_METADATA = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # its name in Python 3.13
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
