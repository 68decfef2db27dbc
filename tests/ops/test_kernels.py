"""The Triton kernels against their PyTorch twins: on a GPU, or anywhere with TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_ep.ops import activation, cross_entropy, grouped_mm, low_rank, permute, routing
from lightning_ep.ops.expert_form import Activation, ExpertBias
from tests.reference import relative_error

ON_GPU = os.environ.get("LIGHTNING_EP_TEST_DEVICE") == "cuda"
DEVICE = "cuda" if ON_GPU else "cpu"
EXACT = ON_GPU
NEW_NUMPY = np.lib.NumpyVersion(np.__version__) >= "2.4.0"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (ON_GPU or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs Triton and a GPU, or TRITON_INTERPRET=1",
)

# Sizes that are no multiple of any block, fewer in the interpreter, which takes a minute for what is nothing on a GPU.
MANY, SOME = (300, 130) if ON_GPU else (90, 50)
ROUTINGS = [(37, 3, 5), (1, 1, 1), (MANY, 8, 128), (0, 2, 4), (SOME, 6, 6)]  # (tokens, top-k, experts)


def _ids(tokens: int, top_k: int, experts: int, empty: float = 0.0) -> Tensor:
    """Distinct experts per token; a share of the slots empty (``experts``)."""
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)] or [torch.zeros(top_k)])[:tokens].long()
    return ids.masked_fill(torch.rand(ids.shape) < empty, experts).to(DEVICE)


def _poison(*shape: int, dtype: torch.dtype = torch.float32) -> None:
    """Leaves NaNs where the next allocation is likely to land, so that an unwritten output shows."""
    torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(("tokens", "top_k", "experts"), ROUTINGS)
@pytest.mark.parametrize("empty", [0.0, 0.4])
def test_expert_order(tokens: int, top_k: int, experts: int, empty: float) -> None:
    from lightning_ep.ops.kernels import permute as kernel

    ids = _ids(tokens, top_k, experts, empty)
    pairs = int((ids < experts).sum())
    gaps = torch.full((tokens, top_k + 3), -7, device=DEVICE)  # beside other numbers, as rows bring them
    gaps[:, :top_k] = ids
    expected = permute.expert_order_twin(ids, experts, pairs)
    assert all(map(torch.equal, kernel.expert_order(ids, experts, pairs), expected))
    found = kernel.expert_order(gaps[:, :top_k], experts, pairs)
    for name, a, b in zip(expected._fields, found, expected, strict=True):
        assert torch.equal(a, b), name
        assert a.dtype == b.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), ROUTINGS)
@pytest.mark.parametrize("hidden", [72, 2048])
def test_permute_and_gather_sum(tokens: int, top_k: int, experts: int, hidden: int, dtype: torch.dtype) -> None:
    from lightning_ep.ops.kernels import permute as kernel

    ids = _ids(tokens, top_k, experts, 0.3)
    pairs = int((ids < experts).sum())
    order = permute.expert_order_twin(ids, experts, pairs)
    rows = torch.randn(tokens, hidden, device=DEVICE).to(dtype)
    _poison(pairs, hidden, dtype=dtype)
    spread = kernel.permute(rows, order.pair_NK, pairs)
    assert torch.equal(spread, permute.permute_twin(rows, order.pair_NK, pairs))
    wide, out = torch.randn(tokens, hidden + 32, device=DEVICE).to(dtype), torch.zeros(pairs, hidden + 8, device=DEVICE)
    wide[:, :hidden], out = rows, out.to(dtype)
    kernel.permute(wide[:, :hidden], order.pair_NK, pairs, out[:, :hidden])
    assert torch.equal(out[:, :hidden], spread)
    assert out[:, hidden:].count_nonzero() == 0
    values = torch.randn(pairs, hidden, device=DEVICE).to(dtype)
    _poison(tokens, hidden)
    found = kernel.gather_sum(values, order.pair_NK, dtype)
    expected = permute.gather_sum_twin(values, order.pair_NK, dtype)
    # Triton's interpreter truncates where a GPU rounds to bf16.
    assert torch.equal(found, expected) if EXACT or dtype == torch.float32 else relative_error(found, expected) < 8e-3


# What some family has: SwiGLU, DeepSeek-V4's, Gemma 4's, gpt-oss's (with and without its biases), Nemotron-H's.
ACTIVATIONS = [
    (Activation(), False),
    (Activation(limit=2.0), False),
    (Activation("gelu_tanh"), False),
    (Activation(interleaved=True), False),
    (Activation(interleaved=True, alpha=1.702, limit=2.0, up_offset=1.0), True),
    (Activation("relu2", gated=False), False),
    (Activation("relu2", gated=False), True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 72, 768, 1536, *([2880] if ON_GPU else [])])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(37, 3, 5), (SOME, 6, 6)])
def test_activations(tokens: int, top_k: int, experts: int, width: int, dtype: torch.dtype) -> None:
    _compare_activations(Activation(), False, tokens, top_k, experts, width, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [72, 2880] if ON_GPU else [72, 192])
@pytest.mark.parametrize(("how", "biased"), ACTIVATIONS[1:])
def test_activations_of_other_families(how: Activation, biased: bool, width: int, dtype: torch.dtype) -> None:
    _compare_activations(how, biased, 37, 3, 5, width, dtype)


def _compare_activations(
    how: Activation, biased: bool, tokens: int, top_k: int, experts: int, width: int, dtype: torch.dtype
) -> None:
    """Both directions against float64, no worse than the twin."""
    from lightning_ep.ops.kernels import activation as kernel

    ids = torch.full((tokens, top_k + 3), -7, device=DEVICE)  # beside other numbers, as rows bring them
    ids[:, :top_k] = _ids(tokens, top_k, experts, 0.3)
    ids = ids[:, :top_k]
    pairs = int((ids < experts).sum())
    slots = permute.expert_order_twin(ids, experts, pairs).slot_P
    projected = 2 * width if how.gated else width
    h = torch.randn(pairs, projected, device=DEVICE).mul_(3).to(dtype)
    grad = torch.randn(pairs, width, device=DEVICE).to(dtype)
    weights = torch.rand(tokens, top_k + 1, device=DEVICE)[:, :top_k]  # with gaps between its rows
    bias = ExpertBias(torch.randn(experts, projected, device=DEVICE).to(dtype), ids) if biased else None
    doubled = ExpertBias(bias.bias_EF.double(), ids) if bias is not None else None
    tolerance = 1e-6 if dtype == torch.float32 else 1e-4 if EXACT else 8e-3
    inputs = (h, weights, slots, how, bias)
    in_double = (h.double(), weights.double(), slots, how, doubled)
    exact = activation.activate_twin(*in_double)
    assert exact.norm() > 0
    rounded = relative_error(activation.activate_twin(*inputs), exact)
    _poison(pairs, width, dtype=dtype)
    assert relative_error(kernel.activate(*inputs), exact) <= rounded * 1.01 + tolerance
    found = kernel.activate_backward(grad, *inputs)
    expected = activation.activate_backward_twin(grad, *inputs)
    exact_ones = activation.activate_backward_twin(grad.double(), *in_double)
    for index in range(3):
        assert found[index].dtype == expected[index].dtype
        limit = relative_error(expected[index], exact_ones[index]) * 1.01 + tolerance
        assert relative_error(found[index], exact_ones[index]) <= limit


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
@pytest.mark.parametrize(("tokens", "top_k", "local"), [(37, 3, 5), (1, 1, 1), (MANY, 8, 16), (0, 2, 4), (SOME, 6, 3)])
def test_destinations(
    tokens: int, top_k: int, local: int, ranks: int, scanned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_ep.ops.kernels import routing as kernel

    monkeypatch.setattr(kernel, "_SCANNED", 0 if scanned else 2**15)
    if top_k > local * ranks:
        pytest.skip("more slots than experts")
    ids = _ids(tokens, top_k, local * ranks)
    weights = torch.rand(tokens, top_k, device=DEVICE)
    room, width = tokens * min(top_k, ranks), 2 * top_k
    slots = [torch.full((room, width + 5), -7, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    found = routing.Destinations(*kernel.destinations(ids, weights, local, ranks, slots[0][:, :width]))
    expected = routing.destinations_twin(ids, weights, local, ranks, slots[1][:, :width])
    assert torch.equal(found.counts_2D2[0], expected.counts_2D2[0])
    assert torch.equal(found.row_TK, expected.row_TK)
    assert torch.equal(found.first_TK, expected.first_TK)
    assert torch.equal(*slots)  # and nothing beside them, nor past the last row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [50, 8192, 20001])
@pytest.mark.parametrize("gradient", [True, False])
def test_cross_entropy(vocabulary: int, gradient: bool, dtype: torch.dtype) -> None:
    from lightning_ep.ops.kernels import cross_entropy as kernel

    logits = torch.randn(7, vocabulary, device=DEVICE).mul_(5).to(dtype)
    targets = torch.randint(0, vocabulary, (7,), device=DEVICE)
    targets[2] = -100
    copies = [logits.clone(), logits.clone(), logits.double()]
    losses = [torch.full((7,), torch.nan, device=DEVICE, dtype=d) for d in (torch.float32, torch.float32, torch.double)]
    kernel.cross_entropy_(copies[0], targets, losses[0], -100, gradient)
    cross_entropy.cross_entropy_twin_(copies[1], targets, losses[1], -100, gradient)
    cross_entropy.cross_entropy_twin_(copies[2], targets, losses[2], -100, gradient)
    assert relative_error(losses[0], losses[2]) < 1e-6
    if gradient:
        limit = relative_error(copies[1], copies[2]) * 1.01 + (1e-5 if dtype == torch.float32 else 0 if EXACT else 8e-3)
        assert relative_error(copies[0], copies[2]) <= limit
    else:
        assert torch.equal(copies[0], logits)


@pytest.mark.parametrize("target", [-1, 50])
def test_a_target_that_does_not_exist_shows(target: int) -> None:
    from lightning_ep.ops.kernels import cross_entropy as kernel

    logits, losses = torch.randn(3, 50, device=DEVICE), torch.zeros(3, device=DEVICE)
    kernel.cross_entropy_(logits, torch.tensor([1, target, -100], device=DEVICE), losses, -100, True)
    assert losses.isnan().tolist() == logits.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [50, 8192, 20001])
def test_cross_entropy_of_a_shard_of_the_vocabulary(vocabulary: int, dtype: torch.dtype) -> None:
    from lightning_ep.ops.kernels import cross_entropy as kernel

    logits = torch.randn(7, vocabulary, device=DEVICE).mul_(5).to(dtype)
    targets = torch.randint(0, vocabulary, (7,), device=DEVICE)
    targets[:3] = torch.tensor([-1, vocabulary, vocabulary + 5])  # classes of other shards
    found = kernel.softmax_statistics(logits, targets)
    expected = cross_entropy.softmax_statistics_twin(logits, targets, torch.float64)
    assert torch.equal(found[2].double(), expected[2])
    assert relative_error(found[:2], expected[:2]) < 1e-6
    normalizers = (expected[0] + expected[1].log() + 0.5).float()
    normalizers[3] = torch.inf
    copies = [logits.clone(), logits.clone(), logits.double()]
    kernel.softmax_gradient_(copies[0], targets, normalizers)
    cross_entropy.softmax_gradient_twin_(copies[1], targets, normalizers)
    cross_entropy.softmax_gradient_twin_(copies[2], targets, normalizers.double())
    limit = relative_error(copies[1], copies[2]) * 1.01 + (1e-5 if dtype == torch.float32 else 0 if EXACT else 8e-3)
    assert relative_error(copies[0], copies[2]) <= limit


@pytest.mark.skipif(NEW_NUMPY and not ON_GPU, reason="the interpreter needs an older numpy")
@pytest.mark.parametrize("width", [72, 512])
@pytest.mark.parametrize("counts", [[1], [130, 0, 1, 400, 0], [0, 0, 128, 256], [3] * 9])
def test_grouped_outer(counts: list[int], width: int) -> None:
    from lightning_ep.ops.kernels import grouped_outer as kernel

    dtype = torch.bfloat16 if ON_GPU else torch.float16
    offsets = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    x = torch.randn(sum(counts), 256, device=DEVICE).to(dtype)
    y = torch.randn(sum(counts), width, device=DEVICE).to(dtype)
    expected = grouped_mm.grouped_outer_twin(x.double(), y.double(), offsets)
    assert not ON_GPU or kernel.serves(x, y, len(counts))
    # More than there are tiles, too. Each sorts, which the interpreter is slow at.
    for programs in (1, 3, 100) if ON_GPU else (3,):
        _poison(*expected.shape, dtype=dtype)
        found = kernel.grouped_outer(x, y, offsets, programs=programs)
        assert found[torch.tensor(counts) == 0].eq(0).all()
        assert relative_error(found, expected) < 4e-3
        assert kernel._counters(x.device).eq(0).all()


@pytest.mark.skipif(NEW_NUMPY and not ON_GPU, reason="the interpreter needs an older numpy")
def test_a_grouped_outer_that_works_is_used_and_another_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lightning_ep.ops.kernels import grouped_outer as kernel
    from lightning_ep.ops.kernels import tried

    if not ON_GPU:
        monkeypatch.setattr(kernel, "multiprocessors", lambda device: 3)
    x, y = (torch.randn(9, width, device=DEVICE).to(torch.bfloat16 if ON_GPU else torch.float16) for width in (128, 64))
    right = kernel.grouped_outer
    for launch, wanted in (
        (right, True),
        (lambda x, y, ends: right(x, y, ends) * 2, False),
        (lambda x, y, ends: right(x, y, ends) + 1, False),  # of experts without rows, too
        (lambda x, y, ends: (x.t() @ y).repeat(len(ends), 1, 1), False),
    ):
        monkeypatch.setattr(tried, "_WORKS", {})
        monkeypatch.setattr(kernel, "grouped_outer", launch)
        assert kernel._works(x, y, 3) is wanted
    assert len(caplog.records) == 3
    assert (
        "No gradient GEMM of lightning_ep for weights (3, 128, 64), torch's instead: its results differ" in caplog.text
    )


@pytest.mark.skipif(NEW_NUMPY and not ON_GPU, reason="the interpreter needs an older numpy")
def test_rows_of_other_experts_do_not_reach_a_gradient() -> None:
    from lightning_ep.ops.kernels import grouped_outer as kernel

    dtype = torch.bfloat16 if ON_GPU else torch.float16
    x, y = (torch.ones(40, width, device=DEVICE, dtype=dtype) for width in (128, 64))
    x[33:] = y[33:] = float("nan")
    found = kernel.grouped_outer(x, y, torch.tensor([33, 40], device=DEVICE).int(), programs=2)
    assert found[0].eq(33).all()
    assert found[1].isnan().all()


@pytest.mark.skipif(NEW_NUMPY and not ON_GPU, reason="the interpreter needs an older numpy")
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("width", [72, 256, 768])
@pytest.mark.parametrize("counts", [[1], [130, 0, 1, 400, 0], [0, 0, 128, 256], [3] * 9])
def test_grouped_mm(counts: list[int], width: int, transposed: bool) -> None:
    from lightning_ep.ops.kernels import grouped_mm as kernel

    # The interpreter has no bf16 products.
    dtype = torch.bfloat16 if ON_GPU else torch.float16
    offsets = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    x = torch.randn(sum(counts), 128, device=DEVICE).to(dtype)
    shape = (len(counts), width, 128) if transposed else (len(counts), 128, width)
    stored = torch.randn(shape, device=DEVICE).to(dtype)
    weight = stored.transpose(1, 2) if transposed else stored
    expected = grouped_mm.grouped_mm_twin(x.double(), weight.double(), offsets)
    assert not ON_GPU or kernel.serves(x, weight)  # at these sizes the tile fits
    for programs in (3, 100):
        _poison(sum(counts), width, dtype=dtype)
        found = kernel.grouped_mm(x, weight, offsets, programs=programs)
        assert relative_error(found, expected) < 4e-3


@pytest.mark.skipif(NEW_NUMPY and not ON_GPU, reason="the interpreter needs an older numpy")
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("rank", [5, 8, 24])  # not what tensor cores multiply at once, in one step and in two
@pytest.mark.parametrize("counts", [[130, 0, 1, 200, 0], [3] * 9])
def test_grouped_mm_with_a_low_rank_product_beside(counts: list[int], rank: int, transposed: bool) -> None:
    from lightning_ep.ops.kernels import grouped_mm as kernel

    dtype = torch.bfloat16 if ON_GPU else torch.float16
    offsets = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    # Strides as factors of adapters have them: [E, R, B] or [E, B, R] in memory. Rows behind the last are nobody's.
    x, low = (torch.randn(sum(counts) + 2, size, device=DEVICE).to(dtype) for size in (128, rank))
    x[-2:], low[-2:] = float("nan"), float("nan")
    weight, factor = (_stored(len(counts), size, 264, transposed, dtype) for size in (128, rank))
    expected = grouped_mm.grouped_mm_twin(x.double(), weight.double(), offsets, (low.double(), factor.double()))
    assert not ON_GPU or kernel.serves(x, weight, (low, factor))
    _poison(sum(counts) + 2, 264, dtype=dtype)
    found = kernel.grouped_mm(x, weight, offsets, (low, factor), programs=7)
    assert relative_error(found[:-2], expected[:-2]) < 4e-3
    alone = grouped_mm.grouped_mm_twin(x.double(), weight.double(), offsets)
    assert relative_error(alone[:-2], expected[:-2]) > 0.1, "what is beside shows"


def _stored(experts: int, a: int, b: int, transposed: bool, dtype: torch.dtype) -> Tensor:
    """``[E, A, B]``, with a unit stride over A if it is transposed."""
    shape = (experts, b, a) if transposed else (experts, a, b)
    stored = torch.randn(shape, device=DEVICE).to(dtype)
    return stored.transpose(1, 2) if transposed else stored


# Ranks below and above what a tile has, no multiple of 16 among them; experts without rows; features behind a tile's.
LOW_RANKS = [([70, 0, 1, 64], 72, 8), ([0, 3], 300, 70), ([5], 8, 1), ([65, 2, 0], 136, 20)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16 if ON_GPU else torch.float16])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("counts", "features", "rank"), LOW_RANKS)
def test_rows_go_to_the_rank_space_of_their_expert(
    counts: list[int], features: int, rank: int, transposed: bool, dtype: torch.dtype
) -> None:
    from lightning_ep.ops.kernels import low_rank as kernel

    offsets, num_rows = torch.tensor(counts, device=DEVICE).cumsum(0).int(), sum(counts)
    wide = torch.randn(num_rows, features + 8, device=DEVICE).to(dtype)  # with gaps between its rows
    factor = _stored(len(counts), features, rank, transposed, dtype)
    expected = low_rank.project_twin(wide[:, :features].double(), factor.double(), 0.3, offsets)
    _poison(num_rows, rank, dtype=dtype)
    found = kernel.project(wide[:, :features], factor, 0.3, offsets)
    assert found.dtype == dtype
    assert relative_error(found, expected) < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16 if ON_GPU else torch.float16])
@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize(("counts", "features", "rank"), LOW_RANKS)
def test_gradients_of_factors(counts: list[int], features: int, rank: int, indexed: bool, dtype: torch.dtype) -> None:
    """In fp32, whatever the rows are in; as A lies in memory and as B does; without what was added to the rank."""
    from lightning_ep.ops.kernels import low_rank as kernel

    offsets, num_rows = torch.tensor(counts, device=DEVICE).cumsum(0).int(), sum(counts)
    tokens = num_rows // 2 + 1 if indexed else num_rows
    row_P = torch.randint(0, tokens, (num_rows,), device=DEVICE).int() if indexed else None
    x = torch.randn(tokens, features + 8, device=DEVICE).to(dtype)[:, :features]
    low = torch.randn(num_rows, rank + 8, device=DEVICE).to(dtype)  # rows of 16 numbers, too, are copied ahead
    for rank_first in (True, False):
        shape = (len(counts), rank, features) if rank_first else (len(counts), features, rank)
        out = torch.full(shape, float("nan"), device=DEVICE)
        found = out.transpose(1, 2) if rank_first else out
        expected = torch.empty_like(found, dtype=torch.float64)
        low_rank.outer_twin_(expected, x.double(), low.double(), offsets, row_P)
        kernel.outer_(found, x, low, offsets, row_P)
        assert relative_error(found, expected) < 1e-6
        empty = torch.tensor(counts, device=DEVICE) == 0
        assert not found[empty].any()


@pytest.mark.parametrize("failure", ["out of resource: shared memory", "its results differ"])
def test_a_grouped_mm_that_fails_is_left_to_torch(
    failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from triton.runtime.errors import OutOfResources

    from lightning_ep.ops.kernels import grouped_mm as kernel
    from lightning_ep.ops.kernels import tried

    def launch(x_PA: Tensor, weight_EAB: Tensor, offsets_E: Tensor, beside: None) -> Tensor:
        if failure.startswith("out of"):
            raise OutOfResources(245784, 232448, "shared memory")
        return x_PA @ weight_EAB[1]

    monkeypatch.setattr(tried, "_WORKS", {})
    monkeypatch.setattr(kernel, "grouped_mm", launch)
    weight = torch.randn(2, 64, 8, device=DEVICE)
    assert [kernel._works(weight) for _ in range(2)] == [False, False]
    assert len(caplog.records) == 1
    assert f"(2, 64, 8), torch's instead: {failure}" in caplog.text


def test_a_grouped_mm_that_leaves_out_what_is_beside_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first factor that comes is zero, as that of an adapter which begins."""
    from lightning_ep.ops.kernels import grouped_mm as kernel
    from lightning_ep.ops.kernels import tried

    monkeypatch.setattr(tried, "_WORKS", {})
    monkeypatch.setattr(kernel, "grouped_mm", lambda x_PA, weight_EAB, ends_E, beside: x_PA @ weight_EAB[0])
    weight, factor = torch.randn(2, 64, 16, device=DEVICE), torch.zeros(2, 8, 16, device=DEVICE)
    assert kernel._works(weight)
    assert not kernel._works(weight, factor)


@pytest.mark.skipif(NEW_NUMPY and not ON_GPU, reason="the interpreter needs an older numpy")
@pytest.mark.parametrize("transposed", [True, False])
def test_a_grouped_mm_that_works_is_used(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_ep.ops.kernels import grouped_mm as kernel
    from lightning_ep.ops.kernels import tried

    monkeypatch.setattr(tried, "_WORKS", {})
    if not ON_GPU:
        monkeypatch.setattr(kernel, "multiprocessors", lambda device: 4)
    dtype = torch.bfloat16 if ON_GPU else torch.float16
    weight, factor = (_stored(3, size, 128, transposed, dtype) for size in (128, 8))
    assert kernel._works(weight)
    assert kernel._works(weight, torch.zeros_like(factor))
    assert len(tried._WORKS) == 2


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("sizes", [(64, 128), (128, 64), (64, 64), (192, 64), (704, 2048)])
def test_grouped_mm_of_any_sizes(sizes: tuple[int, int]) -> None:
    """Whichever kernel takes them: a tile that does not fit must not end the run."""
    offsets = torch.tensor([5, 5, 300], device=DEVICE, dtype=torch.int32)
    x = torch.randn(300, sizes[0], device=DEVICE).bfloat16()
    weight = torch.randn(3, *sizes, device=DEVICE).bfloat16()
    for operand in (weight, weight.transpose(1, 2).contiguous().transpose(1, 2)):
        expected = grouped_mm.grouped_mm_twin(x.double(), operand.double(), offsets)
        assert relative_error(grouped_mm.grouped_mm(x, operand, offsets), expected) < 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 0.37, float("nan")])
@pytest.mark.parametrize("size", [1, 4096, 4096 * 9 + 5])
def test_scale(size: int, factor: float, dtype: torch.dtype) -> None:
    from lightning_ep.ops.kernels import scale as kernel

    x = torch.randn(size, device=DEVICE).to(dtype)
    by = torch.tensor(factor, device=DEVICE)
    expected = (x.float() * by).to(dtype)
    kernel.scale_(x, by)
    assert torch.equal(x.isnan(), expected.isnan())
    error = relative_error(x.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert error == 0 if EXACT or dtype == torch.float32 else error < 8e-3  # the interpreter cuts bits off


@pytest.mark.parametrize("factor", [1.0, 0.37])
@pytest.mark.parametrize("size", [1, 1024 * 3 + 5])
def test_scaled_in_another_dtype(size: int, factor: float) -> None:
    from lightning_ep.ops.kernels import scale as kernel

    x, by = torch.randn(size, device=DEVICE), torch.tensor(factor, device=DEVICE)
    found = kernel.scaled(x, by, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert found.shape == x.shape
    error = relative_error(found, (x * by).bfloat16())
    assert error == 0 if EXACT else error < 8e-3  # the interpreter cuts bits off


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [None, 0.37])
@pytest.mark.parametrize("size", [7, 4096 * 3 + 5])
def test_adamw(size: int, factor: float | None, grad_dtype: torch.dtype) -> None:
    """Five steps against torch's optimizer in float64; the first ones are where 1 - 0.999 ** step loses digits."""
    from lightning_ep.ops.adamw import Rule, Update
    from lightning_ep.ops.kernels import adamw as kernel

    rule = Rule(lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    param = torch.randn(size, device=DEVICE)
    expected = param.double().requires_grad_()
    optimizer = torch.optim.AdamW([expected], **rule._asdict())
    update = Update(param, param, torch.zeros_like(param), torch.zeros_like(param), torch.zeros((), device=DEVICE))
    by = None if factor is None else torch.tensor(factor, device=DEVICE)
    for _ in range(5):
        grad = torch.randn(size, device=DEVICE).to(grad_dtype)
        expected.grad = grad.double() * (factor or 1.0)
        optimizer.step()
        update.step.add_(1)
        before, version = grad.clone(), param._version
        kernel.adamw_(*update._replace(grad=grad), by, rule.numbers())
        assert torch.equal(grad, before)
        assert param._version > version
    assert relative_error(param, expected.detach()) < 1e-6
    for found, key in ((update.exp_avg, "exp_avg"), (update.exp_avg_sq, "exp_avg_sq")):
        assert relative_error(found, optimizer.state[expected][key]) < 1e-6, key


def test_adamw_of_a_small_decay() -> None:
    from lightning_ep.ops.adamw import Rule, Update
    from lightning_ep.ops.kernels import adamw as kernel

    param = torch.rand(20_000, device=DEVICE) + 0.5
    before, zeros, step = param.double(), torch.zeros_like(param), torch.ones((), device=DEVICE)
    update = Update(param, zeros, zeros.clone(), zeros.clone(), step)
    rule = Rule(lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for _ in range(5):
        kernel.adamw_(*update, None, rule.numbers())
    assert (1 - param.double() / before).mean().item() == pytest.approx(5e-6, rel=3e-3)


def test_adamw_of_bf16_weights_and_moments() -> None:
    from lightning_ep.ops.adamw import Rule, Update, adamw_twin_
    from lightning_ep.ops.kernels import adamw as kernel

    rule = Rule(lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    tensors = [torch.randn(5000, device=DEVICE).bfloat16() for _ in range(3)]
    found = Update(*tensors, tensors[0].abs(), torch.ones((), device=DEVICE))
    twin = Update(*(tensor.clone() for tensor in found))
    kernel.adamw_(*found, None, rule.numbers())
    adamw_twin_([twin], rule, None)
    for name, a, b in zip(found._fields, found, twin, strict=True):
        assert relative_error(a, b) < (4e-3 if EXACT else 8e-3), name  # the interpreter cuts bits off


# (elements, where they are in the whole): all of it, a run of it, and rows shorter and longer than a block.
_PARTS = [
    (7, (5, 7, 7)),
    (8197, (2**33, 8197, 1)),
    (8200, (17, 1025, 3000)),
    (12288, (2**40, 3, 7)),
    (9000, (0, 6000, 2**31)),
]


@pytest.mark.parametrize("factor", [None, 0.37])
@pytest.mark.parametrize(
    ("weights", "moments"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
@pytest.mark.parametrize(("size", "part"), _PARTS)
def test_adamw_rounds_stochastically_as_its_twin(
    size: int, part: tuple[int, int, int], weights: torch.dtype, moments: torch.dtype, factor: float | None
) -> None:
    """Bit for bit, for three steps, with numbers that are not finite among them."""
    from lightning_ep.ops.adamw import Rule, Update, adamw_rounded_twin_
    from lightning_ep.ops.kernels import adamw as kernel
    from lightning_ep.ops.rounding import Elements

    rule = Rule(lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    param = torch.randn(size, device=DEVICE).to(weights)
    mean, square = (torch.rand(size, device=DEVICE).to(moments) for _ in range(2))
    found = Update(param, param, mean, square, torch.ones((), device=DEVICE))
    twin = Update(*(tensor.clone() for tensor in found))
    by = None if factor is None else torch.tensor(factor, device=DEVICE)
    for key in (0, 3, 2**63 - 1):
        grad = torch.randn(size, device=DEVICE).bfloat16()
        grad[-1] = (1.0, float("inf"), float("nan"))[int(found.step) - 1]
        kernel.adamw_(*found._replace(grad=grad), by, rule.numbers(), Elements(key, *part))
        adamw_rounded_twin_(twin._replace(grad=grad), rule, by, Elements(key, *part))
        for name in ("param", "exp_avg", "exp_avg_sq"):
            a, b = getattr(found, name), getattr(twin, name)
            # The interpreter's exponential of the step's numbers differs from torch's in the last digit of fp64.
            last = 2e-7 if name == "param" and weights == torch.float32 and not ON_GPU else 0
            torch.testing.assert_close(
                a, b, rtol=last, atol=last, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
            )
        found.step.add_(1)
        twin.step.add_(1)
    assert found.param[-1].isnan()
    assert found.param[:-1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 4096, 4096 * 9 + 5])
def test_sum_of_squares(size: int, dtype: torch.dtype) -> None:
    from lightning_ep.ops.kernels import norm as kernel

    tensors = [torch.randn(n, device=DEVICE).to(dtype) for n in (size, 3)]
    found, again = kernel.sums_of_squares(tensors), kernel.sums_of_squares(tensors)
    assert torch.equal(found, again)
    expected = sum(x.double().square().sum() for x in tensors)
    assert relative_error(found.double().sum(), expected) < 1e-6
    tensors[0][-1] = float("nan")
    assert kernel.sums_of_squares(tensors).sum().isnan()
