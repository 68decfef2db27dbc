"""`lightning-ep generate` says what plain transformers say, from any checkpoint, on one process and sharded."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ep import CausalLM, CheckpointError, ExpertParallelStrategy, cli
from tests.hub_files import refused_in_one_line
from tests.ranks import run_ranks
from tests.talking import TEMPLATE, greedy, greedy_ids, on_two_ranks, write_talking
from tests.tiny import Samples, quiet

pytestmark = [pytest.mark.usefixtures("on_the_tests_device"), on_two_ranks]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talking(tmp_path_factory.mktemp("hub") / "tiny")


def _said(arguments: list[str], lines: list[str] | None = None) -> str:
    """What a process prints."""
    printed, before = io.StringIO(), sys.stdin
    sys.stdin = io.StringIO("".join(f"{line}\n" for line in lines or []))
    try:
        with contextlib.redirect_stdout(printed):
            cli.main(["generate", *arguments])
    finally:
        sys.stdin = before
    assert not dist.is_initialized(), "the process group ends with the command"
    return printed.getvalue()


def _prompt(hub: Path, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(hub)(text)["input_ids"]


def _turn(hub: Path, *messages: tuple[str, str], **variables: object) -> list[int]:
    """A chat as the template has it, written by hand."""
    text = "".join(f"<|turn|>{role}: {content}<|endoftext|>" for role, content in messages)
    return _prompt(hub, f"{text}<|turn|>assistant: {'zeta' if 'enable_thinking' in variables else ''}")


def test_a_prompt_is_continued_as_by_transformers(hub: Path) -> None:
    expected = greedy(hub, _prompt(hub, "zeta eta"), 12)
    assert expected
    assert _said([str(hub), "--prompt", "zeta eta", "--max_new_tokens", "12"]) == f"{expected}\n"


def test_every_line_of_the_input_is_a_prompt_of_its_own(hub: Path) -> None:
    expected = [greedy(hub, _prompt(hub, text), 5) for text in ("zeta", "eta theta")]
    assert _said([str(hub), "--max_new_tokens", "5"], ["zeta", "", "eta theta"]) == "".join(f"{e}\n" for e in expected)


def test_a_chat_goes_through_the_template_and_keeps_what_was_said(hub: Path) -> None:
    opening = [("system", "be brief"), ("user", "zeta")]
    first = greedy(hub, _turn(hub, *opening), 6)
    second = greedy(hub, _turn(hub, *opening, ("assistant", first), ("user", "theta")), 6)
    assert second != greedy(hub, _turn(hub, ("system", "be brief"), ("user", "theta")), 6), "the past must matter"
    said = _said([str(hub), "--chat", "--system", "be brief", "--max_new_tokens", "6"], ["zeta", "theta"])
    assert said == f"{first}\n{second}\n"


def test_variables_of_the_template_and_another_template(hub: Path, tmp_path: Path) -> None:
    options = [str(hub), "--prompt", "eta", "--chat", "--max_new_tokens", "6"]
    plain, unthinking = (greedy(hub, _turn(hub, ("user", "eta"), **v), 6) for v in ({}, {"enable_thinking": False}))
    assert plain != unthinking
    assert _said(options) == f"{plain}\n"
    assert _said([*options, "--template_kwargs.enable_thinking", "false"]) == f"{unthinking}\n"
    (tmp_path / "other.jinja").write_text("{{ messages[0].content }}")
    expected = greedy(hub, _prompt(hub, "eta"), 6)
    assert _said([*options, "--chat_template", str(tmp_path / "other.jinja")]) == f"{expected}\n"
    expected = greedy(hub, _prompt(hub, "### User:\neta\n\n### Assistant:\n"), 6)
    assert _said([*options, "--chat_template", "plain"]) == f"{expected}\n"


def test_sampling_is_of_its_seed_and_greedy_is_the_default(hub: Path) -> None:
    options = [str(hub), "--prompt", "zeta", "--max_new_tokens", "16"]
    sampled = [_said([*options, "--temperature", "1.5", "--seed", seed]) for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1]
    assert sampled[0] != sampled[2]
    assert _said(options) == _said([*options, "--seed", "7"]), "although the generation config samples"
    assert _said([*options, "--temperature", "1.5", "--top_p", "1e-9"]) == _said(options), (
        "of the likeliest token alone"
    )


def test_an_answer_ends_with_the_tokens_of_the_generation_config(tmp_path: Path) -> None:
    hub = write_talking(tmp_path / "hub")
    prompt = _prompt(hub, "zeta eta")
    whole = greedy_ids(hub, prompt, 12)
    stop = next(i for i in range(1, 12) if whole[i] not in whole[:i])
    config = (hub / "generation_config.json").read_text()
    other = config.replace('"eos_token_id": 0', f'"eos_token_id": [0, {whole[stop]}]')
    assert other != config
    (hub / "generation_config.json").write_text(other)
    expected = AutoTokenizer.from_pretrained(hub).decode(whole[: stop + 1])
    assert _said([str(hub), "--prompt", "zeta eta", "--max_new_tokens", "12"]) == f"{expected}\n"


# ---------------------------------------------------------------------- over ranks, and from checkpoints of a run


def _train(root: Path, hub: Path) -> None:
    trainer = quiet(root, strategy=ExpertParallelStrategy(ep=2), max_steps=1)
    module = CausalLM(str(hub), optimizer=lambda params: torch.optim.SGD(params, lr=1e-2))
    trainer.fit(module, DataLoader(_Batches(4), batch_size=2))
    trainer.save_checkpoint(root / "saved.ckpt")


class _Batches(Samples):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        return {"input_ids": sample["input_ids"], "labels": sample["labels"]}


def _said_by_rank(arguments: list[str], lines: list[str]) -> str:
    return _said(arguments, lines if os.environ["RANK"] == "0" else [])


def test_ranks_answer_together_and_rank_0_alone_listens_and_prints(hub: Path, tmp_path: Path) -> None:
    run_ranks(2, _train, tmp_path, hub, init_process_group=False)
    saved = str(tmp_path / "saved.ckpt")
    cli.main(["export", saved, str(tmp_path / "exported")])
    first = greedy(tmp_path / "exported", _turn(hub, ("user", "zeta")), 6)
    second = greedy(tmp_path / "exported", _turn(hub, ("user", "zeta"), ("assistant", first), ("user", "eta")), 6)
    options = ["--chat", "--max_new_tokens", "6"]
    assert _said([saved, *options], ["zeta", "eta"]) == f"{first}\n{second}\n"
    for arguments in (
        [saved, *options, "--ep", "2"],
        [str(tmp_path / "exported"), *options, "--ep", "1", "--tp", "2"],
    ):
        said = run_ranks(2, _said_by_rank, arguments, ["zeta", "eta"], init_process_group=False)
        assert said == [f"{first}\n{second}\n", ""], arguments
    sampling = [saved, "--model", str(hub), "--prompt", "zeta", "--max_new_tokens", "12", "--temperature", "1.5"]
    sampled = run_ranks(2, _said_by_rank, [*sampling, "--tp", "2"], [], init_process_group=False)
    assert sampled == [_said(sampling), ""], "ranks draw the same"


def _file_of(hub: Path, path: Path, lost: str | None = None) -> Path:
    """A checkpoint in one file of a module that trains more than the model, which it has inside of another module."""
    model = AutoModelForCausalLM.from_pretrained(hub)
    state = {f"policy.model.{name}": tensor for name, tensor in model.state_dict().items() if name != lost}
    header = {"format": 1, "configs": {"policy.model": model.config.to_dict()}}
    torch.save({"state_dict": {**state, "value.weight": torch.ones(1)}, "lightning_ep": header}, path)
    return path


def test_the_model_is_found_among_what_else_a_run_has_trained(hub: Path, tmp_path: Path) -> None:
    expected = greedy(hub, _prompt(hub, "theta"), 6)
    options = ["--model", str(hub), "--prompt", "theta", "--max_new_tokens", "6"]
    assert _said([str(_file_of(hub, tmp_path / "run.ckpt")), *options]) == f"{expected}\n"
    _file_of(hub, tmp_path / "lacking.ckpt", lost="model.layers.1.self_attn.q_proj.weight")
    with refused_in_one_line(CheckpointError, r"missing \(1\):\n    policy.model.model.layers.1.self_attn.q_"):
        _said([str(tmp_path / "lacking.ckpt"), *options])


def test_weights_are_held_in_the_dtype_that_is_asked_for(hub: Path) -> None:
    options = [str(hub), "--prompt", "zeta", "--max_new_tokens", "3"]
    assert _said([*options, "--dtype", "bfloat16"])
    from lightning_ep.cli.opened import opened

    for dtype, expected in (("bfloat16", torch.bfloat16), (None, torch.float32)):
        with opened(str(hub), None, dtype, "auto", 1, True) as found:  # type: ignore[arg-type]
            assert {param.dtype for param in found.model.parameters()} == {expected}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["{hub}", "--prompt", "a", "--top_p", "0"], "top_p=0.0 must be above 0"),
        (["{hub}", "--prompt", "a\udcff"], r"'a\udcff' is no UTF-8"),  # the byte ff
        (["{hub}", "--prompt", "a", "--chat", "--system", "\udcff"], r"'\udcff' is no UTF-8"),
        (["{hub}", "--prompt", "a", "--system", "b"], "--system is for chats: add --chat"),
        (
            ["{hub}", "--prompt", "a", "--chat", "--chat_template", "{tmp}/none"],
            "chat_template='{tmp}/none' is no file here, no template's text, and none of 'plain'",
        ),
        (["{tmp}/bare", "--prompt", "a", "--chat"], "no chat template"),
        (
            ["{hub}", "--prompt", "a", "--chat", "--chat_template", "{tmp}/strict"],
            "conversation: no system message",
        ),
        (
            ["{hub}", "--prompt", "a", "--chat", "--chat_template", "{tmp}/wrong"],
            "template refuses the conversation",
        ),
        (["{tmp}/run.ckpt", "--prompt", "a"], "had no tokenizer to save in it: name the directory or hub id"),
        (
            ["{tmp}/none.ckpt", "--prompt", "a"],
            "none.ckpt cannot be opened: there is neither a checkpoint nor a dir",
        ),
        (["{hub}", "--prompt", "z" * 999], "and fewer than the model's 256 positions"),
        (["{hub}", "--prompt", "a", "--ep", "3"], "ep must divide 1"),
        (["{hub}", "--promt", "a"], "no option 'promt' (did you mean prompt?)"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value[:30],
)
def test_an_error_is_one_line(
    arguments: list[str], line: str, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_talking(tmp_path / "bare", template=None)
    (tmp_path / "run.ckpt").mkdir()
    (tmp_path / "strict").write_text("{{ raise_exception('no system message') }}")
    (tmp_path / "wrong").write_text("{% if %}")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", *(word.format(hub=hub, tmp=tmp_path) for word in arguments)])
    assert ended.value.code == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.strip() and "Loading weights" not in text]
    assert len(errors) == 1, errors
    assert line.format(tmp=tmp_path) in errors[0]


def test_the_template_of_these_tests_is_what_they_write_by_hand(hub: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(hub)
    assert tokenizer.chat_template == TEMPLATE
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "eta"}], add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert rendered == _turn(hub, ("user", "eta"), enable_thinking=False)
