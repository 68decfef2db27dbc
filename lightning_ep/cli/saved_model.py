"""The transformers model that a training checkpoint holds: what it is, under which names, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.adapters.saved import NamedBase
from lightning_ep.checkpoint.saved_weights import read_companions
from lightning_ep.checkpoint.tensor_files import Saved
from lightning_ep.hub.companions import GENERATION_CONFIG, TOKENIZER_FILES, read_files, write_files_to
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.meta_models import meta_model, small_files
from lightning_ep.hub.problems import Problems


@contextmanager
def origin_of(checkpoint: Path, model: NamedBase | None, weights_only: bool) -> Iterator[Path | None]:
    """A directory with what belongs to the model of a checkpoint and is no weights, until the block ends.

    The tokenizer of the run's data, with its chat template, and the generation config are in the checkpoint, and count
    more than those of ``model``, which has the rest: a config, code, and a tokenizer where the run had none.

    Args:
        checkpoint: A checkpoint of a run.
        model: The model that was trained, if it is named.
        weights_only: Build no objects from the checkpoint but tensors and plain values.

    Raises:
        CheckpointError: If there is no such model.
    """
    saved = read_companions(checkpoint, weights_only)
    named = small_files(*model) if model is not None else None
    if not saved:
        yield named
        return
    with TemporaryDirectory() as directory:
        if named is not None:
            tokenizer = () if saved.keys() - {GENERATION_CONFIG} else TOKENIZER_FILES
            write_files_to(Path(directory), read_files(named, ("config.json", GENERATION_CONFIG, "*.py", *tokenizer)))
        write_files_to(Path(directory), saved)
        yield Path(directory)


def saved_model(
    configs: Mapping[str, dict[str, Any]], tensors: Iterable[str], origin: Path | None
) -> tuple[str, PreTrainedModel]:
    """What is in front of the model's names in a checkpoint, and the model on meta, in fp32.

    Args:
        configs: Of every transformers model in the checkpoint, by its name there.
        tensors: The names in the checkpoint.
        origin: Directory with the model's generation config, and its config if there are no others (`origin_of`).

    Raises:
        CheckpointError: If the checkpoint does not say what model it is of, or holds several.
    """
    if len(configs) == 1:
        ((name, values),) = configs.items()
        model = meta_model(AutoConfig.for_model(**values))
    elif configs:
        raise CheckpointError(f"the checkpoint contains {len(configs)} models; one is needed.")
    elif origin is None or not (origin / "config.json").exists():
        raise CheckpointError(
            "the checkpoint does not contain the config of its model, or only among objects that may run code when "
            "loaded; name the model with --model."
        )
    else:
        model = meta_model(AutoConfig.from_pretrained(origin))
        name = _name_in(tensors, model)
    if origin is not None and (origin / GENERATION_CONFIG).exists():
        model.generation_config = GenerationConfig.from_pretrained(origin)
    return f"{name}." if name else "", model


def _name_in(tensors: Iterable[str], model: PreTrainedModel) -> str:
    """The attribute of the LightningModule that holds the model."""
    first = next(name for name, _ in model.named_parameters())
    names = [key.removesuffix(first).removesuffix(".") for key in tensors if f".{key}".endswith(f".{first}")]
    if len(names) != 1:
        raise CheckpointError(
            f"the checkpoint has {len(names)} tensors that end in {first}, the first parameter of a "
            f"{type(model).__name__} as --model describes it; one is needed."
        )
    return names[0]


def match(tensors: Mapping[str, Saved], model: PreTrainedModel, prefix: str, checkpoint: str) -> dict[str, torch.dtype]:
    """Dtypes of the checkpoint's tensors by name in the model; every rank must call it.

    Args:
        tensors: Shape and dtype by name in the checkpoint.
        model: The model on meta.
        prefix: What is in front of its names there.
        checkpoint: The checkpoint, for the error.

    Raises:
        CheckpointError: If names or shapes differ, of which it lists all; if there are adapters among them.
    """
    if any(".lora_" in name for name in tensors):
        raise CheckpointError(
            f"{checkpoint} holds adapters with a model that was in memory when it was adapted, and does not say how "
            "they are scaled. Write them in the run that trains them (the callback HuggingFaceExport), or build the "
            "model by `lightning_ep.from_pretrained` there: checkpoints then say what they are of."
        )
    problems = Problems(f"{checkpoint} does not fit the {type(model).__name__} of its config:")
    state = model.state_dict(keep_vars=True)
    tied = adapter.tied_names(model)
    dtypes: dict[str, torch.dtype] = {}
    for name, tensor in state.items():
        shape, dtype = tensors.get(prefix + name, (None, None))
        if shape is None or dtype is None:
            problems.add("missing", *([prefix + name] if name not in tied else []))
            continue
        dtypes[name] = dtype
        if shape != tuple(tensor.shape):
            problems.add("shape", f"{prefix + name}: {list(shape)}, the config makes it {list(tensor.shape)}")
    inside = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
    problems.add("unexpected", *[prefix + name for name in inside if name not in state and prefix])
    problems.raise_on_all_ranks()
    return dtypes
