"""Recompute and compilation around the decoder layers of a model, and whether it can have them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_ep import transformers_adapter as adapter
from lightning_ep.layers.compilation import compile_forward
from lightning_ep.layers.recompute import ActivationCheckpointing, check_mode, checkpoint_layer
from lightning_ep.moe.experts import is_parallel_experts

_NOT_TRANSFORMERS_OWN = (
    "The activation checkpointing of transformers would route twice, and repeat exchanges between ranks. Leave it off "
    "(`model.gradient_checkpointing_disable()`) and give activation_checkpointing='full' (least memory) or 'selective' "
    "to ExpertParallelStrategy or parallelize instead."
)


def check_recompute(module: nn.Module, plan: Iterable[str], mode: ActivationCheckpointing) -> None:
    """Raises ValueError if the mode does not exist or does not fit the model.

    Args:
        module: A module that contains models.
        plan: Names of the experts in it.
        mode: As in `parallelize`.
    """
    check_mode(mode)
    models = adapter.called_models(module).values()
    if any(model.is_activation_checkpointing for model in models):
        raise ValueError(f"gradient_checkpointing_enable() was called on the model. {_NOT_TRANSFORMERS_OWN}")
    if mode == "none":
        return
    planned = [*models, *adapter.planned_models(module).values()]
    layers = [layer for model in planned for layer in adapter.decoder_layers(model)]
    routers = adapter.routers(planned)
    routed = {child for layer in layers if routers & set(layer.modules()) for child in layer.modules()}
    inside = {child for layer in layers for child in layer.modules()}
    for name in plan:
        if module.get_submodule(name) not in inside:
            raise ValueError(
                f"activation_checkpointing={mode!r} cannot serve {name}: it is in no layer, which is what is "
                "recomputed: a module with a forward, in an `nn.ModuleList` of a module that is called. Put it into "
                "one, or use activation_checkpointing='none'."
            )
        if module.get_submodule(name) not in routed:
            raise ValueError(
                f"activation_checkpointing={mode!r} cannot serve {name}: its family declares no router module "
                "(`_can_record_outputs`) in the decoder layer around it, and beside it stands none. "
                "Use activation_checkpointing='none'."
            )


def wrap_layers(model: nn.Module, mode: ActivationCheckpointing, compile: bool) -> None:
    """Compiles and checkpoints decoder layers, one by one: one compilation serves all, FSDP's hooks stay outside.

    What normalises their output is compiled, too: as transformers writes it, it is a dozen passes over all tokens.

    Args:
        model: A model whose experts are spread over ranks.
        mode: As in `parallelize`.
        compile: As in `parallelize`.
    """
    adapter.refuse_own_checkpointing(model, _NOT_TRANSFORMERS_OWN)
    routers = adapter.routers([model]) if mode != "none" else set()
    for layer in adapter.decoder_layers(model):
        if mode != "none":
            experts = [child for child in layer.modules() if is_parallel_experts(child)]
            checkpoint_layer(layer, [child for child in layer.modules() if child in routers], experts, mode, compile)
        elif compile:
            # Its forward only: `layer.compile()` would compile around FSDP's hooks, in more pieces.
            layer.forward = compile_forward(layer)
    for norm in adapter.norms_beside_layers(model) if compile else ():
        norm.forward = compile_forward(norm)
