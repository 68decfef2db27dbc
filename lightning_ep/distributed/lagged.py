"""A GPU's numbers on the host without waiting for the GPU."""

from __future__ import annotations

from torch import Tensor

from lightning_ep.distributed.on_host import OnHost


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
