"""Fine-tuning in 8 or 12 bytes per parameter learns what fp32 ones learn, and bf16 rounded to the nearest does not.

In small what `benchmarks.rounding` does with four layers, whose curves docs/operate/training.md shows: a model that was
trained on source code goes on with docstrings, at a rate at which most updates are lost to rounding. The reference is
torch's AdamW on fp32 copies of the weights; all compute gradients with bf16 weights.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import doctest
import inspect
import optparse
import random
import statistics
import textwrap
import typing
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from lightning_ep import AdamW
from tests.reference import tiny_model

SEEDS, STEPS, BATCH, LENGTH = (1, 2, 3), 80, 8, 32
RATE, DECAY = 1e-4, 0.1  # 1/512 of a weight is 1e-4 at 0.05, and half of the weights are larger


def _bytes(text: str) -> Tensor:
    """Tokens, of which there are 128."""
    return torch.tensor([byte for byte in text.encode() if byte < 128])


def _docstrings(*modules: ModuleType) -> Iterator[str]:
    for module in modules:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                yield ast.get_docstring(node) or ""


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def _batches(text: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator)
        yield torch.stack([text[start : start + LENGTH] for start in starts.tolist()])


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    """bf16 weights of a model that has learnt source code."""
    model = tiny_model(num_hidden_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 120)
    for ids in _batches(_bytes(inspect.getsource(argparse) + inspect.getsource(optparse)), 120, seed=0):
        _loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}


TEXT = _bytes("\n".join(_docstrings(doctest, difflib, argparse, textwrap, random, statistics, typing)))
HELD_OUT, TRAINED = TEXT[:8192].view(-1, 64), TEXT[8192:]


def _fine_tuned(base: dict[str, Tensor], way: str, seed: int, steps: int = STEPS) -> float:
    """The loss on held-out text."""
    model = tiny_model(num_hidden_layers=1).bfloat16()
    model.load_state_dict(base)
    params = dict(model.named_parameters())
    masters = {name: param.detach().float() for name, param in params.items()}
    optimizer: torch.optim.Optimizer
    with_masters = way in ("masters", "moments")  # of these only the moments are rounded
    trained = masters if with_masters else params
    if way == "masters":
        optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=DECAY)
    else:
        ours = AdamW(trained.values(), lr=RATE, weight_decay=DECAY, stochastic_rounding=way != "nearest")
        ours.name_parameters(trained, seed)
        optimizer = ours
    for ids in _batches(TRAINED, steps, seed):
        _loss(model, ids).backward()
        for name, param in params.items() if with_masters else ():
            assert param.grad is not None
            masters[name].grad = param.grad.float()
        optimizer.step()
        model.zero_grad()
        if with_masters:
            model.load_state_dict(masters)
    with torch.no_grad():
        return _loss(model, HELD_OUT).item()


@pytest.mark.timeout(360)
def test_stochastic_rounding_learns_what_fp32_masters_learn_and_rounding_to_the_nearest_does_not(
    base: dict[str, Tensor],
) -> None:
    before = _fine_tuned(base, "masters", 0, steps=0)
    seeds = {"masters": SEEDS, "stochastic": SEEDS, "moments": SEEDS[:1], "nearest": SEEDS}
    ends = {way: [_fine_tuned(base, way, seed) for seed in some] for way, some in seeds.items()}
    spread = max(ends["masters"]) - min(ends["masters"])
    means = {way: statistics.fmean(losses) for way, losses in ends.items()}
    learnt = before - means["masters"]
    assert learnt > 10 * spread, "there is something to learn"
    assert abs(means["stochastic"] - means["masters"]) < spread
    assert abs(ends["moments"][0] - ends["masters"][0]) < spread / 2  # of the same seed
    assert means["nearest"] - means["masters"] > 5 * spread
    assert before - means["nearest"] < learnt / 2
