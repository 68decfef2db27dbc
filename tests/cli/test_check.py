"""`lightning-ep check` passes right layouts, and ends with 1 and the reason where one is wrong or a link is slow."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from lightning_ep import cli
from lightning_ep.cli.check import _config
from lightning_ep.cli.compared import cut_to_fit
from lightning_ep.cli.links import Link
from lightning_ep.moe.dispatch.all_to_all import AllToAllDispatcher
from lightning_ep.planner import find_model
from lightning_ep.planner.families import shipped
from tests.ranks import run_ranks
from tests.reference import tiny_config
from tests.talking import on_two_ranks

PAGE = re.findall(
    r"```text\n(.*?)```", (Path(__file__).parents[2] / "docs" / "choose" / "planning.md").read_text(), re.DOTALL
)
pytestmark = [pytest.mark.usefixtures("on_the_tests_device"), on_two_ranks]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_config(vocab_size=96).save_pretrained(folder)
    return str(folder)


def _check(arguments: list[str], fault: float = 1.0, of: torch.dtype | None = None) -> tuple[Any, str]:
    """How the command ends on this rank, and what it prints; rows (of a dtype) that come home may be planted wrong."""
    out, combine = io.StringIO(), AllToAllDispatcher.combine

    def wrong(self: Any, plan: Any, rows: torch.Tensor, hop: Any) -> Any:
        return combine(self, plan, fault * rows if of in (None, rows.dtype) else rows, hop)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        if fault != 1:
            patch.setattr(AllToAllDispatcher, "combine", wrong)
        try:
            cli.main(["check", *arguments])
        except SystemExit as ended:
            return ended.code, out.getvalue()
    return 0, out.getvalue()


def _on_ranks(world: int, *arguments: str, fault: tuple[Any, ...] = ()) -> tuple[list[Any], str]:
    ended = run_ranks(world, _check, list(arguments), *fault, init_process_group=False)
    assert not any(shown for _, shown in ended[1:]), "the first rank prints"
    return [code for code, _ in ended], ended[0][1]


def _without_figures(text: str) -> str:
    return re.sub(r"(?<=of )model\S+|\d+(\.\d+)?(e[-+]\d+)?", "#", text)


@pytest.mark.parametrize(
    ("world", "sizes"),
    [
        (2, "--ep_size 2"),
        (2, "--ep_size 1 --tp_size 2"),
        (2, "--ep_size 2 --cp_size 2 --seq_len 31"),
        pytest.param(4, "--ep_size 2 --fsdp_size 2", marks=pytest.mark.slow),
        pytest.param(4, "--ep_size 2 --replicate 2", marks=pytest.mark.slow),
    ],
)
def test_right_layouts_pass(world: int, sizes: str, tiny: str) -> None:
    codes, shown = _on_ranks(world, "--model_name_or_path", tiny, *f"--seq_len 32 {sizes}".split())
    assert codes == [0] * world
    assert shown.endswith("passed\n")
    if sizes == "--ep_size 2":
        assert _without_figures(shown) in [_without_figures(block) for block in PAGE]
    assert "FAIL" not in shown
    errors = [float(text) for text in re.findall(r"^pass .* (\d\.\de[-+]\d+) of ", shown, re.MULTILINE)]
    assert len(errors) == 5
    assert max(errors[:2]) < 1e-4 < min(errors[2:])  # in fp32, and in bf16
    assert re.search(r"experts that routers choose +as on one process", shown)
    norms = re.search(r"norm of expert gradients +(\S+), on one process (\S+)", shown)
    assert norms is not None
    assert float(norms[1]) == pytest.approx(float(norms[2]), rel=1e-4)
    assert float(norms[1]) > 0
    ep = int(sizes.split()[1])
    for rank in range(world):
        experts = 8 // ep
        first = rank % ep * experts
        assert f"rank {rank}: ep {rank % ep} (experts {first} to {first + experts - 1})" in shown
    assert re.search(r"pass +link \w+=2, all-to-all +[\d.]+ GB/s per rank", shown)


@pytest.mark.parametrize(
    ("fault", "wrong", "right"),
    [
        ((1.02,), r"gradients, the largest difference: \d\.\de-02 of model\.layers\.", "in bf16: logits"),
        ((1.5, torch.bfloat16), "in bf16: the largest difference: ", "gradients, the largest difference"),
    ],
)
def test_what_computes_something_else_ends_with_1_and_says_what(
    fault: tuple[Any, ...], wrong: str, right: str, tiny: str
) -> None:
    codes, shown = _on_ranks(2, "--model_name_or_path", tiny, "--ep_size", "2", "--seq_len", "32", fault=fault)
    assert codes == [1, 1]
    assert re.search(rf"^FAILED: .*{wrong}", shown, re.MULTILINE), shown
    assert re.search(rf"^pass +{right}", shown, re.MULTILINE), shown


def test_one_process_and_a_recipe(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    strategy = f"strategy: {{class_path: x, init_args: {{ep: 1, cp: {1}}}}}"
    recipe.write_text(f"trainer:\n  {strategy}\nmodel:\n  init_args: {{model: {json.dumps(tiny)}}}\n")
    assert _check(["--model_name_or_path", str(recipe), "--seq_len", "16"])[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "check needs --model_name_or_path"),
        (["--ep_size", "3"], r"ep=3 is 3, but there are 1 processes"),
        (["--ep_size", "1", "--seq_len", "1"], "--seq_len 1: so few tokens"),
        (["--model_name_or_path", "nothing/there"], "nothing/there is no model that can be opened here: .*Qwen3-30B"),
        (["--model_name_or_path", "{vision}"], "qwen3_vl_moe is no causal language model"),
    ],
)
def test_what_cannot_be_checked_is_refused(
    arguments: list[str],
    message: str,
    tiny: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    vision = tmp_path / "config.json"
    vision.write_text(json.dumps({"model_type": "qwen3_vl_moe"}))
    model = ["--model_name_or_path", tiny] if arguments else []
    assert _check([*model, *(word.replace("{vision}", str(vision)) for word in arguments)])[0] == 2
    assert re.search(message, capsys.readouterr().err)


def test_models_that_plan_knows_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_: pytest.fail("the hub was asked"))
    for name, about in shipped().items():
        for asked in (name, name.rpartition("/")[2].lower()):
            config = _config(asked)
            assert config.model_type == about["config"]["model_type"]
            assert config.num_hidden_layers == about["config"]["num_hidden_layers"]


def test_a_large_model_is_cut_until_it_fits() -> None:
    config = AutoConfig.for_model(**find_model("Qwen/Qwen3-30B-A3B").config)
    some, said = cut_to_fit(config, 16 * 31e9)
    assert (some.num_hidden_layers, said) == (4, "4 of 48 layers")
    some, said = cut_to_fit(config, 16 * 2.6e9)  # 623 M parameters a layer, 622 M beside them
    assert (some.num_hidden_layers, said) == (3, "3 of 48 layers")
    assert cut_to_fit(tiny_config(), 1e12)[1] == ""
    narrow, said = cut_to_fit(config, 16 * 0.2e9)
    assert narrow.num_hidden_layers == 2
    assert re.search(r"2 of 48 layers; narrowed to vocab_size=\d+, moe_intermediate_size=\d+", said)
    kept = ("num_experts", "num_attention_heads", "num_key_value_heads", "hidden_size", "num_experts_per_tok")
    assert all(getattr(narrow, name) == getattr(config, name) for name in kept)
    assert config.num_hidden_layers == 48
    deep = AutoConfig.for_model(**find_model("deepseek-ai/DeepSeek-V3").config)
    cut, _ = cut_to_fit(deep, 16 * 1e9)
    assert (cut.first_k_dense_replace, cut.num_hidden_layers) == (1, 2)
    with pytest.raises(ValueError, match=r"needs .* GiB on every rank, even of 2 layers .* and 0\.1 are free"):
        cut_to_fit(deep, 1e8)


def test_a_slow_link_and_a_wrong_one_are_problems() -> None:
    assert not Link("ep=8, all-to-all", 300e9, 335e9, "").problem
    assert re.match("100.0 GB/s where 335 are normal", Link("ep=8, all-to-all", 100e9, 335e9, "").problem)
    assert Link("ep=8, all-to-all", 1e6, None, "").problem == ""
    assert Link("ep=8, all-to-all", 300e9, 335e9, "not what was sent").problem == "not what was sent"
