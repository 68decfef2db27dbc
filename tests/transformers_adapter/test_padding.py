"""Padding behind the tokens that count costs attention no mask, and makes no difference to them."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ep import ExpertParallelStrategy
from lightning_ep import transformers_adapter as adapter
from lightning_ep.context_parallel import Documents, find_documents
from lightning_ep.transformers_adapter import Packing
from tests.hub import every_family
from tests.ranks import run_ranks
from tests.reference import VOCAB, family_model, relative_error, tiny_model
from tests.tiny import TinyModule, quiet

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


def _both(family: str, **config: Any) -> tuple[Any, Any, list[Any]]:
    """A model as it is, a copy that keeps documents apart, and what the latter makes masks of."""
    plain = _model(family, **config)
    model = deepcopy(plain)
    adapter.keep_documents_apart(model)
    return plain, model, _masks(model)


def _with_positions(batch: dict[str, Tensor], positions: bool) -> dict[str, Tensor]:
    return {**batch, "position_ids": torch.arange(LENGTH).expand(2, -1)} if positions else batch


def _noted(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of a batch that was read on the host, as the strategy reads it."""
    moved = {key: value.clone() for key, value in batch.items()}
    found = adapter.packing_of(batch)
    assert found is not None
    adapter.note_packing(moved, found)
    return moved


def _trained(model: Any, **batch: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    output = model(**batch)
    output.loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    return output.loss.detach(), output.logits.detach(), grads


@pytest.mark.parametrize("positions", [False, True], ids=["alone", "with positions"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_behind_costs_no_mask_and_changes_nothing(family: str, positions: bool) -> None:
    plain, model, masks = _both(family)
    batch = _with_positions(BEHIND, positions)
    loss, logits, grads = _trained(model, **_noted(batch))
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
    batch: dict[str, Any] = {"input_ids": BEHIND["input_ids"], "attention_mask": BEHIND["attention_mask"]}
    noted = {**_noted(batch), "use_cache": False}
    batch["use_cache"] = False
    with torch.no_grad():
        found, expected = (m(**b)[0][batch["attention_mask"].bool()] for m, b in ((model, noted), (plain, batch)))
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_elsewhere_keeps_its_mask(family: str) -> None:
    plain, model, masks = _both(family)
    loss, _, _ = _trained(model, **_noted(BEFORE))
    assert all(mask is not None for mask in masks)
    assert loss == _trained(plain, **BEFORE, use_cache=False)[0]


def test_a_balancing_loss_leaves_padding_out_all_the_same() -> None:
    plain, model, masks = _both("qwen3_moe", output_router_logits=True, router_aux_loss_coef=1.0)
    # Routers choose for padding, too, and other experts than with a mask: none of it may be in the loss.
    loss = model(**_noted(BEHIND)).aux_loss
    assert masks == [None]
    assert loss.item() == pytest.approx(plain(**BEHIND, use_cache=False).aux_loss.item(), rel=1e-6)
    everything = {**BEHIND, "attention_mask": torch.ones(2, LENGTH, dtype=torch.long)}
    assert loss.item() != pytest.approx(plain(**everything, use_cache=False).aux_loss.item(), rel=1e-3)


def test_a_call_that_fills_a_cache_keeps_its_mask() -> None:
    model = _model("qwen3_moe").eval()
    adapter.keep_documents_apart(model)
    masks = _masks(model)
    batch = _noted(BEHIND)
    with torch.no_grad():
        model(**batch)
        model(**batch, use_cache=True)
        assert all(mask is not None for mask in masks)
        masks.clear()
        model(**batch, use_cache=False)
    assert masks == [None]


def test_a_model_whose_tokens_see_what_is_behind_them_keeps_its_mask() -> None:
    model = _model("qwen3_moe")
    for layer in adapter.decoder_layers(model):
        layer.self_attn.is_causal = False
    adapter.keep_documents_apart(model)
    masks = _masks(model)
    model(**_noted(BEHIND))
    assert all(mask is not None for mask in masks)


def test_a_mask_that_nobody_has_read_or_that_was_changed_stays() -> None:
    _, model, masks = _both("qwen3_moe")
    batch = _noted(BEHIND)
    model(**batch)
    assert masks.pop() is None
    batch["attention_mask"][1, 0] = 0
    model(**batch)
    assert masks.pop() is not None
    model(**BEHIND)
    assert masks.pop() is not None


@pytest.mark.parametrize("positions", [False, True], ids=["alone", "with positions"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_that_is_learnt_keeps_its_mask(family: str, positions: bool) -> None:
    plain, model, masks = _both(family)
    batch = _with_positions({**BEHIND, "labels": BEHIND["input_ids"].clone()}, positions)
    assert adapter.packing_of(batch) == Packing(gaps=True)
    loss = model(**_noted(batch)).loss
    assert masks[0] is not None
    assert loss.item() == pytest.approx(plain(**batch, use_cache=False).loss.item(), rel=1e-6)


def test_padding_that_is_learnt_needs_a_mask_where_sequences_are_split() -> None:
    mask = torch.tensor([[1, 1, 0]])
    assert find_documents(None, mask, torch.tensor([[3, 4, -100]])).plain
    assert find_documents(None, mask, torch.tensor([[3, 4, 5]])) == Documents(gaps=True)


class _Padded(TinyModule):
    """Passes whole batches on."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.masks: list[Any] = []

    def configure_model(self) -> None:
        if self.model is None:
            self.model = _model("qwen3_moe")

    def on_train_start(self) -> None:
        self.masks = _masks(self.model)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss


def _fit(root: Path) -> tuple[list[bool], list[float]]:
    learnt = {**BEHIND, "labels": BEHIND["input_ids"].clone()}
    module = _Padded()
    trainer = quiet(root, strategy=ExpertParallelStrategy(ep=2), max_steps=3, use_distributed_sampler=False)
    trainer.fit(module, DataLoader([BEHIND, BEFORE, learnt], batch_size=None))  # type: ignore[arg-type]
    return [mask is None for mask in module.masks], module.losses


def test_a_run_leaves_out_the_masks_of_batches_that_it_has_read(tmp_path: Path) -> None:
    plain = _model("qwen3_moe")
    learnt = {**BEHIND, "labels": BEHIND["input_ids"].clone()}
    expected = [plain(**batch, use_cache=False).loss.item() for batch in (BEHIND, BEFORE, learnt)]
    for left_out, losses in run_ranks(2, _fit, tmp_path, init_process_group=False):
        assert left_out == [True, False, False]
        assert losses == pytest.approx(expected, rel=1e-5)
