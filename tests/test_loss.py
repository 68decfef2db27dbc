"""The summed token loss of whole models, with and without their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_moe import Qwen3MoeForCausalLM

from lightning_ep import loss as module
from lightning_ep import transformers_adapter as adapter
from lightning_ep.loss import summed_loss, token_losses
from lightning_ep.ops.cross_entropy import shifted
from tests.reference import batches, grad_or_zero, relative_error, tiny_config, tiny_model


class _Capped(Qwen3MoeForCausalLM):
    """As Gemma does: what the head gives is not what the loss gets."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits / 5) * 5
        return output


def _batch() -> tuple[Tensor, dict[str, Tensor]]:
    batch = batches(3, 2, padded=True)[2]
    return shifted(batch["labels"]), {"input_ids": batch["input_ids"]}


def _gradients(model: Qwen3MoeForCausalLM, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [grad_or_zero(param) for param in model.parameters()]


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_without_logits_is_that_of_the_logits(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    targets, inputs = _batch()
    losses, _ = token_losses(model, targets, inputs)
    expected = _gradients(model, losses.sum())
    monkeypatch.setattr(module, "token_losses", None)  # the plain path must not be taken
    loss, _ = summed_loss(model, targets, inputs)
    assert relative_error(loss, losses.sum()) < 1e-6
    for found, grad in zip(_gradients(model, loss), expected, strict=True):
        assert relative_error(found, grad) < 1e-5
    assert model.get_output_embeddings() is model.lm_head
    with torch.no_grad():
        assert relative_error(summed_loss(model, targets, inputs)[0], losses.sum()) < 1e-6


@pytest.mark.parametrize("loss_of", [summed_loss, token_losses])
def test_only_rows_with_positions_are_searched_for_packed_sequences(loss_of: Any, monkeypatch: Any) -> None:
    """The search makes the host wait for a GPU; without positions there is nothing to be found."""
    model = tiny_model()
    ids = batches(1, 2, length=6)[0]["input_ids"]
    targets = shifted(ids)
    apart = loss_of(model, targets, {"input_ids": ids})[0].sum()
    positions = torch.arange(6).repeat(2)[None]
    packed = loss_of(model, targets.view(1, 12), {"input_ids": ids.view(1, 12), "position_ids": positions})[0].sum()
    assert relative_error(packed, apart) < 1e-6
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", None)
    assert relative_error(loss_of(model, targets, {"input_ids": ids})[0].sum(), apart) < 1e-6


def test_a_model_that_changes_its_logits_keeps_them() -> None:
    model = _Capped(tiny_config())
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    targets, inputs = _batch()
    losses, _ = token_losses(model, targets, inputs)
    for _ in range(2):
        loss, _ = summed_loss(model, targets, inputs)
        assert relative_error(loss, losses.sum()) < 1e-6
    assert torch.nonzero(losses).numel() > 0


class _Casting(Qwen3MoeForCausalLM):
    """As HunYuan does: the forward asks the head for its dtype."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lm_head.weight.dtype == torch.float32
        return super().forward(*args, **kwargs)


def test_the_head_keeps_its_weight_and_its_hooks() -> None:
    model = _Casting(tiny_config())
    targets, inputs = _batch()
    losses, _ = token_losses(model, targets, inputs)
    loss, _ = summed_loss(model, targets, inputs)
    head = adapter.recall(model, module._Head)
    assert head is not None
    assert head.gives_the_logits
    assert relative_error(loss, losses.sum()) < 1e-6
    # A hook that changes what the head gives takes the plain path, and is not lost.
    model.lm_head.register_forward_hook(lambda head, args, logits: logits * 3)
    losses, _ = token_losses(model, targets, inputs)
    assert relative_error(summed_loss(model, targets, inputs)[0], losses.sum()) < 1e-6
    assert relative_error(loss, losses.sum()) > 1e-3


def test_a_head_with_a_bias_keeps_its_logits() -> None:
    model = tiny_model()
    model.lm_head = torch.nn.Linear(32, 128)
    targets, inputs = _batch()
    losses, _ = token_losses(model, targets, inputs)
    assert relative_error(summed_loss(model, targets, inputs)[0], losses.sum()) < 1e-6


def test_shifted_labels_end_without_a_target() -> None:
    assert shifted(torch.tensor([[1, 2, -100, 3]])).tolist() == [[2, -100, 3, -100]]
