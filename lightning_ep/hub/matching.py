"""Which tensors of a checkpoint become which parameters of a model, and what is wrong with the checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.hub.problems import Problems
from lightning_ep.hub.safetensors_file import (
    INDEX_NAME,
    SINGLE_NAME,
    BrokenFileError,
    StoredTensor,
    read_header,
)
from lightning_ep.hub.trace import NotTraceableError, Piece, Traced

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _meta(stored: StoredTensor) -> Tensor:
    return torch.empty(stored.shape, dtype=stored.dtype, device="meta")


@dataclass(frozen=True)
class Source:
    """Where the weights of a model on meta are, and how they become the model's.

    Attributes:
        directory: The checkpoint.
        loading: Transforms from the hub's layout to the model's.
        saving: Those that can be reverted.
    """

    directory: Path
    loading: list[Any]
    saving: list[Any]


def open_checkpoint(directory: Path, problems: Problems) -> tuple[dict[str, StoredTensor], set[str]]:
    """Reads the headers of all files of a checkpoint.

    Returns:
        Its tensors by name, and names that the index puts into files that cannot be read.
    """
    index = directory / INDEX_NAME
    listed: dict[str, str] = {}
    if index.exists():
        try:
            listed = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            problems.add("files", f"{index.name}: not a readable index ({error!r})")
            return {}, set()
    stored: dict[str, StoredTensor] = {}
    broken: set[str] = set()
    for name in sorted(set(listed.values()) or {SINGLE_NAME}):
        try:
            stored.update(read_header(directory / name))
        except BrokenFileError as error:
            problems.add("files", str(error))
            broken.add(name)
    return stored, {key for key, name in listed.items() if name in broken and key not in stored}


@dataclass
class Filled:
    """A parameter or buffer that the checkpoint fills: how, or (None) by running a conversion."""

    tensor: Tensor
    pieces: tuple[Piece, ...] | None


@dataclass
class Match:
    """What is read for which parameter, and what is wrong with the checkpoint.

    Attributes:
        model: The model, sharded or not.
        source: Its checkpoint.
        stored: The checkpoint's tensors.
        filled: What fills the model's parameters and persistent buffers, by name.
        opaque: Conversions that must run on whole tensors.
        problems: What is wrong.
    """

    model: PreTrainedModel
    source: Source
    stored: dict[str, StoredTensor] = field(default_factory=dict)
    filled: dict[str, Filled] = field(default_factory=dict)
    opaque: list[adapter.Conversion] = field(default_factory=list)

    def __post_init__(self) -> None:
        name = adapter.model_class(self.model).__name__
        self.problems = Problems(f"the checkpoint in {self.source.directory} does not fit {name}:")
        self.tensors: dict[str, Tensor] = dict(self.model.state_dict(keep_vars=True))
        self.stored, unreadable = open_checkpoint(self.source.directory, self.problems)
        keys = [*self.stored, *unreadable]
        conversions, unexpected = adapter.load_conversions(self.model, self.source.loading, keys)
        if keys and not conversions:
            self.problems.add(
                "architecture", f"none of the checkpoint's {len(keys)} tensors belongs to this model, as {keys[0]}"
            )
            return
        unexpected = [key for key in unexpected if not adapter.is_optional(self.model, key, in_checkpoint=True)]
        self.problems.add("unexpected", *unexpected)
        unknown: set[str] = set() if keys else set(self.tensors)  # a lone file that cannot be read says nothing
        for conversion in conversions:
            readable = not unreadable.intersection(conversion.inputs)
            if not (readable and self._check_dtypes(conversion) and self._trace(conversion)):
                unknown.update(self._siblings.get(conversion.target, {conversion.target}))
        self._find_missing(unknown)
        self._check_tied()

    def _check_tied(self) -> None:
        """Notes copies of a tied parameter that a checkpoint stores and that are none: one of them would be lost."""
        for copy, name in adapter.tied_names(self.model).items():
            both = [self.filled[key].pieces for key in (copy, name) if key in self.filled]
            keys = [piece.key for pieces in both for piece in pieces or ()]
            if len(both) == len(keys) == 2 and _differ(*(self.stored[key] for key in keys)):
                self.problems.add(
                    "tied",
                    f"{keys[0]} and {keys[1]} differ, and the config says that they are one (tie_word_embeddings): "
                    "pass tie_word_embeddings=False to from_pretrained",
                )

    @cached_property
    def _siblings(self) -> dict[str, set[str]]:
        """By name, the names that come from the same tensors of a checkpoint (query, key and value of a fused one)."""
        groups = [set(c.inputs) for c in adapter.export_conversions(self.source.saving, self.tensors)]
        return {name: group for group in groups for name in group}

    def _check_dtypes(self, conversion: adapter.Conversion) -> bool:
        wanted = self.tensors[conversion.target].is_floating_point()
        wrong = [key for key in conversion.inputs if (self.stored[key].dtype in _FLOATS) != wanted]
        expected = "a floating-point type" if wanted else "an integer type"
        for key in wrong:
            self.problems.add("dtype", f"{key}: {str(self.stored[key].dtype)[6:]} where the model has {expected}")
        return not wrong

    def _trace(self, conversion: adapter.Conversion) -> bool:
        """Notes what a conversion fills; whether its sources fit."""
        stored = {key: self.stored[key] for key in conversion.inputs}
        try:
            try:
                made = conversion.run(self.model, {k: Traced.source(k, s.shape, s.dtype) for k, s in stored.items()})
            except NotTraceableError:
                made = conversion.run(self.model, {k: _meta(s) for k, s in stored.items()})
                self.opaque.append(conversion)
        except (ValueError, RuntimeError, LookupError, AttributeError) as error:  # whatever operations object to
            self._explain(conversion.target, conversion, str(error))
            return False
        fits = True
        for name, tensor in made.items():
            if name not in self.tensors:
                self.problems.add("unexpected", *conversion.inputs)
            elif tensor.shape != self.tensors[name].shape:
                self._explain(name, conversion, f"{list(tensor.shape)} for {list(self.tensors[name].shape)}")
                fits = False
            else:
                pieces = tensor.pieces if isinstance(tensor, Traced) else None
                self.filled[name] = Filled(self.tensors[name], pieces)
        return fits

    def _explain(self, name: str, conversion: adapter.Conversion, what: str) -> None:
        """Says of a parameter that cannot be made which tensors of the checkpoint are missing, too many or wrong."""
        expected = self._hub_shapes([name])
        if set(conversion.inputs) == {name}:  # a checkpoint in the model's own layout
            expected = {name: tuple(self.tensors[name].shape)}
        found = conversion.inputs
        missing = [key for key in expected if key not in self.stored]
        extra = [key for key in found if key not in expected]
        wrong = [key for key in found if key in expected and self.stored[key].shape != expected[key]]
        self.problems.add("missing", *missing)
        self.problems.add("unexpected", *extra)
        for key in wrong:
            self.problems.add("shape", f"{key}: {list(self.stored[key].shape)}, the model needs {list(expected[key])}")
        if not (missing or extra or wrong):
            self.problems.add("shape", f"{name}: {what}")

    def _hub_shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """The tensors that a complete checkpoint has for these names."""
        shapes: dict[str, tuple[int, ...]] = {}
        for conversion in adapter.export_conversions(self.source.saving, names):
            sources = {key: self.tensors[key] for key in conversion.inputs}
            try:
                traced = {key: Traced.source(key, tuple(t.shape), t.dtype) for key, t in sources.items()}
                made = conversion.run(self.model, traced)
            except NotTraceableError:
                metas = {k: torch.empty(t.shape, dtype=t.dtype, device="meta") for k, t in sources.items()}
                made = conversion.run(self.model, metas)
            shapes.update({key: tuple(tensor.shape) for key, tensor in made.items()})
        return shapes

    def _find_missing(self, unknown: set[str]) -> None:
        present = {id(self.tensors[name]) for name in {*self.filled, *unknown} & self.tensors.keys()}
        missing = [
            name
            for name, tensor in self.tensors.items()
            if tensor.is_meta and id(tensor) not in present and not adapter.is_optional(self.model, name, False)
        ]
        tied = adapter.tied_names(self.model)
        names = [name for name in missing if not (name in tied and tied[name] in missing)]
        if names:
            shapes = self._hub_shapes(names)
            self.problems.add("missing", *[key for key in shapes if key not in self.stored])

    def unique(self) -> Iterator[tuple[str, Filled]]:
        """What is filled, tied parameters once and under the name that is not declared to be a copy."""
        tied = adapter.tied_names(self.model)
        seen: set[int] = set()
        for name, filled in sorted(self.filled.items(), key=lambda item: item[0] in tied):
            if id(filled.tensor) not in seen and filled.tensor.is_meta:
                seen.add(id(filled.tensor))
                yield name, filled


def _differ(one: StoredTensor, two: StoredTensor) -> bool:
    """Whether tensors of one shape and dtype differ at their beginning, middle or end: all of a trained one does."""
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    size = math.prod(one.shape) * one.dtype.itemsize
    window = min(size, 1 << 16)
    return any(_bytes(one, at, window) != _bytes(two, at, window) for at in (0, (size - window) // 2, size - window))


def _bytes(stored: StoredTensor, at: int, count: int) -> bytes:
    with stored.file.open("rb") as stream:
        stream.seek(stored.offset + at)
        return stream.read(count)
