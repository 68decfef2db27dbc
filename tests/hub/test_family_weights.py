"""Weights of every family on meta: drawn and loaded as transformers draws and loads them on one process."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ep import from_pretrained
from lightning_ep import transformers_adapter as adapter
from lightning_ep.hub.initialize import materialize
from lightning_ep.hub.load import stream_pretrained
from tests.hub.every_family import FAMILIES, LEFT_OUT, auto_class_of, declared, tiny_config_of

CPU = torch.device("cpu")
# Rules that write into submodules or whose last writer is a module around; loaded weights that a rule would overwrite;
# fp32 by name, and by a dtype in the code.
SHORT = ["afmoe", "ernie4_5_vl_moe", "flint", "hunyuan_v1_moe", "llava", "mistral_large4", "nemotron_h", "qwen3_next"]
# What only a constructor sets.
NO_RULE = {
    "diffusion_gemma": "layer_scalar is on the meta device",
    "qwen3_omni_moe": r"rules of Qwen3OmniMoeTalkerTextTopKRouter leave this parameter unset",
}
some_or_all = pytest.mark.parametrize(
    "family", [family if family in SHORT else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return dict(named)


def _differs(found: Tensor, one: Tensor, other: Tensor) -> str | None:
    """Whether a tensor is not what two models of other seeds have: the same, or drawn alike."""
    if torch.equal(one, other):
        return None if torch.equal(found, one) else "is no constant"
    wanted, x = torch.cat([one.double().flatten(), other.double().flatten()]), found.double().flatten()
    size = x.numel()
    if (x.mean() - wanted.mean()).abs() > 6 * wanted.std() / size**0.5:
        return f"has the mean {x.mean():.2g}, not {wanted.mean():.2g}"
    if size > 1 and abs(x.std() / wanted.std() - 1) > 0.02 + 6 * (2 * (size - 1)) ** -0.5:
        return f"has the deviation {x.std():.2g}, not {wanted.std():.2g}"
    return None


@some_or_all
def test_random_weights_are_drawn_by_the_familys_rules(family: str) -> None:
    config = tiny_config_of(family)
    auto_class = auto_class_of(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        one, other = (_tensors(auto_class.from_config(deepcopy(config))) for _ in range(2))
    with torch.device("meta"):
        model = auto_class.from_config(deepcopy(config))
    adapter.note_own_modules(model)
    if family in NO_RULE:
        with pytest.raises(ValueError, match=NO_RULE[family]):
            materialize(model, CPU, seed=7)
        return
    materialize(model, CPU, seed=7)
    found = _tensors(model)
    assert found.keys() == one.keys()
    wrong = {name: _differs(value, one[name], other[name]) for name, value in found.items()}
    assert not {name: what for name, what in wrong.items() if what is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@some_or_all
def test_loaded_weights_and_their_dtypes_are_those_that_transformers_loads(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    config = tiny_config_of(family)
    auto_class: Any = auto_class_of(config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        saved = auto_class.from_config(config)
        for tensor in saved.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.normal_(std=0.1)
        if family == "zaya":  # transformers sets the last one, whatever it has loaded
            for name, buffer in saved.named_buffers():
                if name.endswith("balancing_biases"):
                    buffer[-1] = -1.0
    saved.save_pretrained(tmp_path)
    expected = _tensors(auto_class.from_pretrained(tmp_path, dtype=dtype))
    model = from_pretrained(tmp_path, auto_class, dtype=dtype)
    stream_pretrained(model, CPU)
    materialize(model, CPU, seed=5)
    found, params = _tensors(model), dict(model.named_parameters(remove_duplicate=False))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if name in params:
            # Norms that a family asks for in fp32, of which transformers takes notice in fp16 only, are wider here.
            wider = family in ("afmoe", "gpt_oss") and "norm" in name and dtype == torch.bfloat16
            assert value.dtype == (torch.float32 if wider else expected[name].dtype), name
        assert torch.equal(value.to(expected[name].dtype), expected[name]), name


@pytest.mark.slow
def test_every_family_is_here_or_left_out_by_name() -> None:
    by_config = {
        "llava",
        "kimi_k25",
        "nemo_speechlm",
        "nemotron_h_omni",
    }  # the part with experts is the config's choice
    assert declared() == {*FAMILIES, *LEFT_OUT} - by_config
