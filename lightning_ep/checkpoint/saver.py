"""Checkpoints of a run: saved in full or not at all, replaced and deleted only when a newer one is durable."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_ep.checkpoint import files
from lightning_ep.checkpoint.background import JobQueue, Worker
from lightning_ep.checkpoint.files import FileRecord
from lightning_ep.checkpoint.staging import HostBuffer
from lightning_ep.checkpoint.tensor_files import State, flatten, write_shards
from lightning_ep.distributed.agreement import Ranks
from lightning_ep.distributed.shards import local_tensor
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.process_groups import doubt, once

_MAX_THREADS = 4


@dataclass(frozen=True)
class _Target:
    """Where a save goes.

    Attributes:
        final: The checkpoint's name.
        staged: A hidden name beside it, until the checkpoint is complete.
        needed: Bytes that all ranks write.
        free: Bytes that were free before.
    """

    final: Path
    staged: Path
    needed: int
    free: int


class Checkpoints:
    """Saves, replaces and deletes checkpoints, in the order of the calls. Every rank must make the same calls.

    Args:
        timeout: How long ranks wait for one another while writing.
        ranks_per_node: Processes that share this machine.
    """

    def __init__(self, timeout: timedelta, ranks_per_node: int = 1) -> None:
        # One group and thread for all runs of a process: who saves waits for what others are still writing.
        self.ranks, self._worker = once(("checkpoints", timeout), lambda: (Ranks(CheckpointError, timeout), Worker()))
        self._queue = JobQueue(self._worker)
        self._buffer = HostBuffer()
        self._threads = max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // ranks_per_node))
        self._newest: Path | None = None
        self._pending: Path | None = None

    @property
    def pending(self) -> Path | None:
        """The checkpoint that is being written behind this thread, until somebody waits: alike on all ranks."""
        return self._pending

    def wait(self) -> None:
        """Returns when everything that was asked for is durable.

        Raises:
            CheckpointError: If a checkpoint could not be written; nothing that it was to replace has been touched.
        """
        self._pending = None
        self._queue.wait()

    def begin(self) -> None:
        """As `wait`, and for what other runs of the process write: nobody else uses the ranks' group then."""
        self.wait()
        self._worker.wait()

    def settle(self, seconds: float) -> None:
        """Gives what is being written a last chance before the job ends with an error; raises nothing."""
        if not self._queue.busy:
            return
        try:
            self._queue.wait(seconds)
        except Exception as error:
            print(f"[rank {self.ranks.rank}] {self._pending} was not saved: {error!r}", file=sys.stderr, flush=True)
        self._pending = None

    def save_directory(self, path: Path, state: State, blobs: Mapping[str, bytes], behind: bool) -> None:
        """Saves a directory to which every rank writes its shards.

        Args:
            path: Its name; rank 0's counts.
            state: Tensors in nested dicts, the same names on every rank.
            blobs: Contents of further files by name; rank 0's count.
            behind: Return as soon as the tensors are copied, and write on another thread.

        Raises:
            CheckpointError: On every rank, if it cannot be written; if it is written behind, from the next call.
        """
        local = {name: local_tensor(tensor) for name, tensor in flatten(state).items()}
        target = self._begin(path, sum(tensor.nbytes for tensor in local.values()), directory=True)
        if behind:
            local = self._buffer.copy(local)
        self._run(partial(self._write_directory, target, state, local, dict(blobs)), target, behind)

    def save_file(self, path: Path, content: Mapping[str, Any], behind: bool) -> None:
        """Saves one file that rank 0 writes.

        Args:
            path: Its name; rank 0's counts.
            content: What to save; rank 0's counts. Nobody else may change it.
            behind: Return at once, and write on another thread.

        Raises:
            CheckpointError: On every rank, if it cannot be written; if it is written behind, from the next call.
        """
        target = self._begin(path, _num_bytes(content) if self.ranks.rank == 0 else 0, directory=False)
        self._run(partial(self._write_file, target, content), target, behind)

    def remove(self, path: Path) -> None:
        """Deletes a checkpoint once those saved before this call are durable, and not if they fail.

        Links that point to it are moved to the newest checkpoint first.
        """
        self._then(lambda: self._remove(path))

    def link(self, link: Path, target: Path) -> None:
        """Lets a link point to a checkpoint, atomically, once that is durable."""
        self._then(lambda: files.point(link, target))

    # ------------------------------------------------------------------ inside

    def _begin(self, path: Path, size: int, directory: bool) -> _Target:
        self.begin()

        def prepare() -> tuple[str, str, int]:
            files.refuse_foreign_directory(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            files.remove_leftovers(path)
            staged = files.hidden(path)
            free = shutil.disk_usage(path.parent).free
            if directory:
                staged.mkdir()
            return str(path), str(staged), free

        final, staged, free = self.ranks.on_first(f"could not save {path}", prepare)
        needed = sum(self.ranks.together(f"could not save {path}", lambda: size))
        return _Target(Path(final), Path(staged), needed, free)

    def _run(self, write: Callable[[], None], target: _Target, behind: bool) -> None:
        job = partial(self._guarded, write, target)
        if behind:
            self._pending = target.final
            self._queue.submit(job)
        else:
            job()

    def _guarded(self, write: Callable[[], None], target: _Target) -> None:
        try:
            write()
            self.ranks.on_first(f"could not name {target.final}", lambda: files.publish(target.staged, target.final))
        except CheckpointError as error:
            if self.ranks.rank == 0:
                files.delete(target.staged)
            raise CheckpointError(
                f"The checkpoint {target.final} could not be saved: {error}. It takes at most {_size(target.needed)} "
                f"and {_size(target.free)} were free in {target.final.parent}. The state of the training and earlier "
                "checkpoints are as they were: make room (fewer checkpoints, save_top_k), or save elsewhere."
            ) from error
        except BaseException:
            doubt()
            raise
        self._newest = target.final

    def _write_directory(
        self, target: _Target, state: State, local: Mapping[str, Tensor], blobs: Mapping[str, bytes]
    ) -> None:
        records = write_shards(state, local, target.staged, self.ranks.group, self._threads)

        def write_blobs() -> dict[str, FileRecord]:
            if self.ranks.rank == 0:
                records.update({name: files.write_file(target.staged / name, data) for name, data in blobs.items()})
            return records

        everyone = self.ranks.together("writing", write_blobs)
        merged = {name: record for own in everyone for name, record in own.items()}
        self.ranks.on_first("writing the manifest", lambda: files.write_manifest(target.staged, merged))

    def _write_file(self, target: _Target, content: Mapping[str, Any]) -> None:
        def write() -> None:
            with files.ChecksumFile(target.staged) as file:
                torch.save(content, file)  # type: ignore[arg-type]

        self.ranks.on_first("writing", write)

    def _then(self, action: Callable[[], None]) -> None:
        """Rank 0's work on names, after the saves before it. It is no reason to stop a training."""

        def job() -> None:
            try:
                action()
            except OSError as error:
                rank_zero_warn(f"Checkpoints on disk were not tidied up: {error}")

        if self.ranks.rank != 0:
            return
        if self._queue.busy:
            self._queue.submit(job)
        else:
            job()

    def _remove(self, path: Path) -> None:
        newest = self._newest
        if newest is not None and newest.absolute() != path.absolute() and newest.exists():
            for link in files.links_to(path):
                files.point(link, newest)
        files.withdraw(path)


def _num_bytes(content: Any) -> int:
    if isinstance(content, Tensor):
        return content.nbytes
    if isinstance(content, Mapping):
        return sum(map(_num_bytes, content.values()))
    return sum(map(_num_bytes, content)) if isinstance(content, list | tuple) else 0


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:.2f} MiB"
