"""`lightning-ep routing` says what plain transformers' routers choose, of every source, on any ranks."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lightning_ep import cli
from lightning_ep.cli.chats import ChatOptions
from tests.data.chat_families import family_tokenizer
from tests.hub_files import refused_in_one_line
from tests.ranks import run_ranks
from tests.talking import on_two_ranks, write_talking

pytestmark = [pytest.mark.usefixtures("on_the_tests_device"), on_two_ranks]
TEXTS = ["zeta eta theta " * 30, "eta", "theta zeta zeta line " * 9, "z", "eta theta " * 4]
CHATS = [
    [{"role": "user", "content": "eta " * n}, {"role": "assistant", "content": "theta qwerty"}] for n in range(1, 9)
]
LENGTH = 12


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talking(tmp_path_factory.mktemp("hub") / "tiny", max_position_embeddings=64)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    return [str(folder / "texts.jsonl"), str(folder / "chats.jsonl")]


@torch.no_grad()
def _counts(hub: Path, documents: list[list[int]]) -> Tensor:
    """Tokens of each expert ``[M, E]`` from the logits that transformers' routers give, one window at a time."""
    model = AutoModelForCausalLM.from_pretrained(hub)
    top_k, counts = model.config.num_experts_per_tok, 0
    for ids in documents:
        for begin in range(0, len(ids), LENGTH):
            output = model(torch.tensor([ids[begin : begin + LENGTH]]), output_router_logits=True)
            chosen = [logits.topk(top_k).indices.flatten() for logits in output.router_logits]
            counts += torch.stack([one.bincount(minlength=model.config.num_experts) for one in chosen])
    return counts


def _printed(arguments: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main(["routing", *arguments])
    return out.getvalue()


def _row(text: str, title: str) -> list[float]:
    line = next(line for line in text.splitlines() if line.startswith(title))
    return [float(number.replace(",", "")) for number in line[len(title) :].split()]


@pytest.mark.parametrize(
    "options",
    [pytest.param([], id="one process"), ["--ep", "2"], pytest.param(["--tp", "2"], marks=pytest.mark.slow)],
    ids=str,
)
def test_every_source_is_counted_as_transformers_routes_it(
    options: list[str], hub: Path, files: list[str], tmp_path: Path
) -> None:
    arguments = [str(hub), *files, "--sequence_length", str(LENGTH), "--output", str(tmp_path), *options]
    if options:
        text, nothing = run_ranks(2, _printed, arguments, init_process_group=False)
        assert nothing == ""
    else:
        text = _printed(arguments)
    tokenizer = AutoTokenizer.from_pretrained(hub)
    texts = _counts(hub, [tokenizer(one)["input_ids"] for one in TEXTS])
    chats = _counts(hub, [tokenizer.apply_chat_template(chat, return_dict=False) for chat in CHATS])
    columns = [texts + chats, texts, chats]
    top_k = AutoModelForCausalLM.from_pretrained(hub).config.num_experts_per_tok
    assert _row(text, "tokens") == [int(counts[0].sum()) / top_k for counts in columns]
    loads = [counts.double() / counts.double().mean(1, keepdim=True) for counts in columns]
    expected: dict[str, Any] = {
        "max violation, mean of the layers": [(load.amax(1) - 1).mean() for load in loads],
        "coefficient of variation": [load.std(1, correction=0).mean() for load in loads],
        "experts without a token": [(load == 0).sum() for load in loads],
        "straggler factor at ep=2": [load.unflatten(1, (2, -1)).mean(-1).amax(1).mean() for load in loads],
    }
    for title, values in expected.items():
        assert _row(text, title) == pytest.approx([float(value) for value in values], abs=6e-3), title
    place = int(loads[0].argmax())
    layer, expert = divmod(place, loads[0].shape[1])
    assert f"most popular: layer {layer} expert {expert}, {loads[0].max():.1f} times the mean" in text
    layer, expert = divmod(int(loads[0].flatten().argmin()), loads[0].shape[1])
    assert f"least popular: layer {layer} expert {expert}, {loads[0].min():.2g} times the mean" in text
    with (tmp_path / "expert_load.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = loads[0].shape[1] - 1
    assert (rows[-1]["layer"], rows[-1]["expert"]) == (f"model.layers.{len(loads[0]) - 1}.mlp.experts", str(last))
    for column, load in zip(("load", "texts.jsonl", "chats.jsonl"), loads, strict=True):
        assert [float(row[column]) for row in rows] == pytest.approx(load.flatten().tolist(), abs=1e-4), column
    lift = loads[2] / loads[1]  # of chats
    for layer, expert in re.findall(
        r"layer (\d+) expert (\d+) \(", next(x for x in text.splitlines() if x[:9] == "for chats")
    ):
        assert lift[int(layer), int(expert)] > 1.5
    assert {path.name for path in tmp_path.iterdir()} == {"expert_load.csv", "expert_load.png", "specialisation.png"}


def test_chats_are_rendered_by_the_template_that_generate_takes(hub: Path, files: list[str], tmp_path: Path) -> None:
    write_talking(tmp_path / "base", template=None, max_position_embeddings=64)
    template = "{% for m in messages %}{{ m.content * times }}{% endfor %}"
    (tmp_path / "own.jinja").write_text(template)
    arguments = [str(tmp_path / "base"), files[1], "--sequence_length", str(LENGTH), "--output", str(tmp_path / "out")]
    options = ["--chat_template", str(tmp_path / "own.jinja"), "--template_kwargs.times", "2"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    written = [
        tokenizer("".join(m["content"] * 2 for m in chat), add_special_tokens=False)["input_ids"] for chat in CHATS
    ]
    assert _row(_printed([*arguments, *options]), "tokens") == [sum(map(len, written))]
    with refused_in_one_line(ValueError, "has no chat template: give .* as --chat_template"):
        cli.main(["routing", *arguments])


@pytest.mark.parametrize(
    ("content", "options", "line"),
    [
        ('{"messages": [{"role": "user"}]}\n', [], "a.jsonl:1: messages[0] has no content"),
        ("", [], "'{file}' has no rows"),
        ('{"text": ""}\n', [], "a.jsonl has no tokens"),
        ('{"text": "z"}\n', ["--sequence_length", "0"], "sequence_length=0 must be at least 1"),
        (None, [], "there is no file"),
    ],
    ids=["no chat", "no rows", "no tokens", "no window", "no file"],
)
def test_an_error_is_one_line(
    content: str | None, options: list[str], line: str, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit):
        cli.main(["routing", str(hub), str(file), *options])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.format(file=file) in error, error


def test_the_same_file_twice_and_a_model_without_experts_are_refused(
    hub: Path, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["routing", str(hub), files[0], files[0]])
    assert "a file is named twice" in capsys.readouterr().err
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("qwen3", vocab_size=272, head_dim=8, num_key_value_heads=1, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(hub).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["routing", str(tmp_path), files[0]])
    assert "there is no MoE layer to measure" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["deepseekv3", "qwen3_instruct_2507"])
def test_calls_of_tools_are_written_as_the_template_wants_them(family: str) -> None:
    """DeepSeek's wants the arguments as text, and failed in it."""
    tokenizer = family_tokenizer(family)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    written = tokenizer.decode(ChatOptions({}).ids(tokenizer, chat))
    assert '"a": 2' in written
