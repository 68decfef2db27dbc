"""Streamed weights reach their modules whatever user code has made of the model, as in plain transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_ep import ParallelLayout, from_pretrained, parallelize
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.load import stream_pretrained
from tests.hub_files import full_state, write_checkpoint
from tests.ranks import assert_ranks_agree, device, here, run_ranks
from tests.reference import VOCAB, batches, relative_error

Build = Callable[[Any], Any]


class _Around(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"policy": model})


class _OwnAdapter(nn.Module):
    """A hand-written adapter that takes the parameter out of the layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.frozen = layer.weight
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.frozen.T + self.up(self.down(x))


def _lora(model: Any, **options: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], **options))


def _own_adapters(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.q_proj = _OwnAdapter(layer.self_attn.q_proj)
    return model


def _new_head(model: Any) -> Any:
    model.lm_head = nn.Linear(32, 10)
    return model


def _tied_by_hand(model: Any) -> Any:
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _layer_repeated(model: Any) -> Any:
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])
    return model


def _resized(model: Any, size: int) -> Any:
    model.resize_token_embeddings(size)
    return model


BUILDS: dict[str, Build] = {
    "lora": _lora,
    "lora_with_a_whole_module": lambda model: _lora(model, modules_to_save=["lm_head"]),
    "a_module_around": _Around,
    "the_base_model_alone": lambda model: model.model,
    "parameters_moved": _own_adapters,
    "a_head_of_the_users": _new_head,
    "tied_by_hand": _tied_by_hand,
    "a_layer_repeated": _layer_repeated,
    "more_tokens": lambda model: _resized(model, VOCAB + 11),
    "fewer_tokens": lambda model: _resized(model, VOCAB - 11),
}
# Those that are another thing where embedding and head are one.
TIED = ["lora_with_a_whole_module", "a_head_of_the_users", "more_tokens", "fewer_tokens"]


def _wrong(paths: list[str]) -> list[str]:
    """What differs from plain transformers, for all builds, in what is not random."""
    wrong, world = [], dist.get_world_size()
    for path in paths:
        for name in BUILDS if path == paths[0] else TIED:
            build = BUILDS[name]
            expected = build(AutoModelForCausalLM.from_pretrained(path))
            model = build(from_pretrained(path))
            parallelize(model, ParallelLayout(world, ep=world), device())
            found = full_state(model)
            if found.keys() != expected.state_dict().keys():
                wrong.append(f"{name}: other names")
            drawn = ("lora_", ".up.", ".down.", *(["lm_head"] if name == "a_head_of_the_users" else []))
            for key, value in expected.state_dict().items():
                if any(part in key for part in drawn):
                    continue
                if name == "more_tokens" and value.shape[0] == VOCAB + 11:
                    # transformers adds noise of 3e-5 standard deviations to the mean.
                    mean = value[:VOCAB].mean(0)
                    if not torch.allclose(found[key][VOCAB:], mean.expand(11, -1), atol=1e-6):
                        wrong.append(f"{name}: new rows of {key}")
                    if not torch.allclose(value[VOCAB:], mean.expand(11, -1), atol=1e-3):
                        wrong.append(f"{name}: transformers' new rows of {key} are no means any more")
                    found[key], value = found[key][:VOCAB], value[:VOCAB]
                if not torch.equal(found[key], value):
                    wrong.append(f"{name}: {key}")
    return wrong


def test_weights_follow_their_modules(tmp_path: Path) -> None:
    for tied in (False, True):
        write_checkpoint(tmp_path / str(tied), tie_word_embeddings=tied)
    assert_ranks_agree(2, _wrong, [str(tmp_path / "False"), str(tmp_path / "True")])


def _lora_gradients(path: str) -> list[str]:
    """A step of LoRA over streamed weights, against peft on one process with the same adapters."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = _lora(from_pretrained(path))
    parallelize(model, ParallelLayout(world, ep=world), device())
    adapters = {name: value for name, value in full_state(model).items() if "lora_" in name}
    plain = _lora(AutoModelForCausalLM.from_pretrained(path))
    assert not plain.load_state_dict(adapters, strict=False).unexpected_keys
    data = batches(world, 2)
    losses = [plain(**batch).loss for batch in data]
    sum(losses).backward()
    loss = model(**here(data[rank])).loss
    loss.backward()
    wrong = [] if abs(loss.item() - losses[rank].item()) <= 1e-5 else [f"loss {loss.item()} != {losses[rank].item()}"]
    for (name, param), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
        if param.requires_grad != reference.requires_grad or (param.grad is None) != (reference.grad is None):
            wrong.append(f"{name} is trained: {param.requires_grad}")
        elif reference.grad is not None and not relative_error(param.grad.full_tensor(), reference.grad) <= 1e-5:
            wrong.append(name)
    return wrong


def test_lora_over_streamed_weights_is_pefts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    assert_ranks_agree(2, _lora_gradients, str(tmp_path))


def _classifiers(path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    world, found = dist.get_world_size(), []
    asked = (AutoModelForSequenceClassification, "Qwen3MoeForSequenceClassification"), (AutoModel, "Qwen3MoeModel")
    for auto_class, name in asked:
        with pytest.raises(CheckpointError, match=rf"architectures=\['{name}'\]"):
            from_pretrained(path, auto_class)
        model = from_pretrained(path, auto_class, architectures=[name])
        parallelize(model, ParallelLayout(world, ep=world), device())
        found.append(full_state(model))
    return found[0], found[1]


def test_a_streamed_base_takes_a_new_head(tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path).state_dict()
    base = {name: value for name, value in expected.items() if name.startswith("model.")}
    for classifier, body in run_ranks(2, _classifiers, str(tmp_path)):
        score = classifier.pop("score.weight")
        assert score.shape == (2, 32)
        assert 0.005 < score.std() < 0.05  # as the family draws it
        assert classifier.keys() == base.keys()
        assert all(torch.equal(classifier[name], value) for name, value in base.items())
        assert all(torch.equal(body[name.removeprefix("model.")], value) for name, value in base.items())


def test_a_new_head_hides_nothing_that_the_base_lacks(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    model = from_pretrained(
        tmp_path,
        AutoModelForSequenceClassification,
        architectures=["Qwen3MoeForSequenceClassification"],
        num_hidden_layers=3,
    )
    with pytest.raises(CheckpointError, match=r"(?s)missing.*model.layers.2.self_attn.q_proj.weight") as info:
        stream_pretrained(model, torch.device("cpu"))
    assert "score" not in str(info.value)
