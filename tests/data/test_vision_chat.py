"""From rows with images to batches: what transformers makes of each conversation alone, packed; and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from lightning_ep.data import VisionChatDataModule
from lightning_ep.data.vision_windows import documents_in
from lightning_ep.loss import summed_loss
from lightning_ep.ops.cross_entropy import shifted
from lightning_ep.transformers_adapter import keep_documents_apart, load_processor
from tests.reference import relative_error
from tests.vision import asked, picture, plain_inputs, summed_plain_loss, vision_tokenizer, write_rows
from tests.vision import write_vision_checkpoint as write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    picture(path / "wide.png", (40, 24))
    picture(path / "square.png", (24, 24), 1)
    picture(path / "tall.jpg", (20, 70), 2)
    picture(path / "large.png", (90, 60), 3)  # more than max_pixels
    return path


def chats(folder: Path) -> list[list[dict[str, Any]]]:
    """One image, several, none, in later turns, of all shapes."""
    wide, square, tall, large = (folder / name for name in ("wide.png", "square.png", "tall.jpg", "large.png"))
    two_turns = [*asked(large, "What is it?", answer="A dog."), *asked("And this? ", square, answer="One more dog.")]
    return [
        asked(wide, "What is it?"),
        asked("Compare ", wide, " and ", tall, "!", answer="They differ in height."),
        asked("Hello there.", answer="Hi! How are you?"),
        two_turns,
        [{"role": "system", "content": "Be brief."}, *asked(square, square, "Equal?", answer="Yes.")],
    ]


def data(source: Any, checkpoint: Path, tmp_path: Path, **settings: Any) -> VisionChatDataModule:
    defaults: dict[str, Any] = {
        "sequence_length": 192,
        "batch_size": 2,
        "num_proc": 1,
        "num_workers": 0,
        "validation_fraction": 0.0,
        "tokenizer": str(checkpoint),
        "cache_dir": str(tmp_path / "cache"),
    }
    return VisionChatDataModule(str(source) if isinstance(source, Path) else source, **(defaults | settings))


def prepared(*args: Any, **settings: Any) -> VisionChatDataModule:
    module = data(*args, **settings)
    module.prepare_data()
    module.setup("fit")
    return module


def documents(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Tokens, labels and places of each document of a batch."""
    for row, ids in enumerate(batch["input_ids"]):
        places = batch["position_ids"][:, row]
        for begin, end in documents_in(places[0]):
            if end - begin > 1 and (batch["labels"][row, begin:end] != -100).any():
                cut = slice(begin, end)
                yield {"ids": ids[cut], "labels": batch["labels"][row, cut], "places": places[:, cut]}


def test_every_document_is_what_transformers_makes_of_it_alone(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    rows = chats(folder)
    source = write_rows(tmp_path / "rows.jsonl", rows)
    (batch,) = prepared(source, checkpoint, tmp_path, sequence_length=512, batch_size=1).train_dataloader()
    processor = load_processor(checkpoint, vision_tokenizer())
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    alone = {tuple(inputs["input_ids"][0].tolist()): inputs for row in rows if (inputs := plain_inputs(row, processor))}
    found = list(documents(batch))
    assert len(found) == len(rows) == len(alone)
    pixels, grids = [], []
    for document in found:
        inputs = alone[tuple(document["ids"].tolist())]
        assert document["labels"].tolist() == inputs["labels"][0].tolist()
        assert not (document["labels"] == model.config.image_token_id).any()
        assert document["places"][0].tolist() == list(range(len(document["ids"])))
        places = model.model.compute_3d_position_ids(
            inputs["input_ids"], None, inputs.get("image_grid_thw"), mm_token_type_ids=inputs["mm_token_type_ids"]
        )
        expected = document["places"][:1].expand(3, -1) if places is None else places[:, 0]
        assert document["places"][1:].tolist() == expected.tolist()
        if "pixel_values" in inputs:
            pixels.append(inputs["pixel_values"])
            grids.append(inputs["image_grid_thw"])
    assert torch.equal(batch["pixel_values"], torch.cat(pixels))
    assert torch.equal(batch["image_grid_thw"], torch.cat(grids))
    assert (batch["image_grid_thw"].prod(1) <= 16 * 4).all(), "max_pixels of the checkpoint"

    keep_documents_apart(model)
    given = {name: value for name, value in batch.items() if name != "labels"}
    loss, _ = summed_loss(model, shifted(batch["labels"]), given)
    loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters()}
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint)
    losses = [summed_plain_loss(plain, inputs) for inputs in alone.values()]
    assert relative_error(loss.detach(), torch.stack(losses).sum().detach()) <= 1e-5
    torch.stack(losses).sum().backward()
    for name, param in plain.named_parameters():
        assert relative_error(grads[name], param.grad) <= 1e-5, name
