"""The weights of a checkpoint for one process, one tensor at a time, without a process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_ep.checkpoint import files, single_file
from lightning_ep.checkpoint.metadata import HEADER, check_header, deserialize, saved_files
from lightning_ep.checkpoint.resume import check_fit, refuse_damaged
from lightning_ep.checkpoint.tensor_files import WEIGHTS, SafeReader, Saved, read_shards
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.frozen_base import base_names
from lightning_ep.hub.initialize import assign


def open_verified(path: Path) -> Path:
    """Returns where a checkpoint is, a directory or a file, once every byte of it has been compared with its checksum.

    Raises:
        CheckpointError: If there is none, or if it is damaged.
    """
    try:
        found = files.find(path)
        if not found.is_dir():
            single_file.check_file(found)
            return found
        problems = files.damage(found, files.read_manifest(found))
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    refuse_damaged(problems)
    return found


def named_bases(path: Path) -> dict[str, dict[str, Any]]:
    """What a checkpoint says of models of which it has adapters only, unverified; nothing where that is not to be read.

    Whoever opens the checkpoint hears what is wrong with it.
    """
    try:
        found = files.find(path)
        content = deserialize(found / files.META if found.is_dir() else found, True, mmap=not found.is_dir())
    except (CheckpointError, OSError, ValueError):
        return {}
    header = content.get(HEADER) if isinstance(content, dict) else None
    return header.get("bases", {}) if isinstance(header, dict) else {}


def read_companions(path: Path, weights_only: bool = True) -> dict[str, bytes]:
    """The files that a checkpoint has for its model beside config and weights, by name (`companions`).

    Reads no tensors and compares no checksums. None are found where a checkpoint cannot be read, or only with objects
    that may run code: what loads its weights says why.

    Raises:
        CheckpointError: If there is among them what should not be.
    """
    try:
        found = files.find(path)
        content = deserialize(found / files.META if found.is_dir() else found, weights_only, mmap=found.is_file())
    except (CheckpointError, OSError, ValueError):
        return {}
    return saved_files(content, path) if isinstance(content, dict) else {}


class SavedWeights:
    """The tensors of a checkpoint of ExpertParallelStrategy, a directory or one file.

    Attributes:
        path: Where it is.
        tensors: Shape and dtype of the module's parameters and buffers, by their name in the LightningModule.
        configs: Config of every transformers model in the module as a dict, by its name there; empty if the checkpoint
            does not say, or only among objects that may run code.
        bases: As `lightning_ep.hub.frozen_base.describe_bases` gave it, of models of which adapters only are there.

    Args:
        path: The checkpoint.
        weights_only: Build no objects from it but tensors and plain values: others may run code.

    Raises:
        CheckpointError: If there is none, if it is damaged, or if it is a file with other objects.
    """

    tensors: dict[str, Saved]
    configs: dict[str, dict[str, Any]]
    bases: dict[str, dict[str, Any]]

    def __init__(self, path: Path, weights_only: bool = True) -> None:
        self.path = open_verified(path)
        self._file: dict[str, Tensor] | None = None
        self._reader: SafeReader | None = None
        if self.path.is_dir():
            self._open_directory(weights_only)
        else:
            self._open_file(weights_only)

    def read(self, name: str) -> Tensor:
        """One tensor, whole, on the CPU."""
        if self._file is not None:
            return self._file[name]
        shape, dtype = self.tensors[name]
        tensor = torch.empty(shape, dtype=dtype)
        assert self._reader is not None
        read_shards({f"{WEIGHTS}{name}": tensor}, self._reader, no_dist=True)
        return tensor

    def fill(self, module: LightningModule, strict: bool = True) -> None:
        """Gives a module on meta the saved tensors, whole, on the CPU, in the dtypes that they were saved in.

        The base beneath adapters (`note_bases`) is in no checkpoint, and stays on meta.

        Raises:
            CheckpointError: If names (unless not ``strict``) or shapes differ.
        """
        left_out = base_names(module) - self.tensors.keys()
        target = {name: value for name, value in module.state_dict(keep_vars=True).items() if name not in left_out}
        check_fit(target, self.tensors, strict, self.path, "Pass the arguments of the run, or `strict=False`")
        assign(module, {id(target[name]): self.read(name) for name in target if name in self.tensors})

    def _open_directory(self, weights_only: bool) -> None:
        self._reader = SafeReader(self.path)
        self.tensors = self._reader.weights()
        try:
            content = deserialize(self.path / files.META, weights_only)
        except CheckpointError:
            content = {}  # hyperparameters may be of any class
        self._read_header(content)

    def _open_file(self, weights_only: bool) -> None:
        content = deserialize(self.path, weights_only, mmap=True)
        if not isinstance(content, dict) or "state_dict" not in content:
            raise CheckpointError(f"{self.path} is no checkpoint of Lightning: it has no 'state_dict'.")
        self._file = {name: value for name, value in content["state_dict"].items() if isinstance(value, Tensor)}
        self.tensors = {name: (tensor.shape, tensor.dtype) for name, tensor in self._file.items()}
        self._read_header(content)

    def _read_header(self, content: dict[str, Any]) -> None:
        header = content.get(HEADER, {})
        check_header(header, self.path)
        self.configs, self.bases = header.get("configs", {}), header.get("bases", {})
