"""The frozen model beneath adapters: which it is, so that no checkpoint of a training need hold it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.distributed.agreement import Ranks
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.initialize import drawn_from
from lightning_ep.hub.matching import open_checkpoint
from lightning_ep.hub.problems import Problems
from lightning_ep.hub.safetensors_file import StoredTensor
from lightning_ep.hub.source import Source

_SCALES = ("lora_alpha", "use_rslora", "alpha_pattern")
"""What of a LoraConfig changes what adapters do, and neither their names nor their shapes."""
_SAMPLE = 64  # bytes of each tensor that are read


@dataclass(frozen=True)
class Base:
    """What is remembered of an adapted model: the parameters that it can have again without a checkpoint.

    Attributes:
        names: Their names in the model.
        model: What the user has called it, a hub id or a path; None if it is drawn.
        revision: That on the hub.
        fingerprint: Of the checkpoint's tensors, or of the configuration of a model that is drawn.
    """

    names: frozenset[str]
    model: str | None
    revision: str | None
    fingerprint: str


def note_bases(module: nn.Module) -> None:
    """Notes which models are adapted and have frozen parameters that nobody has filled yet; reads a little of files.

    To be called before weights are streamed, drawn or restored, by every rank.
    """
    for model in adapter.pretrained_models(module).values():
        if adapter.recall(model, Base) is None and adapter.peft_configs(model):
            own = set(adapter.own_modules(model))
            names = frozenset(
                f"{prefix}.{name}" if prefix else name
                for prefix, child in model.named_modules(remove_duplicate=False)
                if child in own
                for name, param in child.named_parameters(recurse=False)
                if param.is_meta and not param.requires_grad
            )
            if names:
                adapter.remember(model, _identify(model, names))


def base_names(module: nn.Module) -> set[str]:
    """Names in a module of the parameters that checkpoints leave out."""
    found = adapter.pretrained_models(module).items()
    bases = {prefix: base for prefix, model in found if (base := adapter.recall(model, Base)) is not None}
    return {f"{prefix}.{name}" if prefix else name for prefix, base in bases.items() for name in base.names}


def describe_bases(module: nn.Module) -> dict[str, dict[str, Any]]:
    """What a checkpoint says of the models whose parameters it leaves out, by their names; plain values.

    ``model``, ``revision``, ``fingerprint`` and ``seed`` say which base it is, ``adapters`` what PEFT has put into it.
    """
    found = {}
    for name, model in adapter.pretrained_models(module).items():
        if (base := adapter.recall(model, Base)) is not None:
            found[name] = {
                "model": base.model,
                "revision": base.revision,
                "fingerprint": base.fingerprint,
                "seed": drawn_from(model) if base.model is None else None,
                "adapters": {key: _plain(config.to_dict()) for key, config in adapter.peft_configs(model).items()},
            }
    return found


def check_bases(module: nn.Module, saved: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Raises CheckpointError if the adapters of a checkpoint are of another base than the module's.

    Args:
        module: The module, with or without weights. A seed is compared once they are drawn.
        saved: As `describe_bases` returned it when the checkpoint was saved.
        path: The checkpoint.
    """
    here = describe_bases(module)
    for name, before in saved.items():
        what = f"{path} holds adapters only, trained on {_called(before)}"
        if (now := here.get(name)) is None:
            raise CheckpointError(
                f"{what}, and this run's model is not adapted, or has its weights in memory. Build the module of the "
                "run that saved it: CausalLM with that model and the same `adapter`."
            )
        drawn = before["seed"] is not None and now["seed"] is not None
        if before["fingerprint"] != now["fingerprint"] or (drawn and before["seed"] != now["seed"]):
            raise CheckpointError(
                f"{what}, and this run's base is {_called(now)}: its weights are others. Adapters mean something on "
                "the weights that they were trained on only."
            )
        for key, config in before["adapters"].items():
            own = now["adapters"].get(key, {})
            if other := {k: config.get(k) for k in _SCALES if config.get(k) != own.get(k)}:
                scaled = ", ".join(f"{k}={value} (here {own.get(k)})" for k, value in other.items())
                raise CheckpointError(
                    f"{what}, with {scaled}: the same factors mean another sum. Set these as they were."
                )


def _called(base: Mapping[str, Any]) -> str:
    if base["model"] is None:
        seed = "" if base["seed"] is None else f" of seed {base['seed']} (`seed_everything`)"
        return f"random weights{seed}, configuration {base['fingerprint'][:12]}"
    revision = f" (revision {base['revision']})" if base["revision"] else ""
    return f"{base['model']}{revision}, fingerprint {base['fingerprint'][:12]}"


def _identify(model: PreTrainedModel, names: frozenset[str]) -> Base:
    source = adapter.recall(model, Source)
    if source is None:
        return Base(names, None, None, config_fingerprint(model))
    digest = Ranks(CheckpointError).on_first("reading the base", lambda: fingerprint(source.directory))
    return Base(names, source.typed, source.revision, digest)


def config_fingerprint(model: PreTrainedModel) -> str:
    """A digest of the configuration of a model that is drawn."""
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(config.encode()).hexdigest()


def fingerprint(directory: Path) -> str:
    """A digest of the tensors of a checkpoint: names, shapes, dtypes, and 64 bytes from the middle of each.

    Training moves nearly every number, so these tell any two models apart that differ in whole tensors. Reading all
    bytes of a large model takes as long as loading it.
    """
    stored, _ = open_checkpoint(directory, Problems(""))  # what cannot be read, loading says
    by_file: dict[Path, list[str]] = {}
    for key in sorted(stored):
        by_file.setdefault(stored[key].file, []).append(key)
    with ThreadPoolExecutor(16) as pool:
        parts = pool.map(lambda item: _samples(item[0], item[1], stored), by_file.items())
        samples = {key: sample for part in parts for key, sample in part.items()}
    digest = hashlib.sha256()
    for key in sorted(stored):
        digest.update(f"{key} {stored[key].shape} {stored[key].dtype} ".encode() + samples[key])
    return digest.hexdigest()


def _samples(file: Path, keys: Iterable[str], stored: Mapping[str, StoredTensor]) -> dict[str, bytes]:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return {key: os.pread(descriptor, *_window(stored[key])) for key in keys}
    finally:
        os.close(descriptor)


def _window(tensor: StoredTensor) -> tuple[int, int]:
    """How many bytes of a tensor are read, and where in its file."""
    size = tensor.dtype.itemsize
    for length in tensor.shape:
        size *= length
    count = min(size, _SAMPLE)
    return count, tensor.offset + (size - count) // 2


def _plain(value: Any) -> Any:
    """Values that JSON has, and a weights-only load."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(getattr(value, "value", value))
