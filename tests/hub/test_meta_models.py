"""What `from_config` and `from_pretrained` build without any weights, and what they refuse to build."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM

from lightning_ep import CausalLM, from_config, from_pretrained
from tests.hub.every_family import tiny_config_of


def test_quantized_weights_are_refused_however_they_are_asked_for(tmp_path: Path) -> None:
    config, asked = tiny_config_of("mixtral"), BitsAndBytesConfig(load_in_4bit=True)
    assert isinstance(config, MixtralConfig)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    config.quantization_config = asked
    values = {"model_type": "mixtral", "quantization_config": asked.to_dict()}
    for ask in (
        lambda: CausalLM(values, pretrained=False),
        lambda: from_config(config),
        lambda: from_pretrained(tmp_path, quantization_config=asked),
    ):
        with pytest.raises(ValueError, match=r"MixtralConfig has a quantization_config \('bitsandbytes'\).* Remove it"):
            ask()


def test_models_of_images_are_built_from_a_config_by_their_auto_class() -> None:
    model = from_config(tiny_config_of("llava"), AutoModelForImageTextToText)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert all(param.is_meta for param in model.parameters())
