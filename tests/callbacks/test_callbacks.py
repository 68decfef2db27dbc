"""The callbacks in real runs of a plain, single-device Trainer with a plain transformers model."""

from __future__ import annotations

import copy
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lightning_ep.callbacks import GenerateSamples, Throughput
from lightning_ep.data import TextDataModule
from lightning_ep.data.examples import BigramBaseline, bigram_cross_entropy


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextDataModule:
    texts, cache = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("cache")
    rng = np.random.default_rng(0)
    for number in range(12):
        (texts / f"{number}.txt").write_text(" ".join(rng.choice(["alpha", "beta", "gamma", "delta"], 200)))
    return TextDataModule(
        str(texts), sequence_length=16, batch_size=4, vocab_size=300, validation_fraction=0.2, cache_dir=str(cache)
    )


class Module(LightningModule):
    """A user's module: nothing of lightning_ep, with dropout, so that it uses the random state of training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2,
            attention_dropout=0.1, max_position_embeddings=64,
        )  # fmt: skip
        self.model: Any = Qwen3MoeForCausalLM(config)
        self.losses: list[float] = []
        self.training_modes: list[bool] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.training_modes.append(all(module.training for module in self.model.modules()))
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def fit(module: LightningModule, data: LightningDataModule | None, *callbacks: Any, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_steps": 4, "val_check_interval": 2, "limit_val_batches": 2, "logger": False}
    trainer = Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **(defaults | settings),
    )
    torch.manual_seed(1)
    trainer.fit(module, datamodule=data)
    return trainer


# ------------------------------------------------------------------------------------------------- GenerateSamples


def test_samples_are_printed_after_each_validation_but_not_the_sanity_check(data: TextDataModule, capsys: Any) -> None:
    fit(Module(), data, GenerateSamples(["alpha beta", "gamma"], max_new_tokens=5))
    out = capsys.readouterr().out
    assert re.findall(r"sample at step (\d+)", out) == ["2", "2", "4", "4"]
    assert len(re.findall(r"^alpha beta", out, re.MULTILINE)) == 2  # without padding or special tokens
    assert len(re.findall(r"^gamma", out, re.MULTILINE)) == 2
    assert "<|endoftext|>" not in out


def test_samples_come_after_every_nth_validation(data: TextDataModule, capsys: Any) -> None:
    fit(Module(), data, GenerateSamples(["alpha"], every_n_validations=2, max_new_tokens=2), max_steps=8)
    assert re.findall(r"sample at step (\d+)", capsys.readouterr().out) == ["4", "8"]


def test_sampling_disturbs_neither_training_nor_modes(data: TextDataModule) -> None:
    plain, sampled = Module(), Module()
    fit(plain, data)
    fit(sampled, data, GenerateSamples(["alpha"], max_new_tokens=5))
    assert len(plain.losses) == 4
    assert sampled.losses == plain.losses
    assert sampled.training_modes == [True] * 4


def test_samples_are_reproducible_and_differ_between_steps(data: TextDataModule, capsys: Any) -> None:
    outputs = []
    for _ in range(2):
        fit(Module(), data, GenerateSamples(["alpha"], max_new_tokens=12, temperature=1.0))
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    first, second = (text for text in re.split(r"--- sample at step \d\n", outputs[0]) if text)
    assert first != second


class FakeTokenizer:
    eos_token_id = 7
    pad_token_id = None

    def __call__(self, prompts: list[str], **kwargs: Any) -> Any:
        return {"input_ids": [list(range(1, 2 + len(prompt))) for prompt in prompts]}

    def decode(self, ids: list[int], **kwargs: Any) -> str:
        return str(ids)


class FakeModel(torch.nn.Module):
    def generate(self, **kwargs: Any) -> Tensor:
        assert not self.training
        self.kwargs = kwargs
        ids = kwargs["input_ids"]
        return torch.cat([ids, torch.tensor([[5, 7, 7], [5, 6, 4]])], dim=1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_are_kept_in_step_whatever_the_stop_lengths(world_size: int, capsys: Any) -> None:
    module = LightningModule()
    module.model = FakeModel()
    tokenizer = FakeTokenizer()
    trainer: Any = SimpleNamespace(
        world_size=world_size,
        global_step=3,
        sanity_checking=False,
        is_global_zero=False,
        progress_bar_callback=None,
        datamodule=None,
        precision_plugin=Trainer(accelerator="cpu", logger=False).precision_plugin,
    )
    callback = GenerateSamples(["a", "bcd"], max_new_tokens=5, temperature=0, tokenizer=tokenizer)
    texts = callback._generate(trainer, module)
    assert texts == ["[1, 2, 5, 7]", "[1, 2, 3, 4, 5, 6, 4]"], "a text ends with its end"
    kwargs = module.model.kwargs
    assert kwargs["synced_gpus"] is (world_size > 1)
    assert (kwargs["do_sample"], kwargs["max_new_tokens"]) == (False, 5)
    assert (kwargs["eos_token_id"], kwargs["pad_token_id"]) == ([7], 7)
    assert kwargs["input_ids"].tolist() == [[7, 7, 1, 2], [1, 2, 3, 4]], "padded on the left"
    assert kwargs["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert module.model.training
    callback.on_validation_end(trainer, module)
    assert "sample" not in capsys.readouterr().out  # rank 0 alone prints


def test_generate_says_what_is_missing(data: TextDataModule) -> None:
    class NoModel(Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm = self.model
            del self.model

    with pytest.raises(TypeError, match=r"`model.generate`.*NoModel has none.*self.model"):
        fit(NoModel(), data, GenerateSamples(["alpha"]))

    whole = copy.copy(data)
    whole.trainer = None
    whole.prepare_data()
    whole.setup()

    class NoTokenizer(LightningDataModule):
        def train_dataloader(self) -> Any:
            return whole.train_dataloader()

        def val_dataloader(self) -> Any:
            return whole.val_dataloader()

    with pytest.raises(TypeError, match=r"needs a tokenizer.*NoTokenizer has no `tokenizer`.*tokenizer=\.\.\."):
        fit(Module(), NoTokenizer(), GenerateSamples(["alpha"]))
    fit(Module(), NoTokenizer(), GenerateSamples(["alpha"], max_new_tokens=2, tokenizer=whole.tokenizer))


def test_generate_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match=r"prompts=\[\] must be"):
        GenerateSamples([])
    with pytest.raises(ValueError, match=r"prompts=\['a', ''\] .* none may be empty"):
        GenerateSamples(["a", ""])
    with pytest.raises(ValueError, match=r"every_n_validations=0"):
        GenerateSamples(["a"], every_n_validations=0)


# -------------------------------------------------------------------------------------------------- BigramBaseline


def bigram_loss(data: TextDataModule) -> float:
    """Of the predictions that a model makes, which are not those of first tokens and of padding."""
    parts = (data.train_dataset, data.val_dataset)
    ids, labels = ([torch.stack(list(p[name])).numpy() for p in parts] for name in ("input_ids", "labels"))
    return bigram_cross_entropy(*ids, len(data.tokenizer), *labels)


def test_bigram_baseline_is_logged_and_printed_beside_the_loss(data: TextDataModule, capsys: Any) -> None:
    trainer = fit(Module(), data, BigramBaseline(), limit_val_batches=1.0)
    expected = bigram_loss(data)
    assert trainer.callback_metrics["val/bigram_loss"].item() == pytest.approx(expected, rel=1e-6)
    loss = trainer.callback_metrics["val/loss"].item()
    lines = [line for line in capsys.readouterr().out.splitlines() if "bigram" in line]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4", "after training"]
    assert lines[-1].endswith(f"validation loss {loss:.2f} nats/token, discounted bigram {expected:.2f}")


def test_bigram_baseline_of_a_second_run_is_that_of_its_data(data: TextDataModule) -> None:
    callback = BigramBaseline()
    first = fit(Module(), data, callback).callback_metrics["val/bigram_loss"].item()
    shorter = copy.copy(data)
    shorter.setup = lambda stage: None  # type: ignore[method-assign]
    shorter.train_dataset = data.train_dataset.select(range(20))
    second = fit(Module(), shorter, callback).callback_metrics["val/bigram_loss"].item()
    assert second == pytest.approx(bigram_loss(shorter), rel=1e-6)
    assert second != first


def test_bigram_baseline_says_when_the_loss_was_not_logged(data: TextDataModule, capsys: Any) -> None:
    fit(Module(), data, BigramBaseline(monitor="val/other"))
    assert "val/other was not logged, discounted bigram" in capsys.readouterr().out


def test_bigram_baseline_says_what_the_datamodule_lacks() -> None:
    module: Any = Module()
    module.train_dataloader = lambda: [{"input_ids": torch.zeros(1, 4, dtype=torch.long)}]
    with pytest.raises(TypeError, match=r"NoneType has no tokenizer, train_dataset, val_dataset.*TextDataModule"):
        fit(module, None, BigramBaseline())


# ------------------------------------------------------------------------------------------------------ Throughput


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Logged(SimpleNamespace):
    """Stands in for the LightningModule: keeps what was logged last."""

    def log(self, name: str, value: float, **kwargs: Any) -> None:
        self.values[name] = (value, kwargs.get("prog_bar", False))


def drive(callback: Throughput, clock: Clock, trainer: Any, tokens: int, wait: float, compute: float) -> dict[str, Any]:
    module: Any = Logged(values={}, device=torch.device("cpu"))
    batch = {"input_ids": torch.zeros(1, tokens)}
    trainer.profiler.start("[_TrainingEpochLoop].train_dataloader_next")
    clock.now += wait
    trainer.profiler.stop("[_TrainingEpochLoop].train_dataloader_next")
    callback.on_train_batch_start(trainer, module, batch, 0)
    clock.now += compute
    callback.on_train_batch_end(trainer, module, None, batch, 0)
    return module.values


def test_throughput_counts_distinct_tokens_of_all_data_ranks_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("lightning_ep.callbacks.throughput.time", clock)
    # four processes, of which two pairs share their batches
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(data_rank=0, data_world_size=2), world_size=4)
    trainer.profiler = profiler = PassThroughProfiler()
    callback = Throughput(window=2)
    callback.on_train_start(trainer, Logged(values={}, device=torch.device("cpu")))  # type: ignore[arg-type]
    assert drive(callback, clock, trainer, 100, wait=50, compute=1)["tokens/s"] == (200, True)
    # the wait for data between two steps counts
    values = drive(callback, clock, trainer, 100, wait=1, compute=2)
    assert values["tokens/s"] == (pytest.approx(400 / 4), True)
    # a step in which a callback before this one saves a checkpoint does not count
    module: Any = Logged(values={}, device=torch.device("cpu"))
    callback.on_train_batch_start(trainer, module, None, 0)
    callback.on_save_checkpoint(trainer, module, {})
    callback.on_train_batch_end(trainer, module, None, {}, 0)
    assert module.values == {}
    assert values["tokens/s/device"] == (pytest.approx(400 / 4 / 4), False)
    assert values["data/wait"] == (pytest.approx(1 / 4), False), "of the first step nothing is known"
    # validation and checkpoints do not
    for interruption in (
        lambda: callback.on_validation_start(trainer, None),  # type: ignore[arg-type]
        lambda: callback.on_save_checkpoint(trainer, None, {}),  # type: ignore[arg-type]
    ):
        interruption()
        values = drive(callback, clock, trainer, 100, wait=1000, compute=3)
    assert values["tokens/s"][0] == pytest.approx(400 / 6)  # the last two steps
    assert values["data/wait"][0] == 0, "what comes after an interruption does not count"
    callback.teardown(trainer, None, "fit")  # type: ignore[arg-type]
    assert trainer.profiler is profiler


def test_throughput_is_logged_by_a_trainer(data: TextDataModule, tmp_path: Path) -> None:
    trainer = fit(Module(), data, Throughput())
    assert trainer.progress_bar_metrics["tokens/s"] > 0
    assert trainer.callback_metrics["tokens/s/device"] == trainer.callback_metrics["tokens/s"]
    assert "memory/peak_gib" not in trainer.callback_metrics
    assert 0 < trainer.callback_metrics["data/wait"] < 1
    assert type(trainer.profiler) is PassThroughProfiler
    assert "mfu" not in trainer.callback_metrics


class Rows(LightningDataModule):
    """Windows of 16 tokens, each of one document or of two."""

    def __init__(self, first: int) -> None:
        super().__init__()
        positions = torch.cat([torch.arange(first), torch.arange(16 - first)])
        self.row = {"input_ids": torch.arange(16), "labels": torch.arange(16), "position_ids": positions}

    def train_dataloader(self) -> Any:
        return DataLoader([self.row] * 8, batch_size=2)


@pytest.mark.parametrize("documents", [[16], [5, 11]])
def test_mfu_counts_attention_inside_of_documents_and_experts_that_are_used(
    documents: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_ep.callbacks.throughput._peak", lambda device: 1e9)
    trainer = fit(Module(), Rows(documents[0]), Throughput(), precision="bf16-mixed", limit_val_batches=0, max_steps=2)
    pairs = sum(length * (length + 1) / 2 for length in documents)  # of a token and one that it sees
    # hidden size 16, 2 heads of 8 and one for keys and values, router of 4 experts of width 8, of which 2; head of 300
    matrices = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 4 * 16 + 2 * 3 * 16 * 8 + 16 * 300
    per_window = 3 * (2 * matrices * 16 + 2 * 2 * 16 * pairs)
    rate = trainer.callback_metrics["tokens/s/device"].item() / 16
    assert trainer.callback_metrics["mfu"].item() == pytest.approx(rate * per_window / 1e9, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "settings", "reason"),
    [
        (lambda module: None, {}, r"those of bf16, and precision is 32-true"),
        (
            lambda module: module.model.lm_head.requires_grad_(False),
            {"precision": "bf16-mixed"},
            r"% of the parameters",
        ),
        (lambda module: vars(module.model.config).update(to_dict=dict), {"precision": "bf16-mixed"}, "is not planned"),
    ],
    ids=["fp32", "frozen", "unknown family"],
)
def test_why_there_is_no_mfu_is_said(
    change: Any, settings: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr("lightning_ep.callbacks.throughput._peak", lambda device: 1e9)
    module = Module()
    change(module)
    with caplog.at_level("INFO"):
        trainer = fit(module, Rows(16), Throughput(), limit_val_batches=0, max_steps=1, **settings)
    assert re.search(f"Throughput logs no mfu: .*{reason}", caplog.text)
    assert "mfu" not in trainer.callback_metrics


class Slow(Rows):
    """A loader that takes its time."""

    def train_dataloader(self) -> Any:
        return DataLoader(
            [self.row] * 8, batch_size=2, collate_fn=lambda rows: time.sleep(0.2) or default_collate(rows)
        )


def test_data_wait_is_the_loaders_time_and_not_that_of_other_callbacks() -> None:
    class Sleeps(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            time.sleep(0.2)

    trainer = fit(Module(), Slow(16), Throughput(), Sleeps(), limit_val_batches=0, max_steps=4)
    # three of four steps begin with it: of the first one it is not in the time
    seconds = 4 * 32 / trainer.callback_metrics["tokens/s"].item()
    assert trainer.callback_metrics["data/wait"].item() == pytest.approx(3 * 0.2 / seconds, rel=0.2)
    assert seconds > 3 * 0.4
