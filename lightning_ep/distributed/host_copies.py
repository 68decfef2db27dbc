"""Numbers of a GPU that the host needs, copied as early and awaited as late as possible, or not at all."""

from __future__ import annotations

import torch
from torch import Tensor


class OnHost:
    """A copy of a tensor on the CPU, on its way.

    Args:
        values: The tensor; what the GPU is given afterwards is not waited for.
    """

    def __init__(self, values: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> Tensor:
        """The copy, complete; the host waits for it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values


class Lagged:
    """Gives, for every 0-dim tensor, the value of the one before, on the CPU.

    Progress bars ask for numbers after every step. To give them the newest, the host would wait until the GPU has done
    the step, and the GPU would then wait for the launches of the next one.
    """

    def __init__(self) -> None:
        self._before: OnHost | None = None

    def swap(self, value: Tensor) -> Tensor:
        """Takes a value and returns the one before; the value itself if it is on the CPU, or the first."""
        if not value.is_cuda:
            return value
        copy = OnHost(value.detach())
        before, self._before = self._before or copy, copy
        return before.wait()  # at once, unless the host is a whole step ahead
