"""FSDP2's groups: which parameters are gathered and reduced together, over which ranks, and that all of them sum."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.fsdp.embedding import TokenGradients, has_plain_lookup
from lightning_ep.fsdp.idle_parameters import IdleParameters
from lightning_ep.fsdp.optional_parts import OptionalParts, parts_in
from lightning_ep.fsdp.passes import watch_layers, watch_root
from lightning_ep.fsdp.prefetch import chain_prefetches
from lightning_ep.fsdp.state import keep_fp32, states_in
from lightning_ep.layout import Meshes
from lightning_ep.moe.experts import expert_context, holder_of, is_parallel_experts, spread_parameters
from lightning_ep.moe.idle_experts import EntersAll, blocks_apart
from lightning_ep.moe.master_weights import ModelMasterWeights
from lightning_ep.moe.tower_experts import TowerExperts
from lightning_ep.process_groups import hosts

# Up to this many parameters are gathered and reduced together: 320 MB in bf16, a millisecond between GPUs of a node.
# FSDP's hooks take the host about 4 ms per group and step, more than the GPU needs for a layer of few tokens.
_GROUPED_PARAMETERS = 160_000_000


def group_layers(
    layers: Iterable[nn.Module], ignored: Collection[nn.Parameter], optional: Collection[nn.Module] = ()
) -> list[list[nn.Module]]:
    """Consecutive layers that are small enough together, the last ones first: what is left over begins.

    The first group's weights arrive before anything is computed, and its gradients are reduced behind all of it.

    Args:
        layers: The layers in the order of forward. One whose experts FSDP shards stays by itself: several of them would
            be gathered at once.
        ignored: Parameters that FSDP leaves alone.
        optional: Modules inside that are gathered apart from their layer.
    """
    groups: list[list[nn.Module]] = []
    room = 0
    for layer in reversed(list(layers)):
        alone = any(isinstance(child, FSDPModule) and child not in optional for child in layer.modules())
        size = sum(p.numel() for p in layer.parameters() if p not in ignored)
        if not groups or alone or size > room:
            groups, room = [[], *groups], _GROUPED_PARAMETERS
        groups[0].insert(0, layer)
        room = -1 if alone else room - size
    return groups


def shard_experts(experts: nn.Module, meshes: Meshes, mp_policy: MixedPrecisionPolicy, device: torch.device) -> None:
    """Shards the matrices of this rank's experts over the ``fsdp`` dimension, in a group of their own.

    Args:
        experts: A module that `is_parallel_experts`.
        meshes: The meshes of the layout.
        mp_policy: FSDP2 mixed precision.
        device: This rank's device.
    """
    mesh = meshes.expert_shards
    context = expert_context(experts)
    placements = _placements_over_fsdp(experts, meshes.expert["fsdp"].size())
    if mesh.size() > 1:
        # Its inputs come as the layer made them: many routers give weights in fp32, which FSDP would round.
        mp_policy = replace(mp_policy, cast_forward_inputs=False)
        shared = {holder.get_parameter(name) for holder, name in context.shared}
        shard = partial(fully_shard, mesh=mesh, mp_policy=mp_policy, ignored_params=shared)
        shard(experts, shard_placement_fn=placements.get)
        return
    # A group of one rank has nothing to gather or reduce, and FSDP's copies around that nothing cost more than the
    # experts' arithmetic at 4k tokens. The placements are those that FSDP would give; the MoE body casts.
    for holder, name in context.params:
        param = holder.get_parameter(name)
        assert isinstance(param, DTensor)
        local = param.to_local().detach()
        local = local if local.is_meta else local.to(device)
        shards = DTensor.from_local(local, meshes.expert, [placements[param], Shard(0)], run_check=False)
        holder.register_parameter(name, nn.Parameter(shards, requires_grad=param.requires_grad))


def _placements_over_fsdp(experts: nn.Module, num_shards: int) -> dict[nn.Parameter, Shard]:
    """Which dimension ``fsdp`` shards: one behind that of experts, so that checkpoints need no strided shards.

    FSDP refuses such a one where it is uneven.
    """
    context = expert_context(experts)
    params = [holder.get_parameter(name) for holder, name in context.params]
    even = all(param.shape[1] % num_shards == 0 for param in params[: context.num_weights])
    placements = {param: Shard(1 if even else 0) for param in params[: context.num_weights]}
    for param in params[context.num_weights :]:  # of adapters, whose ranks are small
        divided = [dim for dim in (1, 2) if param.shape[dim] % num_shards == 0]
        placements[param] = Shard(max(divided, key=param.shape.__getitem__, default=0))
    return placements


def unmanaged_experts(model: nn.Module) -> list[nn.Module]:
    """Experts that `shard_experts` left out of FSDP."""
    return [m for m in model.modules() if is_parallel_experts(m) and not isinstance(m, FSDPModule)]


def unmanaged_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters of those experts, but for what these share, which is a layer's."""
    return {param for experts in unmanaged_experts(model) for param in spread_parameters(experts)}


def _shared_holders(model: nn.Module) -> list[nn.Module]:
    """What holds parameters that experts share, inside of experts that FSDP shards: a layer's group ends there."""
    found = [expert_context(m).shared for m in model.modules() if is_parallel_experts(m) and isinstance(m, FSDPModule)]
    return list(dict.fromkeys(holder for shared in found for holder, _ in shared))


def own_master_weights(model: nn.Module, device: torch.device) -> ModelMasterWeights:
    """Puts the layers in charge of the gradients of experts that no FSDP reduces, once their weights are in memory."""
    layers = {experts: expert_context(experts).masters for experts in unmanaged_experts(model)}
    for experts, masters in layers.items():
        masters.own(spread_parameters(experts))
    return ModelMasterWeights(list(layers.values()), device)


def shard_dense(model: PreTrainedModel, meshes: Meshes, mp_policy: MixedPrecisionPolicy, head_alone: bool) -> None:
    """Shards all of a model but its experts: decoder layers in groups, the embedding, the head, and the rest as root.

    Args:
        model: A model whose experts are sharded, and whose layers are wrapped.
        meshes: The meshes of the layout.
        mp_policy: FSDP2 mixed precision.
        head_alone: The output head's weight is read in calls of the head only.
    """
    ignored = unmanaged_parameters(model)
    shard = partial(fully_shard, mesh=meshes.dense_shards, mp_policy=mp_policy, ignored_params=ignored)
    for holder in _shared_holders(model):
        shard(holder)
    kept = {holder_of(model, name) for name in adapter.fp32_parameters(model)} if in_bf16(model, mp_policy) else set()
    layers = adapter.decoder_layers(model)
    parts = adapter.optional_parts(model) if dist.get_world_size() > 1 else []
    beside = {child for part in parts for child in part.modules()}
    text = [layer for layer in layers if layer not in beside]
    blocks = {layer: blocks_apart(layer) for layer in text} if dist.get_world_size() > 1 else {}
    units = [[block] for found in blocks.values() for block in found]
    for unit in units:
        shard(unit)
    groups = group_layers(text, ignored, optional=[unit[0] for unit in units])
    for group in groups:
        shard(group)
        watch_layers(group, mp_policy)
    embedding, head = adapter.input_embedding(model), model.get_output_embeddings()
    in_layer = any(embedding in set(layer.modules()) for layer in text)  # BERT declares its embeddings to be a block
    # A parameter that two modules share must be in the group of the module that contains both.
    if embedding is not None and not in_layer and not adapter.shares_parameters(embedding, model):
        shard(embedding)
        if isinstance(embedding, nn.Embedding) and len(list(embedding.parameters())) == 1:
            assert isinstance(embedding, FSDPModule)
            embedding.set_unshard_in_backward(False)  # what looks rows up needs no weights there
            if has_plain_lookup(embedding) and meshes.tp is None:
                TokenGradients(embedding, meshes.dense_shards)
    # By itself the head's gradient is reduced under backward. With the root it is gathered in all of a forward, as
    # losses expect that read its weight.
    if head_alone and head is not None and not adapter.shares_parameters(head, model):
        shard(head)
    apart = [part for part in parts if not adapter.shares_parameters(part, model)]
    towers = [unit for part in apart for unit in _units(part, layers, ignored)]
    for unit in towers:
        shard(unit)
    units += towers
    # Said explicitly: by default a root stays gathered until a backward comes to it. After validation none comes, and
    # an optimizer built then would get plain copies of its parameters and train nothing; nor does it come in steps
    # that freeze the model, and the next forward would use weights from before the optimizer step.
    shard(model, reshard_after_forward=True)
    if kept:
        for state in states_in(model):
            keep_fp32(state, kept)
    watch_root(model, layers if embedding is None else [embedding, *layers])
    chain_prefetches(model, None if in_layer else embedding, groups, [unit[0] for unit in units])
    for child in model.modules():
        if isinstance(child, FSDPModule) and isinstance(child, PreTrainedModel):
            adapter.keep_recording(child)
    if units:
        assert embedding is not None  # a model without one has no optional parts
        idle = [EntersAll(layer, found) for layer, found in blocks.items() if found]
        OptionalParts(model, units, idle, embedding, mp_policy)
        if any(map(is_parallel_experts, beside)):
            TowerExperts(parts, text[0], hosts())
        adapter.encode_in_forward(model)
    if dist.get_world_size() > 1:
        agreed = [group for optional in parts_in(model) for group in optional.agreed]
        IdleParameters(model, agreed, adapter.uses_parameters_by_length(model))


def _units(part: nn.Module, layers: Collection[nn.Module], ignored: Collection[nn.Parameter]) -> list[list[nn.Module]]:
    """What of an optional part is gathered together: its layers in groups, and the rest."""
    inner = [layer for layer in part.modules() if layer in layers and layer is not part]
    inside = {child for layer in inner for child in layer.modules() if child is not layer}
    return [*group_layers([layer for layer in inner if layer not in inside], ignored), [part]]


def in_bf16(model: nn.Module, mp_policy: MixedPrecisionPolicy) -> bool:
    """Whether a model computes in bf16, all of it or most."""
    return torch.bfloat16 in (mp_policy.param_dtype, *(param.dtype for param in model.parameters()))


def shard_beside(
    module: nn.Module, meshes: Meshes, mp_policy: MixedPrecisionPolicy, models: Collection[PreTrainedModel] = ()
) -> None:
    """Shards a module that belongs to no transformers model: a value head, or a model of plain PyTorch.

    Beside one transformers model it is an optional part of that. Else it is a root of its own, which all ranks call
    equally often; layers of a model around its experts are groups.
    """
    ignored = unmanaged_parameters(module)
    shard = partial(fully_shard, mesh=meshes.all_shards, mp_policy=mp_policy, ignored_params=ignored)
    for holder in _shared_holders(module):
        shard(holder)
    layers = adapter.decoder_layers(module) if module in adapter.planned_models(module).values() else []
    groups = group_layers(layers, ignored)
    for group in groups:
        shard(group)
        watch_layers(group, mp_policy)
    shard(module, reshard_after_forward=True)
    if len(models) == 1 and not layers:
        (model,) = models
        parts = adapter.recall(model, OptionalParts)
        if parts is None:
            parts = OptionalParts(model, [], [], model.get_input_embeddings(), mp_policy)
        parts.adopt(module, mp_policy)
        return
    watch_root(module, layers)
    chain_prefetches(module, None, groups)
    if dist.get_world_size() > 1:
        IdleParameters(module, [], by_batch=True)


def sum_gradients(module: nn.Module) -> None:
    """The one gradient rule: every FSDP group sums, and the loss (or `CausalLM`'s step) scales once.

    A divide factor per group would divide twice in groups of one rank and need a pre-multiplied sum, which gloo
    refuses and NCCL zeroes in bf16.
    """
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.set_gradient_divide_factor(1.0)
            child.set_force_sum_reduction_for_comms(True)
