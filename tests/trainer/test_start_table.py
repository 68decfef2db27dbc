"""A run says at its first step what it does, what that is estimated to cost, what may be better; nothing stops it."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_ep import CausalLM, ExpertParallelStrategy, LoRA, ParallelLayout, add_adapter
from lightning_ep.planner import QWEN3_30B_A3B, Case, find_model, peak_gib, read_widths, tokens_per_second
from lightning_ep.planner.candidates import Request, better, estimate
from lightning_ep.planner.devices import GPUS
from lightning_ep.trainer import start_table
from lightning_ep.trainer.planned import planned_adapters
from tests.reference import tiny_model
from tests.tiny import SMALL, TinyModule, loader

H100 = GPUS["H100"]
PAGE = (Path(__file__).parents[2] / "docs" / "choose" / "planning.md").read_text()


class _AdamW(TinyModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is printed on the first rank."""
    texts: list[str] = []
    monkeypatch.setattr(start_table, "rank_zero_info", texts.append)
    return texts


def _fit(root: Path, module: L.LightningModule | None = None, **options: Any) -> L.LightningModule:
    module = module or _AdamW()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=2, logger=False, enable_checkpointing=False, precision="bf16-mixed",
        enable_progress_bar=False, default_root_dir=root,
        strategy=ExpertParallelStrategy(activation_checkpointing="selective"), **options,
    )  # fmt: skip
    trainer.fit(module, loader())
    assert trainer.global_step == 2
    return module


def _rows(text: str) -> dict[str, str]:
    lines = re.sub(r"\n {14}", " ", text).splitlines()
    assert lines[0] == "Training starts:"
    return {line[2:13].strip(): line[14:] for line in lines[1:]}


def test_a_run_says_once_what_it_does(tmp_path: Path, said: list[str]) -> None:
    _fit(tmp_path, TinyModule())
    (text,) = said
    assert f"```text\n{text}\n```" in PAGE
    rows, model = _rows(text), tiny_model(**SMALL)
    total = sum(p.numel() for p in model.parameters())
    idle = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name) // 2
    assert rows["parameters"] == f"{total:,}, {total - idle:,} active: 2 of 4 experts; all are trained"
    assert rows["layout"] == "ep=1, fsdp=1, replicate=1, tp=1, cp=1 on 1 x CPU"
    assert rows["batch"] == "2 x 8 tokens x 1 data rank x 1 micro-batch = 16 tokens per step"
    assert rows["precision"].startswith("bf16-mixed: weights in fp32")
    assert rows["layers"] == "selective recompute, not compiled"
    assert rows["experts"].startswith("fused kernels (in PyTorch, without a GPU), 4 of a layer on a rank")
    assert rows["attention"].startswith("sdpa; packed documents would cost a mask: ")
    assert (rows["optimizer"], rows["estimates"]) == ("torch's SGD", "none: there is no GPU")


def test_frozen_weights_are_said_to_be_in_bf16(tmp_path: Path, said: list[str]) -> None:
    module = _fit(tmp_path, CausalLM(tiny_model(**SMALL).config, False, adapter=LoRA(r=2)))
    assert _rows(said[0])["precision"].startswith("bf16-mixed: trained weights in fp32, frozen ones in bf16, ")
    dtypes = {(p.requires_grad, p.dtype) for p in module.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_a_run_without_a_model_summary_says_nothing(tmp_path: Path, said: list[str]) -> None:
    _fit(tmp_path, enable_model_summary=False)
    assert not said


def test_estimates_are_those_of_the_planner(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_table, "_known_gpu", lambda _: H100)
    module = _fit(tmp_path)
    case = Case(*read_widths(tiny_model(**SMALL).config.to_dict()), 2, 8, 1, recompute="selective", compile=False)
    (text,) = said
    rows = _rows(text)
    assert rows["memory"].startswith(f"estimated {peak_gib(case, 75.0):.1f} of 75 GiB")
    assert "speed" not in rows  # the speed of layers that are not compiled was never measured
    start_table.say_start(module, ParallelLayout(1), "full", True, (2, 8))
    case = dataclasses.replace(case, recompute="full", compile=True)
    assert _rows(said[1])["speed"].startswith(f"estimated {tokens_per_second(case, H100):,.0f} tokens/s per GPU, ")
    start_table.say_start(module, ParallelLayout(1), "full", True, None)
    assert "batch" not in _rows(said[2])
    assert _rows(said[2])["estimates"] == "none: batches have no input_ids of two dimensions"


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("estimate", "none: ZeroDivisionError: of the planner"),
        ("_attention", "none: ZeroDivisionError: of the planner"),
    ],
)
def test_what_fails_in_it_ends_no_run(
    broken: str, reason: str, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise ZeroDivisionError("of the planner")

    monkeypatch.setattr(start_table, "_known_gpu", lambda _: H100)
    monkeypatch.setattr(start_table, broken, fails)
    _fit(tmp_path)
    assert _rows(said[0])["estimates"] == reason


def test_other_optimizers_are_not_estimated(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_table, "_known_gpu", lambda _: H100)
    _fit(tmp_path, TinyModule())
    assert _rows(said[0])["estimates"] == "none: they are of AdamW, and the optimizer is SGD"


def _request(case: Case) -> Request:
    return Request(find_model("Qwen/Qwen3-30B-A3B"), H100, case.ranks, tokens_per_step=case.tokens_per_step)


def test_what_may_be_better_is_said_as_a_change_of_the_recipe() -> None:
    case = Case(QWEN3_30B_A3B, 48, 1, 4096, 16, ep=16, recompute="full", accumulate=16, skew=1.2)
    now = estimate(case, H100)
    then = better(now, _request(case))
    assert then is not None
    assert then.rate > 1.1 * now.rate
    assert then.case.tokens_per_step == case.tokens_per_step
    said = start_table._change(now, then)
    assert f"```text\n{start_table._wrapped('advice', said)}\n```" in PAGE
    assert f"strategy.init_args.ep: {then.case.ep}, " in said
    assert f"is estimated at {then.rate:,.0f} tokens/s per GPU, {then.rate / now.rate:.2f} times as many" in said
    assert better(then, _request(case)) is None  # what was proposed has nothing better
    too_large = estimate(dataclasses.replace(then.case, batch=16, accumulate=1, recompute="none"), H100)
    assert too_large.gib > 75
    assert better(too_large, _request(case)) is not None  # slower, but it fits


def test_thousands_of_gpus_are_looked_at_in_less_than_a_second() -> None:
    case = Case(QWEN3_30B_A3B, 48, 4, 4096, 2048, ep=8, recompute="full", skew=1.2)
    began = time.process_time()
    better(estimate(case, H100), _request(case))
    assert time.process_time() - began < 1


def test_adapters_are_planned_where_they_are_those_of_attention_and_experts() -> None:
    for experts in (True, False):
        model = tiny_model()
        add_adapter(model, LoRA(r=4, experts=experts))
        assert planned_adapters(model, *read_widths(model.config.to_dict())) == (4, experts)
    assert planned_adapters(tiny_model(), *read_widths(model.config.to_dict())) == (0, False)
    model = tiny_model()
    add_adapter(model, LoRA(r=4, modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="and others are trained"):
        planned_adapters(model, *read_widths(model.config.to_dict()))
    model = tiny_model()
    model.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match="a part of the model is frozen"):
        planned_adapters(model, *read_widths(model.config.to_dict()))
