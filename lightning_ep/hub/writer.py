"""Writes a model in the hub's layout: which rank writes which tensor into which file, and the exchange that it needs.

Each tensor of the hub's layout has one owner, a rank that holds at least a part of it: experts stay with their EP rank,
and what FSDP cut is sent to the owner, one parameter at a time. No rank ever holds more than its share of one parameter
beside its shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.distributed.agreement import from_all_ranks
from lightning_ep.distributed.shards import Region, local_region, local_tensor, whole
from lightning_ep.hub.beneath import Beneath, beneath
from lightning_ep.hub.problems import Problems
from lightning_ep.hub.safetensors_file import SINGLE_NAME, SafetensorsWriter, TensorSpec
from lightning_ep.hub.trace import NotTraceableError, Piece, Traced

MAX_FILE_BYTES = 5 * 10**9
"""Files are closed before they become larger, as on the hub; a larger tensor has a file to itself."""


class Part(NamedTuple):
    """A tensor to be assembled from pieces of parameters."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Group:
    """Tensors of the hub's layout that are made of the same parameters.

    Attributes:
        conversion: What makes them.
        parts: What an owner assembles: the tensors themselves or, if ``opaque``, the parameters to convert.
        outputs: The tensors as they will be in the file.
        opaque: Whether the conversion must run on data.
    """

    conversion: adapter.Conversion
    parts: tuple[Part, ...]
    outputs: tuple[TensorSpec, ...]
    opaque: bool

    @property
    def itemsize(self) -> int:
        """Bytes of an element in the file."""
        return max(spec.dtype.itemsize for spec in self.outputs)


def plan_groups(
    model: PreTrainedModel, dtypes: Mapping[str, torch.dtype], dtype: torch.dtype | None = None
) -> list[Group]:
    """What a model's parameters and persistent buffers become in the hub's layout.

    Args:
        model: The model on meta, not sharded.
        dtypes: What the trained ones have, by name.
        dtype: What parameters are cast to in the files; buffers keep theirs.

    Returns:
        Groups with larger element sizes first, which keeps tensors in files aligned.
    """
    tensors = _distinct(model)
    buffers = {name for name, _ in model.named_buffers()}

    def in_file(key: str, tensor: Tensor, conversion: adapter.Conversion) -> TensorSpec:
        cast = dtype is not None and tensor.is_floating_point() and not buffers.intersection(conversion.inputs)
        return TensorSpec(key, tuple(tensor.shape), dtype if cast and dtype is not None else tensor.dtype)

    groups = []
    for conversion in adapter.export_conversions(adapter.hub_transforms(model, saving=True), tensors):
        sources = {name: Traced.source(name, tuple(tensors[name].shape), dtypes[name]) for name in conversion.inputs}
        try:
            made, opaque = conversion.run(model, dict(sources)), False
            parts = {key: tensor for key, tensor in made.items() if isinstance(tensor, Traced)}
        except NotTraceableError:
            metas = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in sources.items()}
            made, opaque, parts = conversion.run(model, metas), True, sources
        groups.append(
            Group(
                conversion,
                tuple(Part(key, tuple(t.shape), t.dtype, t.pieces) for key, t in parts.items()),
                tuple(in_file(key, tensor, conversion) for key, tensor in made.items()),
                opaque,
            )
        )
    return sorted(groups, key=lambda group: -group.itemsize)


def _distinct(model: PreTrainedModel) -> dict[str, Tensor]:
    """What is saved: tied parameters once, under the name that is not declared to be a copy."""
    tied = adapter.tied_names(model)
    state = model.state_dict(keep_vars=True)
    found: dict[int, str] = {}
    for name in sorted(state, key=lambda name: name in tied):
        if not adapter.not_saved(model, name):
            found.setdefault(id(state[name]), name)
    kept = set(found.values())
    return {name: tensor for name, tensor in state.items() if name in kept}


class OutputFile(NamedTuple):
    """A file to be written by one rank, with its tensors in order."""

    name: str
    rank: int
    specs: tuple[TensorSpec, ...]


def plan_files(groups: Sequence[Group], owners: Mapping[str, int], num_ranks: int) -> list[OutputFile]:
    """Cuts every rank's tensors into files of at most `MAX_FILE_BYTES`."""
    contents: list[tuple[int, list[TensorSpec]]] = []
    for rank in range(num_ranks):
        size = 0
        mine = [spec for group in groups for spec in group.outputs if owners[spec.key] == rank]
        for spec in mine:
            if size == 0 or size + spec.nbytes > MAX_FILE_BYTES:
                contents.append((rank, []))
                size = 0
            contents[-1][1].append(spec)
            size += spec.nbytes
    count = len(contents)
    name = "model-{:05d}-of-{:05d}.safetensors".format
    return [
        OutputFile(SINGLE_NAME if count == 1 else name(index + 1, count), rank, tuple(specs))
        for index, (rank, specs) in enumerate(contents)
    ]


class ShardedTensors:
    """A sharded model's parameters and buffers, and who holds what of them. Every rank must build it.

    Args:
        model: The sharded model.
        merge: Take the model beneath its adapters, with these in its weights.
        dtype: What merged weights become, by default what they are beneath.
    """

    def __init__(self, model: PreTrainedModel, merge: bool = False, dtype: torch.dtype | None = None) -> None:
        self._state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        below = beneath(model) if merge else Beneath(self._state, {}, [])
        self.tensors, self._beside, self.problems = below.tensors, below.beside, below.problems
        self._merged_dtype = dtype
        self._merged: dict[str, Tensor] = {}
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._holders: dict[str, dict[Region, list[int]]] = {name: {} for name in self.tensors}
        regions_of_all = from_all_ranks({name: local_region(tensor) for name, tensor in self.tensors.items()})
        for rank, regions in enumerate(regions_of_all):
            for name, region in regions.items():
                if region.numel > 0:
                    self._holders[name].setdefault(region, []).append(rank)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtypes by name; of merged weights the last one, so that they are rounded once."""
        dtypes = {name: tensor.dtype for name, tensor in self.tensors.items()}
        return dtypes if self._merged_dtype is None else {**dtypes, **dict.fromkeys(self._beside, self._merged_dtype)}

    def choose_owners(self, groups: Iterable[Group]) -> dict[str, int]:
        """Gives every tensor to the rank with the least to write among those that hold a part of it."""
        load = [0] * self.num_ranks
        owners: dict[str, int] = {}
        for group in groups:
            units = [(group.parts, group.outputs)] if group.opaque else _one_by_one(group)
            for parts, outputs in units:
                pieces = [piece for part in parts for piece in part.pieces]
                candidates = {rank for piece in pieces for ranks, _ in self._sources(piece) for rank in ranks}
                # Nobody has a part of what has no numbers.
                owner = min(candidates or {0}, key=lambda rank: (load[rank], rank))
                load[owner] += sum(spec.nbytes for spec in outputs)
                owners.update(dict.fromkeys([*(p.key for p in parts), *(s.key for s in outputs)], owner))
        return owners

    def _sources(self, piece: Piece) -> Iterator[tuple[list[int], Piece]]:
        """The parts of a piece with the ranks that hold them."""
        for region, ranks in self._holders[piece.key].items():
            part = piece.crop_source(region)
            if part is not None:
                yield ranks, part

    def assemble(self, group: Group, owners: Mapping[str, int]) -> dict[str, Tensor]:
        """Brings the parts of a group to their owners. Every rank must call it.

        Returns:
            The parts that this rank owns, on its device.
        """
        self._merged = {name: self._merge(name) for name in group.conversion.inputs if name in self._beside}
        mine: dict[str, Tensor] = {}
        exchange: list[dist.P2POp] = []
        received: list[tuple[Tensor, Piece, Tensor]] = []
        for part in group.parts:
            owner = owners[part.key]
            if owner == self.rank:
                mine[part.key] = torch.empty(part.shape, dtype=part.dtype, device=self._device(part.pieces[0].key))
            for box in part.pieces:
                for ranks, piece in self._sources(box):
                    holder = owner if owner in ranks else ranks[0]
                    if self.rank not in (owner, holder):
                        continue
                    destination = piece.target.of(mine[part.key]) if owner == self.rank else None
                    if holder == self.rank:
                        data = self._local(piece)
                        if destination is not None:
                            destination.copy_(piece.arrange(data))
                        else:
                            exchange.append(dist.P2POp(dist.isend, data.contiguous(), owner))
                    elif destination is not None:
                        buffer = destination.new_empty(piece.source_region().size)
                        exchange.append(dist.P2POp(dist.irecv, buffer, holder))
                        received.append((destination, piece, buffer))
        for work in dist.batch_isend_irecv(exchange) if exchange else []:
            work.wait()
        for destination, piece, buffer in received:
            destination.copy_(piece.arrange(buffer))
        self._merged = {}
        return mine

    def _merge(self, name: str) -> Tensor:
        """This rank's part of a weight with its adapter in it, on the CPU. Every rank must call it."""
        weight, beside = self.tensors[name], self._beside[name]
        a, b = beside.factors(whole(self._state[beside.a]), whole(self._state[beside.b]))
        return beside.merge(local_tensor(weight), local_region(weight), a, b, self._merged_dtype or weight.dtype)

    def _local(self, piece: Piece) -> Tensor:
        tensor, merged = self.tensors[piece.key], self._merged.get(piece.key)
        held = local_tensor(tensor) if merged is None else merged
        local = piece.source_region().relative_to(local_region(tensor).start).of(held)
        return local.to(self._device(piece.key))

    def _device(self, key: str) -> torch.device:
        """Where ranks can exchange a tensor: after `fit` Lightning has moved it to the CPU."""
        tensor = self.tensors[key]
        local = local_tensor(tensor).device
        of_mesh = tensor.device_mesh.device_type if isinstance(tensor, DTensor) else local.type
        return local if of_mesh == local.type else torch.device(of_mesh)


def _one_by_one(group: Group) -> list[tuple[tuple[Part, ...], tuple[TensorSpec, ...]]]:
    return [((part,), (spec,)) for part, spec in zip(group.parts, group.outputs, strict=True)]


Assemble = Callable[[Group], Mapping[str, Tensor]]
"""Gives the parts of a group that this rank owns; every rank calls it for every group, in the same order."""


class _Files:
    """This rank's files, one open at a time."""

    def __init__(self, directory: Path, files: Iterable[OutputFile], rank: int) -> None:
        self._directory = directory
        self._file_of = {spec.key: file for file in files if file.rank == rank for spec in file.specs}
        self._dtype_of = {spec.key: spec.dtype for file in self._file_of.values() for spec in file.specs}
        self._current: OutputFile | None = None
        self._writer: SafetensorsWriter | None = None
        self.nbytes = sum(spec.nbytes for file in set(self._file_of.values()) for spec in file.specs)

    def write(self, key: str, tensor: Tensor) -> int:
        file = self._file_of[key]
        if file is not self._current:
            self.close()
            self._current, self._writer = file, SafetensorsWriter(self._directory / file.name, file.specs)
        assert self._writer is not None
        return self._writer.write(key, tensor.to(self._dtype_of[key]).cpu().contiguous())

    def close(self, complete: bool = True) -> None:
        if self._writer is not None:
            self._writer.close(complete)
        self._writer = None


@torch.no_grad()
def write_files(
    directory: Path,
    model: PreTrainedModel,
    groups: Sequence[Group],
    files: Sequence[OutputFile],
    assemble: Assemble,
    rank: int,
    problems: Problems,
) -> None:
    """Writes this rank's files.

    A rank that cannot write (a full disk) notes it in ``problems`` and goes on to take part in the exchange.

    Args:
        directory: An existing directory.
        model: The model on meta, for conversions.
        groups: `plan_groups` of it.
        files: `plan_files` of these.
        assemble: Gives the data.
        rank: This rank.
        problems: Where failures are noted.
    """
    mine = _Files(directory, files, rank)

    def write_group(group: Group) -> None:  # a function, so that one group is freed before the next is assembled
        parts = assemble(group)
        if not parts or problems.found:
            return
        made = group.conversion.run(model, {k: t.cpu() for k, t in parts.items()}) if group.opaque else parts
        try:
            for key, tensor in made.items():
                bar.update(mine.write(key, tensor))
        except OSError as error:
            problems.add(f"on rank {rank}", str(error))

    with tqdm(
        total=mine.nbytes, desc="Writing weights (rank 0)", unit="B", unit_scale=True, disable=rank != 0, leave=False
    ) as bar:
        for group in groups:
            write_group(group)
    try:
        mine.close(complete=not problems.found)
    except OSError as error:
        problems.add(f"on rank {rank}", str(error))
