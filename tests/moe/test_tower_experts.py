"""Experts in a tower: ranks whose batch has no image, or fewer, enter their exchanges as often as the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_ep import ParallelLayout, parallelize
from tests.fsdp.test_optional_parts import OF_A_TOWER, TURNS, trains_like_one_process
from tests.multimodal import image_batch, multimodal_model, text_batch
from tests.ranks import assert_ranks_agree, device, here
from tests.reference import relative_error

FAMILY = "dots3_note"
# By window and micro-batch: which of two ranks have an image. Latent attention makes more of what two weights differ
# by, so none of these steps moves them.
_STAYS = 0.0


@pytest.mark.parametrize("mode", ["none", pytest.param("selective", marks=pytest.mark.slow), "full"])
def test_images_in_turns(mode: str) -> None:
    assert_ranks_agree(2, trains_like_one_process, FAMILY, TURNS, "nothing", mode, 1, False, _STAYS)


@pytest.mark.parametrize("change", ["the tower is frozen", OF_A_TOWER])
def test_what_is_frozen(change: str) -> None:
    assert_ranks_agree(2, trains_like_one_process, FAMILY, TURNS[:3], change, "none", 1, False, _STAYS)


def test_in_bf16() -> None:
    assert_ranks_agree(2, trains_like_one_process, FAMILY, TURNS[:2], "nothing", "full", 1, True, _STAYS)


@pytest.mark.slow
@pytest.mark.parametrize("replicate", [1, 2])
def test_with_experts_over_fsdp_and_copies(replicate: int) -> None:
    assert_ranks_agree(4, trains_like_one_process, FAMILY, TURNS, "nothing", "none", replicate, False, _STAYS)


@pytest.mark.slow
@pytest.mark.timeout(630)  # that of the ranks must come first
def test_compiled() -> None:
    arguments = (FAMILY, TURNS[:1], "nothing", "none", 1, False, _STAYS, True)
    assert_ranks_agree(2, trains_like_one_process, *arguments, timeout=600)


def _image_and_video(plain: Any, seed: int) -> dict[str, torch.Tensor]:
    """A batch that calls the tower twice: an image, and what stands for a video of as many patches."""
    batch = image_batch(FAMILY, plain, seed)
    image = batch["input_ids"] == plain.config.image_token_id
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][:, -int(image.sum()) :] = plain.config.video_token_id
    batch["labels"][:, -int(image.sum()) :] = -100
    return {
        **batch,
        "pixel_values_videos": batch["pixel_values"].flip(0),
        "video_grid_thw": batch["image_grid_thw"],
    }


def _several_on_one_rank(mode: Any) -> list[str]:
    rank, plain, model = dist.get_rank(), multimodal_model(FAMILY), multimodal_model(FAMILY)
    seconds = (text_batch(1), image_batch(FAMILY, plain, 1))
    pairs = [[here(_image_and_video(plain, 0)), here(second)] for second in seconds]
    plain.to(device())  # where ties break as in the other
    parallelize(model, ParallelLayout.resolve(2, 1, 2, 2), device(), activation_checkpointing=mode)
    wrong: list[str] = []
    for batches in pairs:
        with torch.no_grad():  # of validation
            found, expected = (one(**batches[rank], use_cache=False).loss for one in (model, plain))
        if relative_error(found, expected) > 1e-5:
            wrong.append("the loss without gradients")
        for batch in batches:
            plain(**batch, use_cache=False).loss.backward()
        model(**batches[rank], use_cache=False).loss.backward()
        for (name, param), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            if other.grad is None:
                continue
            assert param.grad is not None, name
            error = relative_error(param.grad.full_tensor(), other.grad)
            if error > 2e-5 and other.grad.norm() > 1e-6:
                wrong.append(f"{name}: {error:.1e}")
        model.zero_grad()
        plain.zero_grad()
    return wrong


@pytest.mark.parametrize("mode", ["none", "full"])
def test_one_rank_calls_the_tower_more_often(mode: str) -> None:
    assert_ranks_agree(2, _several_on_one_rank, mode)
