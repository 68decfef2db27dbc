"""Where the weights of modules on meta are: a checkpoint, and the names in it, whatever becomes of the modules' own."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint from which a model on meta gets its weights.

    Attributes:
        directory: The checkpoint.
        model: The model as its class builds it.
        loading: Transforms from the hub's layout to the model's.
        saving: Those that can be reverted.
        typed: What the user has called it, as it is found from anywhere (`found_from_anywhere`).
        revision: That on the hub.
        new_head: What the checkpoint lacks around the base model is drawn, and what it has there is passed over.
    """

    directory: Path
    model: adapter.Blueprint
    loading: list[Any]
    saving: list[Any]
    typed: str
    revision: str | None = None
    new_head: bool = False
    _tensors: dict[str, weakref.ref[Tensor]] = field(default_factory=dict)
    _names: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def __deepcopy__(self, memo: object) -> Source:
        return self  # copies of a module get the same weights

    def note(self, name: str, tensor: Tensor) -> None:
        """Notes that ``tensor``, not sharded yet, is the one of that name."""
        self._tensors[name] = weakref.ref(tensor)
        if name not in self.model.tied or tensor not in self._names:
            self._names[tensor] = name

    def name_of(self, tensor: Tensor, place: str | None) -> str | None:
        """The name of a tensor that is where that of the name ``place`` was.

        User code may have put another one of the model's there (tied weights). One that is not known is taken for a
        copy: copies of modules hold such, and sharding makes new ones.
        """
        if place is not None and self._tensors[place]() is tensor:
            return place
        known: str | None = self._names.get(tensor)
        return known or place


@dataclass(frozen=True)
class Origin:
    """Which tensors of a module come from a checkpoint; `remember`ed on the module, and copied with it.

    Attributes:
        names: By name in the module, the source and the name there.
    """

    names: dict[str, tuple[Source, str]]


def remember_source(
    model: PreTrainedModel,
    directory: Path,
    typed: str | None = None,
    revision: str | None = None,
    new_head: bool = False,
) -> None:
    """Makes `stream_pretrained` fill ``model``, which is on meta and as its class built it, from ``directory``."""
    # The transforms are looked up by class, and FSDP replaces the classes.
    loading, saving = adapter.hub_transforms(model), adapter.hub_transforms(model, saving=True)
    typed = found_from_anywhere(typed or str(directory))
    source = Source(directory, adapter.blueprint(model), loading, saving, typed, revision, new_head)
    adapter.remember(model, source)
    for prefix, child in model.named_modules():
        names = {}
        for local, tensor in _own_tensors(child):
            name = f"{prefix}.{local}" if prefix else local
            if name in source.model.tensors:
                names[local] = source, name
                source.note(name, tensor)
        if names:
            adapter.remember(child, Origin(names))


def found_from_anywhere(model: str) -> str:
    """A name of a model for files that are read in other directories: a hub id as it is, of a directory the whole path.

    A relative path would mean another place there, and one of two parts a model on the hub.
    """
    path = os.path.expanduser(model)
    return os.path.abspath(path) if os.path.isdir(path) else model


def source_directory(model: PreTrainedModel) -> Path | None:
    """The checkpoint that a model from `from_pretrained` came from."""
    source = adapter.recall(model, Source)
    return source.directory if source is not None else None


def follow_sources(module: nn.Module) -> None:
    """Notes on modules where tensors of checkpoints are now; the last time to ask is before they are sharded.

    User code wraps modules (their parameters get other names), copies them, moves parameters into modules of its own
    (a hand-written LoRA) and replaces them. A module that `resize_token_embeddings` put in place of a head is new, and
    has the old one's name.
    """
    places: dict[nn.Module, dict[str, tuple[Source, str]]] = {}
    sources = _sources(module)
    for child in module.modules():
        origin = adapter.recall(child, Origin) or Origin({})
        for local, tensor in _own_tensors(child):
            there, place = origin.names.get(local, (None, None))
            for source in sources:
                known = source.name_of(tensor, place if source is there else None)
                if known is not None:
                    places.setdefault(child, {})[local] = source, known
                    break
    found = {place for names in places.values() for place in names.values()}
    for model in module.modules():
        if (own := adapter.recall(model, Source)) is None:
            continue
        for prefix, child in model.named_modules():
            for local, tensor in _own_tensors(child):
                name = f"{prefix}.{local}" if prefix else local
                if tensor.is_meta and name in own.model.tensors and (own, name) not in found:
                    places.setdefault(child, {}).setdefault(local, (own, name))
    for child, names in places.items():
        adapter.remember(child, Origin(names))


def tensors_by_source(module: nn.Module) -> dict[Source, dict[str, list[Tensor]]]:
    """The tensors of ``module`` that come from checkpoints, by the name there; several are copies of one another."""
    found: dict[Source, dict[str, list[Tensor]]] = {}
    for child in module.modules():
        origin = adapter.recall(child, Origin)
        for local, tensor in _own_tensors(child) if origin is not None else ():
            if local in origin.names:  # type: ignore[union-attr]
                source, name = origin.names[local]  # type: ignore[union-attr]
                found.setdefault(source, {}).setdefault(name, []).append(tensor)
    return found


def _sources(module: nn.Module) -> list[Source]:
    origins = [origin for child in module.modules() if (origin := adapter.recall(child, Origin)) is not None]
    return list({source: None for origin in origins for source, _ in origin.names.values()})


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor
