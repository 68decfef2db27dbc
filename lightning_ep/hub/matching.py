"""Which tensors of a checkpoint become which parameters of a model, and what is wrong with the checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_ep import transformers_adapter as adapter
from lightning_ep.hub.problems import Problems
from lightning_ep.hub.safetensors_file import (
    INDEX_NAME,
    SINGLE_NAME,
    BrokenFileError,
    StoredTensor,
    read_header,
)
from lightning_ep.hub.source import Source
from lightning_ep.hub.trace import NotTraceableError, Piece, Traced

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _meta(stored: StoredTensor) -> Tensor:
    return torch.empty(stored.shape, dtype=stored.dtype, device="meta")


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
    """A parameter or buffer that the checkpoint fills, and copies of it.

    Attributes:
        tensors: What is filled.
        pieces: How, or (None) by running a conversion.
        rows: How many of its rows the checkpoint has, where that is not all: the vocabulary was resized since.
    """

    tensors: Sequence[Tensor]
    pieces: tuple[Piece, ...] | None
    rows: int | None = None


@dataclass
class Match:
    """What is read for which parameter, and what is wrong with the checkpoint.

    Attributes:
        source: The checkpoint.
        targets: What of it is in the model, sharded or not, by name.
        stored: The checkpoint's tensors.
        filled: What fills the model's parameters and persistent buffers, by name.
        opaque: Conversions that must run on whole tensors.
        problems: What is wrong.
    """

    source: Source
    targets: Mapping[str, Sequence[Tensor]]
    stored: dict[str, StoredTensor] = field(default_factory=dict)
    filled: dict[str, Filled] = field(default_factory=dict)
    opaque: list[adapter.Conversion] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = self.source.model
        self.problems = Problems(f"the checkpoint in {self.source.directory} does not fit {self.model.class_name}:")
        # What user code has taken out of the model is not filled, but still what conversions make.
        self.tensors = {**self.model.tensors, **{name: tensors[0] for name, tensors in self.targets.items()}}
        self.stored, unreadable = open_checkpoint(self.source.directory, self.problems)
        keys = [*self.stored, *unreadable]
        conversions, unexpected = adapter.load_conversions(self.model, self.source.loading, keys)
        if keys and not conversions:
            self.problems.add(
                "architecture", f"none of the checkpoint's {len(keys)} tensors belongs to this model, as {keys[0]}"
            )
            return
        unexpected = [key for key in unexpected if not self.model.is_optional(key, in_checkpoint=True)]
        unexpected = self._in_base_model(unexpected, keys, "it has no place for the checkpoint's")
        self.problems.add("unexpected", *unexpected)
        unknown: set[str] = set() if keys else set(self.tensors)  # a lone file that cannot be read says nothing
        for conversion in conversions:
            readable = not unreadable.intersection(conversion.inputs)
            if not (readable and self._check_dtypes(conversion) and self._trace(conversion)):
                unknown.update(self._siblings.get(conversion.target, {conversion.target}))
        self._check_tied()
        self._fill_tied()
        self._find_missing(unknown)

    def _check_tied(self) -> None:
        """Notes copies of a tied parameter that a checkpoint stores and that are none: one of them would be lost."""
        for copy, name in self.model.tied.items():
            both = [self.filled[key].pieces for key in (copy, name) if key in self.filled]
            keys = [piece.key for pieces in both for piece in pieces or ()]
            if len(both) == len(keys) == 2 and _differ(*(self.stored[key] for key in keys)):
                self.problems.add(
                    "tied",
                    f"{keys[0]} and {keys[1]} differ, and the config says that they are one (tie_word_embeddings): "
                    "pass tie_word_embeddings=False to from_pretrained",
                )

    def _fill_tied(self) -> None:
        """Fills a tied parameter that is one no longer, a copy that PEFT trains say, from the other's tensor."""
        for pair in self.model.tied.items():
            for one, other in (pair, pair[::-1]):
                if one in self.targets and one not in self.filled and other in self.filled:
                    self.filled[one] = replace(self.filled[other], tensors=self.targets[one])

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
            elif tensor.shape != self.tensors[name].shape and not self._is_resized(name, tensor):
                self._explain(name, conversion, f"{list(tensor.shape)} for {list(self.tensors[name].shape)}")
                fits = False
            elif name in self.targets:
                pieces = tensor.pieces if isinstance(tensor, Traced) else None
                rows = tensor.shape[0] if tensor.shape != self.tensors[name].shape else None
                self.filled[name] = Filled(self.targets[name], pieces, rows)
        return fits

    def _is_resized(self, name: str, made: Tensor) -> bool:
        """Whether `resize_token_embeddings` has changed the rows of a parameter that the checkpoint has as it was."""
        built, now = self.model.tensors[name].shape, self.tensors[name].shape
        in_rows = name in self.model.vocabulary and isinstance(made, Traced) and built[1:] == now[1:]
        return in_rows and made.shape == built

    def _in_base_model(self, names: Iterable[str], among: Iterable[str], what: str) -> list[str]:
        """Those of ``names`` that a model whose head is new must have; a warning names the others.

        Args:
            names: Names that only the checkpoint has, or only the model.
            among: All names of the one that has them.
            what: What becomes of the others, for the warning.
        """
        prefix = f"{self.model.base_model_prefix}."
        bare = not any(name.startswith(prefix) for name in among)  # a base model alone
        inside = [name for name in names if not self.source.new_head or bare or name.startswith(prefix)]
        if head := [name for name in names if name not in inside]:
            rank_zero_warn(f"{self.model.class_name} from {self.source.directory}: {what} {', '.join(head)}.")
        return inside

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
            if name in self.targets
            and tensor.is_meta
            and id(tensor) not in present
            and not self.model.is_optional(name, in_checkpoint=False)
        ]
        tied = self.model.tied
        names = [name for name in missing if not (name in tied and tied[name] in missing)]
        names = self._in_base_model(names, self.tensors, "random values, since the checkpoint has none, for")
        if names:
            shapes = self._hub_shapes(names)
            self.problems.add("missing", *[key for key in shapes if key not in self.stored])

    def on_meta(self) -> Iterator[tuple[str, Filled, Tensor]]:
        """What is filled, every tensor once, and tied ones by the name that is not declared to be a copy."""
        seen: set[int] = set()
        for name, filled in sorted(self.filled.items(), key=lambda item: item[0] in self.model.tied):
            for tensor in filled.tensors:
                if id(tensor) not in seen and tensor.is_meta:
                    seen.add(id(tensor))
                    yield name, filled, tensor


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
