"""Where rows have images and clips of sound: as parts of messages, or in a column that texts have markers for."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_ep.data.conversations import MalformedRow, text_of
from lightning_ep.data.media import Clip, Image, Medium


class _Form(NamedTuple):
    """How rows name media of a kind."""

    cls: type[Medium]
    one: str  # what messages call one
    several: str
    columns: tuple[str, ...]
    marker: str  # of texts, in rows with a column
    types: tuple[str, ...]  # of parts of messages
    keys: tuple[str, ...]  # of such a part


_IN_PART = ("url", "path", "bytes")
_FORMS = {
    "image": _Form(
        Image,
        "an image",
        "images",
        ("images", "image"),
        "<image>",
        ("image", "image_url"),
        ("image", "image_url", *_IN_PART),
    ),
    "audio": _Form(
        Clip,
        "a clip of sound",
        "clips of sound",
        ("audios", "audio"),
        "<audio>",
        ("audio", "audio_url", "input_audio"),
        ("audio", "audio_url", "input_audio", *_IN_PART),
    ),
}
_VIDEOS = ("videos", "video")  # columns
_NO_VIDEOS = "videos are not read: give some of their frames as images, or leave the row out"


class RowMedia:
    """Reads the contents of a row's messages, in which images and clips may be, each looked at; see `content`.

    Args:
        columns: Of the row. ``images`` or ``image``, and ``audios`` or ``audio``, if it has them, are those of parts
            and markers that name none.
        where: What messages call the row.
        folder: Where paths go on from that are not absolute.
        kinds: What the model takes: "image", "audio".

    Raises:
        MalformedRow: If the row has a column of videos.
    """

    def __init__(self, columns: Mapping[str, Any], where: str, folder: Path, kinds: Collection[str]) -> None:
        self._where = where
        self._folder = folder
        self._kinds = kinds
        if found := [key for key in _VIDEOS if columns.get(key)]:
            raise MalformedRow(f"{where}: the row has a column {found[0]!r}, and {_NO_VIDEOS}.")
        for form in _FORMS.values():
            if len(found := [key for key in form.columns if _as_list(columns, [key])]) > 1:
                raise MalformedRow(f"{where}: the row has the columns {' and '.join(map(repr, found))}: leave one out.")
        self._columns = {kind: _as_list(columns, form.columns) for kind, form in _FORMS.items()}
        self._used = dict.fromkeys(_FORMS, 0)
        self._marked = {form.marker: kind for kind, form in _FORMS.items() if self._columns[kind]}

    def content(self, written: Any, place: str, role: str) -> Any:
        """A text, or a list of parts as templates take them: ``{"type": "text"}``, ``"image"`` and ``"audio"``.

        Args:
            written: A text, in which ``<image>`` and ``<audio>`` stand for one of the row's column if it has one; or a
                list of texts and parts.
            place: What messages call it.
            role: Of the message.

        Raises:
            MalformedRow: If it is neither, something is missing, cannot be read, or is nothing for the model; for a
                video, and for what an assistant would show or play.
        """
        parts = list(self._parts(written, place))
        media = [part for part in parts if isinstance(part, Medium)]
        if not media:
            return "".join(parts)  # type: ignore[arg-type]  # texts
        if role == "assistant":
            one = _FORMS[media[0].kind].one
            raise MalformedRow(f"{place}: {one} is in what the assistant says, and models write texts.")
        return [
            {"type": part.kind, part.kind: part} if isinstance(part, Medium) else {"type": "text", "text": part}
            for part in parts
            if part
        ]

    def check_used(self) -> None:
        """Raises MalformedRow if no message has a place for some of what is in the columns."""
        for kind, form in _FORMS.items():
            if self._used[kind] < len(self._columns[kind]):
                raise MalformedRow(
                    f"{self._where}: the row has {len(self._columns[kind])} {form.several}, and its messages have "
                    f"{self._used[kind]} places for them: parts {{'type': {kind!r}}}, or {form.marker} in texts."
                )

    def _parts(self, written: Any, place: str) -> Iterator[str | Medium]:
        if isinstance(written, str):
            markers = "|".join(map(re.escape, self._marked))
            for piece in re.split(f"({markers})", written) if markers else [written]:
                yield self._next(self._marked[piece], place) if piece in self._marked else piece
            return
        if not isinstance(written, Sequence):
            yield text_of(written, place, "")  # which says what is wrong
            return
        for number, part in enumerate(written):
            here = f"{place}[{number}]"
            named = part.get("type", "text") if isinstance(part, Mapping) else "text"
            if isinstance(named, str) and "video" in named:
                raise MalformedRow(f"{here} has the type {named!r}, and {_NO_VIDEOS}.")
            kind = next((kind for kind, form in _FORMS.items() if named in form.types), None)
            if kind is None:
                yield text_of([part], here, "")
                continue
            value = next((part[key] for key in _FORMS[kind].keys if part.get(key) is not None), None)
            yield self._next(kind, place) if value is None else self._medium(kind, value, here)

    def _next(self, kind: str, place: str) -> Medium:
        form, column = _FORMS[kind], self._columns[kind]
        self._used[kind] += 1
        if self._used[kind] > len(column):
            raise MalformedRow(
                f"{place}: there is a place for {form.one.split(' ', 1)[1]} {self._used[kind]} of the row, which has "
                f"{len(column)} in its column {form.columns[0]!r}."
            )
        number = self._used[kind] - 1
        return self._medium(kind, column[number], f"{self._where}: {form.columns[0]}[{number}]")

    def _medium(self, kind: str, value: Any, where: str) -> Medium:
        """What a row gives as an image or a clip, looked at."""
        form = _FORMS[kind]
        if kind not in self._kinds:
            raise MalformedRow(
                f"{where}: {form.one}, and the model's processor knows no place for one in a text: it takes "
                f"{' and '.join(_FORMS[known].several for known in self._kinds)}. Take another model, or leave the row "
                "out."
            )
        if isinstance(value, Mapping):  # {"url": ...} and {"data": ...} of OpenAI; of `datasets` {"bytes", "path"}
            if isinstance(value.get("data"), str):
                value = {"url": f"data:;base64,{value['data']}"}
            value = next((value[key] for key in ("bytes", "url", "path") if value.get(key) is not None), value)
        if isinstance(value, str) and value.startswith("data:"):
            try:
                value = base64.b64decode(value.partition(",")[2], validate=True)
            except binascii.Error as error:
                raise MalformedRow(f"{where}: {form.one} is a data URL, and not base64: {error}") from error
        if isinstance(value, str):
            if value.startswith(("http://", "https://")):
                raise MalformedRow(f"{where}: {value} is on the network. Download it, and give its path.")
            return form.cls(str((self._folder / value.removeprefix("file://")).absolute()), None, where).looked_at()
        if isinstance(value, bytes):
            return form.cls(None, value, where).looked_at()
        raise MalformedRow(f"{where}: {form.one} is a path, bytes or a data URL, not {type(value).__name__}.")


def _as_list(columns: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """What is in the first of these columns that has anything."""
    for key in names:
        given = columns.get(key)
        if given is not None and not (isinstance(given, Sequence) and len(given) == 0):
            return list(given) if isinstance(given, Sequence) and not isinstance(given, str | bytes) else [given]
    return []
