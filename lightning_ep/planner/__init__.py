"""What a training step costs on paper, before any GPU is asked: arithmetic, milliseconds, memory. Knows no torch.

    case = Case(QWEN3_30B_A3B, layers=48, batch=4, sequence=4096, ranks=8, ep=8, recompute="full")
    device = find_device("NVIDIA H200")
    tokens_per_second(case, device), peak_gib(case, allocatable_gib(device))

Times and activations are those measured on H200 GPUs at one width, scaled to the case by its arithmetic and its bytes;
`docs/choose/planning.md` has the formulas, and how far off they were. ``lightning-ep plan`` is `planner.command`.
"""

from lightning_ep.planner.case import Case
from lightning_ep.planner.counts import (
    active_parameters,
    attention_adapters,
    expert_adapters,
    expert_parameters,
    flops_per_token,
    num_parameters,
    rows_sent,
)
from lightning_ep.planner.devices import Device, allocatable_gib, dense_peak, find_device
from lightning_ep.planner.families import Model, find_model, model_of, read_widths
from lightning_ep.planner.memory import memory_gib, peak_gib
from lightning_ep.planner.step_time import host_ms, step_ms, tokens_per_second
from lightning_ep.planner.widths import QWEN3_30B_A3B, ModelWidths

__all__ = [
    "QWEN3_30B_A3B",
    "Case",
    "Device",
    "Model",
    "ModelWidths",
    "active_parameters",
    "allocatable_gib",
    "attention_adapters",
    "expert_adapters",
    "expert_parameters",
    "dense_peak",
    "find_device",
    "find_model",
    "flops_per_token",
    "host_ms",
    "memory_gib",
    "model_of",
    "num_parameters",
    "peak_gib",
    "read_widths",
    "rows_sent",
    "step_ms",
    "tokens_per_second",
]
