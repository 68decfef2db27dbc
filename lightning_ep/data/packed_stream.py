"""Windows packed from a stream of texts as it goes by: in an order that does not change, and from any batch on."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_ep.data.preparation import MakeSamples, Samples
from lightning_ep.data.windows import COLUMNS, Sample, best_fit, fill_window

if TYPE_CHECKING:
    import datasets

BUFFER = 256
"""Windows that are packed together and mixed."""

_ROWS = 64  # that are tokenized together


class Position(NamedTuple):
    """Where a rank stands in its stream.

    Attributes:
        epoch: Times that the stream was over.
        stream: What `datasets` says of the place in it where the buffer begins; None at its beginning.
        buffer: Buffers of this epoch before this one.
        windows: Windows of this buffer that were handed out.
    """

    epoch: int = 0
    stream: dict[str, Any] | None = None
    buffer: int = 0
    windows: int = 0


class PackedStream(IterableDataset[tuple[dict[str, torch.Tensor], Position]]):
    """Batches of windows without end, each with the position behind it.

    Texts are read until they fill a buffer of windows, packed best fit, and the windows mixed. The buffer is not kept
    in a checkpoint: it is read again from where it began.

    Args:
        texts: The rows of this rank.
        make_samples: What rows become: documents that windows hold.
        sequence_length: Tokens of a window.
        batch_size: Windows of a batch.
        pad_token_id: What fills windows up.
        seed: With epoch and buffer it says how windows are mixed.
        collate: Makes a batch of windows.
        buffer: Windows of a buffer.
    """

    def __init__(
        self,
        texts: datasets.IterableDataset,
        make_samples: MakeSamples,
        sequence_length: int,
        batch_size: int,
        pad_token_id: int,
        seed: int,
        collate: Callable[[list[dict[str, torch.Tensor]]], dict[str, torch.Tensor]],
        buffer: int = BUFFER,
    ) -> None:
        self._texts = texts
        self._make_samples = make_samples
        self._sequence_length = sequence_length
        self._batch_size = batch_size
        self._pad_token_id = pad_token_id
        self._seed = seed
        self._collate = collate
        self._buffer = buffer
        self.position = Position()

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], Position]]:
        windows = self._windows(self.position)
        while True:
            batch = list(islice(windows, self._batch_size))
            yield self._collate([window for window, _ in batch]), batch[-1][1]

    def _windows(self, position: Position) -> Iterator[tuple[dict[str, torch.Tensor], Position]]:
        while True:
            found = False
            texts = copy.deepcopy(self._texts)  # every iteration of its own: one that was resumed begins there again
            if position.stream is not None:
                texts.load_state_dict(position.stream)
            rows = iter(texts)
            while documents := self._read(rows):
                found = True
                packed = list(best_fit([len(document.input_ids) for document in documents], self._sequence_length))
                order = np.random.default_rng((self._seed, position.epoch, position.buffer)).permutation(len(packed))
                for number in order[position.windows :].tolist():
                    position = position._replace(windows=position.windows + 1)
                    yield self._window([documents[index] for index in packed[number]]), position
                # Only what is asked for is read, so that this is where the next buffer begins.
                position = Position(position.epoch, texts.state_dict(), position.buffer + 1)
            if not found and position.buffer == 0:
                raise ValueError("No row of this rank's share of the stream has a text of more than one token.")
            position = Position(position.epoch + 1)

    def _read(self, rows: Iterator[Any]) -> list[Sample]:
        """The documents of the next buffer; none at the end of the stream."""
        samples, tokens = Samples(), 0
        while tokens < self._buffer * self._sequence_length:
            before, some = len(samples.samples), list(islice(rows, _ROWS))
            if not some:
                break
            self._make_samples(some, samples)
            tokens += sum(len(sample.input_ids) for sample in samples.samples[before:])
        return samples.samples

    def _window(self, documents: list[Sample]) -> dict[str, torch.Tensor]:
        window = fill_window(documents, self._sequence_length, self._pad_token_id)
        return {name: torch.from_numpy(values).long() for name, values in zip(COLUMNS, window, strict=True)}


class StreamLoader:
    """What a Trainer gets of a `PackedStream`: batches, their number in the run, and a position that it can keep.

    A pass goes on where the last one stopped. Positions count what was handed out, not what was read ahead.

    Args:
        stream: The batches.
        batches: Batches of the run on this rank, which is one epoch.
        share: What must be the same in a run that resumes: which share of which data this is.
        num_workers: 1 for a process that reads ahead, 0 for none.
        pin_memory: Give batches in page-locked memory.
    """

    def __init__(
        self, stream: PackedStream, batches: int, share: dict[str, Any], num_workers: int = 0, pin_memory: bool = False
    ) -> None:
        self._stream = stream
        self._batches = batches
        self._share = share
        # Forked, so that what makes samples need not be picklable.
        forked = {"multiprocessing_context": "fork", "worker_init_fn": _begin_worker} if num_workers else {}
        self._options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory, **forked}
        self._position = Position()

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self._stream.position = self._position
        # A generator of its own, or every pass would draw a number from the global one.
        generator = torch.Generator().manual_seed(0)
        loader = DataLoader(self._stream, batch_size=None, generator=generator, **self._options)
        for batch, position in loader:
            self._position = Position(*position)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position of this rank, as JSON, and whose it is."""
        return {**self._share, "position": json.dumps(self._position, default=int)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lets the next pass go on at the position of ``state_dict``.

        Raises:
            ValueError: If it is a position in other data, or in another share of them.
        """
        there = {key: value for key, value in state_dict.items() if key != "position"}
        if there != self._share:
            raise ValueError(
                f"The checkpoint stops inside a stream of {there}, and this run reads {self._share}: its place cannot "
                "be found again. Resume with the same data on as many data ranks."
            )
        self._position = Position(*json.loads(state_dict["position"]))


def _begin_worker(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its warning of forks is gone; one thread is faster than any GPU
