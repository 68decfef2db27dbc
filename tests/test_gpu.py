"""What only a GPU shows: how often the host waits for it, and how exact the kernels are in bf16."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lightning_ep import AdamW, CausalLM, ExpertParallelStrategy, ParallelLayout, parallelize
from lightning_ep import loss as loss_module
from lightning_ep import transformers_adapter as adapter
from lightning_ep.callbacks import Throughput
from lightning_ep.context_parallel import SequencePiece, find_documents
from lightning_ep.context_parallel.attention import _attend
from lightning_ep.moe.dispatch import LocalDispatcher
from lightning_ep.moe.function import moe_forward
from lightning_ep.ops.fused_experts import FusedExperts
from lightning_ep.ops.local_experts import LocalExperts
from lightning_ep.ops.registered_experts import RegisteredExperts, stand_in
from lightning_ep.transformers_adapter import document_bounds, fused_form, local_experts_function
from tests.documents import PACKED, PADDED, SHAPES, documents_error
from tests.ranks import accelerator, assert_ranks_agree, device, run_ranks
from tests.reference import batches, grad_or_zero, relative_error, tiny_config, tiny_model

pytestmark = pytest.mark.gpu


def _count_syncs(ep: int) -> tuple[int, int]:
    """Host synchronisations of one forward and one backward of a MoE layer in bf16, after a warm-up."""
    world = dist.get_world_size()
    model = tiny_model(num_hidden_layers=1).to(torch.bfloat16)
    parallelize(model, ParallelLayout.resolve(ep, "auto", world, world), device())
    block = model.model.layers[0].mlp
    model.model.layers[0].unshard()
    hidden = torch.randn(4, 16, 32, device=device(), dtype=torch.bfloat16, requires_grad=True)
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        waits: list[None] = []
        synchronize = torch.cuda.Event.synchronize
        patch.setattr(torch.cuda.Event, "synchronize", lambda event: (waits.append(None), synchronize(event)))
        for _ in range(2):
            counts = []
            out = None
            for run in ("forward", "backward"):
                waits.clear()
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    torch.cuda.set_sync_debug_mode("warn")
                    if run == "forward":
                        out = block(hidden)
                    else:
                        out.sum().backward()
                    torch.cuda.set_sync_debug_mode("default")
                counts.append(len(waits) + sum("called a synchronizing" in str(w.message) for w in caught))
    return counts[0], counts[1]


@pytest.mark.parametrize(("world", "ep", "expected"), [(1, 1, (0, 0)), (2, 2, (1, 0))])
def test_the_host_waits_once_per_forward(world: int, ep: int, expected: tuple[int, int]) -> None:
    assert run_ranks(world, _count_syncs, ep) == [expected] * world


def _step_syncs(cp: int = 1, extra: dict[str, Tensor] | None = None) -> list[str]:
    """What synchronises with the GPU from one training step of the Trainer to the next, after a few of warm-up."""
    found: list[str] = []

    class Count(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
            torch.cuda.set_sync_debug_mode("warn" if index == 4 else "default")

    module = CausalLM(tiny_config(), pretrained=False, optimizer=lambda params: AdamW(params, lr=1e-3))
    trainer = L.Trainer(
        strategy=ExpertParallelStrategy(ep=1, cp=cp), accelerator=accelerator(), devices=cp, precision="bf16-mixed",
        max_steps=6, gradient_clip_val=1.0, callbacks=[Count(), Throughput()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = [{**batch, **(extra or {})} for batch in batches(6, 2)]
        trainer.fit(module, DataLoader(data, batch_size=None, pin_memory=True))
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            found.append(f"{warning.filename}:{warning.lineno}")
    return found


def test_a_training_step_does_not_wait_for_the_gpu() -> None:
    assert_ranks_agree(1, _step_syncs, init_process_group=False)


_PACKED = torch.cat([torch.arange(length) for length in (5, 4, 3)]).repeat(2, 1)
_LEFT_PADDED = (torch.arange(12) >= torch.tensor([[3], [0]])).long()


def test_a_step_on_packed_documents_does_not_wait_for_the_gpu() -> None:
    assert_ranks_agree(1, _step_syncs, 1, {"position_ids": _PACKED}, init_process_group=False)


@pytest.mark.parametrize("extra", [{}, {"position_ids": _PACKED}, {"attention_mask": _LEFT_PADDED}])
def test_a_step_on_pieces_of_sequences_does_not_wait_for_the_gpu(extra: dict[str, Tensor]) -> None:
    assert_ranks_agree(2, _step_syncs, 2, extra, init_process_group=False)


@pytest.mark.parametrize(("kv_heads", "value_dim", "window"), SHAPES)
@pytest.mark.parametrize(("positions", "mask"), [(PACKED, None), (None, PADDED)])
def test_documents_without_a_mask_attend_as_with_one(
    positions: Tensor | None, mask: Tensor | None, kv_heads: int, value_dim: int, window: int | None
) -> None:
    [error] = run_ranks(1, documents_error, positions, mask, kv_heads, value_dim, window)
    assert error < 1e-2


def _peak_of_documents() -> float:
    """GiB that forward and backward take at 32k packed tokens, of which a mask alone would be 1."""
    positions = torch.arange(8192).repeat(4)[None]
    documents = find_documents(positions, None)
    assert documents.bounds is not None
    piece = SequencePiece(None, 1, 32_768, positions, None, documents, documents.bounds.to(device()))  # type: ignore[arg-type]
    leaves = [torch.randn(1, 2, 32_768, 64, device=device(), dtype=torch.bfloat16) for _ in range(3)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    _attend(None, "sdpa", *leaves, piece).sum().backward()  # type: ignore[arg-type]
    return torch.cuda.max_memory_allocated(device()) / 2**30


def test_packed_documents_need_no_mask_of_all_pairs() -> None:
    assert run_ranks(1, _peak_of_documents)[0] < 0.5


def _packed_errors(mode: Any, compile: bool) -> tuple[list[str], list[int]]:
    """Of models in bf16 that are given packed documents, against plain transformers in fp32 on each alone.

    Also how many graphs there are after each batch, of which no two have the same number of documents.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 4, "head_dim": 64}  # no near-ties in routers
    model, expected = tiny_model(**config), tiny_model(**config).to(device())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layout = ParallelLayout.resolve(1, "auto", 1, 1)
    parallelize(model, layout, device(), mp_policy=policy, compile=compile, activation_checkpointing=mode)
    assert adapter.attention_implementation(model) == "packed_sdpa"
    wrong, graphs = [], []
    generator = torch.Generator().manual_seed(0)
    for lengths in ([700, 1, 299, 24], [1024], [333, 333, 358], [128] * 8):
        ids = torch.randint(0, 128, (2, 1024), generator=generator).to(device())
        rows = [lengths, lengths[::-1]]
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows]).to(device())
        labels = ids.where(positions > 0, -100)
        model.zero_grad()
        expected.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(document_bounds, "documents_mask")  # with which any other way than the kernel fails
            loss = model(input_ids=ids, position_ids=positions, labels=labels).loss
            loss.backward()
        targets = (labels != -100).sum()
        for row, tokens in zip(rows, ids, strict=True):
            for document in tokens.split(row):
                logits = expected(input_ids=document[None]).logits[0, :-1]
                (F.cross_entropy(logits, document[1:], reduction="sum") / targets).backward()
        for (name, param), other in zip(model.named_parameters(), expected.parameters(), strict=True):
            error = relative_error(param.grad.full_tensor(), grad_or_zero(other))
            wrong += [f"{lengths}: gradient of {name}: {error:.1e}"] if not error < 8e-2 else []
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return wrong, graphs


@pytest.mark.parametrize(("mode", "compile"), [("none", False), ("full", False), ("none", True), ("full", True)])
def test_packed_documents_are_separate_ones_in_bf16(mode: str, compile: bool) -> None:
    ((wrong, graphs),) = run_ranks(1, _packed_errors, mode, compile)
    assert not wrong
    # Whole rows are no packed documents: attention is compiled once more for them, and for no number of documents.
    assert graphs == ([2, 3, 3, 3] if compile else [0] * 4)


def _peak_of_packed_model() -> float:
    """GiB of a forward of a model on 32k packed tokens, of which a mask alone would be 1."""
    model = tiny_model(num_hidden_layers=1, max_position_embeddings=32_768, head_dim=64).to(torch.bfloat16)
    parallelize(model, ParallelLayout.resolve(1, "auto", 1, 1), device())
    positions = torch.arange(8192, device=device()).repeat(4)[None]
    torch.cuda.reset_peak_memory_stats(device())
    with torch.no_grad():
        model(torch.zeros_like(positions), position_ids=positions, use_cache=False)
    return torch.cuda.max_memory_allocated(device()) / 2**30


def test_a_model_needs_no_mask_of_all_pairs() -> None:
    assert run_ranks(1, _peak_of_packed_model)[0] < 0.5


def _experts(family: str, num_experts: int) -> nn.Module:
    """Experts of widths that are no multiple of a block, in bf16, large enough that gpt-oss's clamp bites."""
    if family == "qwen3_moe":
        module: nn.Module = Qwen3MoeExperts(
            tiny_config(hidden_size=264, moe_intermediate_size=136, num_experts=num_experts)
        )
    else:
        module = GptOssExperts(GptOssConfig(hidden_size=264, intermediate_size=136, num_local_experts=num_experts))
    for name, param in module.named_parameters():
        torch.nn.init.normal_(param, std=1.0 if name.endswith("bias") else 0.1 if family == "qwen3_moe" else 0.3)
    return module.to(torch.bfloat16)


def _bf16_errors(family: str, implementation: str, tokens: int, experts: int, used: int) -> list[float]:
    """Errors of output and gradients in bf16 against eager experts in float64 on the same (bf16) inputs.

    Only ``used`` of the experts receive tokens; no size is a multiple of a block.
    """
    torch.manual_seed(tokens)
    with torch.device(device()):
        module = _experts(family, experts)
        ids = torch.rand(tokens, used).topk(5).indices
        weights, hidden, grad = torch.rand(tokens, 5), torch.randn(tokens, 264), torch.randn(tokens, 264)
    form, names = fused_form(module)
    params = [module.get_parameter(name) for name in names]
    leaves = [t.detach().bfloat16().requires_grad_() for t in (hidden, weights, *params)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    eager = local_experts_function(module, "eager")
    out = eager(stand_in(module, dict(zip(names, exact[2:], strict=True))), exact[0], ids, exact[1])
    expected = [out, *torch.autograd.grad(out, exact, grad.bfloat16().double())]
    runner: LocalExperts = FusedExperts(experts, (), form)
    if implementation != "fused":
        runner = RegisteredExperts(module, local_experts_function(module, implementation), names)
    # What is freed here is where the next outputs land: an element that nobody writes shows.
    torch.full((2**26,), float("nan"), device=device())
    out = moe_forward(LocalDispatcher(experts), runner, leaves[0], ids, leaves[1], leaves[2:])
    found = [out, *torch.autograd.grad(out, leaves, grad.bfloat16())]
    assert not any(of_param[used:].any() for of_param in found[3:])
    return [relative_error(a, b) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(("tokens", "experts", "used"), [(1000, 24, 24), (1003, 24, 9), (7, 12, 6)])
def test_fused_error_is_no_larger_than_that_of_transformers(family: str, tokens: int, experts: int, used: int) -> None:
    fused = _bf16_errors(family, "fused", tokens, experts, used)
    peer = _bf16_errors(family, "grouped_mm", tokens, experts, used)
    print(f"fused {fused}, transformers {peer}")
    # A projection that is rounded across gpt-oss's limit has no gradient, or has one that it should not have.
    limit = 6e-3 if family == "qwen3_moe" else 3e-2
    for ours, theirs in zip(fused, peer, strict=True):
        assert ours <= theirs
        assert ours < limit


def _losses(implementation: str, plain_loss: bool) -> list[float]:
    """Losses of 50 steps of AdamW on a few batches, in bf16-mixed."""
    trace: list[float] = []

    class Losses(L.Callback):
        def on_before_zero_grad(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
            if "train/loss" in trainer.callback_metrics:
                trace.append(trainer.callback_metrics["train/loss"].item())

    L.seed_everything(1, verbose=False)
    module = CausalLM(
        tiny_config(hidden_size=128, moe_intermediate_size=64, num_experts=16),
        pretrained=False,
        optimizer=lambda params: torch.optim.AdamW(params, lr=5e-4),
    )
    patch = pytest.MonkeyPatch()
    if plain_loss:
        patch.setattr(loss_module, "is_plain_head", lambda head: False)
    trainer = L.Trainer(
        strategy=ExpertParallelStrategy(experts_implementation=implementation),
        accelerator=accelerator(), devices=1, precision="bf16-mixed", max_steps=50, gradient_clip_val=1.0,
        callbacks=[Losses()], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    data = [{k: v.squeeze(0) for k, v in b.items()} for b in batches(16, 1, length=64)]
    trainer.fit(module, DataLoader(data, batch_size=4))
    patch.undo()
    return trace


def test_fifty_steps_agree_with_the_plain_path() -> None:
    runs = [("fused", False), ("grouped_mm", True), ("eager", True)]
    fused, plain, other = (run_ranks(1, _losses, *run, init_process_group=False)[0] for run in runs)
    assert len(fused) == len(plain) == len(other) >= 49
    assert fused[-1] < 0.8 * fused[0], "the comparison says nothing unless training moves"
    difference, noise = (max(abs(a - b) / b for a, b in zip(run, plain, strict=True)) for run in (fused, other))
    print(
        f"largest difference {difference:.2e}, between transformers' own {noise:.2e}; {fused[0]:.3f} to {fused[-1]:.3f}"
    )
    # Rounding decides near-ties in the router, and training carries that on: two of transformers' kernels differ too.
    assert difference < max(3 * noise, 1e-2)


def _deterministic_runs(ep: int) -> bool:
    """Whether two runs of a model wide enough for several blocks of every kernel end with the same weights."""
    config = tiny_config(hidden_size=256, moe_intermediate_size=128, num_experts=16, num_attention_heads=8, head_dim=64)
    weights = []
    for _ in range(2):
        module = CausalLM(config, pretrained=False, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
        torch.manual_seed(0)
        trainer = L.Trainer(
            strategy=ExpertParallelStrategy(ep=ep), accelerator=accelerator(), devices=ep, precision="bf16-mixed",
            max_steps=5, deterministic=True, gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(batches(5, 4, length=300), batch_size=None))
        weights.append([param.detach().full_tensor() for param in module.parameters()])
    torch.use_deterministic_algorithms(False)
    return all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("ep", [1, 2])
def test_deterministic_runs_are_equal_bit_for_bit(ep: int) -> None:
    assert run_ranks(ep, _deterministic_runs, ep, init_process_group=False) == [True] * ep


def _validate_then_fit() -> bool:
    """Experts that FSDP shards, gathered first by an evaluation, then by a training step."""
    module = CausalLM(tiny_config(), pretrained=False, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    arguments: dict[str, Any] = {
        "strategy": ExpertParallelStrategy(ep=1), "accelerator": accelerator(), "devices": 2, "max_epochs": 1,
        "precision": "bf16-mixed", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "use_distributed_sampler": False,
    }  # fmt: skip
    trainer = L.Trainer(**arguments)
    weights = []
    for _ in range(2):
        trainer.validate(module, DataLoader(batches(2, 2), batch_size=None), verbose=False)
        trainer.fit(module, DataLoader(batches(2, 2), batch_size=None))
        trainer.predict(module, DataLoader(batches(2, 2), batch_size=None))
        trainer.fit_loop.max_epochs += 1
        weights.append([param.detach().full_tensor() for param in module.parameters()])
    moved = [not torch.equal(a, b) for a, b in zip(*weights, strict=True)]
    return all(moved) and all(bool(weight.isfinite().all()) for weight in weights[1])


def test_evaluation_and_training_take_turns() -> None:
    assert run_ranks(2, _validate_then_fit, init_process_group=False) == [True, True]
