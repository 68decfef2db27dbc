"""Reads boxes of stored tensors straight into shards, in parallel, with little host memory."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_ep.distributed.shards import Region, as_bytes
from lightning_ep.hub.safetensors_file import StoredTensor
from lightning_ep.hub.trace import Piece

CHUNK_BYTES = 32 * 2**20
"""Largest single read: large enough for full disk speed, small enough that all buffers are a fraction of a GiB."""

MIN_RUN_BYTES = 64 * 2**10
"""Shorter runs, where a box has gaps in the file, are read with the gaps: a disk is as fast."""

_MAX_WORKERS = 8
_MAX_PARTS = 512  # of one read that is scattered over destinations; Linux allows 1024


class ReadError(Exception):
    """A file ended early or could not be read; the message names it."""


@dataclass(frozen=True)
class Read:
    """A run of bytes and what to do with it.

    Attributes:
        offset: First byte in the file.
        shape: Shape of what the bytes are, a box of the stored tensor that is whole in its inner dimensions.
        window: The part of that box that is wanted.
        piece: How its dimensions map to those of the destination.
        dtype: Its dtype.
        destination: View of the shard to fill.
    """

    offset: int
    shape: tuple[int, ...]
    window: Region
    piece: Piece
    dtype: torch.dtype
    destination: Tensor

    @property
    def nbytes(self) -> int:
        """Length of the run."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def as_is(self) -> bool:
        """Whether the bytes are those of the destination, in the same order."""
        dims = [dim for dim in self.piece.dims if dim is not None]
        return (
            self.destination.dtype == self.dtype
            and self.window.size == self.shape
            and dims == sorted(dims)
            and self.destination.is_contiguous()
        )


class Batch(NamedTuple):
    """Reads that are neighbours in a file."""

    file: Path
    reads: tuple[Read, ...]

    @property
    def nbytes(self) -> int:
        """Length of the whole run."""
        return sum(read.nbytes for read in self.reads)


def reads_of(stored: StoredTensor, piece: Piece, destination: Tensor) -> Iterator[tuple[Path, Read]]:
    """The reads that fill ``destination`` with a piece.

    Args:
        stored: The piece's source.
        piece: A piece whose target box is all of ``destination``.
        destination: A view of a shard.
    """
    box = piece.source_region()
    first = next((dim for dim, n in enumerate(box.size) if n > 1), len(box.size))
    inner = tuple(stored.shape[first + 1 :])
    row = math.prod(inner) * stored.dtype.itemsize
    step = max(1, CHUNK_BYTES // row)
    if _has_gaps(box, stored) and _run_bytes(box, stored) >= MIN_RUN_BYTES:
        step = 1
    if first < len(box.size) and box.size[first] > step:
        # Some rows at a time; a single row that is too large, or has gaps, is cut along the next dimension.
        dim = piece.dims.index(first)
        for start in range(0, box.size[first], step):
            size = min(step, box.size[first] - start)
            part = Region(
                tuple(start if d == dim else 0 for d in range(destination.ndim)),
                tuple(size if d == dim else n for d, n in enumerate(destination.shape)),
            )
            whole = Region.whole(tuple(destination.shape))
            cropped = Piece(piece.key, piece.source, whole, piece.dims).crop(part)
            assert cropped is not None
            yield from reads_of(stored, cropped, part.of(destination))
        return
    strides = [math.prod(stored.shape[d + 1 :]) for d in range(len(stored.shape))]
    begin = sum(a * s for a, s in zip(box.start[: first + 1], strides, strict=False))
    shape = (*box.size[: first + 1], *inner)
    window = Region((*[0] * min(first + 1, len(shape)), *box.start[first + 1 :]), box.size)
    offset = stored.offset + begin * stored.dtype.itemsize
    yield stored.file, Read(offset, shape, window, piece, stored.dtype, destination)


def _has_gaps(box: Region, stored: StoredTensor) -> bool:
    first = next((dim for dim, n in enumerate(box.size) if n > 1), len(box.size))
    return box.size[first + 1 :] != stored.shape[first + 1 :]


def _run_bytes(box: Region, stored: StoredTensor) -> int:
    """Length of the runs of bytes that a box consists of."""
    last = max((dim for dim, n in enumerate(box.size) if n != stored.shape[dim]), default=0)
    return math.prod(box.size[last:]) * stored.dtype.itemsize


def batches_of(reads: Sequence[tuple[Path, Read]]) -> list[Batch]:
    """Sorts reads by place and joins those whose bytes are adjacent."""
    batches: list[Batch] = []
    run: list[Read] = []
    size = 0
    previous: tuple[Path, int] | None = None
    for file, read in sorted(reads, key=lambda item: (item[0], item[1].offset)):
        fits = size + read.nbytes <= CHUNK_BYTES and len(run) < _MAX_PARTS
        # One dtype, so that every read is aligned in a buffer.
        joins = previous == (file, read.offset) and fits and run[-1].dtype == read.dtype
        if run and not joins:
            assert previous is not None
            batches.append(Batch(previous[0], tuple(run)))
            run, size = [], 0
        run.append(read)
        size += read.nbytes
        previous = (file, read.offset + read.nbytes)
    if run and previous is not None:
        batches.append(Batch(previous[0], tuple(run)))
    return batches


def read_all(batches: Sequence[Batch], device: torch.device, progress: tqdm | None = None) -> int:
    """Carries out the reads with a few threads.

    Args:
        batches: What to read.
        device: Where the destinations are.
        progress: A bar to advance by bytes.

    Returns:
        Number of bytes read.

    Raises:
        ReadError: If a file ends early or cannot be read.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the shards' memory must be free of earlier work
    descriptors = {file: os.open(file, os.O_RDONLY) for file in {batch.file for batch in batches}}
    local = threading.local()
    total = 0
    try:
        # A thread's current device is the first GPU, where it would open a context.
        prepare = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        with ThreadPoolExecutor(_num_workers(), "read", prepare) as pool:
            futures = [pool.submit(_read_batch, descriptors[b.file], b, device, local) for b in batches]
            try:
                for future in as_completed(futures):
                    total += future.result()
                    if progress is not None:
                        progress.update(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # what the threads' streams keep is of no use to others
    return total


def _num_workers() -> int:
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(2, min(_MAX_WORKERS, (os.cpu_count() or 2) // ranks))


def _read_batch(descriptor: int, batch: Batch, device: torch.device, local: threading.local) -> int:
    reads = batch.reads
    if device.type == "cpu" and all(read.as_is for read in reads):
        _read_into(descriptor, [as_bytes(read.destination) for read in reads], reads[0].offset, batch.file)
        return batch.nbytes
    if not hasattr(local, "staging"):
        local.staging = _Staging(device)
    size = 0
    with local.staging.borrow(batch.nbytes) as buffer:
        _read_into(descriptor, [as_bytes(buffer)], reads[0].offset, batch.file)
        for read in reads:
            _place(buffer[size : size + read.nbytes], read)
            size += read.nbytes
    return size


def _place(data: Tensor, read: Read) -> None:
    """Moves bytes on the host to their destination; casts there, on the device."""
    box = data.view(read.dtype).view(read.shape)
    if not read.as_is:
        box = box.to(read.destination.device, non_blocking=True)
    read.destination.copy_(read.piece.arrange(read.window.of(box)), non_blocking=True)


def _read_into(descriptor: int, buffers: list[memoryview], offset: int, file: Path) -> None:
    try:
        while buffers:
            count = os.preadv(descriptor, buffers, offset)
            if count == 0:
                raise ReadError(f"{file}: ended at byte {offset:,}, which its header says it goes beyond")
            offset += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if buffers:
                buffers[0] = buffers[0][count:]
    except OSError as error:
        raise ReadError(f"{file}: cannot be read at byte {offset:,}: {error}") from error


class _Staging:
    """One thread's host buffers: two, so that a copy to the device runs under the next read."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: list[Tensor | None] = [None, None]
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._next = 0

    @contextmanager
    def borrow(self, nbytes: int) -> Generator[Tensor, None, None]:
        """A buffer of bytes; copies from it must be issued inside the context."""
        index, self._next = self._next, 1 - self._next
        event = self._events[index]
        if event is not None:
            event.synchronize()
        buffer = self._buffers[index]
        if buffer is None or buffer.numel() < nbytes:
            pinned = self._stream is not None
            buffer = torch.empty(max(nbytes, CHUNK_BYTES), dtype=torch.uint8, pin_memory=pinned)
            self._buffers[index] = buffer
        if self._stream is None:
            yield buffer[:nbytes]
            return
        with torch.cuda.stream(self._stream):
            yield buffer[:nbytes]
            event = torch.cuda.Event()
            event.record(self._stream)
            self._events[index] = event
