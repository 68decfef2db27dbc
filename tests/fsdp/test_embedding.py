"""Gradients of an input embedding that travel as those of its tokens: sums of all ranks', whoever has how many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ep import ParallelLayout, parallelize
from lightning_ep.fsdp.accumulation import reduce_kept_gradients, set_gradient_sync
from lightning_ep.fsdp.embedding import TokenGradients, has_plain_lookup
from tests.ranks import assert_ranks_agree, device
from tests.reference import relative_error, tiny_model

# By window and micro-batch: the sequences of a rank, and their length.
WINDOWS = [[(1, 4), (2, 5)], [(2, 3)], [(1, 1), (3, 2), (1, 7)], [(9, 60)], [(1, 3)]]


def _ids(vocabulary: int, window: int, turn: int, rank: int, shape: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * window + 100 * turn + rank)
    return torch.randint(0, vocabulary, (shape[0], shape[1] + rank), generator=generator)  # longer on later ranks


def _loss(model: Any, ids: Tensor, calls: int) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    for _ in range(calls - 1):
        loss = loss + model.get_input_embeddings()(ids).square().mean()
    return loss


def _goes_as_tokens(vocabulary: int, calls: int) -> list[bool]:
    """Of every backward through a lookup, whether tokens are fewer than the vocabulary."""
    world = dist.get_world_size()
    shapes = [shape for window in WINDOWS for shape in window for _ in range(calls)]
    return [world == 1 or world * number * (length + world - 1) <= vocabulary for number, length in shapes]


def _adds_up(
    layout: tuple[int, int, int], vocabulary: int, overrides: dict[str, Any], calls: int, dtype: torch.dtype
) -> list[str]:
    world, rank = dist.get_world_size(), dist.get_rank()
    ep, fsdp, replicate = layout
    made = {"num_hidden_layers": 1, "vocab_size": vocabulary, **overrides}
    plain, sharded = tiny_model(**made).to(dtype), tiny_model(**made).to(dtype)
    parallelize(sharded, ParallelLayout.resolve(ep, fsdp, world, world, replicate), device())
    used: list[bool] = []
    gradients = TokenGradients.gradients

    def noted(self: TokenGradients, *args: Any) -> Any:
        found = gradients(self, *args)
        used.append(found[0] is None)
        return found

    wrong: list[str] = []
    TokenGradients.gradients = noted  # type: ignore[method-assign]
    try:
        for number, window in enumerate(WINDOWS):
            for turn, shape in enumerate(window):
                for other in range(world):
                    _loss(plain, _ids(vocabulary, number, turn, other, shape), calls).backward()
                set_gradient_sync(sharded, turn == len(window) - 1)
                _loss(sharded, _ids(vocabulary, number, turn, rank, shape).to(device()), calls).backward()
            reduce_kept_gradients(sharded)
            for (name, param), expected in zip(sharded.named_parameters(), plain.parameters(), strict=True):
                assert expected.grad is not None
                error = relative_error(param.grad.full_tensor(), expected.grad)
                if not error <= (1e-5 if dtype == torch.float32 else 2e-2):
                    wrong.append(f"window {number}: {name} {error:.1e}")
            plain.zero_grad()
            sharded.zero_grad()
    finally:
        TokenGradients.gradients = gradients  # type: ignore[method-assign]
    if used != (expected_use := _goes_as_tokens(vocabulary, calls) if dtype == torch.float32 else []):
        wrong.append(f"gradients of tokens travelled: {used}, and not {expected_use}")
    return wrong


@pytest.mark.parametrize(
    ("layout", "vocabulary", "overrides", "calls"),
    [
        ((1, 1, 1), 101, {}, 1),
        ((2, 1, 1), 101, {}, 1),
        ((1, 2, 1), 101, {"pad_token_id": 3}, 2),
        ((2, 2, 1), 102, {}, 1),
        ((2, 1, 2), 101, {}, 1),
        ((1, 4, 1), 33, {}, 1),
    ],
)
def test_gradients_add_up(layout: tuple[int, int, int], vocabulary: int, overrides: dict[str, Any], calls: int) -> None:
    world = layout[0] * layout[1] * layout[2]
    assert_ranks_agree(world, _adds_up, layout, vocabulary, overrides, calls, torch.float32)


def test_weights_in_bf16_keep_the_sums_of_a_window() -> None:
    assert_ranks_agree(2, _adds_up, (2, 1, 1), 101, {}, 1, torch.bfloat16)


def _of_ids_of_any_shape() -> list[str]:
    plain, sharded = tiny_model(num_hidden_layers=1), tiny_model(num_hidden_layers=1)
    parallelize(sharded, ParallelLayout.resolve(1, 1, 1, 1), device())
    ids = torch.randint(0, 128, (2, 3), generator=torch.Generator().manual_seed(0))
    for shaped in (ids, ids[0], ids[0, 0], ids[None], ids[:, :0], ids.int()):
        for model in (plain, sharded):
            model.get_input_embeddings()(shaped.to(model.device)).square().sum().backward()
    found, expected = (model.get_input_embeddings().weight.grad for model in (sharded, plain))
    error = relative_error(found.full_tensor(), expected)
    return [] if error <= 1e-6 else [f"off by {error:.1e}"]


def test_ids_of_any_shape() -> None:
    assert_ranks_agree(1, _of_ids_of_any_shape)


class _Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_only_plain_lookups() -> None:
    assert has_plain_lookup(nn.Embedding(4, 2, padding_idx=1))
    others = [nn.Embedding(4, 2, max_norm=1.0), nn.Embedding(4, 2, scale_grad_by_freq=True), _Scaled(4, 2)]
    others += [nn.Embedding(4, 2, sparse=True), nn.EmbeddingBag(4, 2)]
    hooked = nn.Embedding(4, 2)
    hooked.forward = lambda input: input  # type: ignore[assignment,method-assign]
    assert not any(map(has_plain_lookup, [*others, hooked]))
