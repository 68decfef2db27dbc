"""From files of chats to windows: what is learnt, kept, left out and counted, and what goes with the model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ep import CausalLM, ExpertParallelStrategy, cli
from lightning_ep.callbacks import HuggingFaceExport
from lightning_ep.data import ChatDataModule, Source
from lightning_ep.data.conversations import MalformedRow, conversation
from lightning_ep.data.preparation import Samples
from lightning_ep.data.rendering import SHORTENED, RendersConversations, tokens_within
from lightning_ep.data.template_text import with_defaults
from tests.data.chat_families import chat_template, family_tokenizer, stop_ids, template_text
from tests.data.test_chat_template import FOUR, HELLO, HI, SUM, SYSTEM, learnt_texts, samples_of
from tests.hub_files import write_checkpoint
from tests.tiny import quiet

INSTRUCT = "qwen3_instruct_2507"


def write_chats(path: Path, chats: list[list[dict[str, Any]]]) -> Path:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny weights with Qwen3's template and special tokens."""
    path = tmp_path_factory.mktemp("hub") / "tiny"
    write_checkpoint(path, num_hidden_layers=1, vocab_size=420, max_position_embeddings=512)
    family_tokenizer("qwen3").save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_ids("qwen3")}))
    return path


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    more = [[HI, {**HELLO, "content": f"Hello {number}!"}] for number in range(30)]
    return write_chats(tmp_path / "chats.jsonl", more)


def data(source: Any, tmp_path: Path, **settings: Any) -> ChatDataModule:
    defaults: dict[str, Any] = {"sequence_length": 128, "num_proc": 1, "cache_dir": str(tmp_path / "cache")}
    return ChatDataModule(source if isinstance(source, list) else str(source), **(defaults | settings))


def fitted(module: CausalLM, chats: ChatDataModule, tmp_path: Path, **settings: Any) -> None:
    settings = {"max_steps": 1, "limit_val_batches": 0, "num_sanity_val_steps": 0, "strategy": "ep", **settings}
    quiet(tmp_path, devices=1, accelerator="cpu", **settings).fit(module, chats)


# ------------------------------------------------------------------------------------------------- characters to tokens


def test_tokens_are_learnt_that_lie_in_a_span() -> None:
    def within(offsets: list[tuple[int, int]], *spans: tuple[int, int]) -> list[int]:
        return tokens_within(offsets, spans).nonzero()[0].tolist()

    assert within([(0, 2), (2, 4), (4, 6)], (2, 4)) == [1]
    assert within([(0, 2), (2, 4), (4, 6)], (0, 2), (4, 6)) == [0, 2]
    assert within([(0, 3), (3, 5)], (2, 5)) == [1], "the first begins with what was given"
    assert within([(0, 3), (3, 5)], (0, 4)) == [0], "the second ends with what comes after"
    assert within([(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], (1, 2)) == [1, 2, 3], "a character of three bytes"
    assert within([(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], (2, 3)) == [4]
    assert within([(0, 1), (2, 4)], (1, 4)) == [1], "a space that the tokenizer leaves out of its offsets"
    assert within([(0, 1), (2, 4)], (2, 4)) == [], "it belongs to the token all the same"
    assert within([(0, 0), (0, 2)], (0, 2)) == [1], "a special token that no character stands for"
    assert within([], (0, 2)) == []
    assert within([(0, 2)]) == []


def test_characters_of_several_tokens_are_learnt_whole() -> None:
    tokenizer = family_tokenizer(INSTRUCT)
    emoji = "\N{SLIGHTLY SMILING FACE}"
    assert len(tokenizer(emoji)["input_ids"]) > 1
    samples = samples_of(INSTRUCT, [{**HI, "content": f"Hi {emoji}"}, {**HELLO, "content": f"{emoji} Hello {emoji}"}])
    assert learnt_texts(tokenizer, samples) == [[f"{emoji} Hello {emoji}<|im_end|>"]]


# --------------------------------------------------------------------------------------------------- what becomes of it


def test_a_message_that_is_not_to_be_learnt_is_only_read() -> None:
    samples = samples_of(INSTRUCT, [HI, {**HELLO, "train": False}, SUM, FOUR])
    assert learnt_texts(family_tokenizer(INSTRUCT), samples) == [["4.<|im_end|>"]]
    marked = samples_of("qwen3_training", [HI, {**HELLO, "train": False}, SUM, FOUR])
    assert learnt_texts(family_tokenizer("qwen3"), marked) == [["<think>\n\n</think>\n\n4.<|im_end|>"]]


def test_what_follows_the_last_learnt_message_is_left_out() -> None:
    samples = samples_of("qwen3", [HI, HELLO, SUM])
    assert learnt_texts(family_tokenizer("qwen3"), samples) == [["<think>\n\n</think>\n\nHello!<|im_end|>"]]
    assert "2 + 2?" not in family_tokenizer("qwen3").decode(samples.samples[0].input_ids)


@pytest.mark.parametrize("split_turns", [False, True])
def test_a_chat_that_is_too_long_loses_whole_turns_from_its_front(split_turns: bool) -> None:
    tokenizer = family_tokenizer(INSTRUCT)
    turns = [[{**HI, "content": f"{n}: " + "why? " * 8}, {**HELLO, "content": f"{n}, because. " * 4}] for n in range(6)]
    chat = [SYSTEM, *(message for turn in turns for message in turn)]
    last_three = [SYSTEM, *(message for turn in turns[3:] for message in turn)]
    length = len(tokenizer.apply_chat_template(last_three)["input_ids"])
    for room, kept in ((0, 3), (1, 3), (-1, 2)):
        samples = samples_of(INSTRUCT, chat, sequence_length=length + room, split_turns=split_turns)
        expected = tokenizer.apply_chat_template([SYSTEM, *chat[-2 * kept :]], return_dict=False)
        assert samples.samples[-1].input_ids == expected
        answers = [f"{turn[1]['content']}<|im_end|>" for turn in turns]
        if split_turns:
            assert learnt_texts(tokenizer, samples) == [[answer] for answer in answers]
            assert samples.notes[SHORTENED] == 6 - kept
        else:
            assert learnt_texts(tokenizer, samples) == [answers[-kept:]]
            assert samples.notes[SHORTENED] == 1


def test_a_chat_whose_last_turn_is_too_long_is_left_out(checkpoint: Path, tmp_path: Path) -> None:
    long = {**HELLO, "content": "Hello! " * 200}
    file = write_chats(tmp_path / "chats.jsonl", [[HI, HELLO], [HI, HELLO, SUM, long], [HI, long]])
    for too_long in ("shorten", "drop"):
        windows = data(file, tmp_path, tokenizer=str(checkpoint), validation_fraction=0, too_long=too_long)
        windows.prepare_data()
        windows.setup()
        assert windows.counts["train"]["documents"] == 1
        assert windows.counts["train"]["dropped"] == {"longer than 128 tokens": 2}


def test_a_sample_is_the_same_alone_and_among_others() -> None:
    renders = RendersConversations(family_tokenizer("qwen3"), chat_template("qwen3"), 64)
    chats = [
        conversation({"messages": chat}, "") for chat in ([HI, HELLO], [SYSTEM, HI, HELLO, SUM, FOUR], [SUM, FOUR])
    ]
    together, alone = Samples(), Samples()
    renders(chats, together)
    for chat in chats:
        renders([chat], alone)
    assert together.samples == alone.samples
    assert len(alone.samples) == 3


# ------------------------------------------------------------------------------------------------------- the datamodule


def test_a_step_is_that_of_transformers_on_the_answers_alone(checkpoint: Path, tmp_path: Path) -> None:
    chat = [SYSTEM, HI, {**HELLO, "content": "Good morning, and how are you?"}]
    file = write_chats(tmp_path / "chats.jsonl", [chat])
    module = CausalLM(str(checkpoint), optimizer=lambda params: torch.optim.SGD(params, lr=0.5))
    fitted(module, data(file, tmp_path, validation_fraction=0), tmp_path)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer.apply_chat_template(chat[:2], add_generation_prompt=True, tokenize=False)
    answer = "<think>\n\n</think>\n\nGood morning, and how are you?<|im_end|>"
    given, learnt = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (prompt, answer))
    labels = torch.cat([torch.full_like(given, -100), learnt], dim=1)
    before = {name: value.clone() for name, value in model.named_parameters()}
    model(input_ids=torch.cat([given, learnt], dim=1), labels=labels).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    trained = dict(module.model.named_parameters())
    for name, value in model.named_parameters():
        torch.testing.assert_close(
            trained[name].to_local() if hasattr(trained[name], "to_local") else trained[name], value
        )
    assert any(not torch.equal(before[name], value) for name, value in model.named_parameters())


def test_windows_are_the_same_from_one_process_and_from_four(checkpoint: Path, chats: Path, tmp_path: Path) -> None:
    found = []
    for num_proc in (1, 4):
        windows = data(
            chats, tmp_path, tokenizer=str(checkpoint), num_proc=num_proc, cache_dir=str(tmp_path / str(num_proc))
        )
        windows.prepare_data()
        windows.setup()
        found.append([{key: value.tolist() for key, value in row.items()} for row in windows.train_dataset])
    assert found[0] == found[1]


def test_malformed_rows_are_refused_by_line_or_counted(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    good = json.dumps({"messages": [HI, HELLO]})
    file.write_text(f'{good}\n{{"messages": 7}}\n' + 300 * f"{good}\n" + "no JSON\n")  # more than one task
    for num_proc in (1, 2):
        windows = data(file, tmp_path, tokenizer=str(checkpoint), validation_fraction=0, num_proc=num_proc)
        with pytest.raises(MalformedRow, match=rf"{file}:2: messages must be a list"):
            windows.prepare_data()
    windows = data(file, tmp_path, tokenizer=str(checkpoint), validation_fraction=0, malformed="skip")
    windows.prepare_data()
    windows.setup()
    assert windows.counts["train"]["documents"] == 301
    assert windows.counts["train"]["dropped"] == {"malformed rows": 2}


def test_an_error_names_several_malformed_rows(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    good, wrong = json.dumps({"messages": [HI, HELLO]}), json.dumps({"messages": [{"role": "bard", "content": "?"}]})
    file.write_text(f"{good}\n{wrong}\n" * 12)
    with pytest.raises(MalformedRow) as refused:
        data(file, tmp_path, tokenizer=str(checkpoint), validation_fraction=0).prepare_data()
    *rows, more, mend = str(refused.value).splitlines()
    assert [row.partition(": ")[0] for row in rows] == [f"{file}:{line}" for line in range(2, 22, 2)]
    assert more == "And 2 more of the rows around them."
    assert mend == "Mend the rows; or `malformed: skip` leaves out such rows, and counts them."


def test_sources_are_mixed_by_weight_and_validated_on_their_own(checkpoint: Path, chats: Path, tmp_path: Path) -> None:
    other = write_chats(tmp_path / "other.jsonl", [[SUM, FOUR]] * 3)
    windows = data(
        [Source(str(chats), weight=0.5), Source(str(other), weight=2, max_rows=2)],
        tmp_path,
        validation_source=str(other),
        tokenizer=str(checkpoint),
    )
    windows.prepare_data()
    windows.setup()
    assert windows.counts["train"]["documents"] == 15 + 4
    assert windows.counts["val"]["documents"] == 3


@pytest.mark.parametrize(
    "change",
    [
        {"split_turns": True},
        {"template_kwargs": {"enable_thinking": False}},
        {"too_long": "drop"},
        {"chat_template": "plain"},
    ],
)
def test_other_settings_are_prepared_anew(
    change: dict[str, Any], checkpoint: Path, chats: Path, tmp_path: Path
) -> None:
    for settings in ({}, change, {}):
        windows = data(chats, tmp_path, tokenizer=str(checkpoint), **settings)
        windows.prepare_data()
    assert len(list((tmp_path / "cache").iterdir())) == 2


# -------------------------------------------------------------------------------------------------------------- the end


def test_a_model_that_would_not_stop_is_refused_before_rows_are_read(checkpoint: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_checkpoint(base, num_hidden_layers=1, vocab_size=420)
    family_tokenizer("qwen3").save_pretrained(base)
    text_end = family_tokenizer("qwen3").convert_tokens_to_ids("<|endoftext|>")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": text_end}))
    (tmp_path / "chats.jsonl").write_text("no JSON\n")
    module = CausalLM(str(base))
    with pytest.raises(ValueError, match=r"ends an assistant's answer with '<\|im_end\|>'.*\"eos_token_id\""):
        fitted(module, data(tmp_path / "chats.jsonl", tmp_path), tmp_path)


# ------------------------------------------------------------------------------------------------------------ templates


@pytest.mark.parametrize("directory", [True, False])
def test_variables_of_the_template_go_with_the_model(
    directory: bool, checkpoint: Path, chats: Path, tmp_path: Path
) -> None:
    module = CausalLM(str(checkpoint))
    callbacks = [
        HuggingFaceExport(str(tmp_path / "out")),
        ModelCheckpoint(tmp_path, filename="saved", every_n_train_steps=1),
    ]
    windows = data(chats, tmp_path, template_kwargs={"enable_thinking": False})
    strategy = ExpertParallelStrategy(save_distributed_checkpoint=directory)
    fitted(module, windows, tmp_path, strategy=strategy, callbacks=callbacks)
    cli.main(["export", str(tmp_path / "saved.ckpt"), str(tmp_path / "converted" / "out")])  # the run's, unasked
    out, converted = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("out", "converted/out")
    )
    assert {"chat_template.jinja", "generation_config.json", "tokenizer.json"} < out.keys()
    assert converted == out
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = {"add_generation_prompt": True, "tokenize": False}
    assert exported.apply_chat_template([HI], **asked).endswith("assistant\n<think>\n\n</think>\n\n")
    assert exported.apply_chat_template([HI], enable_thinking=True, **asked).endswith("assistant\n")
    ids = windows.train_dataset[0]["input_ids"]
    assert exported.decode(ids).startswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>")


def test_defaults_may_be_any_value() -> None:
    tokenizer = family_tokenizer("qwen3")
    variables = {"a": None, "b": 'say "hi"\n', "c": [None, {"d": True}], "e": 1.5}
    template = with_defaults("{{ a is none and c[0] is none }}|{{ b }}|{{ c[1].d }}|{{ e }}", variables)
    assert tokenizer.apply_chat_template([HI], chat_template=template, tokenize=False) == 'True|say "hi"\n|True|1.5'
    assert tokenizer.apply_chat_template([HI], chat_template=template, tokenize=False, e=2).endswith("|2")
    with pytest.raises(ValueError, match=r"'not a name', which cannot be the name of a template's variable"):
        with_defaults("", {"not a name": 1})


def test_a_base_model_gets_the_template_that_is_passed(chats: Path, tmp_path: Path) -> None:
    tokenizer = family_tokenizer("llama3")
    tokenizer.save_pretrained(tmp_path / "base")
    for file in (tmp_path / "base").glob("chat_template*"):
        file.unlink()
    settings = {"tokenizer": str(tmp_path / "base"), "validation_fraction": 0}
    with pytest.raises(ValueError, match=r"has no chat template.*`chat_template`.*'plain'"):
        data(chats, tmp_path, **settings).prepare_data()
    with pytest.raises(ValueError, match=r"chat_template='plane' is no file here.*none of 'plain'"):
        data(chats, tmp_path, chat_template="plane", **settings).prepare_data()
    (tmp_path / "own.jinja").write_text(template_text("llama3"))
    for given in (str(tmp_path / "own.jinja"), template_text("llama3"), "plain"):
        windows = data(chats, tmp_path, chat_template=given, **settings)
        windows.prepare_data()
        windows.setup()
        text = windows.tokenizer.apply_chat_template([HI], add_generation_prompt=True, tokenize=False)
        if given == "plain":
            assert text == "<|begin_of_text|>### User:\nHi\n\n### Assistant:\n"
            windows.tokenizer.save_pretrained(tmp_path / "saved")
            saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
            ids = saved("Hello!<|eot_id|>", add_special_tokens=False)["input_ids"]
            said = saved.parse_response(ids, prefix=text)  # as servers do
            assert said == {"role": "assistant", "content": "Hello!"}
        else:
            assert text == tokenizer.apply_chat_template([HI], add_generation_prompt=True, tokenize=False)


def test_a_template_with_markers_is_for_training_alone(checkpoint: Path, tmp_path: Path) -> None:
    file = write_chats(tmp_path / "chats.jsonl", [[HI, HELLO, SUM, FOUR]])
    windows = data(
        file,
        tmp_path,
        tokenizer=str(checkpoint),
        chat_template=template_text("qwen3_training"),
        validation_fraction=0,
    )
    windows.prepare_data()
    windows.setup()
    assert windows.tokenizer.chat_template == template_text("qwen3")
    labels = windows.train_dataset[0]["labels"]
    learnt = windows.tokenizer.decode(labels[labels != -100])
    assert learnt == "<think>\n\n</think>\n\nHello!<|im_end|><think>\n\n</think>\n\n4.<|im_end|>"


def test_the_plain_template_learns_answers_and_their_end() -> None:
    tokenizer = family_tokenizer("llama3")
    template = (Path(__file__).parents[2] / "lightning_ep/data/chat_templates/plain.jinja").read_text()
    from lightning_ep.data.chat_template import ChatTemplate

    renders = RendersConversations(tokenizer, ChatTemplate(tokenizer, template, {}, [tokenizer.eos_token_id]), 256)
    samples = Samples()
    renders([conversation({"messages": [SYSTEM, HI, HELLO, SUM, FOUR]}, "")], samples)
    assert learnt_texts(tokenizer, samples) == [["Hello!<|eot_id|>", "4.<|eot_id|>"]]


# ----------------------------------------------------------------------------------------------------- the command line


def test_sources_can_be_given_in_yaml() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(ChatDataModule, "data")
    text = """
    data:
      source: [{path: a.jsonl, weight: 2, max_rows: 5}, b.parquet]
      template_kwargs: {enable_thinking: false}
      split_turns: true
      sequence_length: 512
    """
    built = parser.instantiate(parser.parse_string(text)).data
    assert built.source == [Source("a.jsonl", 2.0, "train", None, 5), "b.parquet"]
    assert built.template_kwargs == {"enable_thinking": False}
    assert built.sequence_length == 512
    assert parser.instantiate(parser.parse_args(["--data.source", "a.jsonl"])).data.source == "a.jsonl"


def test_the_page_says_what_can_be_read(checkpoint: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "operate" / "data.md").read_text()
    page = page[page.index("## Chats") : page.index("## Pairs of texts")]
    blocks = dict(re.findall(r"```(json|yaml)\n(.*?)```", page, re.S))
    parser = ArgumentParser()
    parser.add_subclass_arguments(ChatDataModule, "data")
    windows = parser.instantiate(parser.parse_string(blocks["yaml"])).data
    assert isinstance(windows, ChatDataModule)
    rows = [json.loads(blocks["json"])] * 2
    (tmp_path / "my_chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    windows.source, windows.cache_dir = str(tmp_path / "my_chats.jsonl"), str(tmp_path / "cache")
    windows._tokenizer_source, windows.batch_size, windows.num_proc = str(checkpoint), 1, 1
    windows.prepare_data()
    windows.setup()
    labels = windows.train_dataset[0]["labels"]
    assert windows.tokenizer.decode(labels[labels != -100]).endswith("7 degrees.<|im_end|>")
