"""`lightning-ep perplexity` is that of plain transformers, whatever the windows, batches and ranks."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ep import cli
from lightning_ep.cli.perplexity import batches_of, windows_of
from tests.ranks import run_ranks
from tests.talking import on_two_ranks, write_talking

pytestmark = [pytest.mark.usefixtures("on_the_tests_device"), on_two_ranks]
TEXTS = ["zeta eta theta " * 30, "eta", "theta zeta zeta\u2028line " * 9, "z", "", "eta theta " * 4]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talking(tmp_path_factory.mktemp("hub") / "tiny", max_position_embeddings=64)


@torch.no_grad()
def _expected(hub: Path, texts: list[str], length: int) -> tuple[float, int]:
    """Loss and tokens from transformers' logits in float64, one window at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(hub), AutoTokenizer.from_pretrained(hub)
    losses = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        begin = 0
        while begin + 1 < len(ids):
            window = torch.tensor(ids[begin : begin + length])
            log_probs = model(window[None]).logits[0].double().log_softmax(-1)
            losses += [-log_probs[i, token].item() for i, token in enumerate(window[1:].tolist())]
            begin += length - 1
    return sum(losses) / len(losses), len(losses)


def _printed(arguments: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main(["perplexity", *arguments])
    return out.getvalue()


def _check(line: str, loss: float, tokens: int, documents: int) -> None:
    found = re.fullmatch(
        r"perplexity (\S+), loss (\S+) nats per token: ([\d,]+) tokens of (\d+) documents? in windows of \d+\n", line
    )
    assert found, line
    assert float(found[1]) == pytest.approx(math.exp(loss), rel=1e-5)
    assert float(found[2]) == pytest.approx(loss, rel=1e-5)
    assert (int(found[3].replace(",", "")), int(found[4])) == (tokens, documents)


def test_a_text_is_one_document_in_windows_of_the_models_length(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[0])
    loss, tokens = _expected(hub, TEXTS[:1], 64)
    assert tokens > 2 * 64
    _check(_printed([str(hub), str(tmp_path / "a.txt")]), loss, tokens, 1)


@pytest.mark.parametrize("options", [[], ["--ep", "2"], ["--tp", "2"]], ids=["one process", "ep=2", "tp=2"])
def test_documents_are_weighted_by_token_on_any_ranks(options: list[str], hub: Path, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) + "\n\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(rows)
    for length in (12, 64):  # with batches of several windows, and steps that a rank takes for others
        loss, tokens = _expected(hub, TEXTS, length)
        arguments = [str(hub), str(tmp_path / "a.jsonl"), "--sequence_length", str(length), *options]
        if not options:
            _check(_printed(arguments), loss, tokens, len(TEXTS))
            continue
        first, second = run_ranks(2, _printed, arguments, init_process_group=False)
        _check(first, loss, tokens, len(TEXTS))
        assert second == ""


def test_every_token_but_the_first_is_predicted_once_and_batches_are_bounded() -> None:
    for size in range(40):
        windows = windows_of(range(size), 7)
        assert [token for window in windows for token in window[1:]] == list(range(1, size))
        assert all(2 <= len(window) <= 7 for window in windows)
    windows = [window for size in (3, 40, 2, 9, 2, 2) for window in windows_of(range(size), 16)]
    batches = batches_of(windows, 16)
    assert sorted(map(list, windows)) == sorted(list(window) for batch in batches for window in batch)
    assert all(len(batch) * max(map(len, batch)) <= 16 for batch in batches)
    assert any(len(batch) > 2 for batch in batches)


@pytest.mark.parametrize(
    ("content", "options", "line"),
    [
        ('{"text": "a b"}\n{"text": 3}\n', [], "a.jsonl, line 2: a document is an object"),
        ('{"text": "a b"}\n\n{"text"\n', [], "a.jsonl, line 3: Expecting"),
        ('{"text": "a b"}\n{"text": "a \\ud83d"}\n', [], "a.jsonl, line 2: a text has '\\ud83d', which is half"),
        ('\ufeff{"text": "z"}\n', [], "no document has two tokens"),  # behind a byte order mark, as in training
        ("", ["--sequence_length", "1"], "sequence_length=1 must be at least 2"),
        (None, [], "there is no file"),
    ],
    ids=["no text", "no JSON", "half a character", "no tokens", "no window", "no file"],
)
def test_an_error_is_one_line(
    content: str | None, options: list[str], line: str, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(SystemExit) as ended:
        cli.main(["perplexity", str(hub), str(tmp_path / "a.jsonl"), *options])
    assert ended.value.code == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.strip() and "Loading weights" not in text]
    assert len(errors) == 1, errors
    assert line in errors[0]
