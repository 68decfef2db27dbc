"""Documents on their way into windows: in files, since there may be more of them than fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightning_ep.data.media import MediaWriter, Medium
from lightning_ep.data.windows import Sample


class DocumentFiles:
    """Writes documents as they come.

    Args:
        scratch: A directory that is removed once they are in windows.
        directory: Where their images and clips stay, if they have any.
    """

    def __init__(self, scratch: Path, directory: Path) -> None:
        self._paths = scratch / "tokens", scratch / "supervised"
        self._media = MediaWriter(directory)
        none = np.zeros(0, np.int64)
        self._lengths, self._parts, self._numbers = [none], [none], [none]

    def __enter__(self) -> DocumentFiles:
        with ExitStack() as stack:
            self._files = [stack.enter_context(path.open("wb")) for path in self._paths]
            stack.enter_context(self._media)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(
        self,
        tokens: np.ndarray,
        supervised: np.ndarray,
        lengths: np.ndarray,
        media: Sequence[Medium],
        numbers: np.ndarray,
        part: int,
    ) -> None:
        """Adds documents of one part; for the others see `Documents`."""
        for file, values in zip(self._files, (tokens, supervised), strict=True):
            file.write(values.tobytes())
        self._media.add(media)
        self._lengths.append(lengths)
        self._parts.append(np.full(len(lengths), part))
        self._numbers.append(numbers)

    def documents(self) -> Documents:
        """All that were added; after the files are closed."""
        columns = [np.concatenate(column) for column in (self._lengths, self._parts, self._numbers)]
        if not len(columns[0]):
            return Documents(np.zeros(0, np.int32), np.zeros(0, np.bool_), *columns)
        tokens, supervised = self._paths
        return Documents(np.memmap(tokens, np.int32, "r"), np.memmap(supervised, np.bool_, "r"), *columns)


@dataclass
class Documents:
    """All documents, in the order of the rows.

    Attributes:
        tokens: int32, one document after the other.
        supervised: bool, of each token.
        lengths: int64, of each document.
        parts: int64, the number of each document's part.
        numbers: int64, how many images and clips each document has.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    lengths: np.ndarray
    parts: np.ndarray
    numbers: np.ndarray

    def __post_init__(self) -> None:
        self._ends = np.cumsum(self.lengths)
        self._media_ends = np.cumsum(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        begin, end = self._ends[index] - self.lengths[index], self._ends[index]
        return Sample(self.tokens[begin:end], self.supervised[begin:end])  # type: ignore[arg-type]  # arrays

    @property
    def have_media(self) -> bool:
        """Whether any document has one."""
        return bool(self.numbers.any())

    def media(self, index: int) -> range:
        """The images and clips of a document, by their numbers in the file of all."""
        end = int(self._media_ends[index])
        return range(end - int(self.numbers[index]), end)

    def mixed(self, weights: Sequence[float], seed: int) -> np.ndarray:
        """The documents of an epoch: mixed, and as often as their parts' weights say; of every part one at least."""
        rng = np.random.default_rng(seed)
        chosen = [np.zeros(0, np.int64)]
        for part, weight in enumerate(weights):
            documents = np.flatnonzero(self.parts == part)
            times, rest = divmod(weight, 1)
            chosen += [documents] * int(times)
            number = max(round(rest * len(documents)), int(times == 0))
            chosen.append(rng.permutation(documents)[:number])
        return rng.permutation(np.concatenate(chosen))
