"""The files that go with a model beside its config and weights: tokenizer, chat templates, generation config."""

from __future__ import annotations

import json
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""What says how a multimodal model is given images, sound and videos."""


def companions(model: PreTrainedModel, tokenizer: Any | None, source: Path | None) -> dict[str, bytes]:
    """The files that go with a model, by name in its directory: all but config, weights and code.

    Exports write them, and checkpoints of a run hold them, so that what is asked of a trained model is asked as it was
    trained: with the chat template of the data, and its variables' values.

    Args:
        model: The model, on any device. Its generation config goes along; where that does not say at which token a text
            ends, with that of the tokenizer.
        tokenizer: What the data was made with: anything with ``save_pretrained``.
        source: Directory of the checkpoint that the model came from, whose tokenizer it is if there is no other, and
            whose processor of images.
    """
    files = read_files(source, PROCESSOR_FILES) if source is not None else {}
    if tokenizer is not None:
        with TemporaryDirectory() as directory:
            tokenizer.save_pretrained(directory)
            files |= read_files(Path(directory), ("**/*",))
    elif source is not None:
        files |= read_files(source, TOKENIZER_FILES)
    if model.can_generate() and model.generation_config is not None:
        config = deepcopy(model.generation_config)
        if config.eos_token_id is None:
            config.eos_token_id = getattr(tokenizer, "eos_token_id", None)
        # Not its save_pretrained, which refuses values that hub checkpoints have.
        files[GENERATION_CONFIG] = config.to_json_string().encode()
    return files


def read_files(directory: Path, patterns: Iterable[str]) -> dict[str, bytes]:
    """The contents of files by their name in a directory."""
    found = sorted({file for pattern in patterns for file in directory.glob(pattern) if file.is_file()})
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in found}


def write_files_to(directory: Path, files: dict[str, bytes]) -> None:
    """Writes what `read_files` returned."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def has_chat_template(files: dict[str, bytes]) -> bool:
    """Whether there is a chat template among the files of a tokenizer."""
    config = files.get("tokenizer_config.json")  # where templates were before they had files
    return any(name.startswith("chat_template") for name in files) or (
        config is not None and "chat_template" in json.loads(config)
    )


def tokenizer_of(trainer: Any) -> Any | None:
    """The tokenizer that the data of a run is made with, if its data module has one that can be saved.

    A data module whose models are given more than texts says what to save as ``saved_with_model``.
    """
    data = getattr(trainer, "datamodule", None)
    tokenizer = getattr(data, "saved_with_model", None) or getattr(data, "tokenizer", None)
    return tokenizer if hasattr(tokenizer, "save_pretrained") else None
