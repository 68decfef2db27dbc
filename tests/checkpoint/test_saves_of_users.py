"""What is saved at the end of a run: refused at its start if it could only fail, else read by transformers and peft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM, Qwen3MoeForSequenceClassification

from lightning_ep.callbacks import HuggingFaceExport
from lightning_ep.hub.export import export_sharded
from tests.hub_files import full_state
from tests.reference import VOCAB, tiny_config, tiny_model
from tests.rows import RowFailures, Rows, refused
from tests.tiny import SMALL, TinyModule, loader, quiet

row = Rows()


class Module(TinyModule):
    """Builds its model with a function of the test's, and calls another at the end of training, on every rank."""

    def __init__(self, build: Callable[[], Any], save: Callable[[Any], None] = lambda model: None) -> None:
        super().__init__()
        self.build, self.save = build, save

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.build()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        inputs = {"input_ids": batch["input_ids"], "use_cache": False}
        return self.model(**inputs).logits.float().square().mean()

    def on_train_end(self) -> None:
        self.save(self.model)


class _MustNotStart(Callback):
    def on_train_start(self, *_: Any) -> None:
        raise AssertionError("training starts")


def _train(root: Path, module: Module, *callbacks: Callback) -> dict[str, Tensor]:
    trainer = quiet(root, max_steps=1, callbacks=list(callbacks))
    trainer.fit(module, loader())
    return full_state(module.model)


def _refused(root: Path, build: Callable[[], Any], *words: str, path: Path | None = None) -> None:
    export = HuggingFaceExport(str(path or root / "out"))
    with refused(*words):
        _train(root, Module(build), export, _MustNotStart())
    assert not (root / "out").exists()
    assert not (root / "out.incomplete").exists()


def _lora(twice: bool = False, **options: Any) -> Any:
    model = peft.get_peft_model(tiny_model(**SMALL), peft.LoraConfig(target_modules=["q_proj"], **options))
    if twice:
        model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))
    return model


def _with_head(tokens: int, said: bool) -> Any:
    model = tiny_model(**SMALL)
    model.lm_head = nn.Linear(32, tokens, bias=False)
    if said:
        model.config.vocab_size = tokens
    return model


def _untied(said: bool) -> Any:
    model = tiny_model(**SMALL, tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    if said:
        model.config.tie_word_embeddings = False
    return model


class _Around(nn.Module):
    def __init__(self, **models: nn.Module) -> None:
        super().__init__()
        self.inside = nn.ModuleDict(models)

    def forward(self, **inputs: Any) -> Any:
        return next(model(**inputs) for model in self.inside.values())


# ---------------------------------------------------------------------- refused before training


@row()
def adapters_of_which_a_file_cannot_hold_all(root: Path) -> None:
    _refused(root, lambda: _lora(twice=True), r"the model has 2 \(default, other\), and a file holds one")


@row()
def an_adapter_that_cannot_be_merged(root: Path) -> None:
    export = HuggingFaceExport(str(root / "out"), merge=True)
    with refused(r"q_proj is adapted by a variant of LoRA \(use_dora\)"):
        _train(root, Module(lambda: _lora(use_dora=True)), export, _MustNotStart())
    with refused("has no adapters: leave `merge` out"):
        _train(root, Module(lambda: tiny_model(**SMALL)), export, _MustNotStart())


@row()
def a_head_that_the_config_does_not_describe(root: Path) -> None:
    _refused(root, lambda: _with_head(40, said=False), r"lm_head.weight: \[40, 32\], the config makes it \[128, 32\]")


@row()
def weights_that_are_tied_no_longer(root: Path) -> None:
    _refused(root, lambda: _untied(said=False), "are two, and the config says one", "tie_word_embeddings = False")


@row()
def a_path_that_cannot_be(root: Path) -> None:
    root.mkdir(exist_ok=True)
    (root / "file").write_text("")
    _refused(root, lambda: tiny_model(**SMALL), "Not a directory", path=root / "file" / "out")


@row()
def an_adapter_around_the_model(root: Path) -> None:
    state = _train(root, Module(_lora), HuggingFaceExport(str(root / "out")))
    found = peft.PeftModel.from_pretrained(tiny_model(**SMALL), root / "out").state_dict()
    factors = [key for key in found if "lora_" in key]
    assert len(factors) == 2
    assert all(torch.equal(found[key], state[key]) for key in factors)


@row()
def two_models(root: Path) -> None:
    build = lambda: _Around(one=tiny_model(**SMALL), two=tiny_model(**SMALL))  # noqa: E731
    _refused(root, build, "contains 2", r"export_sharded\(model, path\)")
    paths = {name: root / name for name in ("one", "two")}
    module = Module(build, lambda model: [export_sharded(model.inside[n], path) for n, path in paths.items()])
    state = _train(root, module)
    for name, path in paths.items():
        for key, value in AutoModelForCausalLM.from_pretrained(path).state_dict().items():
            assert torch.equal(state[f"inside.{name}.{key}"], value)


# ---------------------------------------------------------------------- exported


@row()
def what_the_config_was_told(root: Path) -> None:
    for name, build in (("untied", lambda: _untied(said=True)), ("wrapped", lambda: _Around(m=tiny_model(**SMALL)))):
        state = _train(root, Module(build), HuggingFaceExport(str(root / name)))
        for key, value in AutoModelForCausalLM.from_pretrained(root / name).state_dict().items():
            assert torch.equal(state[f"inside.m.{key}" if name == "wrapped" else key], value), (name, key)


@row()
def a_classifier(root: Path) -> None:
    config = tiny_config(**SMALL, num_labels=3, pad_token_id=0)
    state = _train(
        root, Module(lambda: Qwen3MoeForSequenceClassification(config)), HuggingFaceExport(str(root / "out"))
    )
    model, info = Qwen3MoeForSequenceClassification.from_pretrained(root / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    readme = (root / "out" / "README.md").read_text()
    assert "Qwen3MoeForSequenceClassification.from_pretrained" in readme
    assert "vllm" not in readme


# ---------------------------------------------------------------------- save_pretrained


@row()
def save_pretrained_of_a_model(root: Path) -> None:
    """Twice to one place, as after every epoch; what else is there stays, but for other weights."""
    path = root / "out"
    path.mkdir(parents=True, exist_ok=True)
    (path / "notes.txt").write_text("mine")
    (path / "model.safetensors").write_bytes(b"old weights in one file")

    def save(model: Any) -> None:
        dist.barrier()
        for _ in range(2):
            model.save_pretrained(path)

    module = Module(lambda: tiny_model(**SMALL), save)
    state = _train(root, module)
    loaded, info = Qwen3MoeForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(state[key], value) for key, value in loaded.state_dict().items())
    assert (path / "notes.txt").read_text() == "mine"
    assert not (path / "model.safetensors").exists()
    module.model.save_pretrained(root / "later")  # in the user's script, behind `fit`
    assert Qwen3MoeForCausalLM.from_pretrained(root / "later").lm_head.weight.shape == (VOCAB, 32)
    with refused("push_to_hub cannot", "HuggingFaceExport", "upload_folder"):
        module.model.push_to_hub("me/mine")
    with refused("ranks name different directories"):
        module.model.save_pretrained(root / f"rank {dist.get_rank()}")


@row()
def save_pretrained_of_a_state_that_the_user_gathered(root: Path) -> None:
    def save(model: Any) -> None:
        state = full_state(model)
        if dist.get_rank() == 0:
            model.save_pretrained(root / "out", state_dict=state)
        dist.barrier()

    state = _train(root, Module(lambda: tiny_model(**SMALL), save))
    loaded = Qwen3MoeForCausalLM.from_pretrained(root / "out").state_dict()
    assert all(torch.equal(state[key], value) for key, value in loaded.items())


@row()
def save_pretrained_of_adapters(root: Path) -> None:
    def build() -> Any:
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
        model = peft.get_peft_model(tiny_model(**SMALL), config)
        model.add_adapter("other", peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
        return model

    def save(model: Any) -> None:
        model.save_pretrained(root / "out")
        with refused("push_to_hub cannot gather a PeftModel"):
            model.push_to_hub("me/mine")

    state = _train(root, Module(build, save))
    for name, path in (("default", root / "out"), ("other", root / "out" / "other")):
        loaded = peft.PeftModel.from_pretrained(tiny_model(**SMALL), path, adapter_name=name)
        compared = [key for key in loaded.state_dict() if name in key.split(".")]
        assert len(compared) == (3 if name == "default" else 2), compared
        assert all(torch.equal(state[key], loaded.state_dict()[key]) for key in compared)


@row()
def save_pretrained_of_a_model_with_an_adapter_of_its_own(root: Path) -> None:
    def build() -> Any:
        model = tiny_model(**SMALL)
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        return model

    state = _train(root, Module(build, lambda model: model.save_pretrained(root / "out")))
    loaded = tiny_model(**SMALL)
    loaded.load_adapter(root / "out")
    compared = [key for key in loaded.state_dict() if "lora_" in key]
    assert len(compared) == 2
    assert all(torch.equal(state[key], loaded.state_dict()[key]) for key in compared)


@pytest.mark.parametrize("name", row)
def test_works_or_is_refused(name: str, row_failures: RowFailures) -> None:
    row_failures.check(name)
