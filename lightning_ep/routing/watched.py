"""What a model's routers do, put into one metric while it runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_ep import transformers_adapter as adapter
from lightning_ep.distributed.host_copies import OnHost
from lightning_ep.layout import ParallelLayout
from lightning_ep.routing.losses import probabilities
from lightning_ep.routing.metrics import Measures, Routed, RoutingSummary
from lightning_ep.routing.observe import Observation, Routing, moe_layers


class Watched:
    """Fills a `RoutingSummary` from the forwards of a model, while it is `active`.

    A layer costs the device three kernels of a forward, for the entropy (left out where it is not known how a family's
    routers score); the rest is done for all layers together.

    Args:
        module: As in `Observation`.
        layout: Which rank holds which experts. Default: this process holds all.
        rank: This rank, of all.
        training: Look at forwards with a backward, or (False) at those without.

    Attributes:
        layers: Names of the MoE layers.
        active: Whether to look at all.

    Raises:
        ValueError: If there are no MoE layers.
    """

    def __init__(
        self, module: nn.Module, layout: ParallelLayout | None = None, rank: int = 0, training: bool = True
    ) -> None:
        found = moe_layers(module)
        self.metric = RoutingSummary({layer.name: layer.num_experts for layer in found}, layout, rank)
        self.layers = self.metric.layers
        self.active = True
        self._training = training
        self._scoring = [None if layer.router is None else adapter.router_scoring(layer.router) for layer in found]
        self._of_pass: list[Routed | None] = [None] * len(found)
        self._seen = self._passed_over = 0
        self._observation = Observation(module, self._see, logits="values", mark=self._mark)

    @torch.no_grad()
    def _see(self, routing: Routing) -> None:
        if not self.active:
            return
        if routing.training != self._training:
            self._passed_over += 1
            return
        self._seen += 1
        layer, logits_TE = routing.layer.index, routing.logits_TE
        if self._of_pass[layer] is not None:
            self._end_pass()
        scoring = self._scoring[layer]
        entropy_T = None if logits_TE is None or scoring is None else entropy(logits_TE, scoring)
        self._of_pass[layer] = Routed(routing.ids_TK, routing.counted_T, entropy_T)
        if layer == len(self._of_pass) - 1:
            self._end_pass()  # ids need not be kept any longer

    def _mark(self) -> Callable[[], None]:
        before = list(self._of_pass), self._seen, self._passed_over
        totals_MC = self.metric.totals_MC.clone()

        def forget() -> None:
            self._of_pass, self._seen, self._passed_over = before
            self.metric.totals_MC.copy_(totals_MC)

        return forget

    def _end_pass(self) -> None:
        device = next(one.ids_TK.device for one in self._of_pass if one is not None)
        self.metric.to(device).update(self._of_pass)
        self._of_pass = [None] * len(self._of_pass)

    def take(self) -> OnHost:
        """Sums of all ranks since the last call, for `measures`, on their way to the host; every rank must call it."""
        if any(one is not None for one in self._of_pass):
            self._end_pass()
        if self._passed_over and not self._seen:
            which = ("no backward", "a") if self._training else ("a backward", "no")
            rank_zero_warn(
                f"Watched has seen forwards with {which[0]} only, and looks at those with {which[1]} backward: "
                f"Watched(..., training={not self._training}) looks at the others (torch.no_grad()).",
                stacklevel=2,
            )
        self._seen = self._passed_over = 0
        with self.metric.sync_context(dist_sync_fn=self.metric.dist_sync_fn):
            totals_MC = self.metric.totals_MC
        self.metric.reset()
        return OnHost(totals_MC)

    def measures(self, totals: OnHost) -> Measures:
        """What such sums say, on the CPU; the host waits for them."""
        return self.metric.measures(totals.wait())

    def remove(self) -> None:
        """Looks no longer."""
        self._observation.remove()


def entropy(logits_TE: Tensor, scoring: adapter.Scoring) -> Tensor:
    """Entropy of a router's probabilities in nats, fp32 ``[T]``."""
    return torch.special.entr(probabilities(logits_TE, scoring)).sum(-1)
