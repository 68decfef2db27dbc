"""Bytes that travel, against arithmetic by hand (docs/operate/multinode.md, docs/choose/layouts.md), and rings."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from lightning_ep import ParallelLayout
from lightning_ep.planner import QWEN3_30B_A3B, Case, find_model, rows_sent, step_ms, tokens_per_second
from lightning_ep.planner.devices import GPUS
from lightning_ep.planner.traffic import (
    Traffic,
    copies_sum,
    dense_gather,
    exchange,
    expert_gather,
    sequence_exchange,
    tensor_exchange,
)

MIB = 2**20


def _case(shape: tuple[int, int] = (1, 4096), ranks: int = 16, **settings: Any) -> Case:
    return Case(QWEN3_30B_A3B, 48, *shape, ranks, **settings)


def test_experts_of_two_nodes_travel_as_the_docs_say() -> None:
    # docs/operate/multinode.md: 2 x 72 MiB gathered and 144 MiB of gradients; 288 MiB all-reduced; 3.3 rows of 4 KiB.
    assert expert_gather(_case(ep=8)) == Traffic(0.0, 72 * MIB)
    experts = 48 * 128 * 3 * 2048 * 768
    copies = copies_sum(_case(ep=8, replicate=2))
    assert copies.link == 0
    assert 48 * 288 * MIB < copies.network < 48 * 288 * MIB * (30.6e9 / experts)
    flat = exchange(_case(ep=16))
    assert flat.network / 4096 / 4096 == pytest.approx(rows_sent(QWEN3_30B_A3B, 16) * 8 / 15)
    assert 4 * flat.network / 4096 == pytest.approx(53 * 1024, rel=0.01)
    assert flat.link / flat.network == pytest.approx(7 / 8)
    assert exchange(_case(ep=8)).network == 0
    # Twice the rows of the mean reach the busiest rank.
    assert exchange(_case(ep=8, skew=2.0)).link == pytest.approx(2 * exchange(_case(ep=8)).link)


@pytest.mark.parametrize(("ep", "node", "ranks"), [(1, 8, 32), (2, 8, 32), (4, 4, 16), (8, 4, 32), (4, 8, 8)])
def test_rings_leave_nodes_as_often_as_they_are_drawn(ep: int, node: int, ranks: int) -> None:
    """A ring over every group of ranks that share experts, in the order of the ranks, edge by edge."""
    case = _case(ranks=ranks, ep=ep, node=node)
    sent = (case.fsdp - 1) / case.fsdp * 2 * 128 * 3 * 2048 * 768 / ep  # by every rank to the next one
    inside = away = 0
    for first in range(ep):
        ring = list(range(first, ranks, ep))
        for one, other in itertools.pairwise([*ring, ring[0]]):
            inside += one // node == other // node
            away += one // node != other // node
    found = expert_gather(case)
    assert found.network * ranks == pytest.approx(away * sent)
    # Where a ring has ranks beside each other, those at the border of a node are taken to be as loaded as the others.
    assert (found.link == 0) == (inside == 0)
    assert found.link in (0, pytest.approx(sent))


def test_exchanges_of_sequences_and_matrices_are_those_of_the_docs() -> None:
    # docs/choose/layouts.md: 288 MiB per layer and direction at cp=2 and 64k tokens; 64 MiB at 4 x 4096 and tp=2.
    assert sequence_exchange(_case((1, 65_536), 2, cp=2)).link == 288 * MIB
    assert tensor_exchange(_case((4, 4096), 2, tp=2)).link == 64 * MIB
    assert sequence_exchange(_case()) == tensor_exchange(_case()) == Traffic()
    # Key and value heads are repeated where there are fewer than ranks: 4 of them on 8 ranks.
    eight = sequence_exchange(_case((1, 65_536), 8, cp=8))
    assert eight.link == 7 / 8 * 8192 * (2 * 32 + 2 * 4 * 2) * 128 * 2
    latent = find_model("deepseek-ai/DeepSeek-V3")
    case = Case(latent.widths, latent.layers, 1, 4096, 8, ep=8, cp=4)
    assert sequence_exchange(case).link == 3 / 4 * 1024 * 128 * (192 + 192 + 128 + 128) * 2


def test_what_is_no_expert_is_shared_by_all_ranks_of_a_copy() -> None:
    others = 30_532_122_624 - 48 * 128 * 3 * 2048 * 768
    assert dense_gather(_case(ep=8)).network == pytest.approx(15 / 16 * 2 * others / 8)
    assert dense_gather(_case(ep=8, tp=2)).network == pytest.approx(7 / 8 * 2 * others / 2 * 2 / 8)
    assert dense_gather(_case(ep=8, replicate=2)) == Traffic(7 / 8 * 2 * others)


def test_the_slower_of_links_and_network_sets_the_time() -> None:
    h100 = GPUS["H100"]
    assert Traffic(h100.link).ms(h100) == pytest.approx(1e3 * 450 / 334.5)
    assert Traffic(h100.link / 2, h100.network).ms(h100) == pytest.approx(1e3 / 0.8)
    assert (Traffic(1, 2) + Traffic(3, 4)) * 2 == Traffic(8, 12)


def test_flat_ep_loses_to_ep_inside_a_node_until_tokens_are_few() -> None:
    h100 = GPUS["H100"]

    def faster(shape: tuple[int, int]) -> bool:
        inside, flat = (_case(shape, ep=ep, recompute="full") for ep in (8, 16))
        return tokens_per_second(inside, h100) > tokens_per_second(flat, h100)

    assert faster((8, 4096))
    assert faster((2, 4096))
    assert not faster((1, 1024))


def test_accumulation_repeats_passes_and_not_the_step() -> None:
    h200 = GPUS["H200"]
    once, four = (step_ms(_case(ep=8, accumulate=times), h200) for times in (1, 4))
    for name in ("attention core", "expert GEMMs", "dispatch and combine", "FSDP's copies of experts", "casts"):
        assert four[name] == pytest.approx(4 * once[name])
    for name in ("AdamW", "norm"):
        assert four[name] == once[name]


def test_frozen_weights_have_no_gradients() -> None:
    h200 = GPUS["H200"]
    full, lora = (step_ms(_case(ep=8, lora_rank=rank), h200) for rank in (0, 16))
    for name in ("attention projections", "expert GEMMs", "head and loss"):
        assert lora[name] == pytest.approx(2 / 3 * full[name])
    assert lora["attention core"] == full["attention core"]
    assert 0.02 * full["AdamW"] < lora["AdamW"] < 0.03 * full["AdamW"]  # 657 M of 30.5 B
    assert copies_sum(_case(replicate=2, lora_rank=16)) == Traffic()


def test_a_layout_is_that_of_the_package() -> None:
    for ep, replicate, tp, cp in ((4, 2, 2, 2), (8, 1, 1, 4), (1, 4, 1, 2)):
        layout = ParallelLayout(16, ep, 16 // ep // replicate, replicate, tp, cp)
        case = _case(ep=ep, replicate=replicate, tp=tp, cp=cp)
        assert (case.fsdp, case.shards, case.data_ranks) == (layout.fsdp, layout.shards, layout.data_world_size)
        assert case.tokens_per_step == 4096 * layout.data_world_size
