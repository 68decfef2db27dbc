"""`load_from_checkpoint` of a run with LoRA: its logits are those of PEFT with the exported adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_ep import DPO, CausalLM, ExpertParallelStrategy, LoRA, cli
from lightning_ep.callbacks import HuggingFaceExport
from lightning_ep.checkpoint.saved_weights import SavedWeights
from lightning_ep.hub.errors import CheckpointError
from tests.adapters.test_checkpoints import _another
from tests.hub_files import write_checkpoint
from tests.ranks import run_ranks
from tests.reference import relative_error, tiny_config
from tests.tiny import Samples, quiet

IDS = torch.arange(24).view(2, 12) * 5 % 128
LORA: dict[str, Any] = {"r": 3, "init_lora_weights": "gaussian", "rank_pattern": {"q_proj": 2}}


class _Batches(Samples):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value for name, value in super().__getitem__(index).items() if name != "id"}


def _data() -> DataLoader:
    return DataLoader(_Batches(16), batch_size=2)


def _optimizer(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=5e-2)


def _train(root: Path, kind: type[CausalLM], ep: int, in_one_file: bool, **options: Any) -> None:
    """Two steps of an adapter, in float32, saved as ``saved.ckpt``."""
    strategy = ExpertParallelStrategy(ep=ep, save_distributed_checkpoint=not in_one_file)
    seed_everything(5)
    exported = HuggingFaceExport(str(root / "by callback"))
    trainer = quiet(root, strategy=strategy, max_steps=2, precision="32-true", callbacks=[exported])
    arguments = {"model": str(root / "hub"), "adapter": LoRA(**LORA), "optimizer": _optimizer}
    trainer.fit(kind(**{**arguments, **options}), _data())
    trainer.save_checkpoint(root / "saved.ckpt")


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def _by_peft(root: Path) -> tuple[Tensor, Tensor]:
    """Logits of the base, and with the adapter that the command writes."""
    cli.main(["export", str(root / "saved.ckpt"), str(root / "exported")])
    base = AutoModelForCausalLM.from_pretrained(root / "hub", dtype=torch.float32)
    before = _logits(base).clone()
    return before, _logits(peft.PeftModel.from_pretrained(base, root / "exported"))


@pytest.mark.parametrize(("kind", "ep", "in_one_file"), [(CausalLM, 2, False), (CausalLM, 1, True), (DPO, 2, False)])
def test_a_loaded_module_says_what_peft_says(tmp_path: Path, kind: type[CausalLM], ep: int, in_one_file: bool) -> None:
    write_checkpoint(tmp_path / "hub")
    saved = tmp_path / "saved.ckpt"
    run_ranks(2, _train, tmp_path, kind, ep, in_one_file, init_process_group=False)
    assert any(name.endswith("lora_A.default.weight") for name in SavedWeights(saved).tensors)
    assert not any("embed_tokens" in name for name in SavedWeights(saved).tensors)
    before, expected = _by_peft(tmp_path)
    assert relative_error(before, expected) > 1e-2, "the adapter must matter"
    for options in ({}, {"adapter": LoRA(**LORA)}, {"map_location": "cpu", "strict": False}):
        module = kind.load_from_checkpoint(saved, **options)
        assert type(module) is kind
        assert module.pretrained_path == str(tmp_path / "hub")
        assert {param.device.type for param in module.parameters()} == {"cpu"}
        assert relative_error(_logits(module), expected) < 1e-5, options
    assert module.model.generate(IDS[:, :3], max_new_tokens=2, do_sample=False, eos_token_id=None).shape == (2, 5)
    # It is PEFT's model: its own methods write the same adapter.
    module.model.save_pretrained(tmp_path / "by hand")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.float32)
    assert relative_error(_logits(peft.PeftModel.from_pretrained(again, tmp_path / "by hand")), expected) < 1e-5


def _goes_on(root: Path) -> list[str]:
    """What is wrong with a module that was loaded, trained on and loaded once more."""
    wrong = []
    module = CausalLM.load_from_checkpoint(root / "saved.ckpt", optimizer=_optimizer)
    before = {
        name: param.detach().clone() for name, param in module.model.named_parameters() if not param.requires_grad
    }
    start = _logits(module)
    module.train()
    trainer = quiet(root, strategy=ExpertParallelStrategy(ep=1), max_steps=2, precision="32-true")
    trainer.fit(module, _data())
    trainer.save_checkpoint(root / "longer.ckpt")
    longer = CausalLM.load_from_checkpoint(root / "longer.ckpt")
    if set(SavedWeights(root / "longer.ckpt").tensors) != set(SavedWeights(root / "saved.ckpt").tensors):
        wrong.append("the second checkpoint holds other tensors")
    after = dict(longer.model.named_parameters())
    wrong += [f"{name} has moved" for name, param in before.items() if not torch.equal(param, after[name])]
    if relative_error(_logits(longer), start) < 1e-2:
        wrong.append("nothing was trained")
    return wrong


def test_a_loaded_module_is_trained_on(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hub")
    run_ranks(2, _train, tmp_path, CausalLM, 2, False, init_process_group=False)
    assert run_ranks(1, _goes_on, tmp_path, init_process_group=False) == [[]]


def test_a_base_has_another_place_or_is_another(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hub", sharded=False)
    saved = tmp_path / "saved.ckpt"
    run_ranks(2, _train, tmp_path, CausalLM, 2, False, init_process_group=False)
    expected = _logits(CausalLM.load_from_checkpoint(saved))
    _another(tmp_path / "hub", tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"adapters only, trained on .*/hub, .* base is .*/other"):
        CausalLM.load_from_checkpoint(saved, model=str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match=r"of another shape: .*lora_A") as refused:
        CausalLM.load_from_checkpoint(saved, adapter=LoRA(r=2))
    assert "strict_loading" not in str(refused.value)
    with pytest.raises(TypeError, match=r"`model` says where their base is .* was a Qwen3MoeConfig"):
        CausalLM.load_from_checkpoint(saved, model=tiny_config())
    (tmp_path / "hub").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"base cannot be opened: .*/hub.* pass that as `model`"):
        CausalLM.load_from_checkpoint(saved)
    module = CausalLM.load_from_checkpoint(saved, model=str(tmp_path / "moved"))
    assert torch.equal(_logits(module), expected)


def _drawn(root: Path) -> Tensor:
    seed_everything(5)
    strategy = ExpertParallelStrategy(ep=1)
    module = CausalLM(tiny_config(), pretrained=False, adapter=LoRA(**LORA), optimizer=_optimizer)
    trainer = quiet(root, strategy=strategy, max_steps=2, precision="32-true")
    trainer.fit(module, _data())
    trainer.save_checkpoint(root / "saved.ckpt")
    return _logits(module)


def test_a_base_that_was_drawn_is_drawn_again(tmp_path: Path) -> None:
    (expected,) = run_ranks(1, _drawn, tmp_path, init_process_group=False)
    assert relative_error(_logits(CausalLM.load_from_checkpoint(tmp_path / "saved.ckpt")), expected) < 1e-5


class _InMemory(CausalLM):
    def configure_model(self) -> None:
        if self.model is None:
            self.model = self._adapted(AutoModelForCausalLM.from_pretrained(self.pretrained_path, dtype=torch.float32))


def test_adapters_of_a_base_that_was_in_memory_need_their_adapter(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hub")
    saved = tmp_path / "saved.ckpt"
    run_ranks(2, _train, tmp_path, _InMemory, 2, False, init_process_group=False)
    with pytest.raises(CheckpointError, match="pass the `adapter` of the run") as refused:
        CausalLM.load_from_checkpoint(saved)
    assert "strict" not in str(refused.value)
    module = CausalLM.load_from_checkpoint(saved, adapter=LoRA(**LORA))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.float32)
    expected = _logits(peft.PeftModel.from_pretrained(base, tmp_path / "by callback"))
    assert relative_error(_logits(module), expected) < 1e-5


def _goes_on_with(root: Path) -> list[float]:
    trainer = quiet(root, strategy=ExpertParallelStrategy(ep=2), limit_val_batches=1, precision="32-true")
    module = CausalLM(str(root / "hub"), adapter=LoRA(pretrained=str(root / "exported")), optimizer=_optimizer)
    trainer.validate(module, DataLoader([{"input_ids": IDS, "labels": IDS}], batch_size=None), verbose=False)
    return [trainer.callback_metrics["val/loss"].item()]


@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens", "lm_head"], ["gate"]])
def test_an_adapter_with_whole_modules_goes_on(tmp_path: Path, whole: list[str]) -> None:
    write_checkpoint(tmp_path / "hub")
    adapter = LoRA(**LORA, modules_to_save=whole)
    run_ranks(2, _train_whole, tmp_path, adapter, init_process_group=False)
    before, expected = _by_peft(tmp_path)
    assert relative_error(before, expected) > 1e-2, "the adapter must matter"
    losses = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    for (found,) in run_ranks(2, _goes_on_with, tmp_path, init_process_group=False):
        assert found == pytest.approx(losses.item(), rel=1e-5)
    cli.main(["export", str(tmp_path / "exported"), str(tmp_path / "merged"), "--merge"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative_error(_logits(merged), expected) < 1e-5


def _train_whole(root: Path, adapter: LoRA) -> None:
    _train(root, CausalLM, 2, False, adapter=adapter)
