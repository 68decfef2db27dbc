"""A tiny checkpoint of a vision-language MoE with its processor and tokenizer, and conversations with images."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.data.chat_families import family_tokenizer, stop_ids
from tests.hub.every_family import auto_class_of, tiny_config_of

PATCH, MERGE = 4, 2
# As Qwen3-VL's template writes it: a place for every image of a message, and what is said.
TEMPLATE = (
    "{%- macro say(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' }}{{ say(message.content) }}"
    "{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def vision_tokenizer() -> Any:
    """Byte-level, with the special tokens of Qwen3-VL."""
    tokenizer = deepcopy(family_tokenizer("qwen3"))
    tokens = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def vision_config(family: str = "qwen3_vl_moe", layers: int = 2) -> PreTrainedConfig:
    """A configuration of the family whose placeholders are the tokenizer's."""
    config: Any = tiny_config_of(family)
    ids = vision_tokenizer().convert_tokens_to_ids
    text = config.get_text_config()
    text.vocab_size, text.max_position_embeddings = 448, 512
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[-layers:]
    config.image_token_id, config.video_token_id = ids("<|image_pad|>"), ids("<|video_pad|>")
    config.vision_start_token_id, config.vision_end_token_id = ids("<|vision_start|>"), ids("<|vision_end|>")
    vision = config.vision_config
    vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size = PATCH, MERGE, 2
    if hasattr(vision, "deepstack_visual_indexes"):
        vision.deepstack_visual_indexes = [0]
    config.architectures = [auto_class_of(config)._model_mapping[type(config)].__name__]
    return config


def vision_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Random weights that make routers and towers matter, the same wherever they are drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = auto_class_of(config).from_config(config)
        for name, param in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(param, std=0.1)
    return model


def write_vision_checkpoint(path: Path, family: str = "qwen3_vl_moe") -> Path:
    """Weights, tokenizer and the files of the processor, in the hub's layout."""
    vision_model(vision_config(family)).save_pretrained(path)
    vision_tokenizer().save_pretrained(path)
    sizes: dict[str, Any] = {"patch_size": PATCH, "merge_size": MERGE, "min_pixels": 64, "max_pixels": 16 * 64}
    Qwen2VLImageProcessorPil(temporal_patch_size=2, **sizes).save_pretrained(path)
    processor = json.loads((path / "preprocessor_config.json").read_text())
    named = {"processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorFast"}
    (path / "preprocessor_config.json").write_text(json.dumps({**processor, **named}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_ids("qwen3")}))
    return path


def picture(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    """A file with random pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def asked(*content: Any, answer: str = "A cat.") -> list[dict[str, Any]]:
    """A conversation of one question; paths are images."""
    parts = [
        {"type": "image", "image": str(part)} if isinstance(part, Path) else {"type": "text", "text": part}
        for part in content
    ]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def write_rows(path: Path, rows: list[Any]) -> Path:
    """JSON lines; a list is the messages of a row."""
    lines = [json.dumps(row if isinstance(row, dict) else {"messages": row}) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def plain_inputs(messages: list[dict[str, Any]], processor: Any) -> dict[str, torch.Tensor]:
    """What transformers makes of a conversation alone, with labels where the assistant speaks."""
    bare = [dict(message) for message in messages]
    pictures = [
        Image.open(part["image"]).convert("RGB")
        for message in messages
        for part in message["content"]
        if isinstance(part, dict) and part["type"] == "image"
    ]
    text = processor.tokenizer.apply_chat_template(bare, tokenize=False)
    inputs = dict(processor(images=pictures or None, text=[text], return_tensors="pt"))
    return {**inputs, "labels": labels_of(inputs["input_ids"], processor.tokenizer)}


def labels_of(input_ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """``[1, L]``: what the assistant says of a conversation, and -100."""
    ids = input_ids[0].tolist()
    header, end = (tokenizer(text)["input_ids"] for text in ("<|im_start|>assistant\n", "<|im_end|>"))
    labels = [-100] * len(ids)
    for place in range(len(ids)):
        if ids[place - len(header) : place] == header:
            last = ids.index(end[0], place)
            labels[place : last + 1] = ids[place : last + 1]
    return torch.tensor([labels])


def summed_plain_loss(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of the token losses of one conversation, by transformers' own forward, which places its images itself."""
    given = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**given, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, inputs["labels"][0, 1:], ignore_index=-100, reduction="sum")


def vanishes(name: str) -> bool:
    """Whether a gradient is rounding alone: what is added to all keys of a tower for sound moves nothing."""
    return "audio_tower" in name and name.endswith("k_proj.bias")
