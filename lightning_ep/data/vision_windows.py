"""Windows with images and clips, which are decoded here; each token where it would be in its document alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_ep import transformers_adapter as adapter
from lightning_ep.data.media import Clip, Image, MediaFile, Medium
from lightning_ep.data.windows import COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset

_LENGTHS = 64  # rows of one document are as long as a multiple of this: a compiled model is compiled for every length
_TYPES = "mm_token_type_ids"


class VisionWindows:
    """Windows as `open_windows` gives them, with what the processor makes of their images and clips.

    An item has the columns of a window, and what the processor gives for images (``pixel_values``, ``image_grid_thw``)
    and clips (``input_features``, ``feature_attention_mask``), if there are any in it. ``position_ids`` are
    ``[4, sequence]`` where the model has places in time, height and width: in front of these the one in the text, by
    which attention keeps documents apart.

    Args:
        windows: The windows.
        media: Their images and clips.
        processor: The model's.
        positions: Finds places of tokens.
    """

    def __init__(self, windows: Dataset, media: MediaFile, processor: Any, positions: adapter.MediaPositions) -> None:
        self._windows = windows
        self._media = media
        self._processor = processor
        self._positions = positions

    def __len__(self) -> int:
        return len(self._windows)

    def select(self, indices: Sequence[int]) -> VisionWindows:
        """Some of the windows."""
        return VisionWindows(self._windows.select(indices), self._media, self._processor, self._positions)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = dict(self._windows[index])
        numbers = window.pop("media", [])  # of each document its own
        documents = [[self._media[number] for number in of_document.tolist()] for of_document in numbers]
        found = {name: window[name] for name in COLUMNS}
        types_S = torch.tensor(self._processor.create_mm_token_type_ids([found["input_ids"].tolist()])[0])
        if pictures := [medium.decoded() for media in documents for medium in media if isinstance(medium, Image)]:
            found |= self._processor.image_processor(images=pictures, return_tensors="pt")
        if heard := [self._heard(clips) for media in documents if (clips := [m for m in media if isinstance(m, Clip)])]:
            found |= {name: joined([clips[name] for clips in heard]) for name in heard[0]}
        if self._positions.takes(_TYPES):
            found[_TYPES] = types_S
        if self._positions.several:
            found["position_ids"] = self._places(found, types_S, documents)
        return found

    def _heard(self, clips: Sequence[Clip]) -> dict[str, Tensor]:
        """What the model is given of a document's clips, which the processor takes together: see `audio_inputs`."""
        rate = self._processor.feature_extractor.sampling_rate
        return adapter.audio_inputs(self._processor, [clip.waveform(rate) for clip in clips])[0]

    def _places(self, window: dict[str, Tensor], types_S: Tensor, documents: Sequence[Sequence[Medium]]) -> Tensor:
        """``[4, S]``: in the text, in time, height and width."""
        in_text_S, ids_S = window["position_ids"], window["input_ids"]
        places_4S = in_text_S.repeat(4, 1)
        images, clips = 0, 0
        for (begin, end), media in zip(documents_in(in_text_S), documents, strict=False):  # behind them is padding
            grids = frames = None
            if number := sum(isinstance(medium, Image) for medium in media):
                images += number
                grids = window["image_grid_thw"][images - number : images]
            if number := len(media) - number:
                clips += number
                frames = window["feature_attention_mask"][clips - number : clips].sum(1)
            if media:
                ids, types = ids_S[begin:end].tolist(), types_S[begin:end].tolist()
                places_4S[1:, begin:end] = self._positions.of(ids, types, grids, frames)
        return places_4S


def documents_in(position_ids: Tensor) -> Iterator[tuple[int, int]]:
    """Where documents (and runs of padding) of a window begin and end, from places ``[S]`` in the text."""
    begins = (position_ids == 0).nonzero().flatten().tolist()
    return pairwise([*begins, len(position_ids)])


def batch_of(windows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch: ``[B, S]`` for tokens, ``position_ids`` maybe ``[4, B, S]``, and all images (clips) one after the other.

    Windows that were made of nothing, to fill an epoch up, lack what those of images have.
    """
    several = any(window["position_ids"].ndim == 2 for window in windows)
    positions = [w["position_ids"].expand(4, -1) if several else w["position_ids"] for w in windows]
    positions = [p if p.ndim == positions[0].ndim else p.expand_as(positions[0]) for p in positions]
    batch = {name: torch.stack([window[name] for window in windows]) for name in ("input_ids", "labels")}
    batch["position_ids"] = torch.stack(positions, dim=1 if several else 0)
    if any(_TYPES in window for window in windows):
        batch[_TYPES] = torch.stack([w.get(_TYPES, torch.zeros_like(w["input_ids"])) for w in windows])
    others = {name: None for window in windows for name in window if name not in (*COLUMNS, _TYPES)}
    return batch | {name: joined([w[name] for w in windows if name in w]) for name in others}


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One behind the other by their first axis, filled up with zeros to the largest in the others, as clips are."""
    sizes = [max(size) for size in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    whole = tensors[0].new_zeros(sum(map(len, tensors)), *sizes)
    begin = 0
    for tensor in tensors:
        whole[begin : begin + len(tensor), *(slice(size) for size in tensor.shape[1:])] = tensor
        begin += len(tensor)
    return whole


def rows_of(windows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of one document a row, as long as the longest of them, whose padding an ``attention_mask`` tells.

    Positions go on through it, so that layers that pass on a state from token to token are no reason to refuse it.
    """
    batch = batch_of(windows)
    size = batch["input_ids"].shape[1]
    ends = [next(documents_in(window["position_ids"].view(-1, size)[0]))[1] for window in windows]
    length = min(-(-max(ends) // _LENGTHS) * _LENGTHS, size)
    positions = batch["position_ids"][..., :length].clone()
    for row, end in enumerate(ends):
        positions[..., row, end:] = positions[..., row, end - 1 : end] + torch.arange(1, max(length - end, 0) + 1)
    cut = {name: batch[name][:, :length] for name in ("input_ids", "labels", _TYPES) if name in batch}
    mask = torch.arange(length) < torch.tensor(ends)[:, None]
    return {**batch, **cut, "position_ids": positions, "attention_mask": mask.long()}
