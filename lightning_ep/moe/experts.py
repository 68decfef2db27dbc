"""An experts module whose experts are spread over ranks: what it knows, and its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule

from lightning_ep import transformers_adapter as adapter
from lightning_ep.moe.dispatch import Dispatcher
from lightning_ep.moe.function import moe_forward
from lightning_ep.moe.master_weights import MasterWeights
from lightning_ep.ops.autograd import in_backward
from lightning_ep.ops.local_experts import LocalExperts


@dataclass
class ExpertContext:
    """What an expert-parallel experts module needs in forward; `remember`ed on it.

    Attributes:
        dispatcher: How rows travel to this layer's experts.
        experts: The local experts.
        params: The parameters that they compute with: the module that holds each, and its name there.
        num_weights: How many of these are the experts' own; the others are factors of adapters.
        shared: Parameters that all experts use alike, as that of a norm behind each: every rank computes with all of
            it, and they are sharded as what is no expert.
        are_off: Whether a forward leaves the adapters out.
        masters: How these parameters are cast for the GEMMs.
        leave: As in `moe_forward`; set by the activation checkpointing of a layer.
        route: Called with the ids of every call, ``[T, K]``, and returns those that it takes; set by whoever watches
            what routers choose.
        has_run: Whether there has been a forward.
    """

    dispatcher: Dispatcher[Any]
    experts: LocalExperts
    params: tuple[tuple[nn.Module, str], ...]
    num_weights: int
    shared: tuple[tuple[nn.Module, str], ...] = ()
    are_off: Callable[[], bool] | None = None
    masters: MasterWeights = field(default_factory=MasterWeights)
    leave: Callable[[Tensor], Callable[[], Tensor] | None] | None = None
    route: Callable[[Tensor], Tensor] | None = None
    has_run: bool = False


def spread_over_ranks(module: nn.Module, context: ExpertContext) -> None:
    """Has ``module`` run its experts as ``context`` says, whatever its config says or will say.

    Its own forward is replaced, and not the name that transformers' experts interface looks up in a config: a config is
    shared with other models, copied for layers, and changed by others (`generate` changes the name while it runs).
    """
    adapter.remember(module, context)
    module.forward = MethodType(_experts_forward, module)


def holder_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module inside of ``module`` that holds a parameter, and the parameter's name there."""
    inside, _, own = name.rpartition(".")
    return module.get_submodule(inside), own


def expert_context(module: nn.Module) -> ExpertContext:
    """The context of a module that `is_parallel_experts`."""
    context = adapter.recall(module, ExpertContext)
    assert context is not None, f"the experts of {type(module).__name__} are not spread over ranks"
    return context


def spread_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those of a module that `is_parallel_experts` of which a rank has a part: all but what its experts share."""
    return [holder.get_parameter(name) for holder, name in expert_context(module).params]


def is_parallel_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds experts that `ExpertParallel` has spread over ranks."""
    return adapter.recall(module, ExpertContext) is not None


# Opaque to torch.compile: its sizes are not known before it runs, and its kernels are already fused.
@torch.compiler.disable
def _experts_forward(module: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
    if kwargs:  # by the names that its own forward has
        args = inspect.signature(type(module).forward).bind(module, *args, **kwargs).args[1:]
    hidden_TH, ids_TK, weights_TK = args
    context = expert_context(module)
    if hidden_TH.ndim != 2 or ids_TK.ndim != 2 or weights_TK.shape != ids_TK.shape or ids_TK.is_floating_point():
        shapes = ", ".join(f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in args)
        raise ValueError(
            f"The experts of {context.dispatcher.layer} are called with {shapes}, and take hidden states "
            "[tokens, size], expert ids [tokens, top_k] (integers) and weights [tokens, top_k], in this order."
        )
    if in_backward():
        rank_zero_warn(
            "Activation checkpointing that the strategy knows nothing of runs the experts again in backward, so that "
            "routing and (with ep > 1) every exchange of tokens between ranks is repeated. Use "
            "ExpertParallelStrategy(activation_checkpointing='full'), or 'selective', in its place."
        )
        if isinstance(module, FSDPModule):
            # After their own backward (checkpointing without early stop) FSDP has gathered them again, and nobody would
            # let go of them: the next forward would run on weights from before the optimizer step.
            Variable._execution_engine.queue_callback(module.reshard)
    if context.route is not None:
        ids_TK = context.route(ids_TK)
    if ids_TK.is_cpu or not context.has_run:  # the host would wait for a GPU's, and does so once
        _check_ids(ids_TK, context.dispatcher)
        context.has_run = True
    weights, factors = context.params[: context.num_weights], context.params[context.num_weights :]
    if context.are_off is not None and context.are_off():
        factors = ()
    params = [getattr(holder, name) for holder, name in weights]
    params += [_gathered(holder, name) for holder, name in context.shared]
    params += [getattr(holder, name) for holder, name in factors]
    dispatcher, experts = context.dispatcher, context.experts
    return moe_forward(dispatcher, experts, hidden_TH, ids_TK, weights_TK, params, context.leave, context.masters)


def _check_ids(ids_TK: Tensor, dispatcher: Dispatcher[Any]) -> None:
    """Raises ValueError for ids of experts that there are not: they would be looked up in other rows' places."""
    if ids_TK.numel() == 0:
        return
    least, most = ids_TK.min().item(), ids_TK.max().item()
    if least < 0 or most >= dispatcher.num_experts:
        raise ValueError(
            f"The experts of {dispatcher.layer} are called with ids from {least} to {most}, and there are experts 0 to "
            f"{dispatcher.num_experts - 1}. A token that takes fewer experts than others has any id with a weight of 0."
        )


def _gathered(holder: nn.Module, name: str) -> Tensor:
    """What experts share, whole: in a layer's group of FSDP it is there, in one of its own it is fetched."""
    if not isinstance(holder, FSDPModule):
        return getattr(holder, name)
    holder.unshard()
    whole = getattr(holder, name).clone()  # of a few numbers; FSDP reduces the gradient when backward ends
    holder.reshard()
    return whole
