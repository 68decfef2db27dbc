"""A key of a configuration that nobody reads is refused, wherever a user has typed it, with the nearest names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from lightning_ep import CausalLM, from_config, from_pretrained
from tests.hub_files import write_checkpoint
from tests.reference import tiny_config

MOE = {"model_type": "qwen3_moe"}
VISION = {"model_type": "qwen3_vl_moe"}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}

UNKNOWN = {
    "misspelt": ({**MOE, "num_expert": 4}, "num_expert (did you mean num_experts or"),
    "of another family": ({**MOE, "n_routed_experts": 4}, "n_routed_experts"),
    "of generation": ({**MOE, "temperature": 0.5}, "temperature (a setting of generation"),
    "nested": ({**VISION, "text_config": {"num_expert": 4}}, "text_config.num_expert (did you mean num_experts"),
    "in the other tower": ({**VISION, "text_config": {"spatial_merge_size": 2}}, "text_config.spatial_merge_size"),
    "not nested": ({**VISION, "num_experts": 4}, "num_experts (did you mean text_config.num_experts?)"),
    "of the rotary embedding": (
        {**MOE, "rope_parameters": {**YARN, "beta_fats": 1}},
        "beta_fats (did you mean beta_fast",
    ),
    "the old name of it": ({**MOE, "rope_scaling": {**YARN, "beta_fats": 1}}, "rope_scaling.beta_fats"),
    "no such family": ({"model_type": "qwen3_mo"}, "did you mean qwen3_moe"),
    "no family": ({"num_experts": 4}, "names its family"),
}

KNOWN = {
    "an alias": {**MOE, "num_local_experts": 4},
    "read by the model, not declared": {**MOE, "head_dim": 64},
    "old names": {**MOE, "torch_dtype": "bfloat16", "rope_theta": 1e4, "attn_implementation": "eager"},
    "read on the way in": {"model_type": "deepseek_v32", "num_experts": 4},
    "composed names": {"model_type": "dots3_note_text", "swa_head_dim": 64},
    "nested": {**VISION, "text_config": {"num_experts": 4}, "vision_config": {"depth": 2}},
    "rotary": {**MOE, "rope_parameters": {**YARN, "beta_fast": 16.0}},
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_key_that_nobody_reads_is_refused_with_the_nearest(case: str) -> None:
    values, message = UNKNOWN[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        from_config(values)
    with pytest.raises(ValueError, match=re.escape(message)):
        CausalLM(values, pretrained=False)


@pytest.mark.parametrize("case", KNOWN)
def test_a_key_that_is_read_is_accepted(case: str) -> None:
    CausalLM(KNOWN[case], pretrained=False)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v4", "gpt_oss", "qwen3_vl_moe", "ernie4_5_vl_moe"])
def test_what_a_family_writes_into_its_own_file_is_accepted(family: str) -> None:
    CausalLM(AutoConfig.for_model(family).to_dict(), pretrained=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_expert": 2}, "num_expert (did you mean num_experts"),
        ({"rope_parameters": {**YARN, "beta_fats": 1}}, "rope_parameters.beta_fats (did you mean beta_fast"),
        ({"cache_dir": "elsewhere", "token": "x"}, "has no arguments cache_dir, token: the environment says where"),
    ],
)
def test_overrides_of_a_checkpoint_are_refused_alike(overrides: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(TypeError, match=re.escape(message)):
        from_pretrained(tmp_path, **overrides)


def test_what_a_file_holds_beside_is_not_refused(tmp_path: Path) -> None:
    config = tiny_config(key_of_remote_code=3)
    assert from_config(config).config.key_of_remote_code == 3
    write_checkpoint(tmp_path, key_of_remote_code=3)
    assert from_pretrained(tmp_path, key_of_remote_code=4).config.key_of_remote_code == 4
