"""Models on the meta device, whose weights come once they are sharded: streamed from a checkpoint, or drawn."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from huggingface_hub import snapshot_download
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from lightning_ep import transformers_adapter as adapter
from lightning_ep.distributed.agreement import Ranks
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.safetensors_file import INDEX_NAME, SINGLE_NAME
from lightning_ep.hub.source import remember_source

_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")


def from_pretrained(
    path: str | os.PathLike[str],
    auto_class: Any = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    **config_overrides: Any,
) -> PreTrainedModel:
    """A model on the meta device whose weights are streamed after it has been sharded: no rank holds it whole.

    Every rank then reads the bytes of its own shards from the safetensors files, in the hub's layout or the model's.
    Weights become the dtype that the strategy's precision gives to parameters (without a strategy: the config's).

    Args:
        path: A directory, or the id of a model on the Hugging Face hub, which is downloaded once per node.
        auto_class: What builds the model from its config: an auto class of transformers. Default: the one for the class
            that the config declares, if it writes texts, of images too; else AutoModelForCausalLM.
        revision: Branch, tag or commit on the hub.
        attn_implementation: As in transformers.
        trust_remote_code: Run Python code that comes with the model.
        **config_overrides: Values that replace those of ``config.json``. ``architectures=[name]``, with the class that
            ``auto_class`` builds: its base model is the checkpoint's, its head a new one; a warning names both heads.

    Raises:
        TypeError: For a keyword, or a key of a nested configuration, that the config does not know, and for those by
            which transformers finds files elsewhere (``cache_dir``, ``token``, ``subfolder``).
        CheckpointError: If there is no such checkpoint, if its weights are pickled or quantized, or if its config is
            that of another architecture than ``auto_class`` builds.
    """
    _refuse_places(config_overrides)
    find = partial(_find, os.fspath(path), revision, trust_remote_code)
    if dist.is_initialized():
        # Of every node one rank first, which may download.
        first = int(os.environ.get("LOCAL_RANK", "0")) == 0
        directory = Ranks(CheckpointError).in_turns(f"{path} cannot be opened", first, find)
    else:
        directory = find()
    if config_overrides.get("dtype") == "auto":
        del config_overrides["dtype"]  # transformers' word for what the config says
    config, unknown = AutoConfig.from_pretrained(
        directory, trust_remote_code=trust_remote_code, return_unused_kwargs=True, **config_overrides
    )
    _refuse_unknown_overrides(config_overrides, unknown, config)
    if config_overrides.get("quantization_config") is None and (method := _quantization(config)) is not None:
        raise CheckpointError(
            f"{path} is quantized ({method!r}), and training needs weights in "
            "bf16 or more. Use an unquantized checkpoint of this model, or write one with transformers "
            "(from_pretrained with dequantize=True in its quantization config, then save_pretrained)."
        )
    _refuse_quantization(config)
    auto_class = auto_class or adapter.auto_class_of(config)
    options = {"trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation  # type: ignore[assignment]
    dtype = getattr(torch, config.dtype) if isinstance(config.dtype, str) else config.dtype
    with torch.device("meta"):
        # fp32 first: buffers would be built in the config's dtype, and some (expert biases) need fp32.
        model = auto_class.from_config(config, dtype=torch.float32, **options)
    _check_architecture(str(path), config, model)
    model.config.dtype = dtype
    if dtype is not None:
        cast_parameters(model, dtype)
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    adapter.allow_resizing_on_meta(model)
    remember_source(model, directory, os.fspath(path), revision, new_head="architectures" in config_overrides)
    adapter.note_own_modules(model)
    return model


def from_config(config: PreTrainedConfig | Mapping[str, Any], auto_class: Any = None) -> PreTrainedModel:
    """A model on the meta device, whose random weights the strategy initialises after sharding.

    Args:
        config: Any configuration that ``auto_class`` knows, or a dict as for `config_of`.
        auto_class: What builds the model from its config, an auto class of transformers. Default:
            `transformers.AutoModelForCausalLM` or AutoModelForImageTextToText, whichever knows the config; where both
            do, ``architectures`` says which.

    Raises:
        ValueError: As `config_of`.
    """
    config = config_of(config) if isinstance(config, Mapping) else config
    _refuse_quantization(config)
    with torch.device("meta"):
        model: PreTrainedModel = (auto_class or adapter.auto_class_of(config)).from_config(config)
    adapter.allow_resizing_on_meta(model)
    adapter.note_own_modules(model)
    return model


def config_of(values: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration that a user has written as a dict: ``model_type``, and what differs from its defaults.

    Raises:
        ValueError: If there is no such ``model_type``, or if a key, of a nested configuration too, is not known to the
            configuration and not read by its model; names the nearest ones. If it asks for quantized weights.
    """
    name = values.get("model_type")
    if name not in CONFIG_MAPPING:
        raise ValueError(
            f"model_type={name!r} of the model's configuration is none of transformers'"
            f"{adapter.near(str(name), CONFIG_MAPPING)}. A configuration as a dict names its family, for example "
            "model_type: qwen3_moe."
        )
    config = AutoConfig.for_model(**deepcopy(dict(values)))  # transformers fills nested dicts in place
    unknown = adapter.unknown_keys(values, config)
    if unknown:
        raise ValueError(
            f"{type(config).__name__} does not know {', '.join(unknown)}. A key that nobody reads would leave the "
            "model as it is without it; correct or remove it."
        )
    _refuse_quantization(config)
    return config


def _refuse_quantization(config: PreTrainedConfig) -> None:
    if (method := _quantization(config)) is not None:
        raise ValueError(
            f"{type(config).__name__} has a quantization_config ({method!r}), and training needs weights in bf16 or "
            "more: transformers would build them so, and what is exported would say that they are quantized. Remove it."
        )


def _quantization(config: PreTrainedConfig) -> str | None:
    """How the weights of a configuration are quantized, None if they are not."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    values = found if isinstance(found, Mapping) else found.to_dict()
    method = values.get("quant_method")
    return str(getattr(method, "value", method))


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives a model on meta the dtype in which its weights are to be held; what a family asks to be fp32 stays so."""
    fp32 = set(adapter.fp32_parameters(model).values()) if dtype == torch.bfloat16 else set()
    for param in model.parameters():
        param.data = param.data.to(torch.float32 if param in fp32 else dtype)


def _refuse_unknown_overrides(overrides: Mapping[str, Any], unused: Iterable[str], config: PreTrainedConfig) -> None:
    """Raises TypeError, as for any unknown keyword; what transformers leaves though a model reads it is set."""
    config.update({key: overrides[key] for key in unused})
    own = {key: value for key, value in overrides.items() if key in unused or isinstance(value, Mapping)}
    unknown = adapter.unknown_keys(own, config)
    if unknown:
        raise TypeError(
            f"{type(config).__name__} has no {', '.join(unknown)}, and from_pretrained no such argument. "
            "Look at config.json for the names that can be given."
        )


def _refuse_places(overrides: Mapping[str, Any]) -> None:
    """Raises TypeError for arguments of transformers that would find another config than the weights are found with."""
    places = {*inspect.signature(PreTrainedConfig.from_pretrained).parameters, "subfolder", "proxies"} & set(overrides)
    if places:
        raise TypeError(
            f"from_pretrained has no arguments {', '.join(sorted(places))}: the environment says where models are "
            "looked for (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE=1). Or call `huggingface_hub.snapshot_download` with what "
            "you need, and pass the directory that it returns."
        )


def meta_model(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """A model on meta, in fp32, of the class that the config names or, if it names none, of the causal language model.

    Raises:
        ValueError: If the config names a class that transformers does not have.
    """
    config = deepcopy(config)
    if model_class is None and config.architectures:
        name = config.architectures[0]
        model_class = getattr(transformers, name, None)
        if model_class is None:
            raise ValueError(
                f"the config names the architecture {name}, which transformers does not have. Models whose code comes "
                "with the checkpoint are exported in the run that trained them, by the callback HuggingFaceExport."
            )
    with torch.device("meta"):
        if model_class is None:
            return adapter.auto_class_of(config).from_config(config, dtype=torch.float32)
        config.dtype = torch.float32
        return model_class(config)


def _check_architecture(path: str, config: Any, model: PreTrainedModel) -> None:
    name, declared = type(model).__name__, config.architectures
    if declared and name not in declared:
        raise CheckpointError(
            f"{path} holds {', '.join(declared)} (model_type {config.model_type!r}), and a {name} was asked for. Pass "
            f"the auto_class that builds {declared[0]}, or architectures=[{name!r}] for a {name} with the base model "
            "of the checkpoint and a new head."
        )


def small_files(path: str, revision: str | None = None, code: bool = False) -> Path:
    """The directory of a model with all but its weights, downloaded if ``path`` is no directory.

    Raises:
        CheckpointError: If ``path`` is neither a directory nor the id of a model that can be had from the hub.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if path.count("/") > 1 or path.startswith((".", "~", "/")):
        raise CheckpointError(f"there is no directory {directory.absolute()}, and {path!r} is no id of a model.")
    return download(path, revision, [*_SMALL_FILES, *(["*.py"] if code else [])])


def download(path: str, revision: str | None, patterns: list[str]) -> Path:
    """The directory of the files of a hub's model that the patterns name.

    Raises:
        CheckpointError: If they cannot be had.
    """
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path!r} is no directory here (if a run of yours writes it, that comes first) and cannot be had from "
            f"the hub: {error}"
        ) from error


def _find(path: str, revision: str | None, code: bool) -> Path:
    """The directory of a checkpoint, downloaded if need be."""
    directory = small_files(path, revision, code)
    if not Path(path).expanduser().is_dir():
        index = directory / INDEX_NAME
        # By name: some repositories hold the same weights a second time, in another format.
        weights = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {SINGLE_NAME}
        directory = download(path, revision, sorted(weights))
    _check_format(directory)
    return directory


def _check_format(directory: Path) -> None:
    if (directory / INDEX_NAME).exists() or (directory / SINGLE_NAME).exists():
        return
    problem = f"{directory} has neither {SINGLE_NAME} nor {INDEX_NAME}."
    if not (directory / "config.json").exists():
        problem = f"{directory} is no checkpoint: it has no config.json."
    raise CheckpointError(
        f"{problem} Pickled weights (pytorch_model*.bin) are not read, since a pickle can run any code. If you trust "
        "them, convert them once: `m = AutoModelForCausalLM.from_pretrained(path); m.save_pretrained(new_path)` "
        "with transformers writes safetensors."
    )
