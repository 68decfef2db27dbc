"""A GPU's numbers on the host without waiting for the GPU."""

from __future__ import annotations

import torch
from torch import Tensor


class Lagged:
    """Gives, for every 0-dim tensor, the value of the one before, on the CPU.

    Progress bars ask for numbers after every step. To give them the newest, the host would wait until the GPU has done
    the step, and the GPU would then wait for the launches of the next one.
    """

    def __init__(self) -> None:
        self._before: tuple[Tensor, torch.cuda.Event] | None = None

    def swap(self, value: Tensor) -> Tensor:
        """Takes a value and returns the one before; the value itself if it is on the CPU, or the first."""
        if not value.is_cuda:
            return value
        copy = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value.detach(), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        before, self._before = self._before or (copy, copied), (copy, copied)
        before[1].synchronize()  # returns at once, unless the host is a whole step ahead
        return before[0]
