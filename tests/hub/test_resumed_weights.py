"""Hub weights and training checkpoints together: what a checkpoint fills is not read from the hub, nor drawn."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_ep import CausalLM, ExpertParallelStrategy, cli
from lightning_ep.callbacks import HuggingFaceExport
from lightning_ep.hub import initialize
from lightning_ep.hub.errors import CheckpointError
from tests.hub_files import full_state, refused_in_one_line, write_checkpoint
from tests.ranks import run_ranks
from tests.tiny import Samples, quiet


class _Batches(Samples):
    """Batches that `CausalLM` takes."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        return {"input_ids": sample["input_ids"], "labels": sample["labels"]}


class _Count:
    """Bytes of weights that this process has read from the hub's files, and parameters that it has drawn."""

    def __init__(self) -> None:
        self.read = self.drawn = 0
        preadv, draw = os.preadv, initialize._draw

        def count_bytes(*args: Any) -> int:
            size = preadv(*args)
            self.read += size
            return size

        def count_draws(*args: Any) -> Tensor:
            self.drawn += 1
            return draw(*args)

        os.preadv, initialize._draw = count_bytes, count_draws

    def take(self) -> tuple[int, int]:
        """Bytes and draws since the last call."""
        found = (self.read, self.drawn)
        self.read = self.drawn = 0
        return found


class _WithoutHead(CausalLM):
    """Saves a part of its weights."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if "lm_head" not in name}


def _data() -> DataLoader:
    return DataLoader(_Batches(16), batch_size=2)


def _state(module: CausalLM) -> dict[str, Tensor]:
    return full_state(module.model)


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _run(root: Path, hub: str, options: dict[str, Any]) -> dict[str, Any]:
    """Trains, saves, and comes back in every way: what was read and drawn for it, and whether the weights are right."""
    count = _Count()

    def trainer(steps: int = 2, *callbacks: Callback) -> Trainer:
        strategy = ExpertParallelStrategy(ep=2, **options)
        return quiet(root, strategy=strategy, callbacks=list(callbacks), max_steps=steps)

    def module(kind: type[CausalLM] = CausalLM) -> CausalLM:
        return kind(hub, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))

    saved = root / "saved.ckpt"
    first, model = trainer(2, ModelCheckpoint(root, filename="saved", every_n_train_steps=2)), module()
    first.fit(model, _data())
    original, trained = AutoModelForCausalLM.from_pretrained(hub).state_dict(), _state(model)
    found: dict[str, Any] = {"first": count.take()}

    resumed, export = module(), HuggingFaceExport(str(root / "exported"))
    with warnings.catch_warnings(record=True) as caught:
        trainer(2, export).fit(resumed, _data(), ckpt_path=saved)
    found["fit"] = (*count.take(), _same(_state(resumed), trained))
    told = any(f"run `lightning-ep export {saved} {root}/exported`" in str(warning.message) for warning in caught)
    assert told == (os.environ["RANK"] == "0")
    again = trainer(3, export)
    again.fit(resumed, _data(), ckpt_path=saved)  # a module that another Trainer has sharded, and a run after a run
    again.save_checkpoint(root / "longer.ckpt")
    found["fit again"] = (*count.take(), not _same(_state(resumed), trained) and again.global_step == 3)
    again.validate(resumed, _data(), ckpt_path=saved, verbose=False)
    found["validate after fit"] = (*count.take(), _same(_state(resumed), trained))

    for name in ("validate", "test", "predict"):
        for ckpt_path, expected in ((saved, trained), (None, original)):
            model = module()
            getattr(trainer(), name)(model, _data(), ckpt_path=ckpt_path)
            found[f"{name} {ckpt_path and 'saved'}"] = (*count.take(), _same(_state(model), expected))

    scratch = CausalLM(AutoModelForCausalLM.from_pretrained(hub).config, pretrained=False)
    trainer().validate(scratch, _data(), ckpt_path=saved, verbose=False)
    found["from_config"] = (*count.take(), _same(_state(scratch), trained))

    part, model = trainer(), module(_WithoutHead)
    model.strict_loading = False
    part.validate(model, _data(), ckpt_path=saved, verbose=False)
    part.save_checkpoint(root / "part.ckpt")
    count.take()
    with pytest.raises(CheckpointError) as refused:
        trainer().validate(module(), _data(), ckpt_path=root / "part.ckpt", verbose=False)
    found["part"] = (*count.take(), "missing: model.lm_head.weight." in str(refused.value))
    lenient = module()
    lenient.strict_loading = False
    trainer().validate(lenient, _data(), ckpt_path=root / "part.ckpt", verbose=False)
    tied = lenient.model.config.tie_word_embeddings
    mixed = trained if tied else {**trained, "lm_head.weight": original["lm_head.weight"]}
    found["part, not strict"] = (*count.take(), _same(_state(lenient), mixed))
    return found


@pytest.mark.parametrize(
    ("options", "checkpoint"),
    [
        ({}, {}),
        pytest.param({"async_save": True}, {"tie_word_embeddings": True}, marks=pytest.mark.slow),
        # 2 divides none of these: shards of unequal size.
        ({"save_distributed_checkpoint": False}, {"hidden_size": 36, "moe_intermediate_size": 9, "vocab_size": 129}),
    ],
    ids=str,
)
def test_a_resume_reads_nothing_of_the_hub(tmp_path: Path, options: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    sizes = {k: v.nbytes for k, v in write_checkpoint(tmp_path / "hub", **checkpoint).state_dict().items()}
    tied = "tie_word_embeddings" in checkpoint
    head = sizes.pop("lm_head.weight") if tied else sizes["lm_head.weight"]
    one, other = run_ranks(2, _run, tmp_path, str(tmp_path / "hub"), options, init_process_group=False)
    for case in one:
        read, drawn, right = (one[case][0] + other[case][0], one[case][1] + other[case][1], one[case][2:])
        assert all(right), case
        assert drawn == 0, case
        if case == "first" or "None" in case:
            assert read == sum(sizes.values()), case
        else:
            # A tied head has the embedding's weights, which are saved.
            assert read == (head if case == "part, not strict" and not tied else 0), case
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    module = CausalLM.load_from_checkpoint(tmp_path / "longer.ckpt")
    assert _same(exported, module.model.state_dict())
    ids = torch.arange(24).view(2, 12)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", experts_implementation="eager")
    module.model.set_experts_implementation("eager")
    with torch.no_grad():
        assert torch.equal(module(input_ids=ids).logits, reloaded(input_ids=ids).logits)


def test_causal_lm_is_loaded_without_a_trainer(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hub", tie_word_embeddings=True)
    trainer = quiet(tmp_path, strategy=ExpertParallelStrategy(ep=1))
    model = CausalLM(str(tmp_path / "hub"))
    trainer.validate(model, _data(), verbose=False)
    saved = tmp_path / "saved.ckpt"
    trainer.save_checkpoint(saved)
    module = CausalLM.load_from_checkpoint(saved, map_location="cpu")
    assert module.model.lm_head.weight is module.model.model.embed_tokens.weight
    assert module.model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2).shape == (1, 5)
    quiet(tmp_path, strategy=ExpertParallelStrategy(ep=1), max_steps=1).fit(module, _data())  # trains on
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "hub").config
    other.num_hidden_layers = 3
    with pytest.raises(CheckpointError, match=r"missing: model\.model\.layers\.2\."):
        CausalLM.load_from_checkpoint(saved, model=other)
    with pytest.raises(CheckpointError, match=r"There is no checkpoint .*nothing\.ckpt"):
        CausalLM.load_from_checkpoint(tmp_path / "nothing.ckpt")
    with pytest.raises(ValueError, match="no hyperparameters file"):
        CausalLM.load_from_checkpoint(saved, hparams_file="hparams.yaml")
    shard = saved / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp has the checksum"):
        CausalLM.load_from_checkpoint(saved)
    with refused_in_one_line(CheckpointError, r"__0_0\.distcp has the checksum"):
        cli.main(["export", str(saved), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
