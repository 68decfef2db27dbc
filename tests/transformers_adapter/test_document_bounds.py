"""Attention that is told bounds of documents: packed documents are separate ones on every path, and nothing is in vain.

In production it takes a GPU. Here models are told bounds before they are sharded, and attention makes the mask of them
that defines it, or runs what GPUs run, with the kernel's maths on the CPU.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoConfig, masking_utils

from lightning_ep import ParallelLayout, from_config, parallelize, shard_sequence
from lightning_ep import transformers_adapter as adapter
from lightning_ep.ops import packed_attention
from lightning_ep.ops.packed_attention import documents_mask, has_kernel, kernel_serves
from lightning_ep.trainer import cost_warnings
from lightning_ep.transformers_adapter import document_bounds
from tests.documents import PACKED, kernel_on_cpu
from tests.hub.every_family import auto_class_of, tiny_config_of
from tests.rank_process import on_cuda
from tests.ranks import assert_ranks_agree, device, run_ranks
from tests.reference import VOCAB, family_model, grad_or_zero, relative_error, tiny_model
from tests.transformers_adapter import test_packed_documents as packed_documents
from tests.transformers_adapter.test_packed_documents import SIZES

cpu_only = pytest.mark.skipif(on_cuda(), reason="the kernel itself runs in test_gpu.py")

LATENT: dict[str, Any] = {  # keys and values of different widths
    **SIZES, "n_routed_experts": 4, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "head_dim": 8, "v_head_dim": 6,
    "num_key_value_heads": 4, "moe_intermediate_size": 16,
}  # fmt: skip


def _model(family: str) -> Any:
    if family == "deepseek_v3":
        return family_model(family, LATENT, "sdpa", std=0.3)
    return tiny_model(**packed_documents.FAMILIES[family])


def _errors(family: str, layout: dict[str, int], kernel: bool, **options: Any) -> list[str]:
    """Of loss and gradients of packed documents, against plain transformers on each document alone."""
    world = dist.get_world_size()
    whole = {"tp": 1, "cp": 1, **layout}
    expected_model, model = _model(family).double(), _model(family).double()  # fp32 alone gives errors of 1e-6
    expected = packed_documents._apart(expected_model)
    expected.backward()
    if whole["cp"] == 1:
        adapter.use_bounds_of_documents(model)
        assert adapter.attention_implementation(model) == "packed_sdpa"
    resolved = ParallelLayout.resolve(world, "auto", world, world, tp=whole["tp"], cp=whole["cp"])
    meshes = parallelize(model, resolved, device(), **options)
    batch = shard_sequence({k: v.to(device()) for k, v in packed_documents._batch().items()}, meshes.cp)
    with kernel_on_cpu() if kernel else nullcontext() as calls:
        loss = model(**batch).loss / resolved.loss_world_size
        loss.backward()
    assert not kernel or set(calls) == {(5, 4, 3, 7, 5)}
    dist.all_reduce(mean := loss.detach().clone())
    wrong = []
    if not abs(mean.item() - expected.item()) <= 1e-6 * expected.item():
        wrong.append(f"loss {mean.item()}, not {expected.item()}")
    for (name, param), other in zip(model.named_parameters(), expected_model.parameters(), strict=True):
        error = relative_error(param.grad.full_tensor(), grad_or_zero(other))
        wrong += [f"gradient of {name}: {error:.1e}"] if not error < 1e-6 else []
    return wrong


CASES: list[tuple[str, dict[str, int], dict[str, Any]]] = [
    ("qwen3_moe", {}, {}),
    ("qwen3_moe", {"tp": 2}, {}),
    ("qwen3_moe", {"cp": 2}, {}),
    ("qwen3_moe", {}, {"activation_checkpointing": "full"}),
    ("qwen3_moe", {"tp": 2}, {"activation_checkpointing": "selective"}),
    ("window", {}, {}),
    ("deepseek_v3", {}, {}),
]


def _all_errors(kernel: bool) -> list[str]:
    return [f"{case}: {wrong}" for case in CASES for wrong in _errors(case[0], case[1], kernel, **case[2])]


@cpu_only
@pytest.mark.parametrize("kernel", [False, True])
def test_packed_documents_are_separate_ones_on_every_path(kernel: bool) -> None:
    assert_ranks_agree(2, _all_errors, kernel)


# -------------------------------------------------------------------------------- compiled layers


def _rows(*rows: list[int]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


PACKINGS = [_rows([5, 4, 3], [7, 5]), _rows([12], [1, 11]), _rows([2, 2, 2, 6], [3, 3, 3, 3]), _rows([1] * 12, [4, 8])]


def _compiled(mode: Any, backend: str) -> tuple[list[str], list[int]]:
    """What is wrong with compiled layers, and how many graphs there are after each packing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    expected, model = tiny_model().double(), tiny_model().double()
    adapter.use_bounds_of_documents(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
        layout = ParallelLayout.resolve(1, "auto", 1, 1)
        parallelize(model, layout, device(), compile=True, activation_checkpointing=mode)
    wrong, graphs = [], []
    ids = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    with kernel_on_cpu() as calls:
        for positions in PACKINGS:
            batch = {"input_ids": ids, "labels": ids.where(positions > 0, -100), "position_ids": positions}
            loss, reference = model(**batch).loss, expected(**batch, use_cache=False).loss
            loss.backward()
            reference.backward()
            if not abs(loss.item() - reference.item()) <= 1e-6 * reference.item():
                wrong.append(f"loss {loss.item()}, not {reference.item()}")
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(calls)) == len(PACKINGS)
    for (name, param), other in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        error = relative_error(param.grad.full_tensor(), grad_or_zero(other[1]))
        wrong += [f"gradient of {name}: {error:.1e}"] if not error < 1e-6 else []
    return wrong, graphs


@cpu_only
@pytest.mark.parametrize(
    ("mode", "backend"),
    [("none", "aot_eager"), ("full", "aot_eager"), pytest.param("full", "inductor", marks=pytest.mark.slow)],
)
def test_layers_are_compiled_once_for_any_number_of_documents(mode: str, backend: str) -> None:
    ((wrong, graphs),) = run_ranks(1, _compiled, mode, backend)
    assert not wrong
    assert graphs == [3] * len(PACKINGS)  # before and behind the experts, and the norm


# -------------------------------------------------------------------------------- who is told


def _told() -> list[str]:
    """The attention of models that have been parallelised here in fp32 and in bf16."""
    names = []
    for policy in (None, MixedPrecisionPolicy(param_dtype=torch.bfloat16)):
        model = tiny_model()
        parallelize(model, ParallelLayout.resolve(1, "auto", 1, 1), device(), mp_policy=policy)
        names.append(adapter.attention_implementation(model))
    return names


def test_bounds_are_told_where_the_kernel_runs() -> None:
    assert run_ranks(1, _told) == [["sdpa", "packed_sdpa" if on_cuda() else "sdpa"]]


@pytest.mark.parametrize(
    ("family", "overrides", "why_not"),
    [
        ("qwen3_moe", {}, None),
        ("mixtral", {"sliding_window": 3}, None),
        ("deepseek_v3", LATENT, None),
        ("glm4_moe", {"n_routed_experts": 4}, None),
        ("qwen2_moe", {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 0}, "does not tell"),
        ("gpt_oss", {}, "'eager'"),
        ("llama4_text", {}, "chunked_attention"),
        ("qwen3_next", {}, "does not go through"),
        ("qwen3_moe", {"attention_dropout": 0.1}, "dropout"),
    ],
)
def test_attention_that_a_mask_alone_describes_keeps_it(
    family: str, overrides: dict[str, Any], why_not: str | None
) -> None:
    with torch.device("meta"):
        model = from_config(AutoConfig.for_model(family, **{**SIZES, **overrides}))
    before = adapter.attention_implementation(model)
    found = adapter.why_not_bounds(model)
    assert found is None if why_not is None else why_not in (found or "")
    adapter.use_bounds_of_documents(model)
    assert adapter.attention_implementation(model) == ("packed_sdpa" if why_not is None else before)


ALL_TOLD = [
    "afmoe", "aria_text", "beam", "cohere2_moe", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe",
    "granitemoe", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "kolibri1", "laguna", "mellum", "minimax_m2",
    "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "solar_open",
    # the text in models of images, too
    "aria", "deepseek_ocr2", "ernie4_5_vl_moe", "glm4v_moe", "kimi_k25", "llava",
    "qwen3_omni_moe_thinker", "qwen3_vl_moe", "step3p7",
]  # fmt: skip


@cpu_only
@pytest.mark.slow
@pytest.mark.parametrize("family", ALL_TOLD)
def test_every_family_that_is_told_keeps_documents_apart(family: str) -> None:
    config = tiny_config_of(family)
    if getattr(config, "sliding_window", None):
        config.sliding_window = 3
    torch.manual_seed(0)
    model = auto_class_of(config).from_config(config, experts_implementation="eager").double().eval()
    for name, param in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(param, std=0.3)
    batch = packed_documents._batch()
    ids, positions = batch["input_ids"], batch["position_ids"]
    with torch.no_grad(), kernel_on_cpu() as calls:
        rows = zip(ids, packed_documents.ROWS, strict=True)
        apart = [model(document[None]).logits[0] for row, lengths in rows for document in row.split(lengths)]
        adapter.use_bounds_of_documents(model)
        adapter.keep_documents_apart(model)
        found = model(ids, position_ids=positions).logits.flatten(0, 1)
    assert len(calls) == config.get_text_config().num_hidden_layers
    torch.testing.assert_close(found, torch.cat(apart), rtol=1e-5, atol=1e-5)  # some route in fp32


def test_no_mask_is_made_and_nobody_asks_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    adapter.use_bounds_of_documents(model)
    adapter.keep_documents_apart(model)
    batch = packed_documents._batch()
    packing = adapter.packing_of(batch)
    assert packing is not None
    adapter.note_packing(batch, packing)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *_: pytest.fail("was asked"))
    monkeypatch.setattr(adapter.Packing, "of", lambda *_: pytest.fail("was read again"))
    monkeypatch.setattr(document_bounds, "documents_mask", lambda *_: pytest.fail("a mask was made"))
    with kernel_on_cpu() as calls:
        loss = model(**batch, attention_mask=None).loss
    assert calls == [(5, 4, 3, 7, 5)] * 2
    assert loss.item() == pytest.approx(packed_documents._apart(tiny_model()).item(), rel=1e-6)


def test_users_are_told_why_documents_cost_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(cost_warnings, "rank_zero_info", said.append)
    gpu, model = torch.device("cuda"), tiny_model()
    cost_warnings.say_if_documents_need_a_mask(model, torch.device("cpu"))
    assert not said
    cost_warnings.say_if_documents_need_a_mask(model, gpu)
    cost_warnings.say_if_documents_need_a_mask(tiny_model(attention_dropout=0.1), gpu)
    adapter.use_bounds_of_documents(model)
    cost_warnings.say_if_documents_need_a_mask(model, gpu)
    assert len(said) == 2
    assert "Qwen3MoeForCausalLM makes a mask" in said[0]
    assert said[0].endswith("it does not compute in bf16.")
    assert "dropout" in said[1]


def test_other_batches_are_attended_to_as_before() -> None:
    plain, model = tiny_model(), tiny_model()
    adapter.use_bounds_of_documents(model)
    adapter.keep_documents_apart(model)
    ids = packed_documents._batch()["input_ids"]
    left = torch.ones_like(ids)
    left[0, :4] = 0
    for extra in ({}, {"attention_mask": left}, {"position_ids": torch.arange(12)[None]}):
        with torch.no_grad():
            assert model(ids, **extra).logits.equal(plain(ids, **extra).logits)
    arguments: dict[str, Any] = {"attention_mask": left, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert model.generate(ids, **arguments).equal(plain.generate(ids, **arguments))
    assert "packed_sdpa" not in model.config.to_json_string()


def test_positions_of_one_row_are_those_of_all() -> None:
    model = tiny_model()
    adapter.use_bounds_of_documents(model)
    adapter.keep_documents_apart(model)
    ids, positions = packed_documents._batch()["input_ids"], _rows([5, 4, 3])
    wanted = tiny_model()(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(model(ids, position_ids=positions).logits, wanted)


@pytest.mark.parametrize("window", [None, 9, 500])
def test_the_mask_of_bounds_is_that_of_transformers(window: int | None) -> None:
    found = documents_mask(adapter.Packing.of(PACKED, None).bounds, 2, 128, window)
    wanted = adapter.causal_mask("sdpa", 2, 128, window, PACKED, None, torch.float32, torch.device("cpu"))
    assert found.equal(wanted)


@pytest.mark.parametrize(
    ("query", "value", "dropout", "serves"),
    [
        ((1, 2, 4, 64), 64, 0.0, True),
        ((1, 2, 4, 64), 32, 0.0, True),
        ((1, 2, 4, 64), 64, 0.1, False),
        ((1, 2, 4, 60), 60, 0.0, False),
        ((1, 2, 4, 320), 64, 0.0, False),
        ((1, 2, 4, 64), 128, 0.0, False),
    ],
)
def test_the_kernel_gets_what_it_can_do(query: Any, value: int, dropout: float, serves: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(packed_attention, "has_kernel", lambda *_: True)
    assert kernel_serves(torch.empty(query), torch.empty(*query[:3], value), dropout) == serves


def test_the_kernel_is_for_gpus_and_16_bits() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [has_kernel(cuda, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)] == [True, True, False]
    assert not has_kernel(cpu, torch.bfloat16)
