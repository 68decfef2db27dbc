"""The order of things: TP, experts over EP, everything under FSDP2, then the weights that were left on meta."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from transformers import PreTrainedModel

from lightning_ep import context_parallel
from lightning_ep import transformers_adapter as adapter
from lightning_ep.fsdp.groups import group_layers, serve_parts_of
from lightning_ep.fsdp.passes import recover_from_interruptions
from lightning_ep.fsdp.prefetch import chain_prefetches
from lightning_ep.hub.initialize import materialize
from lightning_ep.hub.load import stream_pretrained
from lightning_ep.layers.compilation import compile_forward
from lightning_ep.layers.recompute import ActivationCheckpointing, check_mode, checkpoint_layer
from lightning_ep.layout import Meshes, ParallelLayout
from lightning_ep.moe.expert_parallel import expert_plan
from lightning_ep.moe.master_weights import ModelMasterWeights
from lightning_ep.tensor_parallel import apply_tensor_plan, tensor_plan

_NOT_TRANSFORMERS_OWN = (
    "The activation checkpointing of transformers would route twice, and repeat exchanges between ranks. Leave it off "
    "(`model.gradient_checkpointing_disable()`) and give activation_checkpointing='full' (least memory) or 'selective' "
    "to ExpertParallelStrategy or parallelize instead."
)
_LAYOUT = "_lightning_ep_layout"  # attribute of a model that is sharded for it


def parallelize(
    model: nn.Module,
    layout: ParallelLayout,
    device: torch.device,
    *,
    plan: Mapping[str, ParallelStyle] | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    seed: int = 0,
    compile: bool = False,
    activation_checkpointing: ActivationCheckpointing = "none",
) -> Meshes:
    """Shards a model in place, without a Trainer: for your own loop or Lightning Fabric.

    Gradients are *sums* over all ranks: divide the loss by ``layout.loss_world_size`` for the mean, and clip with
    `lightning_ep.clip_grad_norm_`. With ``layout.cp`` larger than 1 the ranks that share a batch pass it to the model
    through `lightning_ep.shard_sequence`, with the ``cp`` mesh of what this returns.

    Args:
        model: A transformers MoE, or a module that contains some. Weights that are on meta are streamed from the
            checkpoint that `from_pretrained` was given, or initialised from ``seed``; weights in memory are those of
            rank 0, everywhere.
        layout: The layout of the initialised process group.
        device: This rank's device.
        plan: Expert plan as `expert_plan` returns it (the default).
        mp_policy: FSDP2 mixed precision.
        seed: Seed of the weights, the same on every rank.
        compile: Compile every decoder layer, except its experts.
        activation_checkpointing: ``"none"``, ``"selective"`` (decoder layers are recomputed in backward, without their
            routing and experts) or ``"full"`` (the experts' rows are sent and computed again, too).

    Returns:
        The device meshes.

    Raises:
        ValueError: If the layout does not fit the model; nothing has been changed then.
        CheckpointError: If the checkpoint of a model from `from_pretrained` does not fit it.
    """
    meshes = layout.build_meshes(device.type)
    plan = plan or expert_plan(model)
    policy = mp_policy or MixedPrecisionPolicy()
    shard(model, layout, meshes, device, plan, policy, compile, activation_checkpointing)
    stream_pretrained(model, device)
    materialize(model, device, seed)
    return meshes


def is_parallelized(module: nn.Module) -> bool:
    """Whether any parameter is sharded already, by us or by the user."""
    return any(isinstance(param, DTensor) for param in module.parameters())


def check_sharded(module: nn.Module, layout: ParallelLayout) -> None:
    """Raises ValueError if a model of the module was sharded for another layout, which cannot be changed any more."""
    for name, model in adapter.pretrained_models(module).items():
        found = getattr(model, _LAYOUT, layout)
        if found != layout:
            raise ValueError(
                f"{name or type(model).__name__} was sharded for {found} by an earlier run or `parallelize`, and this "
                f"one asks for {layout}. Pass the same sizes, or build the module anew (a checkpoint loads into any "
                "layout)."
            )


def shard(
    module: nn.Module,
    layout: ParallelLayout,
    meshes: Meshes,
    device: torch.device,
    plan: Mapping[str, ParallelStyle],
    mp_policy: MixedPrecisionPolicy,
    compile: bool = False,
    activation_checkpointing: ActivationCheckpointing = "none",
) -> None:
    """Applies the expert plan and FSDP2; weights on meta stay there.

    Args:
        module: The module, on meta or with the same weights' shapes on every rank.
        layout: The layout.
        meshes: Its meshes.
        device: This rank's device.
        plan: Style by module name.
        mp_policy: FSDP2 mixed precision.
        compile: Compile every decoder layer, except its experts.
        activation_checkpointing: As in `parallelize`.

    Raises:
        ValueError: If the layout does not fit the model; nothing has been changed then.
    """
    models = adapter.pretrained_models(module)
    tensor_plans = check(module, layout, plan)
    check_recompute(module, plan, activation_checkpointing)
    _broadcast_weights(module, device)
    for model, styles in tensor_plans.items():
        assert meshes.tp is not None
        apply_tensor_plan(model, styles, meshes.tp)
    for name, style in plan.items():
        experts = module.get_submodule(name)
        parallelize_module(experts, meshes.expert["ep"], style)
        # Directly after its own slicing: at most one layer's experts are unsharded on the device at a time.
        _shard_experts(experts, meshes, mp_policy, device)
    head_alone = getattr(module, "calls_its_head", False)
    for model in models.values():
        _wrap_layers(model, activation_checkpointing, compile)
        _fully_shard_dense(model, meshes, mp_policy, head_alone)
        adapter.use_expert_parallel_forward(model)
        if layout.cp > 1:
            context_parallel.use_context_parallel_attention(model)
        setattr(model, _LAYOUT, layout)
    for child in _outside(module, models.values()):
        fully_shard(child, mesh=meshes.all_shards, mp_policy=mp_policy, reshard_after_forward=True)
        recover_from_interruptions(child)
    if layout.world_size > 1:  # alone there is nothing to sum, and dividing by one would still read every gradient
        _sum_gradients(module)


def check(
    module: nn.Module, layout: ParallelLayout, plan: Mapping[str, ParallelStyle]
) -> dict[PreTrainedModel, dict[str, ParallelStyle]]:
    """Raises ValueError if the layout does not fit the model or the module has parameters that nothing shards.

    Returns:
        The tensor-parallel plan of each model; empty without tensor parallelism.
    """
    for name, style in plan.items():
        experts = module.get_submodule(name)
        num_experts = getattr(experts, "num_experts", None)
        if isinstance(num_experts, int):
            layout.check_num_experts(num_experts, name)
        validate = getattr(style, "validate", None)
        if validate is not None:
            validate(experts, layout.ep)
    models = adapter.pretrained_models(module).values()
    tensor_plans = {model: tensor_plan(model, layout) for model in models} if layout.tp > 1 else {}
    for model in models:
        if layout.cp > 1:
            context_parallel.check(model, layout)
    _refuse_shared_parameters(module, [*models, *_outside(module, models)], plan)
    return tensor_plans


def check_recompute(module: nn.Module, plan: Iterable[str], mode: ActivationCheckpointing) -> None:
    """Raises ValueError if the mode does not exist or does not fit the model."""
    check_mode(mode)
    models = adapter.pretrained_models(module).values()
    if any(model.is_activation_checkpointing for model in models):
        raise ValueError(f"gradient_checkpointing_enable() was called on the model. {_NOT_TRANSFORMERS_OWN}")
    if mode == "none":
        return
    layers = [layer for model in models for layer in adapter.decoder_layers(model)]
    routers = adapter.routers(models)
    routed = {child for layer in layers if routers & set(layer.modules()) for child in layer.modules()}
    for name in plan:
        if module.get_submodule(name) not in routed:
            raise ValueError(
                f"activation_checkpointing={mode!r} cannot serve {name}: its family declares no router module "
                "(`_can_record_outputs`) in the decoder layer around it. Use activation_checkpointing='none'."
            )


def _wrap_layers(model: PreTrainedModel, mode: ActivationCheckpointing, compile: bool) -> None:
    """Compiles and checkpoints decoder layers, one by one: one compilation serves all, FSDP's hooks stay outside."""
    adapter.refuse_own_checkpointing(model, _NOT_TRANSFORMERS_OWN)
    routers = adapter.routers([model]) if mode != "none" else set()
    for layer in adapter.decoder_layers(model):
        if mode != "none":
            experts = [child for child in layer.modules() if adapter.is_parallel_experts(child)]
            checkpoint_layer(layer, [child for child in layer.modules() if child in routers], experts, mode, compile)
        elif compile:
            # Its forward only: `layer.compile()` would compile around FSDP's hooks, in more pieces.
            layer.forward = compile_forward(layer)


def _shard_experts(experts: nn.Module, meshes: Meshes, mp_policy: MixedPrecisionPolicy, device: torch.device) -> None:
    mesh = meshes.expert_shards
    num_shards = meshes.expert["fsdp"].size()
    # Dim 1 keeps whole experts on every rank, so that checkpoints need no strided shards; FSDP refuses it if uneven.
    even = all(param.shape[1] % num_shards == 0 for param in experts.parameters())
    placement = Shard(1 if even else 0)
    if mesh.size() > 1:
        # Its inputs come as the layer made them: many routers give weights in fp32, which FSDP would round.
        mp_policy = replace(mp_policy, cast_forward_inputs=False)
        fully_shard(experts, mesh=mesh, mp_policy=mp_policy, shard_placement_fn=lambda _: placement)
        return
    # A group of one rank has nothing to gather or reduce, and FSDP's copies around that nothing cost more than the
    # experts' arithmetic at 4k tokens. The placements are those that FSDP would give; the MoE body casts.
    for name, param in list(experts.named_parameters()):
        assert isinstance(param, DTensor)
        local = param.to_local().detach()
        local = local if local.is_meta else local.to(device)
        shards = DTensor.from_local(local, meshes.expert, [placement, Shard(0)], run_check=False)
        experts.register_parameter(name, nn.Parameter(shards, requires_grad=param.requires_grad))


def _unmanaged_experts(model: nn.Module) -> list[nn.Module]:
    """Experts that `_shard_experts` left out of FSDP."""
    return [m for m in model.modules() if adapter.is_parallel_experts(m) and not isinstance(m, FSDPModule)]


def own_master_weights(model: nn.Module, device: torch.device) -> ModelMasterWeights:
    """Puts the layers in charge of the gradients of experts that no FSDP reduces, once their weights are in memory."""
    layers = {experts: adapter.master_weights_of(experts) for experts in _unmanaged_experts(model)}
    for experts, masters in layers.items():
        masters.own(experts.parameters())
    return ModelMasterWeights(list(layers.values()), device)


def _fully_shard_dense(model: nn.Module, meshes: Meshes, mp_policy: MixedPrecisionPolicy, head_alone: bool) -> None:
    mesh = meshes.dense_shards
    ignored = {param for experts in _unmanaged_experts(model) for param in experts.parameters()}
    shard_dense = partial(fully_shard, mesh=mesh, mp_policy=mp_policy, ignored_params=ignored)
    layers = adapter.decoder_layers(model)  # type: ignore[arg-type]
    groups = group_layers(layers, ignored)
    for group in groups:
        shard_dense(group)
        serve_parts_of(group, mp_policy)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    # A parameter that two modules share must be in the group of the module that contains both.
    if not adapter.tied(model):  # type: ignore[arg-type]
        shard_dense(embedding)
        # By itself the head's gradient is reduced under backward. With the root it is gathered in all of a forward, as
        # losses expect that read its weight.
        if head_alone and head is not None:
            shard_dense(head)
    # Said explicitly: by default a root stays gathered until a backward comes to it. After validation none comes, and
    # an optimizer built then would get plain copies of its parameters and train nothing; nor does it come in steps
    # that freeze the model, and the next forward would use weights from before the optimizer step.
    shard_dense(model, reshard_after_forward=True)
    recover_from_interruptions(model)
    _initialize_with_any_part(model, [embedding, *layers])
    chain_prefetches(model, embedding, groups)


def _initialize_with_any_part(root: nn.Module, parts: Iterable[nn.Module]) -> None:
    """Has FSDP know its root when a part is called first: it would take the part for one, and not find the others."""
    state: Any = root._get_fsdp_state()  # type: ignore[operator]

    def initialize(*_: Any) -> None:
        if state._is_root is None:
            state._lazy_init()
        for handle in handles:
            handle.remove()

    handles = [part.register_forward_pre_hook(initialize, prepend=True) for part in parts]


def _outside(module: nn.Module, models: Iterable[nn.Module], name: str = "") -> Iterable[nn.Module]:
    """The largest submodules with parameters that contain no transformers model and belong to none."""
    models = list(models)
    if module in models:
        return
    for param_name, param in module.named_parameters(recurse=False):
        if param.requires_grad:
            where = f"{name}.{param_name}" if name else param_name
            raise ValueError(
                f"the parameter {where} of {type(module).__name__} belongs to no submodule that can be sharded: left "
                "alone it would diverge across ranks silently. Put it into a submodule of its own that is called in "
                "forward (an `nn.Linear`, an `nn.Embedding`, or an `nn.Module` of yours)."
            )
    for child_name, child in module.named_children():
        where = f"{name}.{child_name}" if name else child_name
        holds_model = any(inner in models for inner in child.modules())
        container = isinstance(child, nn.ModuleList | nn.ModuleDict)
        if holds_model or container:
            yield from _outside(child, models, where)
        elif next(child.parameters(), None) is not None:
            yield child


def _refuse_shared_parameters(module: nn.Module, roots: Iterable[nn.Module], plan: Iterable[str]) -> None:
    """Raises ValueError if parameters that are sharded apart are one: each module would go on with its own."""
    names = {child: name for name, child in module.named_modules()}
    # Experts last: they are apart from the model around them.
    apart = [*roots, *(module.get_submodule(name) for name in plan)]
    part_of = {child: part for part in apart for child in part.modules()}
    found: dict[nn.Parameter, tuple[nn.Module, str]] = {}
    for child, part in part_of.items():
        for name, param in child.named_parameters(recurse=False):
            where = f"{names[child]}.{name}" if names[child] else name
            owner, first = found.setdefault(param, (part, where))
            if owner is not part:
                raise ValueError(
                    f"{first} and {where} are one parameter, of modules that are sharded each by itself, and would "
                    "become two that differ. Hold it in one of them and call that one, or put modules beside the model "
                    "that share it into one nn.Module. (Within a transformers model only experts are apart.)"
                )


def _broadcast_weights(module: nn.Module, device: torch.device) -> None:
    """Makes rank 0's weights everyone's, as DDP does: user code may have initialised them from unequal seeds."""
    if dist.get_world_size() == 1:
        return
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_meta or isinstance(tensor, DTensor):
                continue
            on_device = tensor.detach().to(device).contiguous()
            dist.broadcast(on_device, src=0)
            tensor.copy_(on_device)


def _sum_gradients(module: nn.Module) -> None:
    """The one gradient rule: every FSDP group sums, and the loss (or `CausalLM`'s step) scales once.

    A divide factor per group would divide twice in groups of one rank and need a pre-multiplied sum, which gloo
    refuses and NCCL zeroes in bf16.
    """
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.set_gradient_divide_factor(1.0)
            child.set_force_sum_reduction_for_comms(True)
