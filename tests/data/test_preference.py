"""Pairs of answers: how they may be written, which tokens of each count, and where they lie in a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ep.data import PreferenceDataModule
from lightning_ep.data.conversations import MalformedRow, preference
from lightning_ep.data.preference import SAME
from lightning_ep.data.preview import preview
from tests.talking import write_talking

U, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "eta"), ("assistant", "zeta"), ("assistant", "theta")))
FIRST = {"role": "assistant", "content": "alpha"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "eta", "chosen": "zeta", "rejected": "theta"},
        {"prompt": [U], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [U, GOOD], "rejected": [U, BAD]},
        {"prompt": "eta", "chosen": [U, GOOD], "rejected": [U, BAD]},  # as UltraFeedback's files have it
        {"prompt": json.dumps([U]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
        {
            "conversations": [{"from": "human", "value": "eta"}],
            "chosen": {"from": "gpt", "value": "zeta"},
            "rejected": "theta",
        },
    ],
)
def test_a_preference_is_read_however_it_is_written(row: dict[str, Any]) -> None:
    chosen, rejected = preference(row, "here")
    assert (chosen.messages, rejected.messages) == ([U, GOOD], [U, BAD])
    assert chosen.trained == rejected.trained == [False, True]


SYSTEM = {"role": "system", "content": "alpha eta"}


@pytest.mark.parametrize(
    ("prompt", "repeated", "front"),
    [
        ([SYSTEM, U], [U], [SYSTEM, U]),  # both begin with the question, and leave out the system's message
        ([SYSTEM, U], [SYSTEM, U], [SYSTEM, U]),
        ([SYSTEM], [U], [SYSTEM, U]),
        ([U, FIRST], [U], [U, FIRST, U]),  # an earlier turn, behind which both go on
        ([SYSTEM, U, FIRST, U], [U, FIRST, U], [SYSTEM, U, FIRST, U]),
        ([SYSTEM, {"role": "user", "content": "eta, written in another way"}], [SYSTEM, U], [SYSTEM, U]),
    ],
)
def test_nothing_of_a_prompt_is_lost(prompt: Any, repeated: Any, front: Any) -> None:
    row = {"prompt": prompt, "chosen": [*repeated, GOOD], "rejected": [*repeated, BAD]}
    chosen, rejected = preference(row, "here")
    assert (chosen.messages, rejected.messages) == ([*front, GOOD], [*front, BAD])
    assert chosen.trained == rejected.trained == [False] * len(front) + [True]


@pytest.mark.parametrize("text", ['{"x": 1}', "[1, 2]", "[INST] eta", "{eta}", '["eta"]', "[]"])
def test_texts_may_be_json_or_begin_like_it(text: str) -> None:
    chosen, _ = preference({"prompt": text, "chosen": text, "rejected": "theta"}, "here")
    assert [message["content"] for message in chosen.messages] == [text, text]


def test_only_what_differs_is_learnt() -> None:
    chosen, rejected = preference({"chosen": [U, FIRST, U, GOOD], "rejected": [U, FIRST, U, BAD, U, BAD]}, "here")
    assert chosen.trained == [False, False, False, True]
    assert rejected.trained == [False, False, False, True, False, True]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "eta", "chosen": "zeta"}, r"here: the row has \['chosen', 'prompt'\].*'chosen' and 'rejected'"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no message in common: add 'prompt'"),
        ({"prompt": "eta", "chosen": [U], "rejected": [U, BAD]}, "chosen has no assistant's turn"),
        ({"prompt": "eta", "chosen": 3, "rejected": "zeta"}, "chosen must be a list of at least one message, not 3"),
    ],
)
def test_what_is_none_is_refused_by_its_place(row: dict[str, Any], message: str) -> None:
    with pytest.raises(MalformedRow, match=message):
        preference(row, "here")


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_batch_has_the_chosen_ones_in_front_and_padding_behind_each(tmp_path: Path) -> None:
    hub = write_talking(tmp_path / "hub")
    rows = [{"prompt": f"eta {i}", "chosen": "zeta" * (1 + i % 3), "rejected": "theta" * (1 + i % 2)} for i in range(8)]
    left_out = [{"prompt": "eta", "chosen": "zeta", "rejected": "zeta"}, {**rows[0], "rejected": "x" * 99}]
    source = _write(tmp_path / "pairs.jsonl", [*rows, *left_out])
    data = PreferenceDataModule(
        source, tokenizer=str(hub), sequence_length=48, batch_size=4,
        validation_fraction=0, num_proc=1, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    assert data.counts["train"]["dropped"] == {SAME: 1, "of a pair longer than 48 tokens": 1}
    batches = list(data.train_dataloader())
    assert len(batches) == 2
    seen, tokens = set(), 0
    for batch in batches:
        assert set(batch) == {"input_ids", "labels", "attention_mask"}
        assert batch["input_ids"].shape == batch["labels"].shape == (8, 48)
        assert batch["input_ids"].dtype == torch.int64
        for good, bad in zip(range(4), range(4, 8), strict=True):
            texts = [data.tokenizer.decode(batch["input_ids"][row]) for row in (good, bad)]
            learnt = [data.tokenizer.decode(ids[ids >= 0]) for ids in batch["labels"][[good, bad]]]
            number = texts[0].partition("eta ")[2][0]
            row = rows[int(number)]
            seen.add(number)
            for text, what, answer in zip(texts, learnt, (row["chosen"], row["rejected"]), strict=True):
                assert text.startswith(f"<|turn|>user: {row['prompt']}<|endoftext|><|turn|>assistant: {answer}")
                assert what == f"{answer}<|endoftext|>"
            for place, answer in ((good, "chosen"), (bad, "rejected")):
                turns = [("user", row["prompt"]), ("assistant", row[answer])]
                chat = [{"role": role, "content": content} for role, content in turns]
                ids = data.tokenizer.apply_chat_template(chat, return_dict=False)
                assert batch["input_ids"][place, : len(ids)].tolist() == ids
                # It ends with the token that pads, too.
                assert batch["attention_mask"][place].tolist() == [1] * len(ids) + [0] * (48 - len(ids))
                tokens += len(ids)
    assert len(seen) == 8
    assert data.counts["train"]["tokens"] == data.counts["train"]["sources"][source]["tokens"] == tokens
    assert data.counts["train"]["fill_rate"] == tokens / (8 * 2 * 48)
    shown = "\n".join(preview(data, colour=False))
    assert "assistant: ⟦zeta" in shown
    assert "8 documents" in shown, "preview knows that a pair takes two rows"
    assert f"8 documents, {tokens:,} tokens, " in shown
    assert f"to {tokens / (8 * 2 * 48):.1%}." in shown
    assert "[padding x " in shown
