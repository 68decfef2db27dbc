"""What routers choose while a model runs: the one place that looks at them.

A MoE layer is seen where its experts are called, with the ids of the experts that each token goes to, in all families
alike and outside of compiled code; under recompute that call runs once. Where somebody asks for router logits, the
router of the layer keeps its own until then, also from inside of compiled code. What is watched costs the device a
kernel or two per layer and call, and the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.moe.experts import expert_context, is_parallel_experts
from lightning_ep.ops.autograd import in_backward
from lightning_ep.routing.tokens import Tokens, note_tokens, tokens_of


@dataclass(frozen=True, eq=False)
class MoELayer:
    """A layer of experts behind a router.

    Attributes:
        index: Its number among the MoE layers of the module, in their order.
        name: Of its experts, in the module that was asked; adapters around them are left out.
        experts: What is called with the ids of experts.
        router: What is called for the logits: where PEFT has wrapped a router, its wrapper.
        block: What is around both.
        num_experts: Experts over all ranks.
    """

    index: int
    name: str
    experts: nn.Module
    router: nn.Module | None
    block: nn.Module
    num_experts: int


@dataclass(frozen=True, eq=False)
class Routing:
    """What one call of a MoE layer chose for this rank's tokens; under ``tp`` and ``cp`` ranks hold different ones.

    Attributes:
        layer: The layer.
        ids_TK: int64 ``[T, K]``, the experts of each token.
        logits_TE: ``[T, E]`` in the router's dtype, with their graph if any watcher asked for it; None where nobody
            asked for logits, or `router_scoring` does not know how the router gives them.
        tokens: What is known of the tokens; the same object in all layers of a pass through the model.
        training: Whether there will be a backward: gradients are enabled.
    """

    layer: MoELayer
    ids_TK: Tensor
    logits_TE: Tensor | None
    tokens: Tokens
    training: bool

    @property
    def counted_T(self) -> Tensor | None:
        """Bool ``[T]``, which tokens are no padding; None where all are."""
        return self.tokens.counted(self.ids_TK.shape[0])

    def count_into(self, counts_E: Tensor) -> None:
        """Adds to int64 ``[E]`` (or more) how many tokens that are no padding go to each expert; each goes to ``K``."""
        ones = self.tokens.ones(self.ids_TK)
        counts_E.scatter_add_(0, self.ids_TK.flatten(), ones)


Logits = Literal["values", "graph"]
"""Which router logits a watcher gets: without their graph, or with it, for a loss on them."""
Watcher = Callable[[Routing], None]
Mark = Callable[[], Callable[[], None]]
"""Notes what a watcher has seen; what it returns has it forget what comes after that."""
Choice = Callable[[MoELayer, Tensor], Tensor]
"""Gives the ids ``[T, K]`` that are taken in place of those of a layer's router."""


@dataclass(frozen=True, eq=False)
class _Entry:
    """A watcher of a layer, by the number and name that the layer has for it."""

    watcher: Watcher
    layer: MoELayer
    logits: Logits | None


@dataclass(eq=False)
class _Watched:
    """What is remembered of experts that somebody watches.

    Attributes:
        model: Which holds them.
        watchers: Who is called.
        choice: Says who is chosen in place of the router.
        kept: Which logits the router keeps; compiled code is made anew where this changes.
        logits: Those that it has kept for the call of the experts behind it.
    """

    model: PreTrainedModel
    watchers: list[_Entry]
    choice: Callable[[Tensor], Tensor] | None = None
    kept: Logits | None = None
    logits: Tensor | None = None

    def watch(self, entry: _Entry) -> None:
        """Calls one more."""
        self.watchers.append(entry)
        self._keep()

    def leave(self, entry: _Entry) -> None:
        """Calls it no longer."""
        self.watchers.remove(entry)
        self._keep()

    def _keep(self) -> None:
        asked = {entry.logits for entry in self.watchers}
        self.kept = "graph" if "graph" in asked else "values" if "values" in asked else None

    @torch.compiler.disable
    def route(self, ids_TK: Tensor) -> Tensor:
        """Tells the watchers of a call, and returns the ids that it takes."""
        logits, self.logits = self.logits, None
        if self.choice is not None:
            ids_TK = self.choice(ids_TK)
        if in_backward():
            return ids_TK  # recompute that is not ours runs experts again
        logits_TE = None if logits is None else logits.flatten(0, -2)
        for entry in list(self.watchers):
            # Not by the layer's mode: models come from `from_pretrained` in that of evaluation, and Lightning keeps it.
            training = torch.is_grad_enabled()
            entry.watcher(Routing(entry.layer, ids_TK, logits_TE, tokens_of(self.model), training))
        return ids_TK


class Observation:
    """Calls a function with the `Routing` of every call of every MoE layer, until it is removed.

    Attributes:
        layers: The layers that it watches.

    Args:
        module: A transformers MoE, or a module that contains some. A model that is to be sharded is watched after
            that, and best before it is compiled, at its first call.
        watcher: The function. It runs in forward of training, evaluation and generation (`Routing.training`), and must
            not wait for the device.
        logits: Which router logits it needs, if any.
        mark: Of a watcher that adds up: a forward may be broken off, or made again (`mark`).
    """

    def __init__(
        self, module: nn.Module, watcher: Watcher, logits: Logits | None = None, mark: Mark | None = None
    ) -> None:
        self.layers = moe_layers(module)
        self._entries: dict[MoELayer, tuple[_Watched, _Entry]] = {}
        self._marks: list[tuple[_Marks, Mark]] = []
        for model in adapter.pretrained_models(module).values():
            inside = set(model.modules())
            if mark is not None:
                marks = adapter.recall(model, _Marks) or _Marks()
                adapter.remember(model, marks)
                marks.append(mark)
                self._marks.append((marks, mark))
            for layer in self.layers:
                if layer.experts in inside:
                    entry, watched = _Entry(watcher, layer, logits), _watched(layer.experts, model)
                    if logits:
                        _keep_logits(layer, watched)
                    watched.watch(entry)
                    self._entries[layer] = watched, entry

    def remove(self) -> None:
        """Stops calling it; a second time does nothing."""
        for watched, entry in self._entries.values():
            watched.leave(entry)
        for marks, mark in self._marks:
            marks.remove(mark)
        self._entries.clear()
        self._marks.clear()


class _Marks(list[Mark]):
    """What is remembered of a model: how those who watch it mark where they are."""


def mark(model: PreTrainedModel) -> Callable[[], None]:
    """Before a forward that may not count: what returns has all who watch the model forget it."""
    takes_back = [note() for note in adapter.recall(model, _Marks) or ()]

    def forget() -> None:
        for take_back in takes_back:
            take_back()

    return forget


def moe_layers(module: nn.Module) -> list[MoELayer]:
    """The MoE layers of all transformers models inside ``module``, in the order in which they hold them."""
    found: list[MoELayer] = []
    for prefix, model in adapter.pretrained_models(module).items():
        for name, (experts, router, block) in adapter.moe_blocks(model).items():
            spread = is_parallel_experts(experts)
            number = expert_context(experts).dispatcher.num_experts if spread else _number_of(experts)
            full = f"{prefix}.{name}" if prefix else name
            found.append(MoELayer(len(found), full, experts, router, block, number))
    return found


def _number_of(experts: nn.Module) -> int:
    return next(param.shape[0] for param in experts.parameters() if param.ndim == 3)


def choose(module: nn.Module, choice: Choice | None) -> None:
    """Has ``choice`` say who is chosen in all MoE layers inside ``module``, in place of routers; None ends that.

    What watches routers sees these choices. Weights stay the routers'.
    """
    for model in adapter.pretrained_models(module).values():
        for layer in moe_layers(model):
            _watched(layer.experts, model).choice = None if choice is None else partial(choice, layer)


def _watched(experts: nn.Module, model: PreTrainedModel) -> _Watched:
    """Has calls of a layer's experts noted, once and for good: what nobody watches costs a call of an empty list."""
    if (found := adapter.recall(experts, _Watched)) is not None:
        return found
    note_tokens(model)
    watched = _Watched(model, [])
    adapter.remember(experts, watched)
    if is_parallel_experts(experts):
        expert_context(experts).route = watched.route
    else:
        # As transformers' experts are called, in all families: hidden states, ids, weights.
        experts.register_forward_pre_hook(lambda _, args: (args[0], watched.route(args[1]), *args[2:]))
    return watched


@dataclass(frozen=True)
class _KeepsLogits:
    """What is remembered of a router: it keeps its logits for the layer's watchers."""

    watched: _Watched


def _keep_logits(layer: MoELayer, watched: _Watched) -> None:
    router = layer.router
    if router is None or adapter.router_scoring(router) is None or adapter.recall(router, _KeepsLogits) is not None:
        return
    adapter.remember(router, _KeepsLogits(watched))

    def keep(_: nn.Module, args: Any, output: Any) -> None:
        # In compiled code this is one more output of the graph that ends at the experts. With a graph of their own,
        # logits that nobody derives from would cost its backward zeros: they have one only for a loss.
        if watched.kept is not None:
            watched.logits = output[0] if watched.kept == "graph" else output[0].detach()

    router.register_forward_hook(keep)
