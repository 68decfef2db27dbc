"""How a family's routers score experts, and the biases on what they choose."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ep.transformers_adapter.structure import inside_wrapper, model_class, routers

Scoring = Literal["softmax", "sigmoid", "probabilities"]
"""How router logits become the scores of experts; ``"probabilities"``: a family's routers return these."""

_BIASES = ("e_score_correction_bias", "expert_bias")
"""Names that families give to biases which decide who is chosen, and not with which weight."""

SOFTMAX_TOP_K: dict[str, bool | None] = {
    **dict.fromkeys(("FlexOlmoTopKRouter", "MellumTopKRouter", "OlmoeTopKRouter", "Qwen2MoeTopKRouter")),
    **dict.fromkeys(("Qwen3MoeTopKRouter", "Qwen3NextTopKRouter", "Qwen4ExpTextTopKRouter")),
    **dict.fromkeys(("Qwen3OmniMoeThinkerTextTopKRouter", "Qwen3OmniMoeTalkerTextTopKRouter")),
    **dict.fromkeys(("Qwen3_5MoeTopKRouter", "Qwen3OmniMoeTextTopKRouter", "Qwen3VLMoeTextTopKRouter"), True),
    **dict.fromkeys(("MixtralTopKRouter", "MiniMaxTopKRouter"), True),
    "JambaTopKRouter": False,
}
"""Routers that take the K largest of a softmax, and whether they divide by the sum of these (None: as they say)."""


def router_scoring(router: nn.Module) -> Scoring | None:
    """How the first of a router's outputs becomes scores, read in the source of its forward; None where that is else.

    A few families' routers return probabilities, or score by a function that their config names.
    """
    source = inspect.getsource(type(inside_wrapper(router)).forward)
    if "return router_prob" in source:
        return "probabilities"
    kinds = [kind for kind in ("softmax", "sigmoid") if f"{kind}(" in source]
    return kinds[0] if len(kinds) == 1 and "shared_logits" not in source else None  # type: ignore[return-value]


def own_balancing_loss(model: PreTrainedModel) -> float | None:
    """The coefficient of the balancing loss that a model's config asks for, None if it asks for none."""
    config = model.config.get_text_config()
    asks = bool(getattr(config, "output_router_logits", False) or getattr(model.config, "output_router_logits", False))
    takes = "output_router_logits" in inspect.signature(model_class(model).forward).parameters
    return getattr(config, "router_aux_loss_coef", None) if asks and takes else None


def leave_out_balancing_loss(model: PreTrainedModel) -> None:
    """Has a model return no router logits and no loss of them unless a call asks, whatever its config says."""
    model.register_forward_pre_hook(_without_router_logits, prepend=True, with_kwargs=True)


def _without_router_logits(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    return None if kwargs.get("output_router_logits") is not None else (args, {**kwargs, "output_router_logits": False})


def correction_bias(router: nn.Module | None, block: nn.Module) -> Tensor | None:
    """The biases on what a router chooses, ``[E]`` or ``[1, E]``: in the router, or in the block that calls it."""
    for module in (*(() if router is None else router.modules()), block):
        for name in _BIASES:
            if isinstance(found := getattr(module, name, None), Tensor):
                return found
    return None


def why_no_selection_bias(router: nn.Module | None) -> str | None:
    """Why a router without biases cannot be given some, or None if it can."""
    if router is None:
        return "no router module stands beside it"
    if type(router).__name__ not in SOFTMAX_TOP_K:
        return f"its router ({type(router).__name__}) is no plain softmax router and has no biases of its own"
    return None


def add_selection_bias(router: nn.Module, num_experts: int) -> None:
    """Adds biases of zero on the logits by which a router chooses: a buffer, which is saved with the model."""
    router.register_buffer(_BIASES[0], torch.zeros(num_experts, device="cpu"))
    router.forward = MethodType(_choose_with_biases, router)


def selection_biases(model: PreTrainedModel, names: Collection[str]) -> dict[str, nn.Module]:
    """Routers of a model for which there are biases among ``names`` that its family has no place for, by their name."""
    known = routers([model])
    found = {f"{name}.{_BIASES[0]}": router for name, router in model.named_modules() if router in known}
    own = set(model.state_dict())
    return {name: router for name, router in found.items() if name in names and name not in own}


def _choose_with_biases(router: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits_TE, weights_TK, _ = type(router).forward(router, hidden)
    scores_TE = torch.softmax(logits_TE, -1, dtype=torch.float32)
    # Of logits the biases have one scale, whatever the number of experts.
    ids_TK = (logits_TE.float() + router.e_score_correction_bias).topk(weights_TK.shape[1], -1).indices
    chosen_TK = scores_TE.gather(-1, ids_TK)
    normalises = SOFTMAX_TOP_K[type(router).__name__]
    if router.norm_topk_prob if normalises is None else normalises:
        chosen_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True)
    return logits_TE, chosen_TK.to(weights_TK.dtype), ids_TK
