"""A tiny checkpoint of Qwen3-Omni's thinker with its processor, and conversations with clips of sound."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image
from transformers import PreTrainedConfig, WhisperFeatureExtractor
from transformers.audio_utils import load_audio

from tests.vision import labels_of, vision_config, vision_model, vision_tokenizer, write_vision_checkpoint

RATE = 16_000
THINKER = "qwen3_omni_moe_thinker"
_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "audio_token": "<|audio_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}


def thinker_tokenizer() -> Any:
    """That of `vision_tokenizer` with the tokens around sound, and the template's place for it."""
    tokenizer = deepcopy(vision_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": [*_TOKENS.values()]})
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{%- else -%}{{ part.text }}",
        "{%- elif part.type == 'audio' -%}<|audio_start|><|audio_pad|><|audio_end|>{%- else -%}{{ part.text }}",
    )
    return tokenizer


def thinker_config() -> PreTrainedConfig:
    """A configuration whose placeholders are the tokenizer's."""
    config: Any = vision_config(THINKER)
    ids = thinker_tokenizer().convert_tokens_to_ids
    config.audio_token_id, config.audio_start_token_id = ids("<|audio_pad|>"), ids("<|audio_start|>")
    return config


def write_thinker_checkpoint(path: Path) -> Path:
    """Weights, tokenizer and the files of the processor, in the hub's layout."""
    write_vision_checkpoint(path, THINKER)
    vision_model(thinker_config()).save_pretrained(path)
    thinker_tokenizer().save_pretrained(path)
    of_tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**of_tokenizer, **_TOKENS}))
    of_images = json.loads((path / "preprocessor_config.json").read_text())
    WhisperFeatureExtractor(feature_size=128, return_attention_mask=True).save_pretrained(path)
    of_sound = json.loads((path / "preprocessor_config.json").read_text())
    named = {"processor_class": "Qwen3OmniMoeProcessor"}
    (path / "preprocessor_config.json").write_text(json.dumps({**of_sound, **of_images, **named}))
    return path


def clip(path: Path, seconds: float, seed: int = 0, rate: int = RATE, channels: int = 1) -> Path:
    """A file with noise."""
    noise = np.random.default_rng(seed).standard_normal((round(seconds * rate), channels))
    soundfile.write(path, 0.1 * noise, rate)
    return path


def heard(*content: Any, answer: str = "A cat.") -> list[dict[str, Any]]:
    """A conversation of one question; paths are images, or clips by their ending."""
    parts: list[dict[str, Any]] = []
    for part in content:
        if not isinstance(part, Path):
            parts.append({"type": "text", "text": part})
        else:
            kind = "image" if part.suffix in (".png", ".jpg") else "audio"
            parts.append({"type": kind, kind: str(part)})
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def plain_inputs(messages: list[dict[str, Any]], processor: Any) -> dict[str, torch.Tensor]:
    """What transformers makes of a conversation alone, with labels where the assistant speaks."""
    parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    pictures = [Image.open(part["image"]).convert("RGB") for part in parts if part["type"] == "image"]
    clips = [load_audio(part["audio"], RATE, backend="soundfile") for part in parts if part["type"] == "audio"]
    text = processor.tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False)
    inputs = dict(processor(text=[text], images=pictures or None, audio=clips or None, return_tensors="pt"))
    return {**inputs, "labels": labels_of(inputs["input_ids"], processor.tokenizer)}
