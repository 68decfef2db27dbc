"""A model without a forward, whose parts its users call: Qwen3-Omni whole, trained through its thinker."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForMultimodalLM, Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

from lightning_ep import expert_plan, from_pretrained
from lightning_ep.callbacks import HuggingFaceExport
from lightning_ep.moe.experts import is_parallel_experts
from lightning_ep.transformers_adapter import called_models, experts_modules, optional_parts
from tests.hub.every_family import shrunk
from tests.multimodal import give_small_ids, image_batch, text_batch
from tests.ranks import assert_ranks_agree
from tests.reference import relative_error
from tests.tiny import quiet


def _omni() -> Any:
    config: Any = shrunk(Qwen3OmniMoeConfig(enable_audio_output=True))
    config.talker_config.spatial_merge_size = 2  # which its class reads and does not declare
    config.code2wav_config.decoder_dim = 32
    give_small_ids(config.thinker_config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3OmniMoeForConditionalGeneration(config)
        with torch.no_grad():
            for name, param in model.named_parameters():
                if "norm" not in name:
                    param.normal_(std=0.1)
    return model


def test_its_parts_with_experts_are_what_is_called() -> None:
    with torch.device("meta"):
        module = nn.ModuleDict({"model": _omni()})
    models = called_models(module)
    assert list(models) == ["model.thinker", "model.talker"]
    assert set(expert_plan(module)) == {f"{name}.{key}" for name, m in models.items() for key in experts_modules(m)}
    thinker: Any = models["model.thinker"]
    assert optional_parts(thinker) == [thinker.model.audio_tower, thinker.model.visual]


class _Thinking(L.LightningModule):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = from_pretrained(self.path, AutoModelForMultimodalLM, dtype=torch.float32)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model.thinker(**batch, use_cache=False).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def _trains(root: Path) -> list[str]:
    rank, plain = int(os.environ["RANK"]), _omni()
    if rank == 0:
        plain.save_pretrained(root / "saved")
    # By step and rank: an image on one rank, on the other, on none.
    has_image = [(1, 0), (0, 1), (0, 0)]
    batches = [
        [
            image_batch("qwen3_omni_moe_thinker", plain.thinker, seed) if has else text_batch(seed)
            for seed, has in enumerate(step)
        ]
        for step in has_image
    ]
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    for step in batches:
        optimizer.zero_grad()
        for batch in step:
            (plain.thinker(**batch, use_cache=False).loss / 2).backward()
        optimizer.step()
    module = _Thinking(root / "saved")
    callbacks = [HuggingFaceExport(str(root / "exported"))]
    trainer = quiet(root, max_steps=3, use_distributed_sampler=False, callbacks=callbacks)
    trainer.fit(module, DataLoader([step[rank] for step in batches], batch_size=None))
    spread = experts_modules(module.model).values()
    wrong = [] if len(spread) == 8 and all(map(is_parallel_experts, spread)) else ["experts are not spread"]
    again: Any = Qwen3OmniMoeForConditionalGeneration.from_pretrained(root / "exported", dtype=torch.float32)
    exported = dict(again.named_parameters())
    for (name, param), expected in zip(module.model.named_parameters(), plain.parameters(), strict=True):
        for where, found in (("trained", param.full_tensor()), ("exported", exported[name])):
            if not (error := relative_error(found.detach(), expected.detach())) <= 1e-5:
                wrong.append(f"{where} {name}: {error:.1e}")
    return wrong


def test_the_whole_model_trains_through_its_thinker_like_one_process(tmp_path: Path) -> None:
    assert_ranks_agree(2, _trains, tmp_path, init_process_group=False)
