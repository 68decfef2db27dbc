"""A tiny checkpoint with a tokenizer and a chat template, as the hub has it, and what plain transformers make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lightning_ep.data import corpus
from tests.hub_files import write_checkpoint
from tests.rank_process import on_cuda

on_two_ranks = pytest.mark.skipif(
    on_cuda() and torch.cuda.device_count() < 2, reason="the commands take a GPU for each rank"
)


TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message.role }}: {{ message.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}zeta{% endif %}"
)


def write_talking(path: Path, template: str | None = TEMPLATE, **overrides: Any) -> Path:
    """Weights, a tokenizer of 262 tokens and <|turn|>, its template, and a generation config as chat models have it."""
    model = write_checkpoint(
        path, **{"vocab_size": 272, "eos_token_id": 0, "max_position_embeddings": 256, **overrides}
    )
    tokenizer = corpus.train_tokenizer(iter(["zeta eta theta " * 50]), 262)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    config = GenerationConfig(eos_token_id=model.config.eos_token_id, do_sample=True, temperature=0.6, top_k=20)
    config.save_pretrained(path)
    return path


@torch.no_grad()
def greedy_ids(path: Path, prompt: list[int], tokens: int) -> list[int]:
    """What transformers generate on one process."""
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


def greedy(path: Path, prompt: list[int], tokens: int) -> str:
    """The text of it, without special tokens."""
    return AutoTokenizer.from_pretrained(path).decode(greedy_ids(path, prompt, tokens), skip_special_tokens=True)
