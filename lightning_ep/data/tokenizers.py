"""Which tokenizer belongs to a model's weights, and whether a tokenizer fits a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ep import transformers_adapter as adapter
from lightning_ep.hub.companions import TOKENIZER_FILES
from lightning_ep.hub.meta_models import small_files
from lightning_ep.hub.source import source_directory


def checkpoint_of(module: LightningModule | None) -> str | None:
    """Directory or hub id of the weights that a module starts from.

    Known before the model is built if the module has ``pretrained_path``, as `CausalLM` does; afterwards for models of
    `lightning_ep.from_pretrained`.
    """
    declared = getattr(module, "pretrained_path", None)
    if declared is not None or module is None:
        return declared
    sources = map(source_directory, adapter.pretrained_models(module).values())
    return next((str(source) for source in sources if source is not None), None)


def tokenizer_files(checkpoint: str) -> list[Path]:
    """The files of a checkpoint's tokenizer, downloaded if need be; none if it has no tokenizer.

    Those in its directory come first, those below it (further chat templates) behind.

    Raises:
        CheckpointError: If there is no such checkpoint.
    """
    directory = small_files(checkpoint)
    found = {file for pattern in TOKENIZER_FILES for file in directory.glob(pattern)}
    return sorted(found, key=lambda file: (len(file.parts), file))


def check_vocabulary(tokenizer: Any, config: Any, fix: str) -> None:
    """Raises ValueError, which ends with ``fix``, if a tokenizer has ids for which a model has no embedding."""
    size = vocabulary_size(config)
    if size is None or not hasattr(tokenizer, "get_vocab"):
        return  # a model without texts; a tokenizer of another kind
    needed = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
    if size < needed:
        raise ValueError(
            f"The model's vocab_size={size} is smaller than the tokenizer's {needed} tokens: some ids have no "
            f"embedding. {fix}"
        )


def vocabulary_size(config: Any) -> int | None:
    """Number of a model's token embeddings, from its configuration."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end a generated text: those of the model's generation config, and the tokenizer's."""
    config = getattr(model, "generation_config", None)
    values = (getattr(config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None))
    return list(dict.fromkeys(i for v in values if v is not None for i in (v if isinstance(v, list) else [v])))


def warn_of_other_special_tokens(tokenizer: Any, model: Any) -> None:
    """Warns where a model's configuration has other ids than the tokenizer for the same tokens."""
    configs = [model.config, getattr(model, "generation_config", None)]
    if hasattr(model.config, "get_text_config"):
        configs.append(model.config.get_text_config(decoder=True))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ours = getattr(tokenizer, name)
        theirs = [value for config in configs if (value := getattr(config, name, None)) is not None]
        ids = {number for value in theirs for number in (value if isinstance(value, list) else [value])}
        if ours is not None and ids and ours not in ids:
            rank_zero_warn(
                f"{name} is {ours} in the tokenizer and {', '.join(map(str, sorted(ids)))} in the model's "
                "configuration: what reads the trained model would look for another token than it was trained with. "
                f"Set {name}={ours} in the configuration, or train with the tokenizer that it was made for."
            )


def refuse_too_small(tokenizer: Any, config: Any, made: bool) -> None:
    """Raises ValueError if a model is too small for a data module's tokenizer, which that has ``made`` or found."""
    size = vocabulary_size(config)
    check_vocabulary(
        tokenizer,
        config,
        f"Set the model's to {len(tokenizer)} or more, or the data's to {size} or less."
        if made
        else f"Use the tokenizer of these weights, not {tokenizer.name_or_path}, or resize the embeddings.",
    )


def check_of_module(tokenizer: Any, module: LightningModule | None, made: bool, data_module: str) -> None:
    """Raises ValueError if the tokenizer of a data module does not fit the models of a module, once they are built.

    Args:
        tokenizer: The tokenizer.
        module: What is trained with it.
        made: Whether the data module has made it.
        data_module: Name of its class.
    """
    models: list[Any] = list(adapter.pretrained_models(module).values()) if module is not None else []
    for model in models or [getattr(module, "model", None)]:
        if hasattr(model, "config"):
            refuse_too_small(tokenizer, model.config, made)
            warn_of_other_special_tokens(tokenizer, model)
    checkpoint = checkpoint_of(module)
    if checkpoint is not None and made and tokenizer_files(checkpoint):
        raise ValueError(
            f"The model's weights are those of {checkpoint}, which has a tokenizer, and {data_module} has made a new "
            "one, whose ids mean nothing to these weights: it could not know before the model was built. Pass "
            f"{data_module}(tokenizer={checkpoint!r}), or give {type(module).__name__} an attribute `pretrained_path`."
        )


def pad_token_id(tokenizer: Any) -> int:
    """What fills windows up: any token will do, since no loss is made of padding."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None), 0)
