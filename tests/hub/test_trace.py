"""Chains of conversions that move boxes are read by range: random chains, boxes and buffer sizes against torch."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_ep.distributed.shards import Region
from lightning_ep.hub import reader
from lightning_ep.hub.safetensors_file import read_header
from lightning_ep.hub.trace import NotTraceableError, Traced

Chain = Callable[[list[Tensor]], Tensor]


def _random_chain(rng: random.Random) -> Chain:
    """Stacks, joins, cuts and turns, decided by ``rng`` when it runs; 12 tensors of 4 x 6 go in."""
    seed = rng.random()

    def chain(tensors: list[Tensor]) -> Tensor:
        choose = random.Random(seed)
        groups = [torch.stack(tensors[i : i + 4], dim=choose.choice([0, 1, 2])) for i in (0, 4, 8)]
        groups = [group.transpose(*choose.sample(range(3), 2)).contiguous() for group in groups[:1]] + groups[1:]
        shape = max(groups, key=lambda g: g.shape).shape
        tensor = torch.cat([group for group in groups if group.shape == shape], dim=choose.choice([0, 1, 2]))
        for _ in range(3):
            dim = choose.randrange(tensor.ndim)
            operation = choose.choice(["chunk", "split", "permute", "unsqueeze", "squeeze", "unbind", "reshape"])
            if operation == "chunk":
                tensor = torch.chunk(tensor, 2, dim=dim)[-1]
            elif operation == "split" and tensor.shape[dim] > 1:
                tensor = torch.split(tensor, [1, tensor.shape[dim] - 1], dim=dim)[1]
            elif operation == "permute":
                tensor = tensor.permute(choose.sample(range(tensor.ndim), tensor.ndim))
            elif operation == "unsqueeze":
                tensor = tensor.unsqueeze(dim)
            elif operation == "squeeze":
                tensor = tensor.squeeze(dim)
            elif operation == "unbind" and tensor.ndim > 2:
                tensor = tensor.unbind(dim)[0]
            else:
                tensor = tensor.reshape(tuple(tensor.shape)).clone()
        return tensor

    return chain


def _random_box(rng: random.Random, shape: tuple[int, ...]) -> Region:
    start = tuple(rng.randrange(n) for n in shape)
    return Region(start, tuple(rng.randint(1, n - a) for a, n in zip(start, shape, strict=True)))


@pytest.mark.parametrize("chunk_bytes", [8, 100, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_chains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(reader, "MIN_RUN_BYTES", 16)
    tensors = {f"t{i:02}": torch.randn(4, 6).to(dtype) for i in range(12)}
    save_file(tensors, tmp_path / "file.safetensors")
    stored = read_header(tmp_path / "file.safetensors")
    rng = random.Random(0)
    turned = 0
    for _ in range(60):
        chain = _random_chain(rng)
        expected = chain(list(tensors.values()))
        traced = chain([Traced.source(key, tuple(t.shape), t.dtype) for key, t in tensors.items()])
        assert isinstance(traced, Traced)
        assert traced.shape == expected.shape == traced.extent
        box = _random_box(rng, tuple(expected.shape))
        found = torch.full(box.size, torch.nan)  # another dtype than the file's for bf16
        cropped = [piece for p in traced.pieces if (piece := p.crop(box)) is not None]
        reads = [r for p in cropped for r in reader.reads_of(stored[p.key], p, p.target.of(found))]
        reader.read_all(reader.batches_of(reads), torch.device("cpu"))
        assert torch.equal(found, box.of(expected).float())
        turned += any(list(p.dims) != sorted(d for d in p.dims if d is not None) for p in traced.pieces)
    assert turned > 10, "some chains must reorder dimensions"


@pytest.mark.parametrize(
    "operation", [lambda t: t * 2, lambda t: t.T, lambda t: t.reshape(6, 4), lambda t: t.float() + 1, torch.exp]
)
def test_what_boxes_cannot_describe_says_so(operation: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotTraceableError):
        operation(Traced.source("t", (4, 6), torch.float32))


def test_shapes_that_do_not_fit_name_their_tensors() -> None:
    tensors = [Traced.source("a", (4, 6), torch.float32), Traced.source("b", (4, 5), torch.float32)]
    with pytest.raises(ValueError, match=r"stacked: a \[4, 6\], b \[4, 5\]"):
        torch.stack(tensors)
    with pytest.raises(ValueError, match=r"concatenated: a \[4, 6\], b \[4, 5\]"):
        torch.cat(tensors)
