"""Images and sound beside texts: which class a multimodal model is, its processor, and where their tokens are."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from lightning_ep.transformers_adapter.document_bounds import makes_masks_around_text

_AUTO_CLASSES = (
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
)
_NAMED_IN = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def auto_class_of(config: PreTrainedConfig) -> Any:
    """What builds the model that a configuration declares, or of its kind the one that writes texts.

    A family with a text model of its own (Qwen3.5) is built with its tower only where ``architectures`` says so.
    """
    known: list[Any] = [(auto, mapping[type(config)]) for auto, mapping in _AUTO_CLASSES if type(config) in mapping]
    declared = set(config.architectures or ())
    found = next((auto for auto, cls in known if cls.__name__ in declared), None)
    return found or (known[0][0] if known else AutoModelForCausalLM)


def load_processor(
    directory: Path, tokenizer: Any, min_pixels: int | None = None, max_pixels: int | None = None
) -> Any | None:
    """The processor of a checkpoint without what it has for videos, which need torchvision; None if it has none.

    Args:
        directory: Where the checkpoint is.
        tokenizer: What the processor tokenizes with.
        min_pixels: The least pixels that an image is scaled to, in place of the checkpoint's.
        max_pixels: The most.

    Raises:
        ValueError: If pixels are given to a processor that scales images otherwise, or more at least than at most.
    """
    # Here, since it imports Pillow, which texts do without.
    from transformers import AutoFeatureExtractor, AutoImageProcessor, ProcessorMixin

    if (cls := _processor_class(directory)) is None:
        return None

    class WithoutVideos(cls):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    parts: dict[str, Any] = {}
    for part in cls.get_attributes():
        if part == "tokenizer":
            parts[part] = tokenizer
        elif part == "image_processor":
            parts[part] = AutoImageProcessor.from_pretrained(directory)
            if size := _size(parts[part], min_pixels, max_pixels):
                parts[part] = AutoImageProcessor.from_pretrained(directory, size=size)
        elif part == "feature_extractor":
            parts[part] = AutoFeatureExtractor.from_pretrained(directory)
        else:
            parts[part] = None
    if "image_processor" not in parts or cls.replace_image_token is ProcessorMixin.replace_image_token:
        return None  # it does not say what stands in a text for an image
    file = directory / _NAMED_IN[0]
    settings = json.loads(file.read_text()) if file.exists() else {}
    own = set(inspect.signature(cls.__init__).parameters) - set(parts)
    return WithoutVideos(**parts, **{name: value for name, value in settings.items() if name in own})


def _processor_class(directory: Path) -> Any | None:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name

    for file in _NAMED_IN:
        if (directory / file).exists() and (name := json.loads((directory / file).read_text()).get("processor_class")):
            return processor_class_from_name(name)
    if not (directory / "config.json").exists():
        return None
    config = type(AutoConfig.from_pretrained(directory))
    return PROCESSOR_MAPPING.get(config, None)


def _size(image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> dict[str, int]:
    """What these pixels make of the size of an image processor; nothing if none are given."""
    given = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    given = {name: pixels for name, pixels in given.items() if pixels is not None}
    if not given:
        return {}
    if not sets_pixels(image_processor):
        raise ValueError(
            f"min_pixels={min_pixels} and max_pixels={max_pixels} mean nothing to {type(image_processor).__name__}, "
            "which scales images otherwise. Leave them out."
        )
    size = {**{name: image_processor.size[name] for name in ("shortest_edge", "longest_edge")}, **given}
    if not 0 < size["shortest_edge"] <= size["longest_edge"]:
        raise ValueError(
            f"Images would have at least {size['shortest_edge']} and at most {size['longest_edge']} pixels: set both "
            "min_pixels and max_pixels, the first to no more than the second."
        )
    return size


def sets_pixels(image_processor: Any) -> bool:
    """Whether the size of an image processor is the least and the most pixels of an image."""
    return {"min_pixels", "max_pixels"} <= set(inspect.get_annotations(image_processor.valid_kwargs))


def takes_audio(processor: Any) -> bool:
    """Whether a processor gives clips of sound places in a text."""
    from transformers import ProcessorMixin

    named = getattr(processor, "audio_token", None) and getattr(processor, "feature_extractor", None)
    return bool(named) and type(processor).replace_audio_token is not ProcessorMixin.replace_audio_token


def audio_inputs(processor: Any, waveforms: Sequence[np.ndarray]) -> tuple[dict[str, Tensor], list[str]]:
    """What a processor makes of the clips of one conversation.

    Of all at once: they are padded to the longest, by which a clip may get a frame more, and its last one other values.

    Args:
        processor: One that `takes_audio`.
        waveforms: float32 ``[samples]`` each, at the rate of the processor's feature extractor.

    Returns:
        What the model is given beside the text (``input_features``, float32 ``[clips, mel bins, frames]``, and
        ``feature_attention_mask``, int ``[clips, frames]``); and what stands in the text for each clip.
    """
    given = processor(
        text=[processor.audio_token * len(waveforms)],
        audio=list(waveforms),
        return_tensors="pt",
        return_text_replacement_offsets=True,
    )
    (written,) = given.pop("text_replacement_offsets")
    of_text = {*processor.tokenizer.model_input_names, "mm_token_type_ids"}
    return {name: x for name, x in given.items() if name not in of_text}, [each["replacement"] for each in written]


class MediaPositions:
    """Where the tokens of documents with images and sound are, as the model would find out for each of them alone.

    Args:
        config: The model's.

    Attributes:
        masks_by_images: Whether who sees whom depends on where images are, beyond what is before what.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class_of(config).from_config(config)
        self._takes = set(inspect.signature(model.forward).parameters)
        self.masks_by_images = makes_masks_around_text(model)
        self._model: Any = next((m for m in model.modules() if hasattr(m, "get_rope_index")), None)

    @property
    def several(self) -> bool:
        """Whether tokens have places in time, height and width beside that in the text."""
        return self._model is not None

    def takes(self, name: str) -> bool:
        """Whether the model's forward has an argument of that name."""
        return name in self._takes

    def of(
        self,
        input_ids: Sequence[int],
        token_types: Sequence[int],
        grids: Tensor | None,
        audio_lengths: Tensor | None = None,
    ) -> Tensor:
        """Places of a document's tokens in time, height and width: int64 ``[3, L]``.

        Args:
            input_ids: Its tokens.
            token_types: For each of them 1 where it stands for an image, 3 where for sound, else 0.
            grids: int64 ``[images, 3]``, the patches of each of its images in these directions; None without images.
            audio_lengths: int64 ``[clips]``, the frames of each of its clips; None without.
        """
        ids = torch.tensor([input_ids])
        known = set(inspect.signature(self._model.get_rope_index).parameters)
        given = {
            "mm_token_type_ids": torch.tensor([token_types]),
            "image_grid_thw": grids,
            "audio_seqlens": audio_lengths,
            "attention_mask": torch.ones_like(ids),
        }
        positions, _ = self._model.get_rope_index(ids, **{key: x for key, x in given.items() if key in known})
        return positions[:, 0].long()
