"""What routers choose while a model runs: the one place that looks at them.

A MoE layer is seen where its experts are called, with the ids of the experts that each token goes to, in all families
alike and outside of compiled code; under recompute that call runs once. Where somebody asks for router logits, the
router of the layer keeps its own until then. What is watched costs the device a kernel or two per layer and call, and
the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
        router: What gives the logits.
        num_experts: Experts over all ranks.
    """

    index: int
    name: str
    experts: nn.Module
    router: nn.Module | None
    num_experts: int


@dataclass(frozen=True, eq=False)
class Routing:
    """What one call of a MoE layer chose for this rank's tokens; under ``tp`` and ``cp`` ranks hold different ones.

    Attributes:
        layer: The layer.
        ids_TK: int64 ``[T, K]``, the experts of each token.
        logits_TE: ``[T, E]`` in the router's dtype, with their graph; None where nobody asked for them.
        tokens: What is known of the tokens; the same object in all layers of a pass through the model.
        training: Whether there will be a backward: gradients are enabled, and the layer is in train mode.
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
        ones = self.tokens.ones(*self.ids_TK.shape, self.ids_TK.device)
        counts_E.scatter_add_(0, self.ids_TK.flatten(), ones)


Watcher = Callable[[Routing], None]


@dataclass(eq=False)
class _Watched:
    """What is remembered of experts that somebody watches."""

    layer: MoELayer
    model: PreTrainedModel
    watchers: list[tuple[Watcher, bool]]
    logits: Tensor | None = None

    @torch.compiler.disable
    def seen(self, ids_TK: Tensor) -> None:
        logits, self.logits = self.logits, None
        if in_backward():
            return  # recompute that is not ours runs experts again
        training = torch.is_grad_enabled() and self.layer.experts.training
        logits_TE = None if logits is None else logits.flatten(0, -2)
        routing = Routing(self.layer, ids_TK, logits_TE, tokens_of(self.model), training)
        for watcher, _ in list(self.watchers):
            watcher(routing)


class Observation:
    """Calls a function with the `Routing` of every call of every MoE layer, until it is removed.

    Attributes:
        layers: The layers that it watches.

    Args:
        module: A transformers MoE, or a module that contains some. A model that is to be sharded is watched after
            that, and best before it is compiled, at its first call.
        watcher: The function. It runs in forward of training, evaluation and generation (`Routing.training`), and must
            not wait for the device.
        logits: Whether it needs the router logits. A compiled layer then runs its router uncompiled.
    """

    def __init__(self, module: nn.Module, watcher: Watcher, logits: bool = False) -> None:
        self.layers = moe_layers(module)
        self._entry = watcher, logits
        for model in adapter.pretrained_models(module).values():
            inside = set(model.modules())
            for layer in self.layers:
                if layer.experts in inside:
                    watched = adapter.recall(layer.experts, _Watched) or _watch(layer, model)
                    watched.watchers.append(self._entry)
                    if logits:
                        _keep_logits(layer, watched)

    def remove(self) -> None:
        """Stops calling it; a second time does nothing."""
        for layer in self.layers:
            watched = adapter.recall(layer.experts, _Watched)
            if watched is not None and self._entry in watched.watchers:
                watched.watchers.remove(self._entry)


def moe_layers(module: nn.Module) -> list[MoELayer]:
    """The MoE layers of all transformers models inside ``module``, in the order in which they hold them."""
    found = []
    for prefix, model in adapter.pretrained_models(module).items():
        for name, (experts, router) in adapter.experts_and_routers(model).items():
            spread = is_parallel_experts(experts)
            number = expert_context(experts).dispatcher.num_experts if spread else _number_of(experts)
            full = f"{prefix}.{name}" if prefix else name
            found.append(MoELayer(len(found), full, experts, router, number))
    return found


def _number_of(experts: nn.Module) -> int:
    return next(param.shape[0] for param in experts.parameters() if param.ndim == 3)


def _watch(layer: MoELayer, model: PreTrainedModel) -> _Watched:
    """Has calls of a layer's experts noted, once and for good: what nobody watches costs a call of an empty list."""
    note_tokens(model)
    watched = _Watched(layer, model, [])
    adapter.remember(layer.experts, watched)
    if is_parallel_experts(layer.experts):
        expert_context(layer.experts).seen = watched.seen
    else:
        # As transformers' experts are called, in all families: hidden states, ids, weights.
        layer.experts.register_forward_pre_hook(lambda _, args: watched.seen(args[1]))
    return watched


@dataclass(frozen=True)
class _KeepsLogits:
    """What is remembered of a router: it keeps its logits for the layer's watchers."""

    watched: _Watched


def _keep_logits(layer: MoELayer, watched: _Watched) -> None:
    router = layer.router
    if router is None:
        raise ValueError(f"{layer.name} has no router module beside it, so that its logits cannot be seen.")
    if adapter.recall(router, _KeepsLogits) is not None:
        return
    adapter.remember(router, _KeepsLogits(watched))
    forward = router.forward

    def keeping(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if any(logits for _, logits in watched.watchers):
            watched.logits = output[0]
        return output

    # Not a hook: torch.compile cannot be kept out of one without giving up the code around the call.
    router.forward = torch.compiler.disable(keeping)
