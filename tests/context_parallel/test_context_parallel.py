"""Sequences split over ranks: attention is that of transformers on one process, and what cannot be split is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from lightning_ep import ExpertParallelStrategy, ParallelLayout, parallelize, shard_sequence, whole_sequences
from lightning_ep import transformers_adapter as adapter
from lightning_ep.callbacks import Throughput
from lightning_ep.context_parallel import (
    Documents,
    SequencePiece,
    attention,
    check,
    find_documents,
    use_context_parallel_attention,
)
from lightning_ep.context_parallel.exchange import kv_repeats
from lightning_ep.parallelize import is_parallelized
from tests.documents import PACKED, PADDED, SHAPES, documents_error, kernel_on_cpu
from tests.hub.every_family import tiny_config_of
from tests.parity import SeededCausalLM, assert_trains_like_one_process
from tests.rank_process import on_cuda
from tests.ranks import assert_ranks_agree, device, here, run_ranks
from tests.reference import VOCAB, family_model, grad_or_zero, relative_error, tiny_config, tiny_model
from tests.tiny import TinyModule, loader, quiet

ON_GPU = on_cuda()

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_experts_per_tok": 2, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "sliding_window": 5},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 5},  # with sinks, and a window in every other layer
    "deepseek_v3": {  # keys and values of different widths
        "n_routed_experts": 4, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "head_dim": 4, "v_head_dim": 6,
        "num_key_value_heads": 4,
    },
}  # fmt: skip


def _family(name: str, attention: str, **overrides: Any) -> PreTrainedModel:
    return family_model(name, {**SIZES, **FAMILIES.get(name, {}), **overrides}, attention, std=0.3)


def _qwen(attention: str) -> PreTrainedModel:
    model = tiny_model()
    model.set_attn_implementation(attention)
    return model


def _positions(*rows: list[int]) -> Tensor:
    """Of packed documents, by their lengths."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def _batch(kind: str) -> dict[str, Tensor]:
    """Two rows that need what ``kind`` says; tokens that do not count have no label."""
    length = {"plain": 12, "odd": 13}.get(kind, 11)
    ids = torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(len(kind)))
    batch = {"input_ids": ids, "labels": ids.clone()}
    batch["labels"][0, :5] = -100  # uneven between the pieces, and between the rows
    if kind in ("packed", "packed and masked"):
        batch["position_ids"] = _positions([4, 3, 4], [11])
        batch["position_ids"][1] += 7  # no beginning of a document
        batch["labels"][0, [4, 7]] = -100  # no document predicts the next one
    if kind == "right":
        batch["attention_mask"] = (torch.arange(11) < torch.tensor([[11], [3]])).long()
    if kind == "left":
        batch["attention_mask"] = (torch.arange(11) >= torch.tensor([[6], [1]])).long()
    if kind == "gaps":
        batch["attention_mask"] = torch.ones(2, 11).long()
        batch["attention_mask"][0, 3:6] = 0
    if kind == "packed and masked":
        batch["attention_mask"] = torch.ones(2, 11).long()
    if "attention_mask" in batch:
        # Nor have those after padding: what a padding token predicts is not defined.
        counts = (batch["attention_mask"] & F.pad(batch["attention_mask"][:, :-1], (1, 0))) == 1
        batch["labels"] = batch["labels"].where(counts, -100)
    return batch


KINDS = ["plain", "odd", "packed", "right", "left", "gaps", "packed and masked"]


def _reference(model: PreTrainedModel, batch: dict[str, Tensor], kind: str) -> Tensor:
    """The mean loss on one process. Packed documents run one by one: not all families look for them."""
    rows = [batch]
    if "packed" in kind:
        rows = [{k: v[:1, start:end] for k, v in batch.items()} for start, end in ((0, 4), (4, 7), (7, 11))]
        rows.append({key: value[1:] for key, value in batch.items()})
    count = (batch["labels"][:, 1:] != -100).sum()
    return sum(model(**row, use_cache=False, num_items_in_batch=count).loss for row in rows)  # type: ignore[return-value]


def _compare(build: Any, arguments: tuple[Any, ...], kinds: list[str], tolerance: float, **options: Any) -> list[str]:
    """Loss and gradients of whole sequences on one process against pieces on all ranks, which share every batch."""
    world, wrong = dist.get_world_size(), []
    layout = ParallelLayout.resolve(world, "auto", world, world, cp=world)
    model, expected = build(*arguments), build(*arguments)
    meshes = parallelize(model, layout, device(), **options)
    for kind in kinds:
        batch = _batch(kind)
        expected.zero_grad()
        reference = _reference(expected, batch, kind)
        reference.backward()
        model.zero_grad()
        piece = shard_sequence(here(batch), meshes.cp)
        loss = model(**piece).loss / layout.loss_world_size
        loss.backward()
        dist.all_reduce(loss.detach())
        if not abs(loss.item() - reference.item()) <= tolerance * reference.item():
            wrong.append(f"{kind}: loss {loss.item()}, not {reference.item()}")
        for (name, param), other in zip(model.named_parameters(), expected.parameters(), strict=True):
            grad, wanted = param.grad.full_tensor(), grad_or_zero(other)
            error = relative_error(grad, wanted)
            if not error <= 10 * tolerance and (grad.cpu() - wanted).norm() > 1e-6:
                wrong.append(f"{kind}: gradient of {name}: {error:.1e}")
    return wrong


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("world", [2, 4])
def test_attention_is_that_of_one_process(world: int, attention: str) -> None:
    assert_ranks_agree(world, _compare, _qwen, (attention,), KINDS, 2e-6)


@pytest.mark.parametrize(("family", "attention"), [("mixtral", "sdpa"), ("gpt_oss", "eager"), ("deepseek_v3", "sdpa")])
def test_windows_sinks_and_latent_attention(family: str, attention: str) -> None:
    assert_ranks_agree(2, _compare, _family, (family, attention), ["odd", "packed", "left"], 2e-6)


HYBRIDS = ["qwen3_next", "qwen3_5_moe_text", "lfm2_moe", "kimi_linear", "bailing_hybrid", "granitemoehybrid"]


def _hybrid(family: str) -> PreTrainedModel:
    """Two layers, the second of them with softmax attention."""
    torch.manual_seed(0)
    config = tiny_config_of(family)
    config.num_hidden_layers = 2
    config.layer_types = ["conv" if family == "lfm2_moe" else "linear_attention", "full_attention"]
    config.n_group, config.num_experts_per_tok, config.num_dense_layers = 1, 2, 0
    config.num_key_value_heads = config.num_attention_heads
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.set_experts_implementation("eager")
    for param in model.parameters():
        if param.ndim > 1:
            torch.nn.init.normal_(param, std=0.1)
    mixers = adapter.whole_sequence_mixers(model)
    assert len(mixers) == 1
    return model


@pytest.mark.parametrize(
    "family", [HYBRIDS[0], *(pytest.param(family, marks=pytest.mark.slow) for family in HYBRIDS[1:])]
)
def test_linear_attention_and_convolutions_run_on_whole_sequences(family: str) -> None:
    assert_ranks_agree(2, _compare, _hybrid, (family,), ["odd", "right", "left"], 2e-6)


def _hybrid_otherwise() -> list[str]:
    """Replayed layers, packed documents, and whole sequences on every rank, as for `generate`."""
    wrong = _compare(_hybrid, ("qwen3_next",), ["odd", "left"], 2e-6, activation_checkpointing="full")
    world = dist.get_world_size()
    model, expected = _hybrid("qwen3_next"), _hybrid("qwen3_next")
    meshes = parallelize(model, ParallelLayout.resolve(world, "auto", world, world, cp=world), device())
    piece = shard_sequence(here(_batch("packed")), meshes.cp)
    with pytest.raises(ValueError, match=r"restart inside a row.*model\.layers\.0\.linear_attn passes on a state"):
        model(**piece)
    ids = _batch("plain")["input_ids"]
    with whole_sequences(model), torch.no_grad():
        found = model(input_ids=ids.to(device())).logits
    if not relative_error(found, expected(input_ids=ids).logits) < 1e-5:
        wrong.append("whole sequences")
    return wrong


def test_layers_that_pass_on_a_state_are_replayed_and_refuse_packed_documents() -> None:
    assert_ranks_agree(2, _hybrid_otherwise)


def _compare_otherwise() -> list[str]:
    """In bf16, whose routers may send a token elsewhere, and with layers that are replayed in backward."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    wrong = _compare(_qwen, ("sdpa",), ["packed", "right"], 3e-2, mp_policy=policy)
    return wrong + _compare(_qwen, ("sdpa",), ["odd", "packed"], 2e-6, activation_checkpointing="full")


def test_bf16_and_replayed_layers() -> None:
    assert_ranks_agree(2, _compare_otherwise)


@pytest.mark.slow
def test_compiled_layers_train_alike() -> None:
    case = {"causal": True, "accumulate": 1, "clip": 0.2, "compile": "inductor"}
    layout = {"ep": 2, "cp": 2}
    assert_trains_like_one_process(2, layout, [case], timeout=110)


@pytest.mark.skipif(ON_GPU, reason="the kernel itself runs in test_gpu.py")
@pytest.mark.parametrize(("kv_heads", "value_dim", "window"), SHAPES)
@pytest.mark.parametrize(("positions", "mask"), [(PACKED, None), (None, PADDED)])
def test_documents_without_a_mask_attend_as_with_one(
    positions: Tensor | None,
    mask: Tensor | None,
    kv_heads: int,
    value_dim: int,
    window: int | None,
) -> None:
    with kernel_on_cpu() as calls:
        assert documents_error(positions, mask, kv_heads, value_dim, window) < 1e-2
    assert len(calls) == 1


def test_flash_attention_is_told_the_bounds_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(positions: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, dict[str, Any]]:
        documents = find_documents(positions, mask)
        piece = SequencePiece(None, 2, 128, positions, mask, documents, documents.bounds)  # type: ignore[arg-type]
        query = torch.zeros(2, 4, 128, 8)
        module: Any = SimpleNamespace(_module=None)
        return attention._attend(module, "flash_attention_2", query, query, query, piece, sliding_window=9)

    def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        return (mask, kwargs), None

    monkeypatch.setattr(adapter, "attention_function", lambda name, module: flash)
    mask, arguments = told(PACKED, None)
    assert mask is None
    assert arguments["cu_seq_lens_q"].tolist() == arguments["cu_seq_lens_k"].tolist() == [0, 50, 51, 128, 256]
    assert arguments["max_length_q"] == arguments["max_length_k"] == 128
    assert arguments["sliding_window"] == 9
    assert told(None, PADDED)[1]["cu_seq_lens_q"].tolist() == [0, 60, 128, 256]
    assert "cu_seq_lens_q" not in told(torch.arange(128).repeat(2, 1), None)[1]
    gaps = PADDED.clone()
    gaps[1, 7] = 0
    assert told(None, gaps)[0] is gaps


# -------------------------------------------------------------------------------- the pieces of a batch


def _piece_of(batch: dict[str, Tensor]) -> dict[str, Any]:
    mesh = ParallelLayout.resolve(1, "auto", 4, 4, cp=4).build_meshes(device().type).cp
    piece = shard_sequence(batch, mesh)
    del piece["sequence"]  # holds a process group
    return piece


def test_pieces_are_consecutive_and_their_targets_cross_the_borders() -> None:
    ids = torch.arange(1, 11).view(1, 10).repeat(2, 1)
    labels = ids.clone()
    labels[1, :8] = -100
    batch = {"input_ids": ids, "labels": labels, "loss_weight": ids / 2, "id": torch.tensor([5, 6])}
    pieces = run_ranks(4, _piece_of, batch)
    assert torch.cat([p["input_ids"] for p in pieces], 1)[0].tolist() == [*range(1, 11), 0, 0]
    assert torch.cat([p["position_ids"] for p in pieces], 1).tolist() == [list(range(12))]
    assert torch.cat([p["shift_labels"] for p in pieces], 1)[0].tolist() == [*range(2, 11), -100, -100, -100]
    assert torch.cat([p["loss_weight"] for p in pieces], 1)[1].tolist() == [n / 2 for n in range(1, 11)] + [0, 0]
    assert all(p["num_items_in_batch"] == (9 + 2) / 4 and p["id"].tolist() == [5, 6] for p in pieces)
    alone = shard_sequence(batch, None)
    assert alone["input_ids"] is ids
    assert alone["num_items_in_batch"] == 11
    assert "sequence" not in alone
    logits = torch.randn(2, 10, 12)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    found = F.cross_entropy(logits.flatten(0, 1), alone["shift_labels"].flatten(), reduction="sum")
    torch.testing.assert_close(found / alone["num_items_in_batch"], expected)


def test_what_the_host_reads_of_documents() -> None:
    packed = find_documents(_positions([4, 3, 4], [2, 9]), None)
    assert packed.bounds is not None
    assert (packed.bounds.tolist(), packed.longest) == ([0, 4, 7, 11, 13, 22], 9)
    assert find_documents(torch.arange(3, 9)[None], None).plain
    assert find_documents(None, torch.tensor([[1, 1, 0], [0, 0, 0]])).plain
    left = find_documents(None, torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]))
    assert left.bounds is not None
    assert (left.bounds.tolist(), left.longest, left.gaps) == ([0, 1, 3, 4, 8], 4, False)
    assert find_documents(None, torch.tensor([[1, 0, 1]])) == Documents(gaps=True)


@pytest.mark.parametrize(("kv_heads", "size", "repeats"), [(4, 2, 1), (2, 4, 2), (3, 2, 2), (6, 4, 2), (1, 8, 8)])
def test_kv_heads_are_repeated_no_more_than_needed(kv_heads: int, size: int, repeats: int) -> None:
    assert kv_repeats(kv_heads, size) == repeats


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 12, 12)}, r"attention_mask of shape \(2, 1, 12, 12\) .* \(2, 12\)"),
        ({"position_ids": torch.ones(3, 2, 12)}, r"position_ids of shape \(3, 2, 12\) cannot be split"),
        ({"cu_seq_lens_q": torch.ones(3)}, r"\['cu_seq_lens_q'\] describe whole sequences.*position_ids"),
    ],
)
def test_batches_that_cannot_be_split(extra: dict[str, Tensor], message: str) -> None:
    class Mesh:  # refused before anything of it is used
        def size(self) -> int:
            return 2

    with pytest.raises(ValueError, match=message):
        shard_sequence({**_batch("plain"), **extra}, Mesh())  # type: ignore[arg-type]


def _balancing(kind: str) -> tuple[float, float]:
    """The balancing loss of this rank's piece, and that of the same tokens on one process."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model, expected = (tiny_model(output_router_logits=True) for _ in range(2))
    meshes = parallelize(model, ParallelLayout.resolve(world, "auto", world, world, cp=world), device())
    batch = _batch(kind)
    size = batch["input_ids"].shape[1]
    length = -(-size // world)
    own = slice(rank * length, (rank + 1) * length)
    logits = [x.unflatten(0, (2, size))[:, own].flatten(0, 1) for x in expected(**batch).router_logits]
    mask = batch["attention_mask"][:, own].flatten() if "attention_mask" in batch else None
    wanted = load_balancing_loss_func(tuple(logits), 8, 4, mask)
    piece = shard_sequence(here(batch), meshes.cp)
    return model(**piece).aux_loss.item(), wanted.item()


@pytest.mark.parametrize("kind", ["plain", "odd", "right"])
@pytest.mark.parametrize("world", [2, 4])
def test_the_balancing_loss_counts_no_padding(world: int, kind: str) -> None:
    for found, wanted in run_ranks(world, _balancing, kind):
        assert found == pytest.approx(wanted, rel=1e-5)


# -------------------------------------------------------------------------------- what is refused


def _refusals() -> dict[str, str]:
    """What a parallelised model says to calls that would compute something else."""
    layout = ParallelLayout.resolve(2, "auto", 2, 2, cp=2)
    refused = tiny_model(num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(ValueError, match="does not divide the 3 attention heads"):
        parallelize(refused, layout, device())
    assert not is_parallelized(refused)
    model = tiny_model()
    meshes = parallelize(model, layout, device())
    batch = here(_batch("plain"))
    piece = shard_sequence(batch, meshes.cp)
    calls = {
        "forgotten": batch,
        "other tokens": {**piece, "input_ids": batch["input_ids"], "position_ids": None},
        "own mask": {**piece, "attention_mask": torch.zeros(2, 1, 6, 6, device=device())},
        "not causal": {**piece, "is_causal": False},
    }
    said = {}
    for name, arguments in calls.items():
        with pytest.raises(RuntimeError) as caught:
            model(**arguments)
        said[name] = str(caught.value)
    assert model(**piece).loss.isfinite()
    return said


def test_calls_that_would_attend_within_pieces_raise() -> None:
    for said in run_ranks(2, _refusals):
        assert "self.model(**self.trainer.strategy.shard_sequence(batch))" in said["forgotten"]
        assert "got 2 x 12 tokens, but the piece of sequences that came with it is 2 x 6" in said["other tokens"]
        assert "mask or bias of its own" in said["own mask"]
        assert "is not causal" in said["not causal"]


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("qwen3_moe", {"num_attention_heads": 6}, r"tp=1 times cp=4 is 4, .* the 6 attention heads .*use tp=1, cp=2"),
        ("jamba", {}, r"cp=4 cannot serve JambaForCausalLM \('jamba'\): .*attention interface"),
        ("minimax", {}, r"layers of the types \['linear_attention'\]"),
        ("deepseek_v32", FAMILIES["deepseek_v3"], "types|Indexer"),
        ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 0}, "sliding window of which it does not tell"),
        ("phimoe", {"rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4,
            "short_mscale": 1.0, "long_mscale": 1.0, "original_max_position_embeddings": 32}}, "rope_type='longrope'"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_split_are_refused(family: str, overrides: dict[str, Any], message: str) -> None:
    config = AutoConfig.for_model(family, **{**SIZES, **overrides})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=message):
        check(model, ParallelLayout.resolve(1, "auto", 8, 8, cp=4))


# -------------------------------------------------------------------------------- with a Trainer


class _Splitting(TinyModule):
    """A user's module that makes the one call."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        arguments = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
        return self.model(**self.trainer.strategy.shard_sequence(arguments)).loss


def _evaluate(root: str) -> dict[str, Any]:
    """Trains, saves on cp=2 and loads on cp=1; a CausalLM's evaluation and predictions on cp=2."""
    strategy = ExpertParallelStrategy(ep=2, cp=2)
    throughput = Throughput()
    module = _Splitting()
    trainer = quiet(Path(root), strategy=strategy, max_steps=2, callbacks=[throughput])
    trainer.fit(module, loader(16))
    seconds = sum(step.seconds for step in throughput._steps) / len(throughput._steps)
    counted = trainer.callback_metrics["tokens/s"].item() * seconds
    trained = trainer.validate(module, loader(8), verbose=False)[0]["val_loss"]
    trainer.save_checkpoint(Path(root, "checkpoint"))
    other = quiet(Path(root), strategy=ExpertParallelStrategy(ep=2))
    loaded = other.validate(_Splitting(), loader(8), ckpt_path=Path(root, "checkpoint"), verbose=False)[0]["val_loss"]

    causal: Any = SeededCausalLM(tiny_config(), pretrained=False)
    causal.overrides = {}
    data = [{key: value for key, value in sample.items() if key != "id"} for sample in loader(6).dataset]
    for index, sample in enumerate(data):
        sample["labels"] = sample["labels"].where(torch.arange(8) > index, -100)
    trainer = quiet(Path(root), strategy=ExpertParallelStrategy(ep=2, cp=2))
    batches = DataLoader(data, batch_size=2)
    predicted = trainer.predict(causal, batches)
    values = {key: torch.cat([part[key] for part in predicted]) for key in ("log_likelihood", "tokens")}
    metrics = trainer.validate(causal, batches, verbose=False)[0]
    return {"trained": trained, "loaded": loaded, "tokens in a step": counted, "metrics": metrics, **values}


def _expected_evaluation() -> tuple[Tensor, Tensor]:
    """Log-likelihood and number of targets of every sequence, on one process."""
    model, sums, counts = tiny_model(), [], []
    for index, sample in enumerate(loader(6).dataset):
        labels = sample["labels"].where(torch.arange(8) > index, -100)[1:]
        with torch.no_grad():
            logits = model(input_ids=sample["input_ids"][None]).logits[0, :-1]
        sums.append(-F.cross_entropy(logits, labels, reduction="sum"))
        counts.append((labels != -100).sum())
    return torch.stack(sums), torch.stack(counts)


@pytest.mark.parametrize("world", [2, 4])
def test_evaluation_prediction_and_checkpoints(world: int, tmp_path: Path) -> None:
    results = run_ranks(world, _evaluate, str(tmp_path), init_process_group=False)
    sums, counts = _expected_evaluation()
    groups = world // 2
    for rank, result in enumerate(results):
        mine = slice(rank // 2, None, groups)  # cp peers predict the same sequences, data ranks different ones
        torch.testing.assert_close(result["log_likelihood"], sums[mine], rtol=1e-5, atol=1e-5)
        assert result["tokens"].tolist() == counts[mine].tolist()
        mean = -sums.sum() / counts.sum()
        assert result["metrics"]["val/loss"] == pytest.approx(mean.item(), rel=1e-5)
        assert result["metrics"]["val/perplexity"] == pytest.approx(mean.exp().item(), rel=1e-4)
        assert result["loaded"] == pytest.approx(result["trained"], rel=1e-5)
        assert result["tokens in a step"] == pytest.approx(2 * 8 * groups, rel=1e-5)


def _generate() -> list[int]:
    model = tiny_model()
    parallelize(model, ParallelLayout.resolve(2, "auto", 2, 2, cp=2), device())
    prompt = torch.arange(5, device=device())[None]
    with whole_sequences(model):
        out = model.generate(prompt, max_new_tokens=6, do_sample=False, synced_gpus=True)
    with pytest.raises(RuntimeError, match="without saying which piece"):
        model(prompt)
    return out[0].tolist()


def test_generation_runs_whole_sequences_on_every_rank() -> None:
    expected = tiny_model().generate(torch.arange(5)[None], max_new_tokens=6, do_sample=False)[0].tolist()
    assert run_ranks(2, _generate) == [expected] * 2


def test_the_config_of_a_split_model_says_nothing_of_it() -> None:
    model = tiny_model()
    use_context_parallel_attention(model)
    assert "context_parallel" not in model.config.to_json_string()
