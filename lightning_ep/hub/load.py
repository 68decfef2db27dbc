"""Streams a Hugging Face checkpoint into a sharded model: every rank reads the bytes of its own shards."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from lightning_ep import transformers_adapter as adapter
from lightning_ep.distributed.shards import Region, local_region
from lightning_ep.hub.initialize import assign, with_storage
from lightning_ep.hub.matching import Match
from lightning_ep.hub.reader import Read, ReadError, batches_of, read_all, reads_of
from lightning_ep.hub.source import follow_sources, tensors_by_source
from lightning_ep.hub.trace import Piece, Traced


@dataclass(frozen=True)
class LoadStatistics:
    """What this rank did.

    Attributes:
        bytes_read: Bytes read from files, headers excepted.
        bytes_needed: Bytes of the shards that were filled, in the dtype of the files.
        seconds: Wall time.
    """

    bytes_read: int
    bytes_needed: int
    seconds: float


@torch.no_grad()
def stream_pretrained(module: nn.Module, device: torch.device) -> LoadStatistics:
    """Fills what came from `from_pretrained` and is still on meta in ``module``. Every rank must call it.

    What user code has made of the models does not matter: modules that were wrapped, renamed or copied get their
    weights, and what was put in their place keeps its own. Rows that `resize_token_embeddings` has added get the mean
    of the others, as in transformers.

    A rank reads only what it holds, from parameters' meshes and placements, whatever these are. Conversions that move
    boxes of elements (stacking experts, joining gate and up, cutting, transposing) are read by range; a conversion of
    another kind is run by transformers on the whole tensors that it needs, one conversion at a time.

    Args:
        module: A module, sharded or not.
        device: Where the shards go.

    Raises:
        CheckpointError: On every rank, listing all that is missing, unexpected, of a wrong shape or dtype, or broken in
            its files; before anything is read where the headers show it.
    """
    start = time.perf_counter()
    read = needed = 0
    follow_sources(module)
    for source, targets in tensors_by_source(module).items():
        if not any(tensor.is_meta for tensors in targets.values() for tensor in tensors):
            continue
        match = Match(source, targets)
        match.problems.raise_on_all_ranks()
        numbers = _fill(module, match, device)
        match.problems.raise_on_all_ranks()
        read, needed = read + numbers[0], needed + numbers[1]
    return LoadStatistics(read, needed, time.perf_counter() - start)


@dataclass(frozen=True)
class _Shard:
    """What this rank holds of a parameter."""

    param: Tensor
    region: Region
    data: Tensor
    rows: int | None


def _fill(module: nn.Module, match: Match, device: torch.device) -> tuple[int, int]:
    """Reads all that the match says and puts it into place; returns the bytes read and the bytes needed."""
    shards: dict[str, list[_Shard]] = {}
    reads: list[tuple[Path, Read]] = []
    for name, filled, tensor in match.on_meta():
        region = local_region(tensor)
        data = torch.empty(region.size, dtype=tensor.dtype, device=device)
        shards.setdefault(name, []).append(_Shard(tensor, region, data, filled.rows))
        reads += _reads(match, filled.pieces or (), region, data)
    bytes_read = 0
    needed = sum(read.window.numel * read.dtype.itemsize for _, read in reads)
    try:
        with _progress(reads) as bar:
            bytes_read += read_all(batches_of(reads), device, bar)
            for conversion in match.opaque:
                bytes_read += _convert(match, conversion, shards)
    except (ReadError, OSError) as error:
        match.problems.add("files", str(error))
        return bytes_read, needed
    filled_here = [shard for several in shards.values() for shard in several]
    for shard in filled_here:
        if shard.rows is not None:
            _fill_new_rows(shard, shard.rows)
    assign(module, {id(shard.param): shard.data for shard in filled_here})
    return bytes_read, needed


def _fill_new_rows(shard: _Shard, rows: int) -> None:
    """Sets what is behind the first ``rows`` to their mean (of a vector: to zero). Every rank must call it."""
    start, size = shard.region.start[0], shard.region.size[0]
    new = shard.data[max(rows - start, 0) :] if rows < start + size else shard.data[size:]
    new.zero_()
    if shard.data.ndim > 1:
        assert isinstance(shard.param, nn.Parameter)
        param = with_storage(shard.param, shard.data)
        whole = param.full_tensor() if isinstance(param, DTensor) else param
        mean = whole[:rows].float().mean(0)
        new.copy_(Region(shard.region.start[1:], shard.region.size[1:]).of(mean).expand_as(new))


def _reads(match: Match, pieces: Iterable[Piece], region: Region, shard: Tensor) -> Iterator[tuple[Path, Read]]:
    for piece in pieces:
        cropped = piece.crop(region)
        if cropped is not None:
            yield from reads_of(match.stored[piece.key], cropped, cropped.target.of(shard))


def _progress(reads: Sequence[tuple[Path, Read]]) -> tqdm:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return tqdm(
        total=sum(read.nbytes for _, read in reads),
        desc="Loading weights (rank 0)",
        unit="B",
        unit_scale=True,
        disable=rank != 0,
        leave=False,
    )


class WholeWeights:
    """The weights of a checkpoint under a model's names, whole, one at a time and on the CPU, without ranks.

    Attributes:
        dtypes: What they are in the files, by name.

    Args:
        model: A model from `from_pretrained`, on meta.

    Raises:
        CheckpointError: If the checkpoint does not fit the model.
    """

    def __init__(self, model: nn.Module) -> None:
        ((source, targets),) = tensors_by_source(model).items()
        self._match = Match(source, targets)
        self._match.problems.raise_on_all_ranks()
        self._made_by = {name: c for c in self._match.opaque for name in self._makes(c)}
        stored = self._match.stored
        self.dtypes = {
            name: stored[filled.pieces[0].key if filled.pieces else self._made_by[name].inputs[0]].dtype
            for name, filled in self._match.filled.items()
        }

    def _makes(self, conversion: adapter.Conversion) -> Iterable[str]:
        stored = {key: self._match.stored[key] for key in conversion.inputs}
        metas = {key: torch.empty(s.shape, dtype=s.dtype, device="meta") for key, s in stored.items()}
        return conversion.run(self._match.model, metas)

    def read(self, name: str) -> Tensor:
        """A parameter or persistent buffer, as the files have it.

        Raises:
            ReadError: If a file cannot be read.
        """
        if name in self._made_by:
            return _run_on_whole(self._match, self._made_by[name])[0][name]
        pieces, region = self._match.filled[name].pieces, Region.whole(tuple(self._match.tensors[name].shape))
        data = torch.empty(region.size, dtype=self.dtypes[name])
        read_all(batches_of(list(_reads(self._match, pieces or (), region, data))), torch.device("cpu"))
        return data


def _convert(match: Match, conversion: adapter.Conversion, shards: Mapping[str, Sequence[_Shard]]) -> int:
    """Runs a conversion that cannot be read by range; returns the bytes read."""
    made, bytes_read = _run_on_whole(match, conversion)
    for name, tensor in made.items():
        for shard in shards.get(name, ()):
            shard.data.copy_(shard.region.of(tensor))
    return bytes_read


def _run_on_whole(match: Match, conversion: adapter.Conversion) -> tuple[dict[str, Tensor], int]:
    """What a conversion makes of whole tensors in host memory, and the bytes read."""
    sources: dict[str, Tensor] = {}
    reads: list[tuple[Path, Read]] = []
    for key in conversion.inputs:
        stored = match.stored[key]
        sources[key] = torch.empty(stored.shape, dtype=stored.dtype)
        whole = Traced.source(key, stored.shape, stored.dtype)
        reads += _reads(match, whole.pieces, Region.whole(stored.shape), sources[key])
    bytes_read = read_all(batches_of(reads), torch.device("cpu"))
    return conversion.run(match.model, sources), bytes_read
