"""Images of conversations: where rows have them, what is wrong with them, and where they wait for a batch."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from lightning_ep.data.conversations import MalformedRow, text_of

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image as Picture

IMAGES = "images.arrow"
"""The file beside windows with what their images are: paths, and the bytes of those that came as bytes."""

_SCHEMA = pa.schema(
    [("path", pa.string()), ("data", pa.large_binary()), ("where", pa.string()), ("size", pa.list_(pa.int32(), 2))]
)
_MARKER = "<image>"  # of rows with a column of images
_KEYS = ("image", "image_url", "url", "path", "bytes")  # of a part of a message


class Image(NamedTuple):
    """An image of a row, encoded as it came.

    Attributes:
        path: Its file; None where the row has the bytes.
        data: The bytes of a file (PNG, JPEG, ...).
        where: What messages call it: file and line, message and number.
        size: Width and height in pixels; None as long as it was not looked at.
    """

    path: str | None
    data: bytes | None
    where: str
    size: tuple[int, int] | None = None

    def decoded(self) -> Picture:
        """The picture, upright and in RGB, as transformers' `load_image` gives it.

        Raises:
            MalformedRow: If there is no such file, or it is no picture, or of another size than it was.
        """
        picture = self._opened()
        if self.size is not None and picture.size != tuple(self.size):
            raise MalformedRow(
                f"{self.where}: {self.path} has {' x '.join(map(str, picture.size))} pixels, and had "
                f"{' x '.join(map(str, self.size))} when the data was prepared: prepare it in another `cache_dir`."
            )
        return picture

    def _opened(self) -> Picture:
        import PIL.Image
        import PIL.ImageOps

        source = self.path if self.data is None else io.BytesIO(self.data)
        try:
            with PIL.Image.open(source) as opened:  # type: ignore[arg-type]  # one of both is there
                return PIL.ImageOps.exif_transpose(opened).convert("RGB")
        except FileNotFoundError as error:
            raise MalformedRow(f"{self.where}: there is no file {self.path}.") from error
        # What is no picture, is cut short, or is larger than Pillow takes for harmless.
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            name = self.path or f"{len(self.data or b''):,} bytes"
            raise MalformedRow(f"{self.where}: {name} cannot be decoded as an image: {error}") from error


class RowImages:
    """Reads the contents of a row's messages, in which images may be, each looked at; see `content`.

    Args:
        columns: Of the row. ``images`` or ``image``, if it has them, are those of parts and markers that name none.
        where: What messages call the row.
        folder: Where paths go on from that are not absolute.
    """

    def __init__(self, columns: Mapping[str, Any], where: str, folder: Path) -> None:
        self._where = where
        self._folder = folder
        given: Any = next((columns[key] for key in ("images", "image") if columns.get(key) is not None), [])
        self._column = list(given) if isinstance(given, Sequence) and not isinstance(given, str | bytes) else [given]
        self._used = 0

    def content(self, written: Any, place: str, role: str) -> Any:
        """A text, or a list of parts as templates take them: ``{"type": "text"}`` and ``{"type": "image"}``.

        Args:
            written: A text, in which ``<image>`` stands for one of the row's column if it has one; or a list of texts
                and parts.
            place: What messages call it.
            role: Of the message.

        Raises:
            MalformedRow: If it is neither, an image is missing or no image, or an assistant's.
        """
        parts = list(self._parts(written, place))
        if not any(isinstance(part, Image) for part in parts):
            return "".join(parts)  # type: ignore[arg-type]  # texts
        if role == "assistant":
            raise MalformedRow(f"{place}: an image is in what the assistant says, and models write texts.")
        return [
            {"type": "image", "image": part} if isinstance(part, Image) else {"type": "text", "text": part}
            for part in parts
            if part
        ]

    def check_used(self) -> None:
        """Raises MalformedRow if no message has a place for some of the column's images."""
        if self._used < len(self._column):
            raise MalformedRow(
                f"{self._where}: the row has {len(self._column)} images, and its messages have {self._used} places "
                f"for them: parts {{'type': 'image'}}, or {_MARKER} in texts."
            )

    def _parts(self, written: Any, place: str) -> Iterator[str | Image]:
        if isinstance(written, str):
            texts = written.split(_MARKER) if self._column else [written]
            for number, text in enumerate(texts):
                if number:
                    yield self._next(place)
                yield text
            return
        if not isinstance(written, Sequence):
            yield text_of(written, place, "")  # which says what is wrong
            return
        for number, part in enumerate(written):
            if isinstance(part, Mapping) and part.get("type", "text") in ("image", "image_url"):
                value = next((part[key] for key in _KEYS if part.get(key) is not None), None)
                yield self._next(place) if value is None else self._image(value, f"{place}[{number}]")
            else:
                yield text_of([part], f"{place}[{number}]", "")

    def _next(self, place: str) -> Image:
        self._used += 1
        if self._used > len(self._column):
            raise MalformedRow(
                f"{place}: there is a place for image {self._used} of the row, which has {len(self._column)} in its "
                "column 'images'."
            )
        return self._image(self._column[self._used - 1], f"{self._where}: images[{self._used - 1}]")

    def _image(self, value: Any, where: str) -> Image:
        """What a row gives as an image, looked at."""
        if isinstance(value, Mapping):  # OpenAI's {"url": ...}; of `datasets` {"bytes": ..., "path": ...}
            value = next((value[key] for key in ("bytes", "url", "path") if value.get(key) is not None), value)
        if isinstance(value, str) and value.startswith("data:"):
            try:
                value = base64.b64decode(value.partition(",")[2], validate=True)
            except binascii.Error as error:
                raise MalformedRow(f"{where}: the image is a data URL, and not base64: {error}") from error
        if isinstance(value, str):
            if value.startswith(("http://", "https://")):
                raise MalformedRow(f"{where}: {value} is on the network. Download it, and give its path.")
            path = (self._folder / value.removeprefix("file://")).absolute()
            image = Image(str(path), None, where)
        elif isinstance(value, bytes):
            image = Image(None, value, where)
        else:
            raise MalformedRow(f"{where}: an image is a path, bytes or a data URL, not {type(value).__name__}.")
        return image._replace(size=image.decoded().size)


class ImageWriter:
    """Writes images to `IMAGES` of a directory as they come; no file if none come."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / IMAGES
        self._stream: Any = None

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()
            self._file.close()

    def add(self, images: Sequence[Image]) -> None:
        """Appends images."""
        if images and self._stream is None:
            self._file = pa.OSFile(str(self._path), "wb")
            self._stream = pa.ipc.new_stream(self._file, _SCHEMA)
        if images:
            columns = zip(*images, strict=True)
            arrays = [pa.array(values, field.type) for values, field in zip(columns, _SCHEMA, strict=True)]
            self._stream.write_batch(pa.record_batch(arrays, schema=_SCHEMA))


class ImageFile:
    """What an `ImageWriter` has written, mapped into memory."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / IMAGES

    @cached_property
    def _dataset(self) -> Dataset:
        from datasets import Dataset

        return Dataset.from_file(str(self._path))

    def __getitem__(self, index: int) -> Image:
        row = self._dataset[index]
        return Image(row["path"], row["data"], row["where"], tuple(row["size"]))
