"""The layouts that a plan chooses from: all that the package accepts, none that it refuses, and which one is taken."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_ep import ParallelLayout, expert_plan
from lightning_ep import transformers_adapter as adapter
from lightning_ep.parallelize import check
from lightning_ep.planner import find_model
from lightning_ep.planner.candidates import Request, cases, choose, estimate, fits, fitting, layouts, smallest
from lightning_ep.planner.devices import GPUS
from lightning_ep.planner.families import shipped


def _request(name: str = "Qwen/Qwen3-30B-A3B", ranks: int = 16, **settings: Any) -> Request:
    return Request(find_model(name), GPUS["H100"], ranks, **settings)


def test_every_layout_that_exists_is_tried() -> None:
    found = {(one.ep, one.fsdp, one.replicate, one.tp, one.cp) for one in layouts(_request())}
    assert len(found) == len(list(layouts(_request())))
    sizes = (1, 2, 4, 8, 16)
    expected = {
        (ep, fsdp, replicate, tp, cp)
        for ep, fsdp, replicate, tp, cp in itertools.product(sizes, repeat=5)
        # Of 128 experts, 32 heads, 4 key and value heads, and a vocabulary of 151,936; tp and cp inside a node.
        if ep * fsdp * replicate == 16 and (fsdp * ep) % (tp * cp) == 0 and 4 % tp == 0 and tp * cp <= 8
    }
    assert found == expected


@pytest.mark.parametrize("name", ["Qwen/Qwen3-30B-A3B", *(n for n in shipped() if not n.startswith("Qwen/Qwen3-"))])
def test_what_is_refused_of_a_family_is_what_the_package_refuses(name: str) -> None:
    family, config = find_model(name).family, dict(find_model(name).config)
    kind_of_model = config.pop("model_type")
    config = {**config, "num_hidden_layers": 4}
    for kind, ours in (("tp", family.tp), ("cp", family.cp)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind_of_model, **config))
        layout = ParallelLayout(2, 1, 2, **{kind: 2})
        if ours or (kind == "cp" and adapter.whole_sequence_mixers(model)):
            check(model, layout, expert_plan(model))
        else:
            with pytest.raises(ValueError, match=kind):
                check(model, layout, expert_plan(model))
    experts = adapter.experts_modules(model).values()
    assert experts
    assert all(adapter.why_not_fused(module) is None for module in experts), "times are those of fused experts"


def test_a_step_has_its_tokens_and_fits_into_memory() -> None:
    request = _request(sequence=8192, tokens_per_step=524_288)
    for one in (found := fitting(request)):
        assert one.case.tokens_per_step == 524_288
        assert one.gib <= request.planned_gib < request.limit_gib
        assert one.parts.keys() == found[0].parts.keys()
    assert [one.rate for one in found] == sorted((one.rate for one in found), reverse=True)
    assert len({one.layout for one in found}) == len(found)
    # Every other way on the layout of the first one is slower, or does not fit.
    same = [estimate(case, request.device) for case in cases(request) if (case.ep, case.cp, case.tp, case.replicate)
            == tuple(getattr(found[0].case, name) for name in ("ep", "cp", "tp", "replicate"))]  # fmt: skip
    assert len(same) > 3
    assert all(one.rate <= found[0].rate or one.gib > request.planned_gib for one in same)


def test_of_two_that_are_about_as_fast_the_simpler_is_taken() -> None:
    found = fitting(_request(sequence=32_768, tokens_per_step=1_048_576))
    chosen = choose(found)
    assert chosen.rate >= 0.9 * found[0].rate
    assert (chosen.case.tp, chosen.case.replicate) == (1, 1)
    assert choose(found[:1]) is found[0]


def test_what_does_not_fit_says_so_quickly() -> None:
    large = _request("Qwen/Qwen3-235B-A22B", 8)
    assert not fits(large)
    assert fitting(large) == []
    least = smallest(large)
    assert least is not None
    assert 14 * 235e9 / 8 < least.gib * 2**30 < 16 * 235e9 / 8
    assert fits(_request("Qwen/Qwen3-235B-A22B", 8, lora_rank=16))
    assert smallest(_request(tokens_per_step=4096 * 3)) is None


def test_a_plan_for_64_gpus_takes_less_than_three_seconds() -> None:
    start = time.process_time()
    assert fitting(_request(ranks=64, sequence=32_768, tokens_per_step=8_388_608))
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": 12}, "12 GPUs are no whole nodes of 8"),
        ({"tokens_per_step": 10_000}, "a step of 10,000 tokens .* sequences of 4,096; 8,192 would"),
        ({"sequence": 0}, "sequence=0: must be a positive integer"),
    ],
)
def test_questions_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _request(**settings)
