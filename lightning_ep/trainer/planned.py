"""A run as the planner knows runs: its model, layout, batch and GPU."""

from __future__ import annotations

import dataclasses

import torch
from lightning.pytorch import LightningModule
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.layout import ParallelLayout
from lightning_ep.planner import (
    Case,
    Device,
    ModelWidths,
    attention_adapters,
    expert_adapters,
    find_device,
    read_widths,
)
from lightning_ep.planner.devices import GPUS
from lightning_ep.trainer.adamw import AdamW


def planned_case(
    module: LightningModule, layout: ParallelLayout, mode: str, compile: bool, shape: tuple[int, int] | None
) -> Case:
    """What is trained, as the planner has it.

    Args:
        module: The module of the run.
        layout: Its layout.
        mode: ``activation_checkpointing``.
        compile: Whether layers are compiled.
        shape: Sequences and tokens of a batch, None if they are not known.

    Raises:
        ValueError: If the planner does not know such a run; says why.
    """
    models = list(adapter.pretrained_models(module).values())
    if len(models) != 1:
        raise ValueError(f"one model is planned, and there are {len(models)}")
    if shape is None:
        raise ValueError("batches have no input_ids of two dimensions")
    widths, layers = read_widths(models[0].config.to_dict())
    rank, experts = planned_adapters(models[0], widths, layers)
    rounds = any(isinstance(optimizer, AdamW) and optimizer.rounds for optimizer in module.trainer.optimizers)
    return Case(
        widths, layers, *shape, layout.world_size, layout.ep, layout.cp, str(module.trainer.precision), mode, compile,
        layout.tp, layout.replicate, module.trainer.accumulate_grad_batches, module.trainer.num_devices, rank, experts,
        stochastic_rounding=rounds,
    )  # fmt: skip


def planned_adapters(model: PreTrainedModel, widths: ModelWidths, layers: int) -> tuple[int, bool]:
    """The rank of adapters, and whether experts have some; 0 if all weights are trained.

    Raises:
        ValueError: If something else is trained.
    """
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    configs = list(adapter.peft_configs(model).values())
    if not configs:
        if not all(param.requires_grad for param in model.parameters()):
            raise ValueError("a part of the model is frozen")
        return 0, False
    rank = configs[0].r
    for experts in (False, True):
        planned = attention_adapters(widths, layers, rank) + experts * expert_adapters(widths, layers, rank)
        if abs(trained - planned) <= 0.01 * planned:
            return rank, experts
    raise ValueError("adapters are planned of all of attention, without or with experts, and others are trained")


def gpu_of_process() -> Device | None:
    """This process's GPU, with the memory that it has; of a kind that is not known its memory alone counts.

    None where there is no GPU.
    """
    if not torch.cuda.is_available():
        return None
    known = find_device(torch.cuda.get_device_name()) or GPUS["H100"]
    return dataclasses.replace(known, memory_gib=torch.cuda.get_device_properties().total_memory / 2**30)
