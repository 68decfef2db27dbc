"""What stands in the text of a conversation for an image: as many tokens as its size asks for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from typing_extensions import override

from lightning_ep.data.chat_template import Rendered
from lightning_ep.data.conversations import Conversation, MalformedRow
from lightning_ep.data.images import Image
from lightning_ep.data.rendering import RendersConversations

_SIZES = 1000  # of which the text is kept, 10 KB each


class ImageTexts:
    """What a processor writes into a text in place of an image, which depends on the image's size alone.

    Args:
        processor: The model's.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._token: str = processor.image_token
        self._others = [token for name in ("video_token", "audio_token") if (token := getattr(processor, name, None))]
        self._text = lru_cache(_SIZES)(self._written)  # looked up by size, of which many images have the same

    def expand(self, rendered: Rendered, images: Sequence[Image]) -> Rendered:
        """A text with all places of its images, as the processor would write it.

        Raises:
            ValueError: If the text has other numbers of places than there are images, or one in what is learnt; or if
                an image cannot be scaled.
        """
        text, spans = rendered.text, rendered.spans
        if found := [token for token in self._others if token in text]:
            raise ValueError(f"it says {found[0]!r}, by which the model knows a clip of sound or a video.")
        places = [match.start() for match in re.finditer(re.escape(self._token), text)]
        if len(places) != len(images):
            raise ValueError(
                f"the chat template writes {len(places)} times {self._token!r}, where an image belongs, and the "
                f"conversation has {len(images)} images. A text may not say that token, and the template has to write "
                "it for every image."
            )
        if any(begin <= place < end for place in places for begin, end in spans):
            raise ValueError(f"{self._token!r} stands in what the assistant says.")
        whole, written, last = "", [], 0
        for place, image in zip(places, images, strict=True):
            assert image.size is not None
            whole += text[last:place] + self._text(image.size)
            last = place + len(self._token)
            written.append((last, len(whole) - last))  # from here on, so much further
        whole += text[last:]

        def moved(place: int) -> int:
            return place + next((further for begin, further in reversed(written) if begin <= place), 0)

        return rendered._replace(text=whole, spans=[(moved(b), moved(e)) for b, e in spans], images=images)

    def _written(self, size: tuple[int, int]) -> str:
        import PIL.Image

        blank = self._processor.image_processor(images=[PIL.Image.new("RGB", size)], return_tensors="pt")
        return self._processor.replace_image_token(blank, image_idx=0)


@dataclass(frozen=True)
class RendersImages(RendersConversations):
    """Makes samples of conversations whose messages have parts with images.

    Args:
        images: Writes the images' places.
    """

    images: ImageTexts | None = None

    @override
    def render(self, conversation: Conversation) -> Rendered:
        assert self.images is not None
        rendered = super().render(conversation._replace(messages=[_bare(m) for m in conversation.messages]))
        images = [part["image"] for message in conversation.messages for part in _parts(message) if "image" in part]
        try:
            return self.images.expand(rendered, images)
        except ValueError as error:
            raise MalformedRow(f"{conversation.where}: {error}") from error


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    return message["content"] if isinstance(message["content"], list) else []


def _bare(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates take it: they write a place for an image and look at nothing of it."""
    if not (parts := _parts(message)):
        return message
    return {**message, "content": [{k: v for k, v in part.items() if k != "image"} for part in parts]}
