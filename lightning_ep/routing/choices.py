"""Choices that no router has made, for benchmarks and tests: equally many tokens for every expert, or Zipf's law."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ep.routing.observe import Choice, MoELayer
from lightning_ep.routing.router_rules import ForcedBalance, RouterRule, SkewedRouting

_ROWS = 8192  # of the table of draws, which tokens go through one after the other


def choice_of(rule: RouterRule) -> Choice | None:
    """What a rule decides, None if it leaves choices to routers."""
    if isinstance(rule, ForcedBalance):
        return balanced
    return _Zipf(rule.exponent, rule.seed) if isinstance(rule, SkewedRouting) else None


def balanced(layer: MoELayer, ids_TK: Tensor) -> Tensor:
    """One expert after the other, those of a token far apart."""
    tokens, top_k = ids_TK.shape
    first_T1 = torch.arange(tokens, device=ids_TK.device)[:, None]
    apart_K = torch.arange(top_k, device=ids_TK.device) * (layer.num_experts // top_k)
    return ((first_T1 + apart_K) % layer.num_experts).to(ids_TK.dtype)


class _Zipf:
    """Draws from a table that is made once on the CPU, so that they are the same on every device and in every step."""

    def __init__(self, exponent: float, seed: int) -> None:
        self._exponent, self._seed = exponent, seed
        self._tables: dict[tuple[int, int], Tensor] = {}
        self._orders: dict[int, Tensor] = {}

    def __call__(self, layer: MoELayer, ids_TK: Tensor) -> Tensor:
        sizes = layer.num_experts, ids_TK.shape[1]
        if sizes not in self._tables:
            self._tables[sizes] = self._draw(*sizes).to(ids_TK.device)
        if layer.index not in self._orders:
            generator = torch.Generator().manual_seed(self._seed + 1 + layer.index)
            self._orders[layer.index] = torch.randperm(layer.num_experts, generator=generator).to(ids_TK.device)
        # Ranks begin at other rows.
        begin = 1031 * dist.get_rank() if dist.is_initialized() else 0
        rows_T = torch.arange(begin, begin + ids_TK.shape[0], device=ids_TK.device) % _ROWS
        return self._orders[layer.index][self._tables[sizes][rows_T]].to(ids_TK.dtype)

    def _draw(self, num_experts: int, top_k: int) -> Tensor:
        """``[_ROWS, K]`` places in a layer's order, those of a row different: Gumbel noise on log odds."""
        generator = torch.Generator().manual_seed(self._seed)
        noise = -torch.log(torch.empty(_ROWS, num_experts).exponential_(generator=generator))
        odds_E = -self._exponent * torch.arange(1, num_experts + 1).log()
        return (noise + odds_E).topk(top_k, dim=1).indices
