"""Transformers models without experts beside one with: a teacher, a tower of one's own, a reward model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen3Config,
    Qwen3Model,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from lightning_ep import ParallelLayout, parallelize
from tests.ranks import assert_ranks_agree, device
from tests.reference import VOCAB, batches, relative_error, tiny_model

_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": VOCAB,
}
_SOUND: dict[str, Any] = {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (3,), "num_feat_extract_layers": 1}
_SOUND |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}


def _dense(kind: str) -> nn.Module:
    if kind == "bert":  # declares that its embeddings, with the input embedding inside, are one block
        return BertModel(BertConfig(**_SIZES), add_pooling_layer=False)
    if kind == "clip":  # so it does, and what its input embedding is called with are pixels
        return CLIPVisionModel(CLIPVisionConfig(**_SIZES, image_size=8, patch_size=4))
    if kind == "wav2vec2":  # says that it has no input embedding
        return Wav2Vec2Model(Wav2Vec2Config(**_SIZES, **_SOUND))
    return Qwen3Model(Qwen3Config(**_SIZES, num_key_value_heads=2, head_dim=8))


class _Both(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model = tiny_model()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.dense = _dense(kind)
        self.kind = kind

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        found = self.model(input_ids=ids, labels=labels, output_hidden_states=True)
        values = ids / VOCAB
        inputs = {"pixel_values": values[:, :1, None, None].expand(-1, 3, 8, 8)} if self.kind == "clip" else {}
        inputs |= {"input_values": values.repeat(1, 4)} if self.kind == "wav2vec2" else {}
        seen = self.dense(**inputs or {"input_ids": ids}).last_hidden_state.mean(1)
        return found.loss + (found.hidden_states[-1][:, -1, :16] * seen).mean()


def _gradients(kind: str, mode: Any) -> list[str]:
    data = batches(dist.get_world_size(), 2)
    plain = _Both(kind).eval()  # nothing is dropped
    sharded = copy.deepcopy(plain)
    sum(plain(*batch.values()) for batch in data).backward()  # type: ignore[union-attr]
    parallelize(sharded, ParallelLayout(2, ep=2), device(), activation_checkpointing=mode)
    sharded(*(tensor.to(device()) for tensor in data[dist.get_rank()].values())).backward()
    wrong = []
    for (name, param), reference in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        if reference.grad is None:  # Wav2Vec2's vector for masks
            continue
        found = param.grad.full_tensor().cpu()  # type: ignore[union-attr]
        if (error := relative_error(found, reference.grad)) > 1e-5 and (found - reference.grad).norm() > 1e-6:
            wrong.append(f"{name}: {error:.1e}")
    return wrong


@pytest.mark.parametrize(
    ("kind", "mode"), [("bert", "none"), ("clip", "none"), ("wav2vec2", "none"), ("qwen3", "full"), ("bert", "full")]
)
def test_gradients_of_a_dense_model_beside_equal_one_process(kind: str, mode: str) -> None:
    assert_ranks_agree(2, _gradients, kind, mode)
