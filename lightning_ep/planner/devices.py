"""GPUs that a plan can be made for: what their vendor says of them, and how much of it was reached."""

from __future__ import annotations

import re
from dataclasses import dataclass

# GiB that an estimate of allocations leaves to CUDA's context, NCCL's buffers and the allocator's fragments: 3 to 4 GiB
# were reserved beyond the peak on one H200.
_BESIDE_GIB = 4.0


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        name: As it is part of the name that the driver gives.
        flops: Peak of the tensor cores in dense bf16, FLOP/s, without sparsity.
        bandwidth: Of its memory, bytes/s.
        memory_gib: Of which a process can allocate all but what its context takes.
        link: Of its links to the GPUs of its node, bytes/s and direction.
        network: Of its share of the network between nodes, bytes/s and direction.
    """

    name: str
    flops: float
    bandwidth: float
    memory_gib: float
    link: float
    network: float


# From NVIDIA's data sheets; memory as torch reports it. Links: NVLink 3, 4 and 5 (600, 900 and 1,800 GB/s, both
# directions together). Network: one adapter per GPU, as in DGX A100 (200 Gb/s) and DGX H100, H200, B200 (400 Gb/s).
GPUS = {
    "A100": Device("A100-SXM4-80GB", 312e12, 2.04e12, 79.0, 300e9, 25e9),
    "H100": Device("H100", 989e12, 3.35e12, 79.0, 450e9, 50e9),
    "H200": Device("H200", 989e12, 4.8e12, 139.0, 450e9, 50e9),
    "B200": Device("B200", 2250e12, 8.0e12, 178.0, 900e9, 50e9),
}

# Share of the links that exchanges reached: two H200, a layer's four in 0.8 ms at 4 x 4096 tokens, 334.5 of 450 GB/s
# (benchmarks/results). It is taken for every collective and GPU.
OF_LINK = 334.5 / 450
# Share of an adapter, assumed: 46 to 48 of 50 GB/s are normal for one that works (NVIDIA in nccl-tests issue 290), an
# all-to-all has one adapter per GPU (nccl-tests issue 267), and less is often seen.
OF_NETWORK = 0.8


def find_device(name: str) -> Device | None:
    """The device with such a name, as ``NVIDIA H200``; None for one that is not known here."""
    return next((device for device in GPUS.values() if device.name in name), None)


def dense_peak(name: str) -> float | None:
    """Peak in dense bf16, FLOP/s, of the card that the driver calls so; None if it is none of those in `GPUS`.

    H100 and H200 have slower cards of the same name (PCIe, NVL), and others have parts of one (MIG); A100 has one peak,
    whatever its memory and its bus.
    """
    words = set(re.split(r"[ -]", name.upper()))
    card = next((card for card in GPUS if card in words), None)
    if card is None or words & {"MIG", "NVL"} or ("PCIE" in words and card != "A100"):
        return None
    return GPUS[card].flops


def allocatable_gib(device: Device, cap_gib: float | None = None) -> float:
    """What the tensors of a rank may take, GiB: the device's memory less what lies beside them, or a smaller cap."""
    return min(device.memory_gib - _BESIDE_GIB, float("inf") if cap_gib is None else cap_gib)
