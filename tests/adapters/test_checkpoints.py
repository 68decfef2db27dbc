"""Checkpoints of adapters: small, of any layout, and of one base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ep import CausalLM, ExpertParallelStrategy, LoRA
from lightning_ep.checkpoint.saved_weights import SavedWeights
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.frozen_base import fingerprint
from tests.hub_files import full_state, write_checkpoint
from tests.ranks import run_ranks
from tests.reference import tiny_config, tiny_model
from tests.tiny import Samples, quiet

ADAPTER = LoRA(r=2, init_lora_weights="gaussian")


class _Batches(Samples):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value for name, value in super().__getitem__(index).items() if name != "id"}


def _module(base: Any, **options: Any) -> CausalLM:
    optimizer = lambda params: torch.optim.AdamW(params, lr=1e-2)  # noqa: E731
    return CausalLM(base, optimizer=optimizer, **{"adapter": ADAPTER, "pretrained": isinstance(base, str), **options})


def _trainer(root: Path, steps: int, ep: int, *callbacks: Any, **options: Any) -> Trainer:
    strategy = ExpertParallelStrategy(ep=ep, **options)
    return quiet(root, strategy=strategy, callbacks=list(callbacks), max_steps=steps, precision="bf16-mixed")


def _data() -> DataLoader:
    return DataLoader(_Batches(16), batch_size=2)


def _trained(module: CausalLM) -> dict[str, Tensor]:
    state = full_state(module.model)
    return {name: state[name] for name, param in module.model.named_parameters() if param.requires_grad}


def _same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> bool:
    close = (torch.allclose(one[name], other[name], rtol=tolerance, atol=tolerance) for name in one)
    return one.keys() == other.keys() and all(close)


def _runs(root: Path, hub: str, other: str, in_one_file: bool) -> list[str]:
    """What is wrong with a training that is saved, resumed on another layout and on other bases."""
    wrong = []
    one_file = {"save_distributed_checkpoint": not in_one_file}
    whole = _module(hub)
    _trainer(root, 4, 2, ModelCheckpoint(root, filename="saved", every_n_train_steps=2, save_top_k=-1), **one_file).fit(
        whole, _data()
    )
    first = root / "saved.ckpt"
    here = {f"model.{name}" for name, param in whole.model.named_parameters() if param.requires_grad}
    if set(SavedWeights(first).tensors) != here:
        wrong.append(f"{sorted(set(SavedWeights(first).tensors) ^ here)} is saved, or not")
    for ep in (2, 1):
        resumed = _module(hub)
        _trainer(root, 4, ep).fit(resumed, _data(), ckpt_path=first)
        if not _same(_trained(resumed), _trained(whole), 0.0 if ep == 2 else 2e-2):
            wrong.append(f"resumed with ep={ep} the adapters are others")
        if not _same(full_state(resumed.model), full_state(whole.model), 2e-2):
            wrong.append(f"resumed with ep={ep} the base is another")
    for module, what in (
        (_module(other), rf"adapters only, trained on {hub}, fingerprint .* this run's base is {other}"),
        (_module(hub, adapter=None), "this run's model is not adapted"),
        (_module(hub, adapter=LoRA(r=4)), "of another shape: .*lora_A"),
    ):
        with pytest.raises(CheckpointError, match=what):
            _trainer(root, 4, 2).fit(module, _data(), ckpt_path=first)
        if not any(param.is_meta for param in module.parameters()):
            wrong.append(f"weights were loaded before {what!r} was said")
    return wrong


def _another(hub: Path, path: Path) -> None:
    """The same checkpoint with one tensor changed."""
    shutil.copytree(hub, path)
    file = next(path.glob("*.safetensors"))
    tensors = load_file(file)
    changed = max(tensors, key=lambda name: tensors[name].numel())
    save_file({**tensors, changed: tensors[changed] + 1e-3}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("in_one_file", [False, True])
def test_adapters_resume_on_another_layout_and_on_their_base_only(tmp_path: Path, in_one_file: bool) -> None:
    hub, other = tmp_path / "hub", tmp_path / "other"
    write_checkpoint(hub, sharded=False)
    _another(hub, other)
    for wrong in run_ranks(2, _runs, tmp_path, str(hub), str(other), in_one_file, init_process_group=False):
        assert not wrong, wrong


def _drawn(root: Path) -> list[str]:
    wrong = []
    for seed, saved in ((1, None), (1, root / "saved.ckpt"), (2, root / "saved.ckpt")):
        seed_everything(seed)
        module = _module(tiny_config())
        trainer = _trainer(root, 2 if saved is None else 3, 1)
        if seed == 2:
            with pytest.raises(CheckpointError, match=r"random weights of seed 1 .* base is random weights of seed 2"):
                trainer.fit(module, _data(), ckpt_path=saved)
            continue
        trainer.fit(module, _data(), ckpt_path=saved)
        if saved is None:
            trainer.save_checkpoint(root / "saved.ckpt")
    return wrong


def test_adapters_over_drawn_weights_are_of_one_seed(tmp_path: Path) -> None:
    assert run_ranks(1, _drawn, tmp_path, init_process_group=False) == [[]]


def test_a_fingerprint_is_of_every_tensor_and_no_path(tmp_path: Path) -> None:
    model = tiny_model()
    found = set()
    for path, changed in (("a", None), ("b", None), ("c", "lm_head.weight"), ("d", "model.layers.1.mlp.gate.weight")):
        with torch.no_grad():
            if changed is not None:
                model.get_parameter(changed).mul_(1.01)
        model.save_pretrained(tmp_path / path)
        found.add(fingerprint(tmp_path / path))
    assert len(found) == 3
