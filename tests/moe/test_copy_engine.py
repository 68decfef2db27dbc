"""Rows that their receivers copy, against those of an all-to-all: bit for bit the same, wherever they travel."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ep import ExpertParallelStrategy
from lightning_ep.distributed.progress import Progress
from lightning_ep.moe.dispatch import AllToAllDispatcher, choice
from lightning_ep.moe.dispatch.copy_engine import CopyEngineDispatcher, dispatcher
from lightning_ep.moe.dispatch.copy_engine.ring import SLOTS, Ring
from lightning_ep.moe.function import moe_forward
from lightning_ep.ops.fused_experts import FusedExperts
from lightning_ep.ops.registered_experts import RegisteredExperts
from lightning_ep.planner import QWEN3_30B_A3B, Case, ModelWidths, memory_gib, traffic
from lightning_ep.transformers_adapter import local_experts_function
from tests.moe import test_moe
from tests.rank_process import on_cuda
from tests.ranks import assert_ranks_agree, device, rank_environments, run_ranks, start_fork_server
from tests.reference import tiny_model
from tests.tiny import Samples, TinyModule, quiet

HIDDEN = 32


class _Counted:
    """Counts exchanges of `Ring`, and those whose rows it had to copy into a slot first."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.started = self.copied = 0
        start = Ring.start

        def counted(ring: Ring, rows: Tensor, *args: Any) -> Any:
            self.started += 1
            slot = ring.room(rows.nbytes)
            self.copied += rows.nbytes > 0 and rows.data_ptr() != slot.data_ptr()
            return start(ring, rows, *args)

        patch.setattr(Ring, "start", counted)


def _layer(kind: type[AllToAllDispatcher], implementation: str, steps: list[tuple[int, bool, bool]]) -> list[Tensor]:
    """Outputs and gradients of a few calls of two layers, by a dispatcher.

    Args:
        kind: Of the dispatcher.
        implementation: Of the local experts.
        steps: Tokens of rank 0 (others have other numbers, some none), whether there is a backward, whether it sends
            the rows again.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    num_experts, top_k, dtype = 3 * world, 3, torch.bfloat16
    generator = torch.Generator(device()).manual_seed(11)
    sizes = (num_experts, 2 * HIDDEN, HIDDEN), (num_experts, HIDDEN, HIDDEN)
    whole = [torch.randn(size, device=device(), generator=generator).div(6).to(dtype) for size in sizes]
    mine = [param.chunk(world)[rank].clone().requires_grad_() for param in whole]
    experts: Any = FusedExperts(3)
    if implementation == "eager":
        module = tiny_model(num_hidden_layers=1, hidden_size=HIDDEN, moe_intermediate_size=HIDDEN).model.layers[0]
        module.mlp.experts.num_experts = 3
        function = local_experts_function(module.mlp.experts, "eager")
        experts = RegisteredExperts(module.mlp.experts, function, ["gate_up_proj", "down_proj"])
    progress = Progress()
    layers = [kind(num_experts, dist.group.WORLD, f"layers.{i}", progress) for i in range(2)]
    generator, found = torch.Generator(device()).manual_seed(rank), []
    for tokens, has_backward, again in steps:
        tokens = 0 if rank == 1 and tokens % 2 else tokens + 5 * rank
        x = torch.randn(tokens, HIDDEN, device=device(), generator=generator).to(dtype).requires_grad_()
        weights = torch.rand(tokens, top_k, device=device(), generator=generator).requires_grad_()
        scores = torch.rand(tokens, num_experts, device=device(), generator=generator)
        ids = (scores + torch.linspace(0, 1, num_experts, device=device())).topk(top_k).indices  # uneven
        leave = (lambda kept: kept.detach) if again else None
        with torch.set_grad_enabled(has_backward):
            hidden = x
            for layer in layers:
                hidden = hidden + moe_forward(layer, experts, hidden, ids, weights, mine, leave)
        found.append(hidden.detach())
        if has_backward:
            found += torch.autograd.grad(hidden.float().square().sum(), [x, weights, *mine])
    return found


def _unlike(found: list[Tensor], expected: list[Tensor]) -> list[str]:
    pairs = zip(found, expected, strict=True)
    return [f"tensor {i} is not that of an all-to-all" for i, pair in enumerate(pairs) if not torch.equal(*pair)]


STEPS = [(6, True, False), (1, False, False), (40, True, True), (7, True, False), (0, False, False), (3, True, True)]


def _differences(implementation: str) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        expected = _layer(AllToAllDispatcher, implementation, STEPS)
        counted = _Counted(patch)
        found = _layer(CopyEngineDispatcher, implementation, STEPS)
    # A forward has 2 exchanges in each layer, a backward 3, and one more where the rows are sent again.
    wrong = [] if counted.started == 2 * (6 * 2 + 4 * 3 + 2) else [f"{counted.started} exchanges by copies"]
    # Gradients of routing weights are small and copied into their slot. All others are written there, but for those
    # that are packed when it turns out that there must be slots, or larger ones.
    if counted.copied > 4 * 2 + 2:
        wrong.append(f"{counted.copied} copies into slots")
    return wrong + _unlike(found, expected)


def _needs_a_gpu_for_each(world: int) -> None:
    if on_cuda() and torch.cuda.device_count() < world:
        pytest.skip("ranks that share a GPU have no symmetric memory")


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_every_bit_is_that_of_an_all_to_all(world: int) -> None:
    _needs_a_gpu_for_each(world)
    assert_ranks_agree(world, _differences, "fused")


def test_every_bit_is_that_of_an_all_to_all_with_experts_of_transformers() -> None:
    _needs_a_gpu_for_each(2)
    assert_ranks_agree(2, _differences, "eager")


def _all_cases() -> dict[str, list[float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_moe, "AllToAllDispatcher", CopyEngineDispatcher)
        counted = _Counted(patch)
        found = test_moe._all_cases(torch.float64, "fused")
        assert counted.started == 5 * len(found)
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_output_and_gradients_at_the_extremes_of_routing(world: int) -> None:
    _needs_a_gpu_for_each(world)
    for results in run_ranks(world, _all_cases):
        for case, errors in results.items():
            assert max(errors) < 1e-12, case


def _inference_first() -> list[str]:
    """A loop of one's own that evaluates first, in the mode whose tensors cannot be written outside of it."""
    found = []
    for kind in (CopyEngineDispatcher, AllToAllDispatcher):
        with torch.inference_mode():
            found.append(_layer(kind, "fused", STEPS[1:2]))
        found[-1] += _layer(kind, "fused", STEPS[:1])
    return _unlike(*found)


def test_an_evaluation_in_inference_mode_may_come_first() -> None:
    _needs_a_gpu_for_each(2)
    assert_ranks_agree(2, _inference_first)


def _too_many_rows() -> list[str]:
    """Rows of rank 0's largest batch are more than slots may hold; before and after it, they fit."""
    steps = [(6, True, False), (300, True, True), (8, True, False)]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected = _layer(AllToAllDispatcher, "fused", steps)
        patch.setattr(dispatcher, "largest_slot", lambda device: 20_480)
        counted = _Counted(patch)
        found = _layer(CopyEngineDispatcher, "fused", steps)
    wrong = [] if counted.started == 2 * 2 * 5 else [f"{counted.started} exchanges by copies"]
    said = [str(one.message) for one in caught if "as collectives" in str(one.message)]
    if dist.get_rank() == 0 and len(said) != 1:
        wrong.append(f"said {said}")
    return wrong + _unlike(found, expected)


def test_rows_that_do_not_fit_travel_as_a_collective_on_all_ranks() -> None:
    _needs_a_gpu_for_each(2)
    assert_ranks_agree(2, _too_many_rows)


def _not_here() -> list[str]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(dispatcher, "_node", lambda: f"node {dist.get_rank()}")
        counted = _Counted(patch)
        found = _layer(CopyEngineDispatcher, "fused", [(6, True, False)])
    expected = _layer(AllToAllDispatcher, "fused", [(6, True, False)])
    wrong = [] if counted.started == 0 else [f"{counted.started} exchanges by copies"]
    if dist.get_rank() == 0 and "its ranks are on several nodes" not in "".join(str(one.message) for one in caught):
        wrong.append("nothing is said")
    return wrong + _unlike(found, expected)


def test_groups_that_cross_nodes_exchange_by_collectives() -> None:
    assert_ranks_agree(2, _not_here)


def _cannot_map() -> list[str]:
    def refuse(*args: Any) -> Any:
        if dist.get_rank() == 1:
            raise RuntimeError("peer access is not supported")
        return open_memory(*args)

    open_memory = dispatcher._open_memory
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # What opens together must also fail on the ranks that could: here before the others are waited for.
        patch.setattr(dispatcher.twin, "from_all_ranks", lambda value, group: [value] * dist.get_world_size())
        patch.setattr(dispatcher, "_open_memory", refuse)
        counted = _Counted(patch)
        found = _layer(CopyEngineDispatcher, "fused", [(6, True, False)] * 2)
    expected = _layer(AllToAllDispatcher, "fused", [(6, True, False)] * 2)
    wrong = [] if counted.started == 0 else [f"{counted.started} exchanges by copies"]
    if dist.get_rank() == 0 and "peer access is not supported" not in "".join(str(one.message) for one in caught):
        wrong.append("nothing is said")
    return wrong + _unlike(found, expected)


def test_memory_that_one_rank_cannot_map_is_used_by_none() -> None:
    if on_cuda():
        pytest.skip("the rank that could waits in torch's rendezvous for the other, until that times out")
    assert_ranks_agree(2, _cannot_map)


def _train(root: Path, by_copies: bool, mode: Any) -> list[Tensor]:
    """Trains, validates and generates; rank 1 has fewer batches to validate and longer ones to train on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "_by_copies", lambda device_type: by_copies)
        counted = _Counted(patch)
        module = TinyModule(num_experts=2 * dist_world())
        strategy = ExpertParallelStrategy(ep=dist_world(), activation_checkpointing=mode)
        trainer = quiet(root, strategy=strategy, max_steps=3, val_check_interval=1)
        rank = int(os.environ["RANK"])
        data = [DataLoader(Samples(12, first, 8 + 3 * rank), batch_size=2) for first in (0, 100)]
        trainer.fit(module, *data)
        tokens = module.model.generate(torch.ones(1, 4, dtype=torch.long, device=module.device), max_new_tokens=4)
        assert (counted.started > 0) == by_copies
    params = [param.full_tensor() if hasattr(param, "full_tensor") else param for param in module.parameters()]
    return [*(param.detach() for param in params), tokens, torch.tensor(module.losses)]


def dist_world() -> int:
    return int(os.environ["WORLD_SIZE"])


def _trained_differences(root: Path, mode: Any) -> list[str]:
    found, expected = (_train(root, by_copies, mode) for by_copies in (True, False))
    return _unlike(found, expected)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_runs_are_bit_for_bit_those_of_an_all_to_all(mode: str, tmp_path: Path) -> None:
    _needs_a_gpu_for_each(2)
    assert_ranks_agree(2, _trained_differences, tmp_path, mode, init_process_group=False)


def _one_is_late() -> list[str]:
    expected = _layer(AllToAllDispatcher, "fused", STEPS[:1])
    with pytest.MonkeyPatch.context() as patch:
        start, calls = Ring.start, []

        def late(ring: Ring, *args: Any) -> Any:
            calls.append(time.sleep(1.5 if dist.get_rank() == 1 and len(calls) in (1, 3) else 0))
            return start(ring, *args)

        patch.setattr(Ring, "start", late)
        found = _layer(CopyEngineDispatcher, "fused", STEPS[:1])
        assert len(calls) == 10
    return _unlike(found, expected)


def test_a_rank_that_is_late_for_seconds_is_waited_for() -> None:
    _needs_a_gpu_for_each(2)
    assert_ranks_agree(2, _one_is_late)


def _slots(widths: ModelWidths, tokens: int) -> list[str]:
    """Whether slots are as large as the planner says, in which everybody has as many tokens."""
    kind, progress, rank = CopyEngineDispatcher, Progress(), dist.get_rank()
    layer = kind(widths.experts, dist.group.WORLD, "layers.0", progress)
    x = torch.ones(tokens, widths.hidden, dtype=torch.bfloat16, device=device())
    ids = torch.arange(tokens * widths.top_k, device=device()).add(rank).view(tokens, -1) % widths.experts
    layer.route(ids, torch.ones_like(ids, dtype=torch.float32), x, "hop")()[1].wait()
    found = SLOTS * layer._slots.capacity
    case = Case(widths, 1, 1, tokens, 2, ep=2, node=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traffic, "COPY_ENGINES", True)
        expected = memory_gib(case, 100.0)["slots of exchanges"] * 2**30
    return [] if found == pytest.approx(expected, rel=0.01) else [f"slots of {found} bytes, not {expected}"]


def test_slots_are_as_large_as_the_planner_says() -> None:
    _needs_a_gpu_for_each(2)
    widths = dataclasses.replace(QWEN3_30B_A3B, hidden=64, experts=8, top_k=4)
    assert_ranks_agree(2, _slots, widths, 1000)


def _dies_in(hop: str, environment: dict[str, str], folder: str, timeout: float) -> None:
    """A rank of a training of two layers, of which rank 1 is killed in the second step."""
    os.environ.update(environment)
    rank, hops, exchange = environment["RANK"], [], CopyEngineDispatcher.exchange
    with open(f"{folder}/{rank}.output", "w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)

    def dies(dispatcher: Any, rows: Tensor, splits: Any, name: str) -> Any:
        hops.append(name)
        if name == hop and hops.count(hop) == 4:
            print("here", time.time(), flush=True)
            if rank == "1":
                os.kill(os.getpid(), signal.SIGKILL)
        return exchange(dispatcher, rows, splits, name)

    CopyEngineDispatcher.exchange = dies  # type: ignore[method-assign]
    choice._by_copies = lambda device_type: True
    strategy = ExpertParallelStrategy(ep=2, timeout=timedelta(seconds=timeout))
    quiet(Path(folder), strategy=strategy, devices=2, accelerator="cpu", max_steps=4).fit(
        TinyModule(num_hidden_layers=2), DataLoader(Samples(16), batch_size=2)
    )


@pytest.mark.parametrize(
    ("hop", "layer"), [("dispatch, forward", 1), ("combine, forward", 1), ("dispatch, backward", 0)]
)
def test_a_rank_that_is_killed_ends_the_other_in_time_with_the_layer_s_name(
    hop: str, layer: int, tmp_path: Path
) -> None:
    timeout, server = 15.0, start_fork_server()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # Nobody else ends the one that is left.
    jobs = [
        server.Process(target=_dies_in, args=(hop, environment, str(tmp_path), timeout))
        for environment in rank_environments(2, store.port)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(100)
        ended = time.time()
        job.kill()
    said = (tmp_path / "0.output").read_text()
    assert [job.exitcode for job in jobs] == [1, -signal.SIGKILL], said
    begin = next(float(line.split()[1]) for line in said.splitlines() if line.startswith("here"))
    assert ended - begin < timeout
    line = next(line for line in said.splitlines() if line.startswith("[rank 0] waiting"))
    assert f"the {hop} of layer model.model.layers.{layer}.mlp.experts, training step 1" in line
    assert "[rank 0] ends: what it waits for has ended, or is too late." in said
