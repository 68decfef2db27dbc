"""How tokens are spread over experts and ranks: metrics of torchmetrics on one sum for all layers.

All of them keep the same state, a row of sums for each MoE layer, so that one all-reduce gives every number of every
layer (`RoutingSummary`), whatever the layout: each rank adds the tokens that its own routers saw, once. Sums are in
float64, in which counts of tokens are exact. `Watched` fills one from a model.

Sizes: ``M`` MoE layers (``L``: some of them), ``E`` experts of the largest, ``T`` tokens of a rank, ``K`` experts per
token, ``D`` ranks of an EP group, ``W`` ranks of all, ``C`` sums that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_ep.layout import ParallelLayout
from lightning_ep.routing import pictures

_AT_ONCE = 2**22  # (token, expert) pairs whose ids are looked at together: 32 MiB
_TOKENS, _ENTROPY, _ROWS = -3, -2, -1  # the last columns of the sums


class Routed(NamedTuple):
    """What a router did with the tokens of a rank in one forward.

    Attributes:
        ids_TK: Integer ``[T, K]``, the experts of each token, global ids.
        counted_T: bool ``[T]``, tokens that are no padding; None where all are.
        entropy_T: Entropy of the router's probabilities in nats, of each token; None to leave it out.
    """

    ids_TK: Tensor
    counted_T: Tensor | None = None
    entropy_T: Tensor | None = None


@dataclass(frozen=True)
class Measures:
    """All that `RoutingSummary` says, of tokens that count; NaN where none came. Formulas: docs/operate/routing.md.

    Attributes:
        load_ME: Tokens of each expert over the mean of its layer: 1 is balanced. NaN behind the experts of a layer.
        max_violation_M: The largest load less 1 (arXiv:2408.15664).
        variation_M: Standard deviation of the loads: the coefficient of variation of tokens (arXiv:1701.06538).
        entropy_M: Mean entropy of a token's probabilities as a share of its maximum, ln E.
        dead_ME: Whether an expert got no token.
        straggler_M: (Token, expert) pairs of the busiest rank over the mean of all: how much longer its GEMMs take.
        rank_load_MW: The same of every rank.
        rows_M: Rows that leave a rank per token: one for each other rank of its EP group that holds experts of it.
        tokens_M: Tokens.
        top_k_M: Experts per token.
    """

    load_ME: Tensor
    max_violation_M: Tensor
    variation_M: Tensor
    entropy_M: Tensor
    dead_ME: Tensor
    straggler_M: Tensor
    rank_load_MW: Tensor
    rows_M: Tensor
    tokens_M: Tensor
    top_k_M: Tensor

    @property
    def effective_M(self) -> Tensor:
        """How many experts would take the tokens of a layer if these shared them evenly: ``E / (1 + variation^2)``."""
        number_M = (~self.load_ME.isnan()).sum(1)
        return number_M / (1 + self.variation_M**2)

    def means(self) -> dict[str, Tensor]:
        """One 0-dim number for each over all layers, as they are logged; of violations also the worst layer's."""
        return {
            "max_violation": self.max_violation_M.nanmean(),
            "max_violation_worst_layer": _largest(self.max_violation_M),
            "load_variation": self.variation_M.nanmean(),
            "entropy": self.entropy_M.nanmean(),
            "dead_experts": self.dead_ME.sum().double(),
            "straggler_factor": self.straggler_M.nanmean(),
            "rows_per_token": self.rows_M.nanmean(),
        }


class RoutingMetric(Metric):
    """The sums that all metrics of routing are made of.

    Args:
        experts: The MoE layers by name, with the number of experts of each.
        layout: Which rank holds which experts. Default: this process holds all.
        rank: This rank, of all.

    Raises:
        ValueError: If there is no layer, or a layer has experts that the ranks of an EP group cannot share.
    """

    full_state_update = False
    totals_MC: Tensor

    def __init__(self, experts: Mapping[str, int], layout: ParallelLayout | None = None, rank: int = 0) -> None:
        super().__init__(dist_sync_fn=_all_reduced)
        if not experts:
            raise ValueError("there is no MoE layer to measure: give the layers with their number of experts.")
        layout = layout or ParallelLayout(1)
        for name, number in experts.items():
            layout.check_num_experts(number, name)
        self.layers = tuple(experts)
        self.num_experts = tuple(experts.values())
        self.ep, self.world_size, self.rank = layout.ep, layout.world_size, rank
        self._most = max(self.num_experts)
        width = self._most + self.world_size + 3  # tokens by expert, pairs by rank; tokens, entropy, rows sent
        self.add_state("totals_MC", torch.zeros(len(experts), width, dtype=torch.float64), "sum")

    @override
    def update(self, routed: Sequence[Routed | None]) -> None:
        """Adds a forward of this rank; the host waits for nothing.

        Args:
            routed: Of every layer in order, None for one that was not called.
        """
        if len(routed) != len(self.layers):
            raise ValueError(f"routing of {len(routed)} layers was given, and there are {len(self.layers)}.")
        alike: dict[tuple[int, ...], list[int]] = {}
        for layer, one in enumerate(routed):
            if one is not None and one.ids_TK.numel() > 0:
                key = id(one.counted_T), one.entropy_T is None, self.num_experts[layer], *one.ids_TK.shape
                alike.setdefault(key, []).append(layer)
        for (_, _, number, *shape), layers in alike.items():
            step = max(1, _AT_ONCE // math.prod(shape))
            for begin in range(0, len(layers), step):
                some = layers[begin : begin + step]
                self._add(some, number, [one for layer in some if (one := routed[layer]) is not None])

    def _add(self, layers: list[int], experts: int, routed: list[Routed]) -> None:
        """Adds layers with the same tokens and as many experts, in kernels for all of them."""
        ids_LTK = torch.stack([one.ids_TK for one in routed]).long()
        counted_T = torch.ones(ids_LTK.shape[1], dtype=torch.float64, device=ids_LTK.device)
        if routed[0].counted_T is not None:
            counted_T *= routed[0].counted_T
        pairs_LE = ids_LTK.new_zeros(len(layers), experts, dtype=torch.float64)
        pairs_LE.scatter_add_(1, ids_LTK.flatten(1), counted_T[:, None].expand_as(ids_LTK).flatten(1))
        added_LC = ids_LTK.new_zeros(len(layers), self.totals_MC.shape[1], dtype=torch.float64)
        added_LC[:, :experts] = pairs_LE
        group, me = divmod(self.rank, self.ep)
        first = self._most + group * self.ep
        added_LC[:, first : first + self.ep] = pairs_LE.view(len(layers), self.ep, -1).sum(2)
        added_LC[:, _TOKENS] = counted_T.sum()
        entropies = [one.entropy_T for one in routed if one.entropy_T is not None]
        added_LC[:, _ENTROPY] = torch.stack(entropies).mul(counted_T).sum(1) if entropies else torch.nan
        if self.ep > 1:
            sends_LTD = ids_LTK.new_zeros(*ids_LTK.shape[:2], self.ep, dtype=torch.bool)
            sends_LTD.scatter_(2, ids_LTK // (experts // self.ep), True)
            sends_LTD[:, :, me] = False
            added_LC[:, _ROWS] = sends_LTD.sum(2).mul(counted_T).sum(1)
        if layers == list(range(layers[0], layers[-1] + 1)):
            self.totals_MC[layers[0] : layers[-1] + 1] += added_LC
        else:
            for layer, added_C in zip(layers, added_LC, strict=True):
                self.totals_MC[layer] += added_C

    def measures(self, totals_MC: Tensor) -> Measures:
        """What sums of all ranks say, on whatever device they are."""
        number_M = torch.tensor(self.num_experts, dtype=torch.float64, device=totals_MC.device)
        exists_ME = torch.arange(self._most, device=totals_MC.device) < number_M[:, None]
        pairs_ME = totals_MC[:, : self._most]
        pairs_MW = totals_MC[:, self._most : self._most + self.world_size]
        tokens_M = totals_MC[:, _TOKENS]
        load_ME = pairs_ME / (pairs_ME.sum(1) / number_M)[:, None]  # 0 / 0 where no token came
        rank_load_MW = pairs_MW / pairs_MW.mean(1, keepdim=True)
        return Measures(
            load_ME=load_ME.masked_fill(~exists_ME, torch.nan),
            max_violation_M=load_ME.amax(1) - 1,
            variation_M=(((load_ME - 1) ** 2 * exists_ME).sum(1) / number_M).sqrt(),
            entropy_M=totals_MC[:, _ENTROPY] / tokens_M / number_M.log(),
            dead_ME=(pairs_ME == 0) & exists_ME & (tokens_M > 0)[:, None],
            straggler_M=rank_load_MW.amax(1),
            rank_load_MW=rank_load_MW,
            rows_M=totals_MC[:, _ROWS] / tokens_M,
            tokens_M=tokens_M,
            top_k_M=pairs_ME.sum(1) / tokens_M,
        )


class RoutingSummary(RoutingMetric):
    """All of it, from one all-reduce: ``compute`` gives `Measures` as a dict."""

    @override
    def compute(self) -> dict[str, Tensor]:
        return dict(vars(self.measures(self.totals_MC)))

    @override
    def plot(self, val: Mapping[str, Tensor] | None = None, ax: Any = None) -> Any:
        """Draws the loads as `ExpertLoad` does."""
        return pictures.heat_map((val or self.compute())["load_ME"], self.layers, ax)


class ExpertLoad(RoutingMetric):
    """Tokens of each expert over the mean of its layer, ``[M, E]``; NaN behind the experts of a layer."""

    @override
    def compute(self) -> Tensor:
        return self.measures(self.totals_MC).load_ME

    @override
    def plot(self, val: Tensor | None = None, ax: Any = None) -> Any:
        """Draws a heat map of layers and experts, with the hottest and the dead named: figure and axes."""
        return pictures.heat_map(self.compute() if val is None else val, self.layers, ax)


class _OfLayers(RoutingMetric):
    """One number for each layer, ``[M]``."""

    _field: str
    _title: str
    _balanced: float | None = None

    @override
    def compute(self) -> Tensor:
        return getattr(self.measures(self.totals_MC), self._field)

    @override
    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draws a bar for each layer, or of several values a curve of each layer: figure and axes."""
        return pictures.of_layers(self.compute() if val is None else val, self.layers, self._title, self._balanced, ax)


class MaxViolation(_OfLayers):
    """How far the most popular expert of each layer is above the mean: 0 is balanced (arXiv:2408.15664)."""

    _field, _title, _balanced = "max_violation_M", "max violation", 0.0


class LoadVariation(_OfLayers):
    """Coefficient of variation of the tokens of a layer's experts: 0 is balanced (arXiv:1701.06538)."""

    _field, _title, _balanced = "variation_M", "coefficient of variation", 0.0


class RouterEntropy(_OfLayers):
    """Mean entropy of a token's router probabilities, as a share of ln E: 0 is certain, 1 undecided."""

    _field, _title = "entropy_M", "router entropy, share of ln E"


class DeadExperts(_OfLayers):
    """How many experts of each layer got no token."""

    _field, _title, _balanced = "dead_ME", "experts without a token", 0.0

    @override
    def compute(self) -> Tensor:
        return super().compute().sum(1)


class StragglerFactor(_OfLayers):
    """(Token, expert) pairs of the busiest rank over the mean of all: how much longer the others' GEMMs wait."""

    _field, _title, _balanced = "straggler_M", "straggler factor", 1.0


class RowsPerToken(_OfLayers):
    """Rows that leave a rank per token: one for each other rank that holds experts of it, however many."""

    _field, _title = "rows_M", "rows sent per token"


def _all_reduced(totals: Tensor, group: Any) -> list[Tensor]:
    """What torchmetrics takes as the values of all ranks, where by default it gathers each, behind a barrier."""
    total = totals.clone()
    dist.all_reduce(total, group=group)
    return [total]


def _largest(values_M: Tensor) -> Tensor:
    """The largest that is no NaN."""
    largest = values_M.nan_to_num(nan=-torch.inf).amax()
    return largest.where(largest > -torch.inf, torch.nan)
