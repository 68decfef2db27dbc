"""From rows with images to batches: what transformers makes of each conversation alone, packed; and what is refused."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from jsonargparse import ArgumentParser
from PIL import Image as Pictures
from torch import Tensor
from transformers import AutoModelForImageTextToText

from lightning_ep import CausalLM
from lightning_ep.callbacks import GradeAnswers
from lightning_ep.data import ChatDataModule, VisionChatDataModule, vision_chat
from lightning_ep.data.conversations import MalformedRow
from lightning_ep.data.preview import preview
from lightning_ep.data.vision_windows import documents_in
from lightning_ep.loss import summed_loss
from lightning_ep.ops.cross_entropy import shifted
from lightning_ep.transformers_adapter import (
    MediaPositions,
    is_told_documents,
    keep_documents_apart,
    load_processor,
    use_bounds_of_documents,
)
from tests.data.test_chat import fitted
from tests.hub.every_family import tiny_config_of
from tests.ranks import REPOSITORY
from tests.reference import relative_error
from tests.vision import (
    asked,
    picture,
    plain_inputs,
    summed_plain_loss,
    vision_tokenizer,
    write_rows,
    write_vision_checkpoint,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_checkpoint(tmp_path_factory.mktemp("hub") / "tiny")


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
        "batch_size": 1,
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


@pytest.mark.parametrize("bounds", [False, True])
def test_every_document_is_what_transformers_makes_of_it_alone(
    bounds: bool, checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    rows = chats(folder)
    source = write_rows(tmp_path / "rows.jsonl", rows)
    (batch,) = prepared(source, checkpoint, tmp_path, sequence_length=512).train_dataloader()
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

    loss, grads = told(model, batch, bounds)
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint)
    losses = [summed_plain_loss(plain, inputs) for inputs in alone.values()]
    assert relative_error(loss, torch.stack(losses).sum().detach()) <= 1e-5
    torch.stack(losses).sum().backward()
    for name, param in plain.named_parameters():
        assert relative_error(grads[name], param.grad) <= 1e-5, name


def told(model: Any, batch: dict[str, Tensor], bounds: bool) -> tuple[Tensor, dict[str, Any]]:
    """Loss of a packed batch whose documents are kept apart, by bounds as where the kernel runs, and its gradients."""
    keep_documents_apart(model)
    if bounds:
        use_bounds_of_documents(model)
        assert is_told_documents(model)
    given = {name: value for name, value in batch.items() if name != "labels"}
    loss, _ = summed_loss(model, shifted(batch["labels"]), given)
    loss.backward()
    return loss.detach(), {name: param.grad for name, param in model.named_parameters()}


def same_windows(module: VisionChatDataModule, number: int) -> dict[str, Tensor]:
    """One of the first windows, which must all be the same."""
    first, *others = (module.train_dataset[index] for index in range(number))
    for window in others:
        assert all(torch.equal(window[name], first[name]) for name in first)
    return first


def the_batch(rows: list[Any], checkpoint: Path, tmp_path: Path, **settings: Any) -> dict[str, Tensor]:
    source = write_rows(tmp_path / "rows.jsonl", rows)
    return next(iter(prepared(source, checkpoint, tmp_path, **settings).train_dataloader()))


def test_every_way_to_give_an_image(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    file = folder / "wide.png"
    data_url = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    answer = {"role": "assistant", "content": "A cat."}
    what = {"type": "text", "text": "What is it?"}
    rows = [
        asked(file, "What is it?"),
        {"images": [str(file)], "messages": [{"role": "user", "content": "<image>What is it?"}, answer]},
        {"image": str(file), "messages": [{"role": "user", "content": [{"type": "image"}, what]}, answer]},
        {"conversations": [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A cat."}]}
        | {"image": str(file)},
    ]
    for part in (
        {"type": "image_url", "image_url": {"url": data_url}},
        {"type": "image", "path": str(file)},
        {"type": "image", "url": f"file://{file}"},
    ):
        rows.append([{"role": "user", "content": [part, what]}, answer])
    parts = prepared(write_rows(tmp_path / "rows.jsonl", rows), checkpoint, tmp_path, pack=False)
    found = same_windows(parts, len(rows))
    relative = prepared(
        write_rows(tmp_path / "relative.jsonl", [asked(Path("wide.png"), "What is it?")] * 2),
        checkpoint,
        tmp_path,
        image_folder=str(folder),
    )
    assert torch.equal(relative.train_dataset[0]["pixel_values"][:60], found["pixel_values"])


def test_columns_of_images_of_datasets_and_parquet(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    messages = [asked(folder / "wide.png", "What is it?")[0] | {"content": "<image>What is it?"}, {"role": "assistant"}]
    messages[1]["content"] = "A cat."
    features = Features(
        {"images": List(Image()), "messages": List({"role": Value("string"), "content": Value("string")})}
    )
    columns = {"images": [[str(folder / "wide.png")], []], "messages": [messages, chats(folder)[2]]}
    columns["messages"][1][0]["content"] = "Hello there."
    dataset = Dataset.from_dict(columns, features)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "rows.parquet")  # with the bytes inside
    (saved, parquet) = (
        prepared(tmp_path / name, checkpoint, tmp_path).train_dataset[0] for name in ("saved", "rows.parquet")
    )
    expected = the_batch([asked(folder / "wide.png", "What is it?"), chats(folder)[2]], checkpoint, tmp_path)
    for window in (saved, parquet):
        assert torch.equal(window["pixel_values"], expected["pixel_values"])
        assert sorted(window["input_ids"].tolist()) == sorted(expected["input_ids"][0].tolist())


_URL = "data:image/png;base64,"
MALFORMED = {
    "there is no file": lambda folder: asked(folder / "no.png", "?"),
    "broken.png cannot be decoded": lambda folder: asked(folder / "broken.png", "?"),
    "cut.jpg cannot be decoded": lambda folder: asked(folder / "cut.jpg", "?"),
    "odd.dds cannot be decoded": lambda folder: asked(folder / "odd.dds", "?"),
    "cannot be opened: embedded null byte": lambda folder: [user({"type": "image", "image": "a\0.png"})],
    "(9,": lambda folder: [user({"type": "image", "image": "a" * 9000})],
    "has the columns 'images' and 'image'": lambda folder: {**_column(folder, 1, "<image>?"), "image": "b.png"},
    "cannot be decoded as an image": lambda folder: [
        user({"type": "image", "image": "data:image/png;base64,aGVsbG8="})
    ],
    "is a data URL, and not base64": lambda folder: [user({"type": "image", "image": "data:image/png;base64,!"})],
    "is on the network. Download it": lambda folder: [user({"type": "image", "image": "https://x.org/a.png"})],
    "an image is a path, bytes or a data URL, not int": lambda folder: [user({"type": "image", "image": 3})],
    "has 2 images, and its messages have 1 places": lambda folder: _column(folder, 2, "<image>What?"),
    "a place for image 2 of the row, which has 1": lambda folder: _column(folder, 1, "<image><image>What?"),
    "has the type 'video', and videos are not read": lambda folder: [user({"type": "video", "video": "a.mp4"})],
    "an image is in what the assistant says": lambda folder: [
        user({"type": "text", "text": "Draw."}),
        user({"type": "image", "image": str(folder / "wide.png")}) | {"role": "assistant"},
    ],
    "writes 1 times '<|image_pad|>', where an image belongs": lambda folder: asked("Say <|image_pad|>"),
    "writes 2 times '<|image_pad|>'": lambda folder: asked(folder / "wide.png", "?", answer="<|image_pad|>"),
    "it says '<|video_pad|>'": lambda folder: asked("Say <|video_pad|>"),
    "aspect ratio": lambda folder: asked(folder / "thin.png", "?"),
}


def user(part: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [part]}


def of_column(name: str, file: Path, number: int, text: str) -> dict[str, Any]:
    """A row with a file, so many times, in a column of that name."""
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "A cat."}]
    return {name: [str(file)] * number, "messages": messages}


def _column(folder: Path, number: int, text: str) -> dict[str, Any]:
    return of_column("images", folder / "wide.png", number, text)


def check_refused(message: str, row: Any, good: list[Any], checkpoint: Path, tmp_path: Path) -> None:
    """A row between good ones must be refused with its line and that message, or skipped where that is asked for."""
    source = write_rows(tmp_path / "rows.jsonl", [*good, row, *good])
    with pytest.raises(MalformedRow, match=f"^{source}:2: ") as refused:
        data(source, checkpoint, tmp_path).prepare_data()
    assert message in str(refused.value)
    skipping = prepared(source, checkpoint, tmp_path, malformed="skip")
    assert skipping.counts["train"]["dropped"] == {"malformed rows": 1}
    assert skipping.counts["train"]["documents"] == 2


@pytest.mark.parametrize("message", MALFORMED)
def test_malformed_rows_are_refused_with_their_line(
    message: str, checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    (folder / "broken.png").write_bytes((folder / "wide.png").read_bytes()[:300])
    (folder / "cut.jpg").write_bytes((folder / "tall.jpg").read_bytes()[:-200])
    odd = picture(folder / "odd.dds", (40, 24))
    odd.write_bytes(odd.read_bytes()[:80] + b"\0\0\0\xff" + odd.read_bytes()[84:])  # Pillow: NotImplementedError
    Pictures.new("RGB", (1000, 2)).save(folder / "thin.png")
    check_refused(message, MALFORMED[message](folder), chats(folder)[:1], checkpoint, tmp_path)


def test_an_image_that_has_changed_since_is_named(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    file = picture(tmp_path / "new.png", (24, 24))
    module = prepared(write_rows(tmp_path / "rows.jsonl", [asked(file, "?")] * 2), checkpoint, tmp_path)
    picture(file, (40, 24))
    with pytest.raises(MalformedRow, match=r"rows.jsonl:1: .*new.png has 40 x 24 pixels, and had 24 x 24"):
        module.train_dataset[0]


def test_an_image_that_is_gone_since_is_named(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    file = picture(tmp_path / "gone.png", (24, 24))
    module = prepared(write_rows(tmp_path / "rows.jsonl", [asked(file, "?")] * 2), checkpoint, tmp_path)
    file.unlink()
    with pytest.raises(MalformedRow, match=r"rows.jsonl:1: messages\[0\]: content\[0\]: there is no file .*gone.png"):
        module.train_dataset[0]


def test_long_conversations_lose_whole_turns_with_their_images(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    wide, square = folder / "wide.png", folder / "square.png"
    long = [*asked(wide, wide, "Both?"), *asked(square, "This?", answer="A dog.")]
    source = write_rows(tmp_path / "rows.jsonl", [long] * 2)
    module = prepared(source, checkpoint, tmp_path, sequence_length=64)
    assert list(module.counts["train"]["notes"].values()) == [2]
    window, end = module.train_dataset[0], "A dog.<|im_end|>\n"
    kept = plain_inputs(long[2:], load_processor(checkpoint, vision_tokenizer()))
    assert window["input_ids"].tolist()[: kept["input_ids"].shape[1]] == kept["input_ids"][0].tolist()
    assert torch.equal(window["pixel_values"], kept["pixel_values"])
    assert end in module.tokenizer.decode(window["input_ids"])
    dropped = prepared(source, checkpoint, tmp_path, sequence_length=40, malformed="skip")
    assert dropped.counts["train"]["dropped"] == {}
    with pytest.raises(ValueError, match="0 training windows"):  # an image alone is longer: nothing is cut
        prepared(source, checkpoint, tmp_path, sequence_length=12)


def test_pixels_are_bounded_and_go_with_the_model(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [asked(folder / "large.png", "What is it?")] * 2)
    module = prepared(source, checkpoint, tmp_path, max_pixels=6 * 64, min_pixels=64)
    assert (module.train_dataset[0]["image_grid_thw"].prod(1) <= 6 * 4).all()
    module.saved_with_model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    assert saved["size"] == {"shortest_edge": 64, "longest_edge": 6 * 64}
    processor = load_processor(tmp_path / "saved", vision_tokenizer())
    again = processor.image_processor(images=[Pictures.open(folder / "large.png")], return_tensors="pt")
    assert torch.equal(again["pixel_values"], module.train_dataset[0]["pixel_values"][: len(again["pixel_values"])])
    with pytest.raises(ValueError, match="set both min_pixels and max_pixels"):
        data(source, checkpoint, tmp_path, max_pixels=32).prepare_data()


def test_a_checkpoint_without_a_processor_is_refused(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    vision_tokenizer().save_pretrained(tmp_path / "text")
    source = write_rows(tmp_path / "rows.jsonl", chats(folder))
    with pytest.raises(ValueError, match="has no processor that gives images places in a text"):
        data(source, tmp_path / "text", tmp_path).prepare_data()


def test_conversations_without_images_become_what_chats_become(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    rows = [[*asked("Hello.", answer="Hi!"), *asked(f"Number {number}?", answer="Yes.")] for number in range(4)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    settings: dict[str, Any] = {"sequence_length": 192, "num_proc": 1, "validation_fraction": 0.0}
    plain = ChatDataModule(str(source), tokenizer=str(checkpoint), cache_dir=str(tmp_path / "cache"), **settings)
    plain.prepare_data()
    plain.setup("fit")
    module = prepared(source, checkpoint, tmp_path)
    for index in range(len(plain.train_dataset)):
        ours, theirs = module.train_dataset[index], plain.train_dataset[index]
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        assert torch.equal(ours["labels"], theirs["labels"])
        assert torch.equal(ours["position_ids"], theirs["position_ids"].expand(4, -1))
        assert "pixel_values" not in ours


def test_a_preview_shows_a_run_of_placeholders_as_its_length(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    module = data(write_rows(tmp_path / "rows.jsonl", chats(folder)), checkpoint, tmp_path)
    module.trains = CausalLM(str(checkpoint))
    shown = "\n".join(preview(module, colour=False))
    assert "<|vision_start|><|image_pad|> x 15<|vision_end|>What is it?<|im_end|>" in shown
    assert "⟦They differ in height.<|im_end|>⟧" in shown
    assert "<|image_pad|><|image_pad|>" not in shown


def test_answers_to_questions_with_images_are_not_graded(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", chats(folder))
    with pytest.raises(
        ValueError, match="asks with texts alone, and the questions of VisionChatDataModule have images"
    ):
        fitted(CausalLM(str(checkpoint)), data(source, checkpoint, tmp_path), tmp_path, callbacks=[GradeAnswers()])


def test_a_module_that_does_not_exist_cannot_be_frozen(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", chats(folder))
    with pytest.raises(ValueError, match=r"no module 'model.visuals'.*model.visual"):
        fitted(CausalLM(str(checkpoint), freeze=["model.visuals"]), data(source, checkpoint, tmp_path), tmp_path)


def test_the_page_says_what_can_be_read_and_what_a_preview_shows(
    checkpoint: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    page = (REPOSITORY / "docs" / "start" / "images.md").read_text()
    page = page[: page.index("## Sound")]
    blocks = dict(re.findall(r"```(json|yaml|)\n(.*?)```", page[: page.index("## Training")], re.S))
    (tmp_path / "my_chats.jsonl").write_text(blocks["json"])
    picture(tmp_path / "cat.png", (40, 24))
    (settings,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    parser = ArgumentParser()
    parser.add_subclass_arguments(CausalLM, "model")
    parser.add_subclass_arguments(VisionChatDataModule, "data")
    built = parser.instantiate(parser.parse_string(settings))
    assert built.model._freeze == ["model.visual"]
    module = built.data
    assert (module.min_pixels, module.max_pixels) == (64 * 1024, 1024 * 1024)
    small = {"min_pixels": None, "max_pixels": None, "cache_dir": str(tmp_path / "cache"), "num_proc": 1}
    for name, value in {**small, "source": str(tmp_path / "my_chats.jsonl"), "validation_fraction": 0.0}.items():
        setattr(module, name, value)
    module.trains = CausalLM(str(checkpoint))
    assert blocks[""].rstrip() in "\n".join(preview(module, colour=False))
    module.sequence_length, module.batch_size, module.num_workers = 64, 1, 0
    module.prepare_data()
    module.setup("fit")
    same_windows(module, 4)
    with caplog.at_level("INFO"):
        fitted(CausalLM(str(checkpoint)), module, tmp_path, enable_model_summary=True)
    (shown,) = (line for line in page.splitlines() if line.startswith("  tower "))
    assert " ".join(shown.split()) in " ".join(caplog.text.split())


def test_what_is_prepared_does_not_depend_on_the_number_of_processes(
    checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision_chat, "_ROWS_PER_TASK", 2)
    source = write_rows(tmp_path / "rows.jsonl", chats(folder))
    one, two = (
        prepared(source, checkpoint, tmp_path, cache_dir=str(tmp_path / f"cache{processes}"), num_proc=processes)
        for processes in (1, 2)
    )
    for name in ("media.arrow", "windows.arrow"):
        assert (one.directory / "train" / name).read_bytes() == (two.directory / "train" / name).read_bytes()


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_omni_moe_thinker", "qwen3_5_moe", "gemma4"])
def test_models_whose_images_change_who_sees_whom_are_known(family: str) -> None:
    assert MediaPositions(tiny_config_of(family)).masks_by_images == (family == "gemma4")
