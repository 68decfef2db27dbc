"""How many tokens went to each expert, kept on the device until somebody asks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ep.routing.observe import MoELayer, Observation, Routing


class RoutingCounts:
    """Counts the choices of routers, of tokens that are no padding; each token is counted ``K`` times.

    Args:
        module: As in `Observation`.
        training: Count passes with a backward, or (False) those without.

    Attributes:
        layers: The layers that it counts in.
    """

    def __init__(self, module: nn.Module, training: bool = True) -> None:
        self._training = training
        self._counts_LE: Tensor | None = None
        self._observation = Observation(module, self._count, mark=self._mark)
        self.layers: list[MoELayer] = self._observation.layers
        self._shape = len(self.layers), max((layer.num_experts for layer in self.layers), default=0)

    def _count(self, routing: Routing) -> None:
        if routing.training == self._training:
            routing.count_into(self._of(routing.ids_TK.device)[routing.layer.index])

    def _mark(self) -> Callable[[], None]:
        counts_LE = None if self._counts_LE is None else self._counts_LE.clone()

        def forget() -> None:
            self._counts_LE = counts_LE

        return forget

    def _of(self, device: torch.device | str) -> Tensor:
        if self._counts_LE is None:
            self._counts_LE = torch.zeros(self._shape, dtype=torch.int64, device=device)
        return self._counts_LE

    def take(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 ``[L, E]``, this rank's counts since the last call; zeros behind the experts of layers with fewer.

        Args:
            device: Where zeros are, if nothing was counted.
        """
        counts_LE, self._counts_LE = self._of(device), None
        return counts_LE

    def remove(self) -> None:
        """Stops counting."""
        self._observation.remove()


def sum_over_ranks(counts: Tensor) -> Tensor:
    """The sum over all ranks, in place; every rank must call it. Ranks of ``tp`` and ``cp`` route different tokens."""
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts
