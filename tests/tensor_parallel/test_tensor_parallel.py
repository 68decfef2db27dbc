"""Tensor parallelism: other models than the parity cases', what ranks share and send, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from transformers import PreTrainedModel

from lightning_ep import ExpertParallelStrategy, LoRA, ParallelLayout, add_adapter, parallelize
from lightning_ep.callbacks import GenerateSamples
from lightning_ep.ops import cross_entropy
from lightning_ep.ops.fused_experts import FusedExperts
from lightning_ep.tensor_parallel import tensor_plan
from lightning_ep.tensor_parallel.vocabulary import VocabularyHead, head_cross_entropy
from tests.multimodal import IMAGES, image_batch, multimodal_model, text_batch
from tests.parity import as_peft, assert_trains_like_one_process
from tests.ranks import assert_ranks_agree, device, here, run_ranks
from tests.reference import batches, family_model, grad_or_zero, relative_error, tiny_model
from tests.tiny import TinyModule, loader, quiet

MODELS = [
    {"causal": True, "accumulate": 1, "clip": 0.2, "overrides": {"mlp_only_layers": [0], "tie_word_embeddings": True}},
    {"causal": False, "accumulate": 1, "clip": 0.2, "overrides": {"attention_bias": True, "pad_token_id": 87}},
    {"causal": True, "accumulate": 2, "clip": 0.2, "overrides": {"mlp_only_layers": [1]}, "length": 11},
    {"causal": False, "accumulate": 3, "clip": 0.2, "precision": "bf16-mixed"},
    {"causal": True, "accumulate": 1, "clip": 0.2, "precision": "bf16-mixed"},
]


def test_models_lengths_and_precisions() -> None:
    assert_trains_like_one_process(2, {"ep": 2, "tp": 2}, MODELS)


@pytest.mark.slow
def test_compiled_layers_train_alike() -> None:
    case = {"causal": True, "accumulate": 1, "clip": 0.2, "compile": "inductor", "length": 11}
    layout = {"ep": 2, "tp": 2}
    assert_trains_like_one_process(2, layout, [case], timeout=110)


SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "pad_token_id": 0,
    "max_position_embeddings": 64,
}  # fmt: skip
_GROUPED = {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "topk_method": "greedy"}
_MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8},  # norms over all heads: its plan gathers and splits features
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},  # not in its plan
    "glm4_moe": _GROUPED,  # shared experts in its plan, a dense layer
    "deepseek_v2": {**_GROUPED, **_MLA},
}


def _family(family: str, **overrides: Any) -> PreTrainedModel:
    return family_model(family, {**SIZES, **FAMILIES.get(family, {}), **overrides})


def _layout(ep: int, tp: int) -> ParallelLayout:
    world = dist.get_world_size()
    return ParallelLayout.resolve(ep, "auto", world, world, tp=tp)


def _compare(expected: nn.Module, found: nn.Module) -> list[str]:
    wrong = []
    for (name, param), reference in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert name == reference[0]
        grad: Tensor = param.grad.full_tensor()
        wanted = reference[1].grad if reference[1].grad is not None else torch.zeros_like(reference[1])
        # Where the true gradient is all but zero (a key bias shifts every score alike) only noise is left.
        if not (relative_error(grad, wanted) <= 1e-5 or (grad.cpu() - wanted).norm() <= 1e-7):
            wrong.append(f"{name}: {relative_error(grad, wanted):.1e}")
    return wrong


def _gradients(family: str, overrides: dict[str, Any]) -> list[str]:
    """A loss that a user may have: of logits, of hidden states, of the router's balance, on padded sequences."""

    def loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
        mask = torch.ones_like(batch["input_ids"])
        mask[0, -3:] = 0
        output = model(**batch, attention_mask=mask, output_hidden_states=True, output_router_logits=True)
        total: Tensor = output.loss + sum(hidden.square().mean() for hidden in output.hidden_states)
        return total

    (batch,) = batches(1, 3, length=11)
    expected, model = _family(family, **overrides), _family(family, **overrides)
    reference = loss(expected, batch)
    reference.backward()
    layout = _layout(2, 2)
    parallelize(model, layout, device())
    found = loss(model, here(batch))
    (found / layout.loss_world_size).backward()
    wrong = _compare(expected, model)
    if not relative_error(found, reference) <= 1e-5:
        wrong.append(f"loss {found.item()} is not {reference.item()}")
    return wrong


@pytest.mark.parametrize("family", ["qwen3_moe", *FAMILIES])
def test_gradients_of_families_equal_one_process(family: str) -> None:
    overrides = {"num_experts": 8, "router_aux_loss_coef": 0.5} if family == "qwen3_moe" else {}
    assert_ranks_agree(2, _gradients, family, overrides)


def _gradients_and_texts(family: str, lora: bool) -> list[str]:
    """An image, if the family takes one; an odd length, padding, and what `generate` goes on with, if not."""

    def build() -> Any:
        model: Any = multimodal_model(family)
        if not lora:
            return model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return add_adapter(model, LoRA(r=3, lora_alpha=5, init_lora_weights=False, experts=True))

    plain, model = build(), build()
    prompt = {"input_ids": text_batch(1)["input_ids"][:, :5].to(device())}
    if family in IMAGES:
        batch = {**image_batch(family, multimodal_model(family), 0), "use_cache": False}
    else:
        batch = {key: value[:, :11] for key, value in text_batch(0, 2).items()}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, -3:] = 0
    reference = plain(**batch).loss
    reference.backward()
    layout = _layout(2, 2)
    parallelize(model, layout, device(), activation_checkpointing="full")
    found = model(**{key: value.to(device()) if torch.is_tensor(value) else value for key, value in batch.items()}).loss
    (found / layout.loss_world_size).backward()
    wanted = {name: grad_or_zero(param) for name, param in plain.named_parameters()}
    wrong = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            grad = as_peft(name, param.grad.full_tensor())
            if not (relative_error(grad, wanted[name]) <= 2e-5 or (grad.cpu() - wanted[name]).norm() <= 1e-6):
                wrong.append(f"{name}: {relative_error(grad, wanted[name]):.1e}")
    if not relative_error(found, reference) <= 1e-5:
        wrong.append(f"loss {found.item()} is not {reference.item()}")
    if family not in IMAGES:
        texts = [m.eval().generate(**prompt, max_new_tokens=5, do_sample=False).tolist() for m in (plain, model)]
        wrong += [] if texts[0] == texts[1] else [f"{texts[1]} in place of {texts[0]}"]
    return wrong


# Linear attention that is told no positions; sinks; features of a tower between layers (DeepStack).
@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("qwen3_next", False),
        ("mimo_v2_flash", True),
        ("qwen3_vl_moe", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("beam", False), ("qwen3_5_moe", False), ("glm4v_moe", False), ("qwen3_vl_moe", True))
        ),
    ],
)
def test_towers_sinks_and_linear_attention(family: str, lora: bool) -> None:
    assert_ranks_agree(2, _gradients_and_texts, family, lora)


def _value_head() -> list[str]:
    class Valued(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_model()
            torch.manual_seed(3)
            self.value = nn.Linear(32, 1)

        def forward(self, input_ids: Tensor) -> Tensor:
            output = self.model(input_ids, output_hidden_states=True)
            return self.value(output.hidden_states[-1]).square().mean() + output.logits.square().mean()

    ids = batches(1, 2)[0]["input_ids"]
    expected, module = Valued(), Valued()
    expected(ids).backward()
    layout = _layout(2, 2)
    parallelize(module, layout, device())
    (module(ids.to(device())) / layout.loss_world_size).backward()
    return _compare(expected, module)


def test_modules_beside_the_model_need_no_plan() -> None:
    assert_ranks_agree(4, _value_head)


def _loss_in_chunks(*arguments: Any) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "_CHUNK", 8)  # several chunks, the last one short
        return _loss(*arguments)


def _loss(tokens: int, ignored: int, dtype: torch.dtype, tolerance: float) -> list[str]:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(tokens + ignored)
    hidden = torch.randn(tokens, 16).to(dtype)
    head = nn.Linear(16, 40, bias=False, dtype=dtype)
    targets = torch.randint(0, 40, (tokens,))
    targets[torch.randperm(tokens)[:ignored]] = -100
    exact = [t.detach().double().requires_grad_() for t in (hidden, head.weight)]
    expected = F.cross_entropy(F.linear(*exact), targets, reduction="sum")
    (expected * 3).backward()
    mesh = init_device_mesh(device().type, (world,), mesh_dim_names=("tp",))
    parallelize_module(head.to(device()), mesh, VocabularyHead(None))
    hidden, targets = hidden.to(device()).requires_grad_(), targets.to(device())
    loss = head_cross_entropy(head, hidden, targets, -100)
    (loss * (3 if rank == 0 else 0)).backward()  # whatever each rank makes of it, the sum counts
    dist.all_reduce(hidden.grad)
    pairs = {"loss": (loss, expected), "hidden": (hidden.grad, exact[0].grad)}
    pairs["weight"] = (head.weight.grad.full_tensor(), exact[1].grad)
    wrong = [name for name, (found, wanted) in pairs.items() if not relative_error(found, wanted) <= tolerance]
    with torch.no_grad():
        if not torch.equal(head_cross_entropy(head, hidden, targets, -100), loss):
            wrong.append("without gradients")
        targets[:1] = 40
        if tokens and not head_cross_entropy(head, hidden, targets, -100).isnan():
            wrong.append("a target that does not exist")
    return wrong


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)]
)
@pytest.mark.parametrize(("tokens", "ignored"), [(21, 5), (21, 21), (0, 0)])
def test_the_loss_without_logits(tokens: int, ignored: int, dtype: torch.dtype, tolerance: float) -> None:
    assert_ranks_agree(2, _loss_in_chunks, tokens, ignored, dtype, tolerance)


def _memory_and_traffic() -> tuple[dict[str, int], int, list[int]]:
    received = 0
    computed = FusedExperts.forward

    def counting(self: FusedExperts, rows: Tensor, ids: Tensor, weights: Tensor, num_pairs: int, *args: Any) -> Any:
        nonlocal received
        received += num_pairs
        return computed(self, rows, ids, weights, num_pairs, *args)

    model = tiny_model(mlp_only_layers=[0], num_hidden_layers=3)
    parallelize(model, _layout(2, 2), device())
    shapes: list[int] = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[1]))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedExperts, "forward", counting)
        model(input_ids=batches(1, 3, length=10)[0]["input_ids"].to(device()))
    local = {name: param.to_local().numel() for name, param in model.named_parameters() if isinstance(param, DTensor)}
    return local, received, shapes


def test_each_token_goes_to_its_experts_once_and_matrices_are_split() -> None:
    ranks = run_ranks(2, _memory_and_traffic)
    tokens, top_k, moe_layers = 3 * 10, 4, 2
    assert sum(received for _, received, _ in ranks) == tokens * top_k * moe_layers
    assert [shapes for *_, shapes in ranks] == [[5], [5]]
    whole = {
        name: param.numel() for name, param in tiny_model(mlp_only_layers=[0], num_hidden_layers=3).named_parameters()
    }
    for local, *_ in ranks:
        kept = {name.split(".")[-2] for name, size in local.items() if size == whole[name]}
        assert kept == {"q_norm", "k_norm", "input_layernorm", "post_attention_layernorm", "norm", "gate"}


class _Numbers:
    """A tokenizer: prompts are numbers."""

    eos_token_id, pad_token_id = 127, 0

    def __call__(self, prompts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(number) for number in prompt.split()] for prompt in prompts]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return str(ids)


class _Samples(GenerateSamples):
    def _generate(self, *args: Any) -> list[str]:
        self.texts = super()._generate(*args)
        return self.texts


def _trainer_path(root: Path, ep: int, tp: int) -> dict[str, Any]:
    strategy = ExpertParallelStrategy(ep=ep, tp=tp)
    samples = _Samples(["5 6 7", "9 8 7 6 5"], max_new_tokens=6, temperature=0, tokenizer=_Numbers())
    trainer = quiet(root, strategy=strategy, callbacks=[samples])
    metrics = trainer.validate(TinyModule(), loader(8, batch_size=1), verbose=False)[0]
    predicted = quiet(root, strategy=ExpertParallelStrategy(ep=ep, tp=tp)).predict(TinyModule(), loader(9))
    return {
        "data_rank": strategy.data_rank,
        "val_loss": metrics["val_loss"],
        "texts": samples.texts,
        "predicted": sorted(torch.cat(predicted).tolist()),
    }


def test_validation_generation_and_prediction(tmp_path: Path) -> None:
    (alone,) = run_ranks(1, _trainer_path, tmp_path, 1, 1, init_process_group=False)
    ranks = run_ranks(4, _trainer_path, tmp_path, 2, 2, init_process_group=False)
    assert [rank["data_rank"] for rank in ranks] == [0, 0, 1, 1]
    assert ranks[0] == ranks[1], "peers return the same"
    assert ranks[2] == ranks[3], "peers return the same"
    assert sorted(ranks[0]["predicted"] + ranks[2]["predicted"]) == list(range(9)), "each sample once"
    for rank in ranks:
        assert rank["texts"] == alone["texts"]
        assert rank["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("family", "overrides", "tp", "message"),
    [
        ("qwen3_moe", {"num_experts": 8}, 4, r"tp=4 does not divide the 2 key/value heads of Qwen3MoeForCausalLM.*"
         r"expert parallelism is not: keep ep=4, fsdp=1 and use tp=2\."),
        ("qwen3_moe", {"num_experts": 8, "vocab_size": 127}, 2, r"vocabulary of 127.*pad_to_multiple_of=2"),
        ("qwen3_moe", {"num_experts": 8, "mlp_only_layers": [0], "intermediate_size": 49}, 2,
         r"does not divide the 49 output features of model\.layers\.0\.mlp\.gate_proj"),
        ("deepseek_v3", {**_GROUPED, **_MLA}, 2, "no tensor-parallel plan for attention.*use tp=1 with the same ep=4"),
        ("gpt_oss", {"num_local_experts": 8}, 2, "no tensor-parallel plan for attention"),
        ("minimax", {"num_local_experts": 8}, 2, r"its plan does not cover model\.layers\.\d\.self_attn"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(family: str, overrides: dict[str, Any], tp: int, message: str) -> None:
    layout = ParallelLayout.resolve(4, "auto", 4, 4, tp=tp)
    with pytest.raises(ValueError, match=message):
        tensor_plan(_family(family, **overrides), layout)


class _Subclass(nn.Linear):
    pass


def _adapter(base_layer: nn.Module) -> nn.Module:
    """As peft's: a class of torch's name that is none of its kind, around the layer."""
    adapter = type(type(base_layer).__name__, (nn.Module,), {"__module__": "peft.tuners.lora.layer"})()
    adapter.base_layer = base_layer
    adapter.weight = base_layer.weight
    adapter.lora_A, adapter.lora_B = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)
    return adapter


@pytest.mark.parametrize(
    ("name", "replace", "message"),
    [
        ("model.layers.1.self_attn.q_proj", _adapter,
         r"model\.layers\.1\.self_attn\.q_proj, which is an adapter \(peft\.tuners\.lora\.layer\.Linear\).*LoRA"),
        ("lm_head", _adapter, r"its head is an adapter \(peft\.tuners\.lora\.layer\.Linear\)"),
        ("model.embed_tokens", _adapter, r"its embedding is an adapter \(peft\.tuners\.lora\.layer\.Embedding\)"),
        ("model.layers.0.self_attn.o_proj", lambda base: _Subclass(32, 32),
         r"self_attn\.o_proj, which is tests\.tensor_parallel\.\w+\._Subclass, a subclass of nn\.Linear"),
        ("model.layers.0.self_attn.o_proj", lambda base: nn.Identity(), "Identity and not an nn.Linear"),
    ],
)  # fmt: skip
def test_layers_that_are_not_plain_are_refused_by_name_and_class(name: str, replace: Any, message: str) -> None:
    model = tiny_model()
    model.set_submodule(name, replace(model.get_submodule(name)))
    with pytest.raises(
        ValueError, match=message + ".*Expert parallelism needs no such plan: use tp=1 with the same ep=2"
    ):
        tensor_plan(model, ParallelLayout.resolve(2, "auto", 2, 2, tp=2))


def test_an_unknown_style_is_refused_by_name() -> None:
    model = tiny_model()
    model._tp_plan = {**model.tp_plan, "model.layers.*.self_attn.q_norm": "colwise_of_tomorrow"}
    with pytest.raises(ValueError, match=r"style 'colwise_of_tomorrow' \(model.layers.0.self_attn.q_norm\)"):
        tensor_plan(model, ParallelLayout.resolve(2, "auto", 2, 2, tp=2))


def test_heads_are_shared_by_tp_and_cp() -> None:
    layout = ParallelLayout.resolve(8, "auto", 8, 8, tp=2, cp=4)
    layout.check_key_value_heads(4, 2, "model")
    message = r"tp=2 times cp=4 is 8, which does not divide the 4 attention heads .* use tp=2, cp=2\."
    with pytest.raises(ValueError, match=message):
        layout.check_attention_heads(4, 2, "model")


def test_attention_weights_are_refused() -> None:
    for message in run_ranks(2, _attention_weights):
        assert "output_attentions=True" in message


def _attention_weights() -> str:
    model = _family("qwen3_moe", num_experts=8)
    parallelize(model, _layout(2, 2), device())
    with pytest.raises(ValueError, match="tensor parallelism does not gather") as caught:
        model(input_ids=batches(1, 1)[0]["input_ids"].to(device()), output_attentions=True)
    return str(caught.value)
