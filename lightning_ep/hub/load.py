"""Streams a Hugging Face checkpoint into a sharded model: every rank reads the bytes of its own shards."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.distributed.shards import Region, local_region
from lightning_ep.hub.initialize import assign
from lightning_ep.hub.matching import Match, Source
from lightning_ep.hub.reader import Read, ReadError, batches_of, read_all, reads_of
from lightning_ep.hub.trace import Piece, Traced


def remember_source(model: PreTrainedModel, directory: Path) -> None:
    """Makes `stream_pretrained` fill ``model``, which is on meta and not sharded yet, from ``directory``."""
    # The transforms are looked up by class, and FSDP replaces the classes.
    source = Source(directory, adapter.hub_transforms(model), adapter.hub_transforms(model, saving=True))
    adapter.remember(model, source)


def source_directory(model: PreTrainedModel) -> Path | None:
    """The checkpoint that a model from `from_pretrained` came from."""
    source = adapter.recall(model, Source)
    return source.directory if source is not None else None


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
    """Fills the models in ``module`` that came from `from_pretrained` and are still on meta. Every rank must call it.

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
    for model in module.modules():
        source = adapter.recall(model, Source)
        if source is None or not any(t.is_meta for t in model.state_dict().values()):
            continue
        assert isinstance(model, PreTrainedModel)
        match = Match(model, source)
        match.problems.raise_on_all_ranks()
        numbers = _fill(model, match, device)
        match.problems.raise_on_all_ranks()
        read, needed = read + numbers[0], needed + numbers[1]
    return LoadStatistics(read, needed, time.perf_counter() - start)


def _fill(model: PreTrainedModel, match: Match, device: torch.device) -> tuple[int, int]:
    """Reads all that the match says and puts it into the model; returns the bytes read and the bytes needed."""
    shards: dict[str, tuple[Region, Tensor]] = {}
    reads: list[tuple[Path, Read]] = []
    filled = dict(match.unique())
    for name, target in filled.items():
        region = local_region(target.tensor)
        shard = torch.empty(region.size, dtype=target.tensor.dtype, device=device)
        shards[name] = region, shard
        reads += _reads(match, target.pieces or (), region, shard)
    bytes_read = 0
    needed = sum(read.window.numel * read.dtype.itemsize for _, read in reads)
    try:
        with _progress(reads) as bar:
            bytes_read += read_all(batches_of(reads), device, bar)
            for conversion in match.opaque:
                bytes_read += _convert(model, match, conversion, shards)
    except (ReadError, OSError) as error:
        match.problems.add("files", str(error))
        return bytes_read, needed
    assign(model, {id(filled[name].tensor): shard for name, (_, shard) in shards.items()})
    return bytes_read, needed


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


def _convert(
    model: PreTrainedModel, match: Match, conversion: adapter.Conversion, shards: dict[str, tuple[Region, Tensor]]
) -> int:
    """Runs a conversion that cannot be read by range, on whole tensors in host memory."""
    sources: dict[str, Tensor] = {}
    reads: list[tuple[Path, Read]] = []
    for key in conversion.inputs:
        stored = match.stored[key]
        sources[key] = torch.empty(stored.shape, dtype=stored.dtype)
        whole = Traced.source(key, stored.shape, stored.dtype)
        reads += _reads(match, whole.pieces, Region.whole(stored.shape), sources[key])
    bytes_read = read_all(batches_of(reads), torch.device("cpu"))
    for name, tensor in conversion.run(model, sources).items():
        if name in shards:
            region, shard = shards[name]
            shard.copy_(region.of(tensor))
    return bytes_read
