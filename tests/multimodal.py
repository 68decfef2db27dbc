"""Tiny multimodal MoE models with random weights, and batches with and without an image (a clip of sound)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tests.hub.every_family import auto_class_of, tiny_config_of

Inputs = dict[str, Any]
_LENGTH = 24
_FIRST_SPECIAL = 100  # ids from here on stand for placeholders; text has smaller ones


def _patches(config: Any, time: int | None = None, channels: int = 3, **more: Any) -> Inputs:
    """An image of 4 x 4 patches, flat or (without ``time``) as small pictures."""
    vision = config.vision_config
    size = vision.patch_size
    shape = (channels, size, size) if time is None else (channels * time * size * size,)
    return {"pixel_values": _random(16, *shape), "image_grid_thw": torch.tensor([[1, 4, 4]]), **more}


def _picture(config: Any, **more: Any) -> Inputs:
    size = config.vision_config.image_size
    return {"pixel_values": _random(1, 3, size, size), **more}


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def _places(side: int) -> Tensor:
    """Where the patches of a square image are, ``[1, patches, 2]``."""
    return torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(1)[None]


IMAGES: dict[str, Callable[[Any], Inputs]] = {
    "aria": lambda c: _picture(c),
    "dots3_note": lambda c: _patches(c),
    "ernie4_5_vl_moe": lambda c: _patches(c, 1),
    "gemma4": lambda c: {"pixel_values": _random(1, 16, 48), "image_position_ids": _places(4)},
    "glm4v_moe": lambda c: _patches(c, 2),
    "glm5_next": lambda c: _patches(c, 2),
    "inkling2": lambda c: {"pixel_values": _random(4, 28, 28, 3), "image_grid_thw": torch.tensor([[1, 2, 2]])},
    "inkling_mm_model": lambda c: {"pixel_values": _random(2, 2, 4, 4, 3)},
    "kimi_k25": lambda c: _patches(c),
    "llava": lambda c: _picture(c),
    "minimax_m3_vl": lambda c: _patches(c, 2),
    "mistral_large4": lambda c: {"pixel_values": _random(1, 3, 56, 56), "image_sizes": torch.tensor([[56, 56]])},
    "muse_spark": lambda c: _patches(c, c.vision_config.patch_temporal),
    "nemo_speechlm": lambda c: {
        "input_features": _random(1, 32, 128),
        "input_features_mask": torch.ones(1, 32, dtype=torch.long),
    },
    "nemotron_h_omni": lambda c: {"pixel_values": _random(16, 588), "image_grid_hw": torch.tensor([[4, 4]])},
    "qwen3_5_moe": lambda c: _patches(c, 2),
    "qwen3_omni_moe": lambda c: _patches(c, 2),
    "qwen3_omni_moe_thinker": lambda c: _patches(c, 2),
    "qwen3_vl_moe": lambda c: _patches(c, 2),
    "qwen4_exp": lambda c: _patches(c, 2),
    "step3p7": lambda c: _picture(c),
    "unlimited_ocr": lambda c: {"pixel_values": _random(1, 3, 64, 64)},
}


def multimodal_model(family: str, std: float = 0.1) -> PreTrainedModel:
    """A tiny model of a family, with equal random weights wherever it is built, and eager experts."""
    config: Any = tiny_config_of(family)
    if family == "aria":
        config.projector_patch_to_query_dict = {4: 2}
    give_small_ids(getattr(config, "thinker_config", config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto_class_of(config).from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for name, param in model.named_parameters():
                if "norm" not in name:
                    param.normal_(std=std)
            for name, table in model.named_buffers():
                if name.endswith("tid2eid"):  # experts of hash routers, by token
                    table.copy_(torch.arange(table.numel()).view_as(table) % 4)
    model.set_experts_implementation("eager")
    return model


def called(model: Any) -> Any:
    """What of a model its users call: the thinker of Qwen3-Omni whole, which has no forward of its own."""
    return getattr(model, "thinker", model)


def give_small_ids(config: PreTrainedConfig) -> None:
    """Ids of placeholders that the small vocabulary has."""
    vocabulary = config.get_text_config().vocab_size
    large = [name for name, value in vars(config).items() if "token" in name and isinstance(value, int)]
    for index, name in enumerate(name for name in large if getattr(config, name) >= vocabulary or "image" in name):
        setattr(config, name, _FIRST_SPECIAL + index)


def text_batch(seed: int, size: int = 1) -> Inputs:
    """Sequences of text, with labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, _FIRST_SPECIAL, (size, _LENGTH), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def image_batch(family: str, model: PreTrainedModel, seed: int) -> Inputs:
    """A sequence of text with an image (a clip of sound) in it."""
    batch, model = text_batch(seed), called(model)
    config: Any = model.config
    inputs = IMAGES[family](config)
    kind = "image" if "pixel_values" in inputs else "audio"
    with torch.no_grad():
        base: Any = model if hasattr(model, f"get_{kind}_features") else model.model
        features = getattr(base, f"get_{kind}_features")(**inputs).pooler_output
    tokens = sum(len(piece.flatten(0, -2)) if piece.ndim > 1 else 1 for piece in features)
    token = getattr(config, f"{kind}_token_id", None) or config.image_token_index
    batch["input_ids"][:, 2 : 2 + tokens] = token
    placeholders = batch["input_ids"] == token
    batch["labels"][placeholders] = -100
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
        if name in inspect.signature(model.forward).parameters:
            batch[name] = placeholders.int()
    return {**batch, **inputs}


def in_dtype_of(model: nn.Module, batch: Inputs) -> Inputs:
    """A batch whose images (clips) have the dtype of the model's weights."""
    dtype = next(param.dtype for param in model.parameters() if param.is_floating_point())
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in batch.items()
    }
