"""What a training step costs on paper, before any GPU is asked: arithmetic, milliseconds, memory. Knows no torch.

    case = Case(QWEN3_30B_A3B, layers=48, batch=4, sequence=4096, ranks=8, ep=8, recompute="full")
    device = find_device("NVIDIA H200")
    tokens_per_second(case, device), peak_gib(case, allocatable_gib(device))

Times and activations are those measured on H200 GPUs at one width, scaled to the case by its arithmetic and its bytes.
Thirteen cells that were run at that width were 0.84 to 1.13 times as fast as this says; at others nothing was compared.
"""

from lightning_ep.planner.case import QWEN3_30B_A3B, Case, ModelWidths
from lightning_ep.planner.counts import expert_parameters, flops_per_token, num_parameters, rows_sent
from lightning_ep.planner.devices import Device, allocatable_gib, find_device
from lightning_ep.planner.memory import memory_gib, peak_gib
from lightning_ep.planner.step_time import host_ms, step_ms, tokens_per_second

__all__ = [
    "QWEN3_30B_A3B",
    "Case",
    "Device",
    "ModelWidths",
    "allocatable_gib",
    "expert_parameters",
    "find_device",
    "flops_per_token",
    "host_ms",
    "memory_gib",
    "num_parameters",
    "peak_gib",
    "rows_sent",
    "step_ms",
    "tokens_per_second",
]
