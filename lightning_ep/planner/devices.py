"""GPUs that a plan can be made for: what their vendor says of them."""

from __future__ import annotations

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
    """

    name: str
    flops: float
    bandwidth: float
    memory_gib: float


# From the data sheets; memory as torch reports it.
_DEVICES = (Device("H100", 989e12, 3.35e12, 79.0), Device("H200", 989e12, 4.8e12, 139.0))


def find_device(name: str) -> Device | None:
    """The device with such a name, as ``NVIDIA H200``; None for one that is not known here."""
    return next((device for device in _DEVICES if device.name in name), None)


def allocatable_gib(device: Device, cap_gib: float | None = None) -> float:
    """What the tensors of a rank may take, GiB: the device's memory less what lies beside them, or a smaller cap."""
    return min(device.memory_gib - _BESIDE_GIB, float("inf") if cap_gib is None else cap_gib)
