"""Every tensor has a rank that writes it, also one of which no rank has a part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lightning_ep.hub.export import export_sharded
from tests.hub.every_family import tiny_config_of


def test_parameters_without_numbers_are_written(tmp_path: Path) -> None:
    config: Any = tiny_config_of("deepseek_v3")
    config.n_shared_experts = 0
    model = AutoModelForCausalLM.from_config(config)
    expected = model.state_dict()
    assert any(tensor.numel() == 0 for tensor in expected.values())
    export_sharded(model, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
