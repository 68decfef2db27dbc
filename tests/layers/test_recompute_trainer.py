"""activation_checkpointing through the Trainer, and what it is refused with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import DynamicCache

from lightning_ep import ExpertParallelStrategy, ParallelLayout, parallelize
from tests.layers.test_recompute import MODELS, MODES, model_of
from tests.ranks import device
from tests.rows import RowFailures, Rows, fit, refused, whole
from tests.tiny import TinyModule, loader, quiet

row = Rows()


class Both(TinyModule):
    """Qwen3-MoE, or a family with shared experts."""

    def __init__(self, family: str = "qwen3_moe") -> None:
        super().__init__()
        self.family = family

    def configure_model(self) -> None:
        if self.model is None:
            self.model = model_of(self.family)


def _weights(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: whole(param) for name, param in module.named_parameters()}


def _equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def _strategy(mode: str, ep: int = 2) -> ExpertParallelStrategy:
    return ExpertParallelStrategy(ep=ep, activation_checkpointing=mode)


def _train_in_every_mode(root: Path, family: str, ep: int) -> None:
    expected = None
    for mode in MODES:
        trainer = quiet(
            root, strategy=_strategy(mode, ep), max_steps=2, accumulate_grad_batches=2, gradient_clip_val=0.1
        )
        trainer.fit(module := Both(family), loader(16))
        found = _weights(module)
        assert _equal(found, expected or found), f"{family}, ep={ep}, {mode}"
        expected = expected or found


@row()
def accumulation_clipping_and_experts_that_fsdp_shards(root: Path) -> None:
    _train_in_every_mode(root, "qwen3_moe", ep=1)
    _train_in_every_mode(root, "deepseek_v3", ep=2)


@row(slow=True)
def accumulation_and_clipping_of_every_family(root: Path) -> None:
    for family in MODELS:
        for ep in (1, 2):
            _train_in_every_mode(root, family, ep)


@row()
def a_checkpoint_of_one_mode_resumes_in_another(root: Path) -> None:
    def run(before: str, after: str) -> dict[str, Tensor]:
        saved = ModelCheckpoint(root / before, every_n_train_steps=2, filename="saved", enable_version_counter=False)
        trainer = quiet(root, strategy=_strategy(before), max_steps=2, callbacks=[saved])
        trainer.fit(Both("deepseek_v3"), loader(16))
        resumed = quiet(root, strategy=_strategy(after), max_steps=4)
        resumed.fit(module := Both("deepseek_v3"), loader(16), ckpt_path=root / before / "saved.ckpt")
        assert resumed.global_step == 4
        assert set(module.state_dict()) == {f"model.{name}" for name in model_of("deepseek_v3").state_dict()}
        return _weights(module)

    expected = run("none", "none")
    for before, after in (("none", "full"), ("full", "selective"), ("selective", "none")):
        assert _equal(run(before, after), expected), f"{before}, then {after}"


@row()
def validation_and_generation_are_left_alone(root: Path) -> None:
    class Generating(TinyModule):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)
            prompt = batch["input_ids"][:1]
            for use_cache in (True, False):
                found.append(self.model.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=use_cache))

    found: list[Tensor] = []
    fit(root, Generating(), strategy=_strategy("full"))
    assert found
    assert all(torch.equal(with_cache, without) for with_cache, without in zip(found[::2], found[1::2], strict=True))


@row()
def modes_that_do_not_exist(root: Path) -> None:
    with refused("activation_checkpointing='some'", "'none'.*'selective'.*'full'"):
        quiet(root, strategy=_strategy("some"))
    with refused("activation_checkpointing='some'", "'none'.*'selective'.*'full'"):
        parallelize(model_of("qwen3_moe"), ParallelLayout(2, 2), device(), activation_checkpointing="some")


@row()
def the_activation_checkpointing_of_transformers(root: Path) -> None:
    class Enabling(TinyModule):
        def __init__(self, hook: str) -> None:
            super().__init__()
            self.hook = hook

        def configure_model(self) -> None:
            super().configure_model()
            if self.hook == "configure_model":
                self.model.gradient_checkpointing_enable()

        def on_train_start(self) -> None:
            self.model.gradient_checkpointing_disable()
            assert self.hook == "on_train_start"
            self.model.model.gradient_checkpointing_enable()

    for mode in ("none", "full"):
        for hook in ("configure_model", "on_train_start"):
            with refused("activation_checkpointing='full'", "gradient_checkpointing_disable"):
                fit(root, Enabling(hook), strategy=_strategy(mode))


@row()
def a_cache_that_holds_tokens(root: Path) -> None:
    class Cached(TinyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            ids = batch["input_ids"]
            with torch.no_grad():
                cache = self.model(ids[:, :4], use_cache=True).past_key_values
            return self.model(ids[:, 4:], labels=ids[:, 4:], past_key_values=cache).loss

    fit(root, Cached())
    with refused("past_key_values", "'none'"):
        fit(root, Cached(), strategy=_strategy("full"))


@row()
def a_cache_that_a_training_forward_should_have_filled(root: Path) -> None:
    class Cached(TinyModule):
        def __init__(self, own: bool, continue_with_gradients: bool) -> None:
            super().__init__()
            self.own = own
            self.continue_with_gradients = continue_with_gradients

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            ids = batch["input_ids"]
            cache = DynamicCache(config=self.model.config) if self.own else None
            output = self.model(ids[:, :4], labels=ids[:, :4], past_key_values=cache, use_cache=True)
            with torch.set_grad_enabled(self.continue_with_gradients):
                rest = self.model(ids[:, 4:], labels=ids[:, 4:], past_key_values=output.past_key_values)
            return output.loss + rest.loss

    for case in ((True, True), (True, False), (False, True), (False, False)):
        fit(root, Cached(*case))
        for mode in ("selective", "full"):
            with refused("past_key_values", "fills no cache", "'none'"):
                fit(root, Cached(*case), strategy=_strategy(mode))


@row()
def caches_that_nobody_reads(root: Path) -> None:
    class Cached(TinyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            cache = DynamicCache(config=self.model.config)
            return self.model(batch["input_ids"], labels=batch["labels"], past_key_values=cache).loss

    fit(root, Cached(), strategy=_strategy("full"))


@pytest.mark.parametrize("name", row)
def test_works_or_is_refused(name: str, row_failures: RowFailures) -> None:
    row_failures.check(name)
