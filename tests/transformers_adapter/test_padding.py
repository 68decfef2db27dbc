"""Padding behind the tokens that count costs attention no mask, and makes no difference to them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ep import transformers_adapter as adapter
from lightning_ep.transformers_adapter import Packing, packing
from tests.hub import every_family
from tests.reference import VOCAB, family_model, relative_error, tiny_model

LENGTH = 12
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
LINEAR = {"num_experts": 4, "layer_types": ["linear_attention", "full_attention"], "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "window": {"sliding_window": 3, "use_sliding_window": True},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 3},
    "qwen3_next": LINEAR,
}


def _model(family: str, **config: Any) -> Any:
    torch.manual_seed(0)
    made = (
        tiny_model(**FAMILIES[family], **config)
        if family in ("qwen3_moe", "window")
        else family_model(family, {**SIZES, **FAMILIES[family], **config}, std=0.3)
    )
    return made.train()


def _batch(counts: list[list[int]]) -> dict[str, Tensor]:
    mask = torch.tensor(counts)
    ids = torch.randint(3, VOCAB, mask.shape, generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids.where(mask > 0, -100), "attention_mask": mask}


BEHIND = _batch([[1] * LENGTH, [1] * 7 + [0] * 5])
BEFORE = _batch([[1] * LENGTH, [0] * 5 + [1] * 7])


def _masks(model: Any) -> list[Any]:
    """What the model beneath the head makes masks of, from now on."""
    seen: list[Any] = []
    model.base_model.register_forward_pre_hook(
        lambda base, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    return seen


def _trained(model: Any, **batch: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    output = model(**batch)
    output.loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    return output.loss.detach(), output.logits.detach(), grads


@pytest.mark.parametrize("positions", [False, True], ids=["alone", "with positions"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_behind_costs_no_mask_and_changes_nothing(family: str, positions: bool) -> None:
    plain = _model(family)
    model = deepcopy(plain)
    adapter.keep_documents_apart(model)
    masks = _masks(model)
    batch = {**BEHIND, **({"position_ids": torch.arange(LENGTH).expand(2, -1)} if positions else {})}
    loss, logits, grads = _trained(model, **batch)
    expected, expected_logits, expected_grads = _trained(plain, **batch, use_cache=False)
    counts = BEHIND["attention_mask"].bool()
    assert masks == [None]
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert relative_error(logits[counts], expected_logits[counts]) < 1e-5
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert relative_error(grad, expected_grads[name]) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in every_family.FAMILIES if f not in ("diffusion_gemma", "qwen3_omni_moe")])
def test_padding_behind_changes_nothing_in_any_family_that_reads_a_text(family: str) -> None:
    torch.manual_seed(0)
    config = every_family.tiny_config_of(family)
    plain = every_family.auto_class_of(config).from_config(deepcopy(config)).float().eval()
    model = deepcopy(plain)
    adapter.keep_documents_apart(model)
    batch = {"input_ids": BEHIND["input_ids"], "attention_mask": BEHIND["attention_mask"], "use_cache": False}
    with torch.no_grad():
        found, expected = (m(**batch)[0][batch["attention_mask"].bool()] for m in (model, plain))
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_elsewhere_keeps_its_mask(family: str) -> None:
    plain = _model(family)
    model = deepcopy(plain)
    adapter.keep_documents_apart(model)
    masks = _masks(model)
    loss, _, _ = _trained(model, **BEFORE)
    assert all(mask is not None for mask in masks)
    assert loss == _trained(plain, **BEFORE, use_cache=False)[0]


def test_a_balancing_loss_leaves_padding_out_all_the_same() -> None:
    plain = _model("qwen3_moe", output_router_logits=True, router_aux_loss_coef=1.0)
    model = deepcopy(plain)
    adapter.keep_documents_apart(model)
    masks = _masks(model)
    # Routers choose for padding, too, and other experts than with a mask: none of it may be in the loss.
    loss = model(**BEHIND).aux_loss
    assert masks == [None]
    assert loss.item() == pytest.approx(plain(**BEHIND, use_cache=False).aux_loss.item(), rel=1e-6)
    everything = {**BEHIND, "attention_mask": torch.ones(2, LENGTH, dtype=torch.long)}
    assert loss.item() != pytest.approx(plain(**everything, use_cache=False).aux_loss.item(), rel=1e-3)


def test_a_call_that_fills_a_cache_keeps_its_mask() -> None:
    model = _model("qwen3_moe").eval()
    adapter.keep_documents_apart(model)
    masks = _masks(model)
    with torch.no_grad():
        model(**BEHIND)
        model(**BEHIND, use_cache=True)
        assert all(mask is not None for mask in masks)
        masks.clear()
        model(**BEHIND, use_cache=False)
    assert masks == [None]


def test_a_model_whose_tokens_see_what_is_behind_them_keeps_its_mask() -> None:
    model = _model("qwen3_moe")
    for layer in adapter.decoder_layers(model):
        layer.self_attn.is_causal = False
    adapter.keep_documents_apart(model)
    masks = _masks(model)
    model(**BEHIND)
    assert all(mask is not None for mask in masks)


def test_a_mask_that_the_host_has_read_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = {key: value.clone() for key, value in BEHIND.items()}
    found = adapter.packing_of(BEHIND)
    assert found == Packing()
    assert adapter.packing_of(BEFORE) == Packing(gaps=True)
    adapter.note_packing(moved, found)
    model = _model("qwen3_moe")
    adapter.keep_documents_apart(model)
    masks = _masks(model)
    monkeypatch.setattr(packing.Packing, "of", lambda *_: pytest.fail("was read again"))
    model(**moved)
    assert masks == [None]
