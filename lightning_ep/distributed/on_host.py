"""Numbers of a GPU that the host needs, copied as early and awaited as late as possible."""

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
