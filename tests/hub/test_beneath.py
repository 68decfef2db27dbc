"""A weight that adapters cannot be merged into is named before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ep import LoRA, add_adapter
from lightning_ep.hub.beneath import beneath
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.export import check_export
from tests.reference import tiny_model


def test_an_adapter_of_one_place_of_a_tied_weight_is_not_merged(tmp_path: Path) -> None:
    lora = LoRA(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    tied = add_adapter(tiny_model(tie_word_embeddings=True), lora)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight are one weight"):
        check_export(tied, tmp_path / "out", merge=True)  # type: ignore[arg-type]
    assert beneath(add_adapter(tiny_model(), lora)).problems == []  # type: ignore[arg-type]
    of_others = add_adapter(tiny_model(tie_word_embeddings=True), LoRA())
    assert beneath(of_others).problems == []  # type: ignore[arg-type]
