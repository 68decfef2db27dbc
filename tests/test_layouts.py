"""Every layout trains like one process, and layouts that cannot be are refused with one that can."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from lightning_ep import ParallelLayout
from tests.parity import assert_trains_like_one_process
from tests.ranks import device, run_ranks

CASES = [
    {"causal": False, "accumulate": 3, "clip": 0.2},
    {"causal": True, "accumulate": 1, "clip": 0.2},
]
STOCK = [{"ep": 1, "fsdp": 2, "replicate": 2}, {"ep": 1, "tp": 2}]  # meshes of three dimensions, and split matrices


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {"ep": 1, "replicate": 2}),
        (4, {"ep": 2, "replicate": 2}),
        (4, {"ep": 1, "fsdp": 2, "replicate": 2}),
        pytest.param(8, {"ep": 2, "fsdp": 2, "replicate": 2}, marks=pytest.mark.slow),
        (2, {"ep": 1, "cp": 2}),
        (2, {"ep": 2, "cp": 2}),
        (4, {"ep": 2, "fsdp": 2, "cp": 2}),
        (4, {"ep": 4, "cp": 4}),  # more than the two KV heads
        (4, {"ep": 2, "replicate": 2, "cp": 2}),
        pytest.param(8, {"ep": 2, "fsdp": 2, "replicate": 2, "cp": 2}, marks=pytest.mark.slow),
        (2, {"ep": 1, "tp": 2}),
        (2, {"ep": 2, "tp": 2}),
        pytest.param(4, {"ep": 4, "tp": 2}, marks=pytest.mark.slow),
        (4, {"ep": 2, "tp": 2}),
        (4, {"ep": 4, "tp": 2, "cp": 2}),
        pytest.param(8, {"ep": 2, "fsdp": 2, "replicate": 2, "tp": 2}, marks=pytest.mark.slow),
    ],
)
def test_training_equals_one_process(world: int, layout: dict[str, int]) -> None:
    assert_trains_like_one_process(world, layout, [{**case, "stock": layout in STOCK} for case in CASES])


COMBINED = [
    {"causal": True, "accumulate": 3, "clip": 0.2, "recompute": "full"},
    {"causal": False, "accumulate": 1, "clip": 0.2, "recompute": "selective", "length": 11},
    {"causal": True, "accumulate": 1, "clip": 0.2, "recompute": "full", "precision": "bf16-mixed"},
    {"causal": True, "accumulate": 1, "clip": 0.2, "precision": "bf16-true"},
]


# Each case on a layout that the others leave something of: all on all are slow.
PAIRS = [
    ({"ep": 4, "tp": 2, "cp": 2}, COMBINED[0:4:2]),
    ({"ep": 1, "fsdp": 2, "replicate": 2, "tp": 2}, COMBINED[1:4:2]),
    ({"ep": 2, "cp": 2}, COMBINED[0:4:3]),
]


@pytest.mark.parametrize(
    ("layout", "cases"),
    [*PAIRS, *(pytest.param(layout, COMBINED, marks=pytest.mark.slow) for layout, _ in PAIRS)],
)
def test_layouts_combine_with_recompute_accumulation_and_precision(
    layout: dict[str, int], cases: list[dict[str, Any]]
) -> None:
    assert_trains_like_one_process(4, layout, cases)


@pytest.mark.slow
def test_layouts_combine_with_compiled_layers() -> None:
    case = {"causal": True, "accumulate": 1, "clip": 0.2, "compile": "inductor", "recompute": "full"}
    layout = {"ep": 4, "tp": 2, "cp": 2}
    assert_trains_like_one_process(4, layout, [case], timeout=110)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"replicate": 3}, r"replicate=3 times .* there are 8 processes.*replicate must divide 8: .*\[1, 2, 4, 8\]"),
        ({"replicate": 2, "ep": 8}, r"replicate=2 times fsdp=1 times ep=8 is 16, .*ep must divide 4: .*\[1, 2, 4\]"),
        ({"replicate": 2, "ep": 2, "fsdp": 4}, r"is 16, but there are 8.* with ep=2 use fsdp=2"),
        ({"tp": 3}, r"tp=3 times cp=1 is 3, which does not divide fsdp \* ep = 1 \* 8 = 8.*Use tp=1\."),
        ({"tp": 4, "cp": 4}, r"tp=4 times cp=4 is 16, which does not divide .* = 8, .*Use tp=2\."),
        ({"cp": 6}, r"cp=6 is 6, which does not divide .*Use cp=4, tp=1\."),
        ({"replicate": 4, "tp": 4}, r"tp=4 times cp=1 is 4, which does not divide fsdp \* ep = 1 \* 2 = 2"),
        ({"cp": 0}, "cp=0: must be a positive integer"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelLayout.resolve(sizes.pop("ep", "auto"), sizes.pop("fsdp", "auto"), 8, 8, **sizes)


def test_both_views_of_the_ranks() -> None:
    layout = ParallelLayout.resolve(4, "auto", 16, 8, replicate=2, tp=2, cp=2)
    assert (layout.fsdp, layout.shards, layout.data_world_size, layout.loss_world_size) == (2, 8, 4, 16)
    assert [layout.data_rank(rank) for rank in range(16)] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert ParallelLayout.resolve("auto", "auto", 16, 16, replicate=2).ep == 8
    assert ParallelLayout.resolve("auto", "auto", 16, 8, replicate=2).ep == 8
    assert ParallelLayout.resolve("auto", 2, 16, 8, replicate=2).ep == 4


@pytest.mark.parametrize("rank", range(8))
def test_a_place_is_that_of_the_meshes(rank: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    layout = ParallelLayout(8, ep=2, fsdp=2, replicate=2, tp=2, cp=2)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
    try:
        meshes, found = layout.build_meshes("cpu"), dict[str, int]()
        for mesh in (meshes.expert, meshes.dense, meshes.cp):
            assert mesh is not None
            found |= {name: mesh.get_local_rank(name) for name in mesh.mesh_dim_names or ()}
    finally:
        dist.destroy_process_group()
    place = layout.place(rank)
    assert found.pop("dp_cp") == rank // 2 % 2
    assert found == {name: getattr(place, name) for name in ("replicate", "fsdp", "ep", "cp", "tp")}
    assert place.data == rank // 4


def _communicators() -> tuple[bool, bool, list[timedelta]]:
    dist.init_process_group(dist.get_default_backend_for_device(device()), timeout=timedelta(seconds=77))
    meshes = ParallelLayout.resolve(2, "auto", 2, 2).build_meshes(device().type)
    groups: list[Any] = [
        meshes.expert["ep"].get_group(),
        meshes.dense["dp_cp"].get_group(),
        meshes.expert["fsdp"].get_group(),
    ]
    timeouts = [group._get_backend(device()).options._timeout for group in groups]
    return groups[0] is dist.group.WORLD, groups[1] is dist.group.WORLD, timeouts


def test_tokens_do_not_queue_behind_parameters_and_every_group_has_the_time_out() -> None:
    for ep_shares, dense_shares, timeouts in run_ranks(2, _communicators, init_process_group=False, alone=True):
        assert (ep_shares, dense_shares) == (False, True)
        assert timeouts == [timedelta(seconds=77)] * 3


# In a process of its own, which torch's groups may abort: ranks of `run_ranks` have other ones already.
_GATHERS = """
import torch
import torch.distributed as dist
from lightning_ep import ParallelLayout

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
meshes = ParallelLayout.resolve(1, "auto", 1, 1).build_meshes("cpu")
piece, whole = torch.ones(4), torch.empty(4)
for mesh in (meshes.expert["ep"], meshes.expert["fsdp"], meshes.dense["dp_cp"]):
    backend = mesh.get_group()._get_backend(torch.device("cpu"))
    for _ in range(300):
        for work in [backend.allgather_coalesced([[whole]], [piece]) for _ in range(64)]:
            work.wait()
"""


def test_gathers_over_gloo_leave_the_heap_alone() -> None:
    ended = subprocess.run([sys.executable, "-c", _GATHERS], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr  # with two threads per group it is -SIGABRT, of malloc
