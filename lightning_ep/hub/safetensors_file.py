"""The safetensors format: headers of files to read by byte range, and files written tensor by tensor.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and byte range of every
tensor) and the data (https://huggingface.co/docs/safetensors). The library reads whole tensors or slices through
buffers of its own; ranges of bytes straight into their destination need the offsets.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_ep.distributed.shards import as_bytes

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the library's own bound


class StoredTensor(NamedTuple):
    """Where a tensor is: file, byte offset of its first element, and what it is."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class BrokenFileError(Exception):
    """A file that is not a complete safetensors file."""


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, without reading data.

    Raises:
        BrokenFileError: If the file is missing, truncated, or no safetensors file; the message names it.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_MAX_HEADER, size - 8):
                raise BrokenFileError(f"{file.name}: not a complete safetensors file ({size:,} bytes)")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        expected = 8 + length + max(ends, default=0)
        if size != expected:
            kind = "truncated" if size < expected else "longer than its header says"
            raise BrokenFileError(f"{file.name}: {kind} ({size:,} bytes, its header says {expected:,})")
        return {key: _stored(file, key, entry, 8 + length) for key, entry in header.items()}
    except FileNotFoundError:
        raise BrokenFileError(f"{file.name}: no such file in {file.parent}") from None
    except (struct.error, ValueError, KeyError, TypeError, OSError) as error:
        raise BrokenFileError(f"{file.name}: not a readable safetensors file ({error})") from error


def _stored(file: Path, key: str, entry: Mapping[str, Any], data_start: int) -> StoredTensor:
    dtype = _DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise ValueError(f"{key} has the dtype {entry['dtype']}, which is not supported")
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{key}: {end - start} bytes do not hold {list(shape)} {entry['dtype']}")
    return StoredTensor(file, data_start + start, shape, dtype)


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a tensor to be written."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes a file one tensor at a time, in a given order, so that only one must be in memory.

    Args:
        file: Path of the new file.
        specs: The tensors in the order in which they will be written; larger element sizes must come first, which
            keeps every tensor aligned.
    """

    def __init__(self, file: Path, specs: Iterable[TensorSpec]) -> None:
        self._expected = [spec.key for spec in specs]
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in specs:
            header[spec.key] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._stream = file.open("wb")
        self._stream.write(struct.pack("<Q", len(encoded)) + encoded)

    def write(self, key: str, tensor: Tensor) -> int:
        """Appends the next tensor, contiguous on the CPU; returns its size in bytes."""
        assert key == self._expected.pop(0)
        if tensor.numel() > 0:
            self._stream.write(as_bytes(tensor))
        return tensor.numel() * tensor.element_size()

    def close(self, complete: bool = True) -> None:
        """Makes the file durable, or (if not ``complete``) leaves it as it is."""
        assert not complete or not self._expected, f"not written: {self._expected[:3]}"
        if complete:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self._stream.close()
