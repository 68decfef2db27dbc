"""Experts in towers, to which tokens come on those ranks only whose batch has an image (a clip, a video).

Such a rank waits in their exchanges for the others, which do not call the tower. How often anyone will call it, nobody
knows before. So ranks meet: whoever is about to call experts of a tower says so to all, and so does everyone who has
come to the text, behind which no tower is called. What anyone is about to call all enter, those without tokens that are
about to call nothing or something else, until all have come to the text.

A meeting is a gather of some hundred bytes between hosts: one per call of such experts, and one per forward, for models
with such experts alone. Autograd goes back through what was entered in the opposite order, on every rank the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ep.moe.experts import expert_context, is_parallel_experts
from lightning_ep.ops.autograd import in_backward

Leave = Callable[[Tensor], Callable[[], Tensor] | None]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)


@dataclass(frozen=True)
class _Call:
    """What a rank is about to call, in numbers that hosts exchange; without experts it has come to the text.

    Attributes:
        experts: One more than the place of the experts among those of towers.
        width: ``H`` of the hidden states ``[T, H]``.
        top_k: ``K`` of ids and weights ``[T, K]``.
        hidden, ids, weights: Their dtypes, as places in `_DTYPES`.
        trains: Whether a backward will come.
        leaves: Whether that sends the rows again.
    """

    experts: int = 0
    width: int = 0
    top_k: int = 0
    hidden: int = 0
    ids: int = 0
    weights: int = 0
    trains: int = 0
    leaves: int = 0


class TowerExperts:
    """Has all ranks enter the experts of a model's towers equally often, and in one order.

    Args:
        parts: What holds them: the optional parts of the model.
        first: The first layer of the text, behind which no tower is called.
        hosts: All ranks, over their hosts.
    """

    def __init__(self, parts: Iterable[nn.Module], first: nn.Module, hosts: dist.ProcessGroup | None) -> None:
        found = (child for part in parts for child in part.modules() if is_parallel_experts(child))
        self._experts = list(dict.fromkeys(found))
        self._hosts = hosts
        self._entered: _Call | None = None
        for place, experts in enumerate(self._experts):
            context = expert_context(experts)
            if context.leave is not None:
                context.leave = partial(self._leave, context.leave)
            # Before FSDP's, which gather the experts, or the layer.
            experts.register_forward_pre_hook(torch.compiler.disable(partial(self._before_call, place)), prepend=True)
        first.register_forward_pre_hook(torch.compiler.disable(self._before_text), prepend=True, with_kwargs=True)

    def _before_call(self, place: int, experts: nn.Module, args: Any) -> Any:
        if self._entered is not None or in_backward():
            return None
        hidden, ids, weights = args
        context = expert_context(experts)
        trained = any(holder.get_parameter(name).requires_grad for holder, name in context.params)
        trains = torch.is_grad_enabled() and (trained or hidden.requires_grad or weights.requires_grad)
        call = _Call(
            experts=place + 1,
            width=hidden.shape[-1],
            top_k=ids.shape[-1],
            hidden=_DTYPES.index(hidden.dtype),
            ids=_DTYPES.index(ids.dtype),
            weights=_DTYPES.index(weights.dtype),
            trains=int(trains),
            leaves=int(trains and context.leave is not None),
        )
        return self._meet(call, hidden), ids, weights

    def _before_text(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        if in_backward():
            return None
        if args:
            return (self._meet(_Call(), args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._meet(_Call(), kwargs["hidden_states"])}

    def _meet(self, mine: _Call, hidden: Tensor) -> Tensor:
        """``hidden``, once what others call before ``mine`` is entered; a backward enters it behind ``hidden``."""
        while (first := self._first_of(mine)) != mine:
            hidden = hidden + self._enter(first, hidden.device).sum().to(hidden.dtype) * 0
        return hidden

    def _first_of(self, mine: _Call) -> _Call:
        said = torch.tensor(astuple(mine), device="cpu")
        all_said = [torch.empty_like(said) for _ in range(dist.get_world_size())]
        dist.all_gather(all_said, said, group=self._hosts)
        calls = [_Call(*numbers.tolist()) for numbers in all_said]
        first = max(calls, key=lambda call: call.experts)
        return mine if mine.experts == first.experts else first

    def _enter(self, call: _Call, device: torch.device) -> Tensor:
        """The output ``[0, H]`` of the experts for no token."""
        sizes = (call.width, call.hidden), (call.top_k, call.ids), (call.top_k, call.weights)
        tensors = [torch.empty(0, size, dtype=_DTYPES[dtype], device=device) for size, dtype in sizes]
        trains = bool(call.trains)
        self._entered = call
        try:
            hidden, ids, weights = tensors
            experts = self._experts[call.experts - 1]
            output: Tensor = experts(hidden.requires_grad_(trains), ids, weights.requires_grad_(trains))
        finally:
            self._entered = None
        return output

    def _leave(self, leave: Leave, hidden: Tensor) -> Callable[[], Tensor] | None:
        """Has experts without tokens send their rows again in backward if those with tokens do."""
        if self._entered is None:
            return leave(hidden)
        return (lambda: hidden) if self._entered.leaves else None
