"""CausalLM on conversations with images, through the Trainer: training equals plain transformers, one by one."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer

from lightning_ep import CausalLM, ExpertParallelStrategy, ParallelLayout, expert_plan
from lightning_ep.callbacks import HuggingFaceExport
from lightning_ep.data import VisionChatDataModule
from lightning_ep.data.vision_windows import documents_in
from lightning_ep.parallelize import check
from lightning_ep.transformers_adapter import load_processor
from tests.ranks import run_ranks
from tests.reference import relative_error
from tests.tiny import quiet
from tests.vision import (
    asked,
    picture,
    plain_inputs,
    summed_plain_loss,
    vanishes,
    vision_config,
    vision_model,
    write_rows,
    write_vision_checkpoint,
)

LR, STEPS = 0.02, 3
PlainInputs = Callable[[list[dict[str, Any]], Any], dict[str, Tensor]]


class Watched(CausalLM):
    """CausalLM that keeps the tokens of every batch, and whether it had an image (a clip)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[list[list[int]], bool]] = []
        self.losses: list[Tensor] = []
        self.gradients: list[dict[str, Tensor]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        places = batch["position_ids"]
        rows = [
            row[begin:end].tolist()
            for row, place in zip(batch["input_ids"], places[0] if places.ndim == 3 else places, strict=True)
            for begin, end in documents_in(place)
        ]
        self.seen.append((rows, not {"pixel_values", "input_features"}.isdisjoint(batch)))
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        pairs = self.model.named_parameters()  # type: ignore[union-attr]
        self.gradients.append({n: p.grad.full_tensor().clone() for n, p in pairs if p.grad is not None})

    def log_step(self, optimizer: Any) -> None:
        assert self._train_loss is not None
        self.losses.append(self._train_loss.cpu())
        super().log_step(optimizer)


def conversations(folder: Path) -> list[list[dict[str, Any]]]:
    """Half of them with images; of lengths by which a window of 64 holds one."""
    folder.mkdir()
    pictures = [picture(folder / f"{number}.png", (24 + 8 * number, 32), number) for number in range(3)]
    with_images = [
        asked("What is on it?", pictures[number % 3], answer=f"It is number {number}. ") for number in range(4)
    ]
    return with_images + [
        asked(f"How much is {number} and {number}?", answer="Too much to say. ") for number in range(4)
    ]


def _fit(checkpoint: Path, source: Path, path: Path, options: dict[str, Any], strategy: dict[str, Any]) -> Any:
    rank = int(os.environ.get("RANK", "0"))
    data = VisionChatDataModule(
        str(source),
        sequence_length=64,
        batch_size=1,
        num_proc=1,
        num_workers=0,
        validation_fraction=0.0,
        cache_dir=str(path / "cache"),
        pack=options.pop("pack", True),
        seed=options.pop("seed", 0),
    )
    precision = options.pop("precision", "32-true")
    module = Watched(str(checkpoint), optimizer=partial(torch.optim.SGD, lr=LR), **options)
    trainer = quiet(
        path,
        max_steps=STEPS,
        precision=precision,
        strategy=ExpertParallelStrategy(**strategy),
        callbacks=[HuggingFaceExport(str(path / "export"))],
    )
    trainer.fit(module, data)
    params = dict(module.model.named_parameters())  # type: ignore[union-attr]
    frozen = {name for name, param in params.items() if not param.requires_grad}
    weights = {name: param.full_tensor().detach() for name, param in params.items()}
    return module.seen, module.losses, (module.gradients, weights) if rank == 0 else None, frozen


def _plain(checkpoint: Path, rows: list[Any], seen: list[Any], frozen: set[str], plain_inputs: PlainInputs) -> Any:
    """The same steps on one process, a conversation at a time, by transformers alone."""
    processor = load_processor(checkpoint, AutoTokenizer.from_pretrained(checkpoint))
    alone = {tuple(inputs["input_ids"][0].tolist()): inputs for row in rows if (inputs := plain_inputs(row, processor))}
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    for name, param in model.named_parameters():
        param.requires_grad_(name not in frozen)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses: list[Tensor] = []
    gradients: list[dict[str, Tensor]] = []
    for step in range(STEPS):
        rows_of_step = [tuple(row) for of_rank in seen for row in of_rank[step][0]]  # with padding, or of nothing else
        found = [alone[key] for row in rows_of_step for key in alone if row[: len(key)] == key]
        tokens = sum(int((inputs["labels"] != -100).sum()) for inputs in found)
        loss = torch.stack([summed_plain_loss(model, inputs) for inputs in found]).sum() / tokens
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses, gradients, {name: param.detach() for name, param in model.named_parameters()}


def _trains_like_transformers(tmp_path: Path, family: str, *args: Any, **options: Any) -> list[str]:
    checkpoint = write_vision_checkpoint(tmp_path / "tiny", family)
    rows = conversations(tmp_path / "pictures")
    return trains_like_transformers(tmp_path, checkpoint, rows, plain_inputs, *args, **options)


def trains_like_transformers(
    tmp_path: Path,
    checkpoint: Path,
    rows: list[Any],
    plain_inputs: PlainInputs,
    tolerance: float = 1e-5,
    data_ranks: int = 2,
    strategy: Any = None,
    **options: Any,
) -> list[str]:
    """What is wrong with a run on two ranks, of which one alone has an image or a clip in some steps."""
    source = write_rows(tmp_path / "rows.jsonl", rows)
    given = (checkpoint, source, tmp_path, options, strategy or {"ep": 2})
    results = run_ranks(2, _fit, *given, init_process_group=False, timeout=100)
    seen = [result[0] for result in results][:data_ranks]
    of_ranks = [[has for _, has in of_rank] for of_rank in seen]
    alone = any(of_ranks[0]) if data_ranks == 1 else any(one != other for one, other in zip(*of_ranks, strict=True))
    assert alone, "no step has an image or a clip (on one rank alone, of two): another `seed` has"
    frozen, (gradients, weights) = results[0][3], results[0][2]
    losses, plain_gradients, plain_weights = _plain(checkpoint, rows, seen, frozen, plain_inputs)
    pairs = [(f"loss {i}", *pair) for i, pair in enumerate(zip(results[0][1], losses, strict=True))]
    first = next(step for step, has in enumerate(zip(*of_ranks, strict=True)) if any(has))
    # In bf16 none behind the first with an image or a clip: routers on their ways apart send tokens elsewhere.
    compared = STEPS if tolerance <= 1e-3 else first + 1
    assert len(gradients) == len(plain_gradients) == STEPS
    for step, (ours, plain) in enumerate(zip(gradients[:compared], plain_gradients, strict=False)):
        assert set(ours) == set(plain), step
        pairs += [(f"gradient {step} of {name}", ours[name], plain[name]) for name in plain if not vanishes(name)]
    pairs += [(f"weight of {name}", weights[name], plain) for name, plain in plain_weights.items()]
    # What comes out is what transformers loads, with the processor.
    exported = dict(AutoModelForImageTextToText.from_pretrained(tmp_path / "export").named_parameters())
    assert set(exported) == set(weights)
    pairs += [(f"exported {name}", exported[name].detach(), weight) for name, weight in weights.items()]
    processor = load_processor(tmp_path / "export", AutoTokenizer.from_pretrained(tmp_path / "export"))
    assert processor.tokenizer.chat_template == AutoTokenizer.from_pretrained(checkpoint).chat_template
    wrong = []
    for name, ours, theirs in pairs:
        error, apart = relative_error(ours, theirs), (ours - theirs).norm()
        # In bf16 near-ties in routers send tokens elsewhere, and what is small is mostly rounding.
        if not (error <= tolerance or (tolerance > 1e-3 and apart <= tolerance / 10)):
            wrong.append(f"{name}: {error:.1e}, {apart:.1e}")
    return wrong


def test_packed_conversations_with_images_on_one_rank(tmp_path: Path) -> None:
    assert _trains_like_transformers(tmp_path, "qwen3_vl_moe", freeze=[]) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_omni_moe_thinker"])
def test_recomputed(family: str, mode: str, tmp_path: Path) -> None:
    strategy = {"ep": 2, "activation_checkpointing": mode}
    assert _trains_like_transformers(tmp_path, family, freeze=[], strategy=strategy) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full"])
def test_linear_attention_takes_a_conversation_a_row(mode: str, tmp_path: Path) -> None:
    strategy = {"ep": 2, "activation_checkpointing": mode}
    assert _trains_like_transformers(tmp_path, "qwen3_5_moe", freeze=[], pack=False, strategy=strategy) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_omni_moe_thinker"])
def test_a_conversation_a_row(family: str, tmp_path: Path) -> None:
    assert _trains_like_transformers(tmp_path, family, pack=False) == []


def test_the_tower_keeps_its_weights_and_what_projects_trains(tmp_path: Path) -> None:
    assert _trains_like_transformers(tmp_path, "qwen3_omni_moe_thinker") == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_omni_moe_thinker", "qwen3_5_moe"])
def test_in_bf16(family: str, mode: str, tmp_path: Path) -> None:
    strategy = {"ep": 2, "activation_checkpointing": mode}
    options: dict[str, Any] = {"precision": "bf16-mixed", "pack": family != "qwen3_5_moe", "freeze": []}
    assert _trains_like_transformers(tmp_path, family, 0.3, strategy=strategy, **options) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_omni_moe_thinker"])
def test_matrices_of_the_text_are_split(family: str, tmp_path: Path) -> None:
    assert (
        _trains_like_transformers(tmp_path, family, strategy={"ep": 2, "tp": 2}, data_ranks=1, freeze=[], seed=1) == []
    )


def test_sequences_with_images_are_not_split() -> None:
    model = vision_model(vision_config())
    with pytest.raises(ValueError, match="parts other than a language model"):
        check(model, ParallelLayout.resolve(2, "auto", 2, 2, cp=2), expert_plan(model))
