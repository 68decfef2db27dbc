"""What stands in the text of a conversation for an image or a clip: as many tokens as its size asks for."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from typing_extensions import override

from lightning_ep import transformers_adapter as adapter
from lightning_ep.data.chat_template import Rendered
from lightning_ep.data.conversations import Conversation, MalformedRow
from lightning_ep.data.media import Clip, Image, Medium
from lightning_ep.data.rendering import RendersConversations

_SIZES = 1000  # of which the text is kept, 10 KB each
_ONES = {"image": "an image", "audio": "a clip"}


class MediaTexts:
    """What a processor writes into a text in place of images and clips, which depends on their sizes alone.

    Args:
        processor: The model's.

    Attributes:
        kinds: What it takes: "image", and "audio" if it does.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._tokens: dict[str, str] = {"image": processor.image_token}
        self._begins: dict[str, str] = {}
        if adapter.takes_audio(processor):
            self._tokens["audio"] = processor.audio_token
            # By which models find clips, where they look for the places of tokens.
            self._begins = {"audio": begin} if (begin := getattr(processor, "audio_bos_token", None)) else {}
        self.kinds: Collection[str] = tuple(self._tokens)
        named = {getattr(processor, name, None) for name in ("video_token", "audio_token")}
        self._others = sorted(token for token in named - set(self._tokens.values()) if token)
        # Looked up by size, of which many images, and some clips, have the same.
        self._of_image = lru_cache(_SIZES)(self._write_image)
        self._of_clips = lru_cache(_SIZES)(self._write_clips)

    def expand(self, rendered: Rendered, media: Sequence[Medium]) -> Rendered:
        """A text with all places of its images and clips, as the processor would write it.

        Raises:
            ValueError: If the text has other numbers of places than there are images (clips), or one in what is learnt;
                or if an image cannot be scaled, or a clip is too short.
        """
        text, spans = rendered.text, rendered.spans
        if found := [token for token in self._others if token in text]:
            raise ValueError(f"it says {found[0]!r}, by which the model knows a clip of sound or a video.")
        for kind, token in self._tokens.items():
            self._check(text, kind, token, sum(medium.kind == kind for medium in media))
        kinds = {token: kind for kind, token in self._tokens.items()}
        places = list(re.finditer("|".join(map(re.escape, kinds)), text))
        if inside := [m for m in places if any(begin <= m.start() < end for begin, end in spans)]:
            raise ValueError(f"{inside[0][0]!r} stands in what the assistant says.")
        # In the order of each kind: a template may write images in front of clips, and models look for each alone.
        texts = {
            "image": iter([self._of_image(medium.size) for medium in media if isinstance(medium, Image)]),
            "audio": iter(self._of_clips(tuple(self._length(medium) for medium in media if isinstance(medium, Clip)))),
        }
        whole, written, last = "", [], 0
        for place in places:
            whole += text[last : place.start()] + next(texts[kinds[place[0]]])
            last = place.end()
            written.append((last, len(whole) - last))  # from here on, so much further
        whole += text[last:]

        def moved(place: int) -> int:
            return place + next((further for begin, further in reversed(written) if begin <= place), 0)

        return rendered._replace(text=whole, spans=[(moved(b), moved(e)) for b, e in spans], media=media)

    def _check(self, text: str, kind: str, token: str, number: int) -> None:
        for expected in (token, self._begins.get(kind, token)):
            if (times := text.count(expected)) != number:
                raise ValueError(
                    f"the chat template writes {times} times {expected!r}, where {_ONES[kind]} belongs, and the "
                    f"conversation has {number} {_ONES[kind].split()[1]}s. A text may not say that token, and the "
                    f"template has to write it for every {_ONES[kind].split()[1]}."
                )

    def longest(self, rendered: Rendered) -> tuple[Clip, int] | None:
        """The clip with the most tokens of an expanded text, and how many; None without clips."""
        clips = [medium for medium in rendered.media if isinstance(medium, Clip)]
        texts = self._of_clips(tuple(map(self._length, clips)))
        sizes = [len(text) // len(self._tokens["audio"]) for text in texts]
        return max(zip(clips, sizes, strict=True), key=lambda pair: pair[1], default=None)

    def _length(self, clip: Clip) -> int:
        extractor = self._processor.feature_extractor
        rate, least = extractor.sampling_rate, extractor.n_fft
        if (length := clip.length(rate)) < least:
            raise MalformedRow(
                f"{clip.where}: the clip has {length:,} samples at {rate:,} per second, and the model hears {least:,} "
                f"({1000 * least / rate:.0f} ms) or more. Leave it out."
            )
        return length

    def _write_image(self, size: tuple[int, int]) -> str:
        import PIL.Image

        blank = self._processor.image_processor(images=[PIL.Image.new("RGB", size)], return_tensors="pt")
        return self._processor.replace_image_token(blank, image_idx=0)

    def _write_clips(self, lengths: tuple[int, ...]) -> list[str]:
        if not lengths:
            return []
        return adapter.audio_inputs(self._processor, [np.zeros(length, np.float32) for length in lengths])[1]


@dataclass(frozen=True)
class RendersMedia(RendersConversations):
    """Makes samples of conversations whose messages have parts with images and clips.

    Args:
        media: Writes their places.
    """

    media: MediaTexts | None = None

    @override
    def render(self, conversation: Conversation) -> Rendered:
        assert self.media is not None
        rendered = super().render(conversation._replace(messages=[_bare(m) for m in conversation.messages]))
        media = [part[part["type"]] for m in conversation.messages for part in _parts(m) if part["type"] != "text"]
        try:
            expanded = self.media.expand(rendered, media)
        except MalformedRow:
            raise
        except ValueError as error:
            raise MalformedRow(f"{conversation.where}: {error}") from error
        longest = self.media.longest(expanded)
        if longest is not None and longest[1] > self.sequence_length and self.too_long == "shorten":
            # No shortening brings it into a window: it would go with its turn, or all the conversation for it.
            raise MalformedRow(
                f"{longest[0].where}: the clip has {longest[1]:,} tokens, and a window {self.sequence_length:,}: cut "
                "it, or raise `sequence_length`. `too_long: drop` leaves such conversations out."
            )
        return expanded


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    return message["content"] if isinstance(message["content"], list) else []


def _bare(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates take them: they write a place for an image or a clip and look at nothing of it."""
    if not (parts := _parts(message)):
        return message
    bare = [part if part["type"] == "text" else {"type": part["type"]} for part in parts]
    return {**message, "content": bare}
