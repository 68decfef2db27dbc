"""Images and clips of sound in conversations: what is read of a file, and where they wait for a batch."""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Self

import numpy as np
import pyarrow as pa
from typing_extensions import override

from lightning_ep.data.conversations import MalformedRow

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image as Picture

MEDIA = "media.arrow"
"""The file beside windows with what their media are: paths, and the bytes of those that came as bytes."""

_LONG_PATH = 300  # characters; what is longer is base64 mostly, megabytes of it

_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("data", pa.large_binary()),
        ("where", pa.string()),
        ("size", pa.list_(pa.int32(), 2)),
        ("kind", pa.string()),
    ]
)


@dataclass(frozen=True)
class Medium(ABC):
    """An image or a clip of a row, encoded as it came.

    Attributes:
        path: Its file; None where the row has the bytes.
        data: The bytes of a file (PNG, JPEG, WAV, FLAC, ...).
        where: What messages call it: file and line, message and number.
        size: Width and height in pixels, or samples and samples per second, as the file has them; None as long as it
            was not looked at.
    """

    path: str | None
    data: bytes | None
    where: str
    size: tuple[int, int] | None = None

    kind: ClassVar[str]
    """What templates call it in a part's type."""

    def looked_at(self) -> Self:
        """With its size; raises as `decoded`."""
        return replace(self, size=self.size_of(self._read()))

    def decoded(self) -> Any:
        """What is in the file.

        Raises:
            MalformedRow: If there is no such file, it cannot be read, or is of another size than it was.
        """
        found = self._read()
        if self.size is not None and (size := self.size_of(found)) != self.size:
            raise MalformedRow(
                f"{self.where}: {self.path} has {self.said(size)}, and had {self.said(self.size)} when the data was "
                "prepared: prepare it in another `cache_dir`."
            )
        return found

    def _read(self) -> Any:
        try:
            with open(self.path, "rb") if self.path is not None else io.BytesIO(self.data or b"") as file:
                return self.decode(file)
        except FileNotFoundError as error:
            raise MalformedRow(f"{self.where}: there is no file {self._name}.") from error
        except MalformedRow:
            raise
        except (OSError, ValueError) as error:  # a directory, nothing that we may read, or no path: it has a zero in it
            raise MalformedRow(
                f"{self.where}: {self._name} cannot be opened: {getattr(error, 'strerror', None) or error}."
            ) from error

    @property
    def _name(self) -> str:
        if self.path is None:
            return f"{len(self.data or b''):,} bytes"
        if len(self.path) <= _LONG_PATH:
            return self.path
        return f"{self.path[:_LONG_PATH]!r}... ({len(self.path):,} characters; base64 has `data:;base64,` in front)"

    @abstractmethod
    def decode(self, file: BinaryIO) -> Any:
        """What is in an open file; raises MalformedRow."""

    @abstractmethod
    def size_of(self, decoded: Any) -> tuple[int, int]:
        """The size of what `decode` returned."""

    @abstractmethod
    def said(self, size: tuple[int, int]) -> str:
        """A size in words, with its unit."""


class Image(Medium):
    """An image. Decoded it is a picture, upright and in RGB, as transformers' `load_image` gives it."""

    kind = "image"

    @override
    def decode(self, file: BinaryIO) -> Picture:
        import PIL.Image
        import PIL.ImageOps

        try:
            with PIL.Image.open(file) as opened:
                return PIL.ImageOps.exif_transpose(opened).convert("RGB")
        # What is no picture, is cut short, or is larger than Pillow takes for harmless. Formats have errors of their
        # own (AVIF a RuntimeError, DDS a NotImplementedError).
        except Exception as error:
            raise MalformedRow(f"{self.where}: {self._name} cannot be decoded as an image: {error}") from error

    @override
    def size_of(self, decoded: Picture) -> tuple[int, int]:
        return decoded.size

    @override
    def said(self, size: tuple[int, int]) -> str:
        return " x ".join(map(str, size)) + " pixels"


class Clip(Medium):
    """A clip of sound. Decoded it is samples, float32 ``[samples]``, the mean of its channels, and their rate in Hz."""

    kind = "audio"

    def waveform(self, rate: int) -> np.ndarray:
        """Its samples at that rate, float32 ``[samples]``, as transformers' `load_audio` gives them by soundfile."""
        samples, own = self.decoded()
        if own == rate:
            return samples
        import soxr

        size, resampled = self.length(rate), soxr.resample(samples, own, rate, quality="soxr_hq")
        return np.pad(resampled, (0, max(0, size - len(resampled))))[:size]

    def length(self, rate: int) -> int:
        """How many samples it has at that rate.

        Raises:
            ModuleNotFoundError: If it has another, and what brings it to this one is not installed.
        """
        assert self.size is not None
        samples, own = self.size
        if own != rate and find_spec("soxr") is None:
            raise ModuleNotFoundError(
                f"{self.where}: {self._name} has {own:,} samples per second, and the model hears {rate:,}. soxr brings "
                "one to the other: pip install soxr."
            )
        return math.ceil(samples * rate / own)

    @override
    def decode(self, file: BinaryIO) -> tuple[np.ndarray, int]:
        if find_spec("soundfile") is None:
            raise ModuleNotFoundError(f"{self.where}: sound is read with soundfile: pip install soundfile soxr.")
        import soundfile

        try:
            with soundfile.SoundFile(file) as opened:
                samples_SC, rate = opened.read(dtype="float32", always_2d=True), opened.samplerate
        # What is no sound, of another format, cut short in its header, without one, or with one that says terabytes.
        except (soundfile.SoundFileError, OSError, ValueError, TypeError, MemoryError) as error:
            raise MalformedRow(
                f"{self.where}: {self._name} cannot be decoded as sound: {error} WAV, FLAC, OGG and MP3 can; "
                "`ffmpeg -i FILE clip.wav` makes the first of most others."
            ) from error
        if not len(samples_SC):
            raise MalformedRow(f"{self.where}: {self._name} has no samples. Leave the clip out.")
        if not np.isfinite(samples_SC).all():
            raise MalformedRow(
                f"{self.where}: {self._name} has samples that are no finite numbers, and so would be the loss. Record "
                "or convert it anew."
            )
        return np.ascontiguousarray(samples_SC.T.mean(axis=0)), rate

    @override
    def size_of(self, decoded: tuple[np.ndarray, int]) -> tuple[int, int]:
        return len(decoded[0]), decoded[1]

    @override
    def said(self, size: tuple[int, int]) -> str:
        return f"{size[0]:,} samples ({size[1]:,} per second)"


_KINDS: dict[str, type[Medium]] = {cls.kind: cls for cls in (Image, Clip)}


class MediaWriter:
    """Writes media to `MEDIA` of a directory as they come; no file if none come."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / MEDIA
        self._stream: Any = None

    def __enter__(self) -> MediaWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()
            self._file.close()

    def add(self, media: Sequence[Medium]) -> None:
        """Appends media."""
        if media and self._stream is None:
            self._file = pa.OSFile(str(self._path), "wb")
            self._stream = pa.ipc.new_stream(self._file, _SCHEMA)
        if media:
            columns = zip(*((*astuple(medium), medium.kind) for medium in media), strict=True)
            arrays = [pa.array(values, field.type) for values, field in zip(columns, _SCHEMA, strict=True)]
            self._stream.write_batch(pa.record_batch(arrays, schema=_SCHEMA))


class MediaFile:
    """What a `MediaWriter` has written, mapped into memory."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / MEDIA

    @cached_property
    def _dataset(self) -> Dataset:
        from datasets import Dataset

        return Dataset.from_file(str(self._path))

    def __getitem__(self, index: int) -> Medium:
        row = self._dataset[index]
        return _KINDS[row.pop("kind")](**{**row, "size": tuple(row["size"])})
