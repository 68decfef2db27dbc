"""What to change where a run is out of memory, by the planner's estimate of this model, layout and batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from lightning.pytorch import LightningModule

from lightning_ep.layout import ParallelLayout
from lightning_ep.planner import Case, allocatable_gib, peak_gib
from lightning_ep.trainer.batches import Batches
from lightning_ep.trainer.planned import gpu_of_process, planned_case

_FILLED = 0.95  # of the room, the rest is for what estimates miss (docs/choose/planning.md)
_MODES = ("none", "selective", "full")


def add_memory_advice(
    exception: BaseException,
    module: LightningModule | None,
    layout: ParallelLayout,
    mode: str,
    compile: bool,
    batches: Batches,
) -> None:
    """Notes on an out-of-memory error of training which settings would fit, where the planner knows the model.

    Args:
        exception: What ends the run; others than out-of-memory errors are left alone.
        module: What was trained, if the run came so far.
        layout: Its layout.
        mode: ``activation_checkpointing``.
        compile: Whether layers are compiled.
        batches: Know the shape of the last one.
    """
    device = gpu_of_process() if isinstance(exception, torch.OutOfMemoryError) else None
    if device is None or module is None:
        return
    try:
        case = planned_case(module, layout, mode, compile, batches.shape)
    except ValueError:  # the planner does not know such a run
        return
    exception.add_note(what_fits(case, allocatable_gib(device)))


def what_fits(case: Case, limit_gib: float) -> str:
    """A sentence on what a case is estimated to take, and the first change that is estimated to fit.

    Args:
        case: What was out of memory.
        limit_gib: What tensors of a rank may take.
    """
    now = peak_gib(case, limit_gib)
    said = (
        f"lightning_ep's planner estimates {now:.1f} GiB per GPU, of {limit_gib:.1f} that there are for tensors, for "
        f"{case.batch} x {case.sequence:,} tokens with activation_checkpointing: {case.recompute}. "
    )
    for other, change in _changes(case):
        gib = peak_gib(other, limit_gib)
        if gib <= _FILLED * min(limit_gib, now):
            return (
                f"{said}By its estimate {gib:.1f} GiB are enough with {change}. `lightning-ep plan` compares layouts."
            )
    return f"{said}Neither recompute nor smaller batches would fit: `lightning-ep plan` says which GPUs or layouts do."


def _changes(case: Case) -> Iterator[tuple[Case, str]]:
    """Other ways to train on the same layout, those that cost least first, and what to write for them in a recipe."""
    for mode in _MODES[_MODES.index(case.recompute) + 1 :]:
        yield dataclasses.replace(case, recompute=mode), f"strategy.init_args.activation_checkpointing: {mode}"
    batch, accumulate = case.batch, case.accumulate
    recompute = "" if case.recompute == "full" else "strategy.init_args.activation_checkpointing: full, "
    while batch % 2 == 0:
        batch, accumulate = batch // 2, accumulate * 2
        smaller = dataclasses.replace(case, recompute="full", batch=batch, accumulate=accumulate)
        yield smaller, f"{recompute}data.init_args.batch_size: {batch}, trainer.accumulate_grad_batches: {accumulate}"
