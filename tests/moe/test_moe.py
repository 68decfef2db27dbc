"""The MoE body against float64 maths over the tokens of all ranks, at the extremes of routing."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_ep.distributed.progress import Progress
from lightning_ep.moe.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher, Pending
from lightning_ep.moe.dispatch.packed import PackedRows
from lightning_ep.moe.function import moe_forward
from lightning_ep.moe.master_weights import MasterWeights
from lightning_ep.ops import low_rank
from lightning_ep.ops.fused_experts import FusedExperts
from lightning_ep.ops.grouped_mm import grouped_mm
from lightning_ep.ops.local_experts import LocalExperts
from lightning_ep.ops.low_rank import Adapter, project
from lightning_ep.ops.registered_experts import RegisteredExperts
from lightning_ep.transformers_adapter import local_experts_function
from tests.ranks import device, run_ranks
from tests.reference import relative_error, tiny_model

EXPERTS, HIDDEN = 8, 32


def _route(case: str, rank: int, world: int) -> tuple[int, Tensor]:
    """Tokens of this rank and their expert ids ``[T, K]``."""
    generator = torch.Generator().manual_seed(7 + rank)
    tokens, top_k = 6, 3
    if case == "one token per rank":
        tokens = 1
    if case == "no token on rank 1" and rank == 1:
        tokens = 0
    if case == "top-k is every expert":
        top_k = EXPERTS
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(tokens)] or
                      [torch.zeros(top_k, dtype=torch.int64)])[:tokens]  # fmt: skip
    if case == "all tokens to one expert":
        ids = torch.full((tokens, 1), 5)
    if case == "only rank 0 receives":
        ids = ids % (EXPERTS // world) if world > 1 else ids
        ids = torch.zeros_like(ids[:, :1]) + ids[:, :1]
    if case == "nobody has a token":
        ids = ids[:0]
    return ids.shape[0], ids


CASES = [
    "random",
    "one token per rank",
    "no token on rank 1",
    "top-k is every expert",
    "all tokens to one expert",
    "only rank 0 receives",
    "nobody has a token",
]


def _inputs(case: str, rank: int, world: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, ids = _route(case, rank, world)
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64)
    grad = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    return hidden, ids, weights, grad


def _expected(case: str, world: int, params: list[Tensor]) -> list[Tensor]:
    """Output, input and weight gradients of every rank, then the experts' gradients, token by token."""
    gate_up, down = (p.clone().requires_grad_() for p in params)
    leaves, outputs, grads = [], [], []
    for rank in range(world):
        hidden, ids, weights, grad = _inputs(case, rank, world)
        hidden.requires_grad_()
        weights.requires_grad_()
        out = [torch.zeros(0, HIDDEN, dtype=torch.float64)]
        for t in range(hidden.shape[0]):
            total = torch.zeros(HIDDEN, dtype=torch.float64)
            for k in range(ids.shape[1]):
                e = int(ids[t, k])
                gate, up = (gate_up[e] @ hidden[t]).chunk(2)
                total = total + weights[t, k] * (down[e] @ (torch.nn.functional.silu(gate) * up))
            out.append(total.unsqueeze(0))
        outputs.append(torch.cat(out))
        leaves += [hidden, weights]
        grads.append(grad)
    every = torch.cat(outputs)
    found = torch.autograd.grad(
        every, [*leaves, gate_up, down], torch.cat(grads), allow_unused=True, materialize_grads=True
    ) if every.requires_grad else [torch.zeros_like(t) for t in [*leaves, gate_up, down]]  # fmt: skip
    return [*outputs, *found]


def _local_experts(module: nn.Module, implementation: str) -> LocalExperts:
    if implementation == "fused":
        return FusedExperts(module.num_experts)
    function = local_experts_function(module, implementation)
    return RegisteredExperts(module, function, ["gate_up_proj", "down_proj"])


def _worker(case: str, dtype: torch.dtype, implementation: str) -> list[float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    experts = tiny_model(num_hidden_layers=1).model.layers[0].mlp.experts
    params = [experts.gate_up_proj.detach().double(), experts.down_proj.detach().double()]
    local = EXPERTS // world
    experts.num_experts = local
    mine = [p[rank * local : (rank + 1) * local].to(device(), dtype).requires_grad_() for p in params]
    dispatcher: Dispatcher[Any] = LocalDispatcher(EXPERTS)
    if world > 1:
        dispatcher = AllToAllDispatcher(EXPERTS, dist.group.WORLD, "experts", Progress())
    runner = _local_experts(experts, implementation)
    hidden, ids, weights, grad = _inputs(case, rank, world)
    hidden = hidden.to(device(), dtype).requires_grad_()
    weights = weights.to(device(), dtype).requires_grad_()
    out = moe_forward(dispatcher, runner, hidden, ids.to(device()), weights, mine)
    out.backward(grad.to(device(), dtype))
    expected = _expected(case, world, params)
    outputs, leaves, full = expected[:world], expected[world : 3 * world], expected[3 * world :]
    errors = [
        relative_error(out, outputs[rank]),
        relative_error(hidden.grad, leaves[2 * rank]),
        relative_error(weights.grad, leaves[2 * rank + 1]),
    ]
    for param, grad_full in zip(mine, full, strict=True):
        # Experts that nobody uses have zero gradients, not missing ones.
        errors.append(relative_error(param.grad, grad_full[rank * local : (rank + 1) * local]))
    assert out.dtype == dtype
    return errors


def _all_cases(dtype: torch.dtype, implementation: str) -> dict[str, list[float]]:
    return {case: _worker(case, dtype, implementation) for case in CASES}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "implementation", "tolerance"),
    [
        (torch.float64, "fused", 1e-12),
        (torch.float64, "eager", 1e-12),
        (torch.float32, "fused", 1e-5),
        (torch.float32, "grouped_mm", 1e-5),
        (torch.bfloat16, "fused", 2e-2),
        (torch.bfloat16, "grouped_mm", 2e-2),
    ],
)
def test_output_and_gradients(world: int, dtype: torch.dtype, implementation: str, tolerance: float) -> None:
    for rank, results in enumerate(run_ranks(world, _all_cases, dtype, implementation)):
        for case, errors in results.items():
            assert max(errors) < tolerance, f"{case}, rank {rank}: {errors}"


@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_second_backward_is_refused(implementation: str) -> None:
    experts = tiny_model(num_hidden_layers=1).model.layers[0].mlp.experts
    runner = _local_experts(experts, implementation)
    hidden = torch.randn(3, HIDDEN, requires_grad=True)
    ids, weights = torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
    params = [experts.gate_up_proj, experts.down_proj]
    out = moe_forward(LocalDispatcher(EXPERTS), runner, hidden, ids, weights, params).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        out.backward()


def test_gradients_of_gradients_are_refused() -> None:
    """In whole models the engine crashed in the second backward, at weights that FSDP had let go of."""
    experts = tiny_model(num_hidden_layers=1).model.layers[0].mlp.experts
    runner = _local_experts(experts, "fused")
    hidden = torch.randn(3, HIDDEN, requires_grad=True)
    ids, weights = torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
    params = [experts.gate_up_proj, experts.down_proj]
    out = moe_forward(LocalDispatcher(EXPERTS), runner, hidden, ids, weights, params).sum()
    with pytest.raises(RuntimeError, match="create_graph=True asks for gradients of gradients"):
        torch.autograd.grad(out, hidden, create_graph=True)


class _Frozen(FusedExperts):
    def backward_params(self, saved: Any, dtypes: Any) -> Any:
        raise AssertionError("gradients of frozen experts")


def test_frozen_experts_cost_no_weight_gradients() -> None:
    experts = tiny_model(num_hidden_layers=1).model.layers[0].mlp.experts
    ids = torch.tensor([[0, 1]] * 3)
    inputs, found = (torch.randn(3, HIDDEN), torch.rand(3, 2)), []
    for runner, trained in ((FusedExperts(EXPERTS), True), (_Frozen(EXPERTS), False)):
        params = [p.detach().clone().requires_grad_(trained) for p in (experts.gate_up_proj, experts.down_proj)]
        leaves = [t.clone().requires_grad_() for t in inputs]
        moe_forward(LocalDispatcher(EXPERTS), runner, leaves[0], ids, leaves[1], params).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
        assert all((param.grad is not None) == trained for param in params)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_experts_of_transformers_cost_no_weight_gradients(recompute: bool) -> None:
    experts = tiny_model(num_hidden_layers=1).model.layers[0].mlp.experts
    params = [experts.gate_up_proj, experts.down_proj]
    runner = _local_experts(experts, "eager")
    ids, inputs = torch.tensor([[0, 1]] * 3), (torch.randn(3, HIDDEN), torch.rand(3, 2))

    def leave(hidden: Tensor) -> Any:
        return (lambda: hidden.detach()) if recompute else None

    def backward(trained: list[bool]) -> tuple[list[Tensor], int]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        for param, needed in zip(params, trained, strict=True):
            param.grad = None
            param.requires_grad_(needed)
        out = moe_forward(LocalDispatcher(EXPERTS), runner, leaves[0], ids, leaves[1], params, leave)
        with FlopCounterMode(display=False) as counter:
            out.square().sum().backward()
        assert [param.grad is not None for param in params] == trained
        return [t.grad for t in (*leaves, *params) if t.grad is not None], counter.get_total_flops()

    expected, flops = backward([True, True])
    for trained, kept in (([False, False], expected[:2]), ([True, False], expected[:3])):
        found, fewer = backward(trained)
        assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))
        frozen = sum(param[0].numel() for param, needed in zip(params, trained, strict=True) if not needed)
        assert flops - fewer == 2 * ids.numel() * frozen, "the GEMMs of frozen weights"


@pytest.mark.parametrize(("seen", "kept"), [(3, True), (2, False), (None, False)])
def test_copies_of_wider_parameters(seen: int | None, kept: bool) -> None:
    """Backward uses the weights of forward; where they are kept, that needs no second cast and changes no bit.

    They are not in calls of more tokens than had been ``seen`` when it was decided that copies fit.
    """
    experts = tiny_model(num_hidden_layers=1).model.layers[0].mlp.experts
    inputs, ids = [torch.randn(3, HIDDEN).bfloat16(), torch.rand(3, 2)], torch.tensor([[0, 1], [1, 5], [5, 0]])
    masters = MasterWeights()
    if seen is not None:
        masters.begin_call([], torch.bfloat16, seen, needs_grad=True)
        masters.begin_call([], torch.bfloat16, 9, needs_grad=False)  # of a validation
        masters.keep_copies = True
    found = []
    for changed in (False, True):
        params = [p.detach().clone().requires_grad_() for p in (experts.gate_up_proj, experts.down_proj)]
        leaves = [t.clone().requires_grad_() for t in inputs]
        runner, hidden, weights = FusedExperts(EXPERTS), *leaves
        out = moe_forward(LocalDispatcher(EXPERTS), runner, hidden, ids, weights, params, masters=masters)
        if changed:
            params[0].data.zero_()
        out.square().sum().backward()
        assert all(param.grad.dtype == torch.float32 for param in params)
        found.append([leaf.grad for leaf in (*leaves, *params)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) == kept


class _Travels(LocalDispatcher):
    """Notes when rows set out and when they are awaited, in the order in which a GPU would be given it all."""

    def __init__(self, noted: list[str]) -> None:
        super().__init__(EXPERTS)
        self.noted = noted

    def _sent(self, hop: str, x: torch.Tensor) -> Pending:
        self.noted.append(f"{hop} begins")

        def arrive() -> torch.Tensor:
            self.noted.append(f"{hop} is awaited")
            return x

        return Pending(arrive)

    def dispatch(self, plan: Any, x_TH: torch.Tensor, hop: str) -> Pending:
        return self._sent(hop, x_TH)

    def combine(self, plan: Any, rows_NH: torch.Tensor, hop: str) -> Pending:
        return self._sent(hop, rows_NH)


class _Passes(TorchDispatchMode):
    """Notes casts of weights and copies of rows to expert order."""

    def __init__(self, noted: list[str], pairs: int) -> None:
        super().__init__()
        self.noted, self.pairs = noted, pairs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].ndim == 3:
            self.noted.append(f"cast of {tuple(args[0].shape)}")
        if func is torch.ops.aten.index.Tensor and out.shape == (self.pairs, HIDDEN):
            self.noted.append("rows to expert order")
        return out


@pytest.mark.parametrize("frozen", [False, True])
def test_what_travels_does_so_under_casts_and_copies(frozen: bool) -> None:
    """An exchange waits for all that the GPU was given before it began, and hides nothing of that."""
    experts = tiny_model(num_hidden_layers=1).model.layers[0].mlp.experts
    params = [p.detach().clone().requires_grad_(not frozen) for p in (experts.gate_up_proj, experts.down_proj)]
    hidden, weights = torch.randn(3, HIDDEN).bfloat16().requires_grad_(), torch.rand(3, 2)
    ids = torch.tensor([[0, 1], [1, 5], [5, 0]])
    noted: list[str] = []
    with _Passes(noted, ids.numel()):
        out = moe_forward(_Travels(noted), FusedExperts(EXPERTS), hidden, ids, weights, params)
        forward, noted[:] = noted[:], []
        out.float().sum().backward()
    up, down = (f"cast of {tuple(param.shape)}" for param in params)
    there, home = "dispatch, forward", "combine, forward"
    in_order, again = "rows to expert order", ["rows to expert order"] * (not frozen)
    assert forward == [
        down, f"{there} begins", up, f"{there} is awaited", in_order, f"{home} begins", f"{home} is awaited"
    ]  # fmt: skip
    there, home = "combine, backward", "dispatch, backward"
    rows = [f"{there} begins", up, down, *again, f"{there} is awaited", in_order]
    gradients = [] if frozen else [down, up]  # to the weights' dtype
    assert noted == [*rows, f"{home} begins", *gradients, f"{home} is awaited"]


def test_copies_are_not_kept_before_a_run_has_shown_its_memory() -> None:
    masters = MasterWeights()
    masters.keep_copies = True  # an earlier run with smaller batches
    masters.own([torch.zeros(2, requires_grad=True)])
    assert not masters.keep_copies


def _count_rows() -> tuple[int, int]:
    dispatcher = AllToAllDispatcher(EXPERTS, dist.group.WORLD, "experts", Progress())
    ids = torch.tensor([[0, 1, 2], [4, 5, 0]], device=device())
    plan, rows = dispatcher.route(
        ids, torch.ones(2, 3, device=device()), torch.ones(2, HIDDEN, device=device()), "hop"
    )()
    assert rows.wait().shape == (sum(plan.splits.recv), HIDDEN)
    return sum(plan.splits.send), plan.num_pairs


def test_a_token_travels_once_to_each_rank() -> None:
    # Experts 0..3 on rank 0: the first token goes to it once for three experts, the second to both ranks.
    assert run_ranks(2, _count_rows) == [(3, 8), (3, 4)]


def _received_rows_are_freed() -> list[bool]:
    progress = Progress()
    dispatcher = AllToAllDispatcher(EXPERTS, dist.group.WORLD, "experts", progress)
    ids = torch.tensor([[0, 5], [1, 6]], device=device())
    rows = torch.ones(2, HIDDEN, device=device())
    plan, routed = dispatcher.route(ids, torch.ones(2, 2, device=device()), rows, "hop")()
    storages = [StorageWeakRef(routed.wait().untyped_storage())]
    plan = plan.without_rows()
    first, second = (dispatcher.dispatch(plan, rows, f"hop {i}") for i in range(2))
    freed = []
    for pending in (routed, second, first):
        storages = storages or [StorageWeakRef(pending.wait().untyped_storage())]
        storage = storages.pop()
        del pending._finish
        deadline = time.monotonic() + 5
        while not storage.expired() and time.monotonic() < deadline:
            time.sleep(0.01)  # gloo's own thread lets go a little later
        freed.append(storage.expired())
    return freed


def test_nothing_keeps_received_rows_alive() -> None:
    assert run_ranks(2, _received_rows_are_freed) == [[True, True, True]] * 2


def _keeps_rows_for_backward(implementation: str) -> bool:
    rank, world = dist.get_rank(), dist.get_world_size()
    experts = tiny_model(num_hidden_layers=1).model.layers[0].mlp.experts.to(device())
    local = experts.num_experts = EXPERTS // world
    mine = [
        param.detach()[rank * local : (rank + 1) * local].clone().requires_grad_() for param in experts.parameters()
    ]
    received = []

    class Watched(AllToAllDispatcher):
        def exchange(self, *args: Any) -> Any:
            found = super().exchange(*args)
            received.append(StorageWeakRef(found[0].untyped_storage()))
            return found

    dispatcher = Watched(EXPERTS, dist.group.WORLD, "experts", Progress())
    hidden, ids, weights, _ = _inputs("random", rank, world)
    runner, hidden = _local_experts(experts, implementation), hidden.float().to(device()).requires_grad_()
    out = moe_forward(dispatcher, runner, hidden, ids.to(device()), weights.float().to(device()), mine)
    assert out.requires_grad
    deadline = time.monotonic() + 5
    while not received[0].expired() and time.monotonic() < deadline and not runner.keeps_rows:
        time.sleep(0.01)  # gloo's own thread lets go a little later
    return not received[0].expired()


@pytest.mark.parametrize(("implementation", "keeps"), [("fused", True), ("eager", False)])
def test_rows_are_kept_only_by_experts_that_need_them(implementation: str, keeps: bool) -> None:
    assert run_ranks(2, _keeps_rows_for_backward, implementation) == [keeps] * 2


@pytest.mark.parametrize(("implementation", "under"), [("fused", 1), ("eager", 0)])
def test_rows_that_are_sent_again_travel_under_the_first_gemm_of_backward(implementation: str, under: int) -> None:
    """Where the local experts know what needs no rows; with those the result is that of kept rows (test_recompute)."""
    experts = tiny_model(num_hidden_layers=1).model.layers[0].mlp.experts.to(device())
    gemms, at_arrival = [], []

    class Watched(LocalDispatcher):
        def dispatch(self, plan: Any, x_TH: Tensor, hop: str) -> Pending:
            def arrive() -> Tensor:
                at_arrival.append((hop, len(gemms)))
                return x_TH

            return Pending(arrive)

    def counted(*args: Any) -> Tensor:
        gemms.append(args)
        return grouped_mm(*args)

    hidden, ids, weights, _ = _inputs("random", 0, 1)
    hidden, ids, weights = hidden.float().to(device()).requires_grad_(), ids.to(device()), weights.float().to(device())
    runner, params = _local_experts(experts, implementation), tuple(experts.parameters())
    leave = lambda kept: lambda: kept.detach()  # noqa: E731
    out = moe_forward(Watched(EXPERTS), runner, hidden, ids, weights, params, leave)
    at_arrival.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank, "grouped_mm", counted)
        out.sum().backward()
    assert at_arrival == [("combine, backward", 0), ("dispatch, recomputed", under)]
    assert hidden.grad is not None


@pytest.mark.parametrize(("rank", "again"), [(8, 0), (9, 2)])
def test_rows_in_rank_space_are_kept_where_they_are_small(rank: int, again: int) -> None:
    """Two projections beside rows of 128 numbers that go to one expert each; with equal gradients either way."""
    generator, hidden, width = torch.Generator().manual_seed(0), 128, 16
    sizes = [(2 * width, hidden), (hidden, width)]
    weights = [torch.randn(EXPERTS, *size, generator=generator) for size in sizes]
    factors = [torch.randn(EXPERTS, *size, generator=generator) for b, a in sizes for size in ((rank, a), (b, rank))]
    rows, grad = (torch.randn(40, hidden, generator=generator) for _ in range(2))
    ids, scores = torch.randint(0, EXPERTS, (40, 1), generator=generator), torch.rand(40, 1, generator=generator)
    experts, dtypes = (
        FusedExperts(EXPERTS, [Adapter(0, rank, 0.5), Adapter(1, rank, 2.0)]),
        [None] * 2 + [rows.dtype] * 4,
    )
    projected: list[Any] = []

    def counted(*args: Any) -> Tensor:
        projected.append(args)
        return project(*args)

    found = []
    for keep in (True, False):
        _, saved = experts.forward(rows, ids, scores, 40, [*weights, *factors], keep)
        projected.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(low_rank, "project", counted)
            later = None if keep else lambda: rows
            *grads, saved = experts.backward_rows(saved, [*weights, *factors], grad, later)
        assert len(projected) == 2 + (0 if keep else again), "the gradients of both outputs, and the rows of both"
        found.append([*grads, *experts.backward_params(saved, dtypes)[2:]])
    assert len(found[0]) == 6
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("slots_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("hidden", "slots"), [(2048, 16), (33, 2), (1, 5)])
def test_rows_and_numbers_share_a_tensor(hidden: int, slots: int, dtype: torch.dtype, slots_dtype: torch.dtype) -> None:
    packing = PackedRows(hidden, dtype, slots, slots_dtype)
    packed = torch.empty(3, packing.width, dtype=torch.int32)
    rows, numbers = torch.randn(3, hidden).to(dtype), torch.randint(-(2**31), 2**31, (3, slots)).to(slots_dtype)
    packing.rows(packed).copy_(rows)
    packing.numbers(packed).copy_(numbers)
    travelled = packed.clone()
    assert torch.equal(packing.rows(travelled), rows)
    assert torch.equal(packing.numbers(travelled), numbers)
    addresses = [view.data_ptr() - packed.data_ptr() for view in (packing.rows(packed)[1], packing.numbers(packed))]
    assert all(address % 16 == 0 for address in addresses)


class _TooLarge(FusedExperts):
    def backward_rows(self, *args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def _out_of_memory() -> str:
    dispatcher = AllToAllDispatcher(EXPERTS, dist.group.WORLD, "layers.3.mlp.experts", Progress())
    hidden = torch.ones(5, HIDDEN, device=device(), requires_grad=True)
    params = [torch.ones(EXPERTS // 2, *size, device=device()) for size in ((2 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN))]
    ids = torch.tensor([[0, 1, 5]] * 2 + [[0, 1, 2]] * 3, device=device())
    out = moe_forward(dispatcher, _TooLarge(EXPERTS // 2), hidden, ids, torch.ones(5, 3, device=device()), params)
    with pytest.raises(torch.OutOfMemoryError) as error:
        out.sum().backward()
    return str(error.value)


def test_an_out_of_memory_error_names_rank_layer_and_rows() -> None:
    first, second = run_ranks(2, _out_of_memory)
    for message in (first, second):
        assert "Out of memory in layers.3.mlp.experts: rank" in message
        assert "activation_checkpointing='full'" in message
        assert message.endswith("CUDA out of memory.")
    assert "rank 0 receives 10 rows with 26 (row, expert) pairs and sends 7 rows" in first
    assert "rank 1 receives 4 rows with 4 (row, expert) pairs and sends 7 rows" in second
