"""The order of things: TP, experts over EP, everything under FSDP2, then the weights that were left on meta."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from transformers import PreTrainedModel

from lightning_ep import context_parallel
from lightning_ep import transformers_adapter as adapter
from lightning_ep.adapters.factors import hold_per_expert, note_adapted_experts
from lightning_ep.distributed import dtensor_rules as dtensor_rules  # registers them
from lightning_ep.fsdp.early_optimizers import warn_of_early_optimizers
from lightning_ep.fsdp.groups import in_bf16, shard_beside, shard_dense, shard_experts, sum_gradients
from lightning_ep.hub.initialize import materialize
from lightning_ep.hub.load import stream_pretrained
from lightning_ep.hub.save_pretrained import save_over_ranks
from lightning_ep.hub.source import follow_sources
from lightning_ep.layers.recompute import ActivationCheckpointing
from lightning_ep.layers.wrap import check_recompute, wrap_layers
from lightning_ep.layout import Meshes, ParallelLayout
from lightning_ep.moe.adapted import experts_in
from lightning_ep.moe.experts import is_parallel_experts
from lightning_ep.moe.own_plan import OwnPlan, resolve_plan
from lightning_ep.ops.packed_attention import has_kernel
from lightning_ep.routing.steer import freeze_routers, steer_routers, steerings
from lightning_ep.tensor_parallel import apply_tensor_plan, tensor_plan


def parallelize(
    model: nn.Module,
    layout: ParallelLayout,
    device: torch.device,
    *,
    plan: OwnPlan | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    seed: int = 0,
    compile: bool = False,
    activation_checkpointing: ActivationCheckpointing = "none",
) -> Meshes:
    """Shards a model in place, without a Trainer: for your own loop or Lightning Fabric.

    Make the optimizer afterwards: its parameters are the shards. Gradients are *sums* over all ranks: divide the loss
    by ``layout.loss_world_size`` for the mean, and clip with `lightning_ep.clip_grad_norm_`. With ``layout.cp`` larger
    than 1 the ranks that share a batch pass it to the model through `lightning_ep.shard_sequence`, with the ``cp`` mesh
    of what this returns.

    Args:
        model: A transformers MoE, or a module that contains some; with ``plan`` any other. Weights that are on meta are
            streamed from the checkpoint that `from_pretrained` was given, or initialised from ``seed``; weights in
            memory are those of rank 0, everywhere.
        layout: The layout of the initialised process group.
        device: This rank's device.
        plan: Expert plan as `expert_plan` returns it (the default), or ``"experts"`` by the names of modules whose
            parameters have the experts in front, or by patterns such as ``"model.layers.*.moe.experts"``.
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
    styles = resolve_plan(model, plan)
    policy = mp_policy or MixedPrecisionPolicy()
    shard(model, layout, meshes, device, styles, policy, compile, activation_checkpointing)
    stream_pretrained(model, device)
    materialize(model, device, seed)
    return meshes


def is_parallelized(module: nn.Module) -> bool:
    """Whether any parameter is sharded already, by us or by the user."""
    return any(isinstance(param, DTensor) for param in module.parameters())


def check_sharded(module: nn.Module, layout: ParallelLayout) -> None:
    """Raises ValueError if a model of the module was sharded for another layout, which cannot be changed any more."""
    for name, model in (adapter.called_models(module) | adapter.planned_models(module)).items():
        found = adapter.recall(model, ParallelLayout)
        if found is not None and found != layout:
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

    The order is that of `Steps`: each changes what those behind it see.

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
        RuntimeError: If a step finds the module in a state that the ones before it do not leave.
    """
    warn_of_early_optimizers(module)
    follow_sources(module)
    tensor_plans = check(module, layout, plan)
    check_recompute(module, plan, activation_checkpointing)
    rules = getattr(module, "router_rules", None)
    if rules is not None:
        steer_routers(module, rules)
    if getattr(module, "freeze_router", False):
        freeze_routers(module)
    steps = Steps(module, meshes, device, plan, mp_policy)
    steps.freeze_empty()
    steps.hold_factors_per_expert()
    steps.cast_constants()
    steps.broadcast_weights()
    for model, styles in tensor_plans.items():
        steps.split_matrices(model, styles)
    for experts in steps.experts:
        steps.spread_experts(experts)
    for model in steps.models:
        steps.wrap_layers(model, activation_checkpointing, compile)
        steps.shard_dense(model)
        if layout.cp > 1:
            context_parallel.use_context_parallel_attention(model)
        elif in_bf16(model, mp_policy) and has_kernel(device, torch.bfloat16):
            adapter.use_bounds_of_documents(model)
        adapter.keep_documents_apart(model, torch.bfloat16 if in_bf16(model, mp_policy) else None)
        adapter.remember(model, layout)
    for plain in steps.plain:
        steps.wrap_layers(plain, activation_checkpointing, compile)
        adapter.remember(plain, layout)
    steps.shard_beside()
    steps.sum_gradients()
    for steering in steerings(module):
        steering.begin()
    save_over_ranks(module)


class Steps:
    """The steps of `shard`; each says what it needs of the ones before and raises RuntimeError where it is not so.

    Args:
        module: As in `shard`, like the others.
        meshes: Its meshes.
        device: This rank's device.
        plan: Style by module name.
        mp_policy: FSDP2 mixed precision.
    """

    def __init__(
        self,
        module: nn.Module,
        meshes: Meshes,
        device: torch.device,
        plan: Mapping[str, ParallelStyle],
        mp_policy: MixedPrecisionPolicy,
    ) -> None:
        self.module = module
        self.models = list(adapter.called_models(module).values())
        self.plain = list(adapter.planned_models(module).values())
        self.experts = {module.get_submodule(name): style for name, style in plan.items()}
        self._meshes, self._device, self._mp_policy = meshes, device, mp_policy

    def freeze_empty(self) -> None:
        """Freezes parameters without numbers, as of no shared experts: FSDP cannot reduce a gradient of nothing."""
        _needs("freeze_empty", not is_parallelized(self.module), "whole parameters, of which no rank lacks a part")
        for param in self.module.parameters():
            if param.numel() == 0:
                param.requires_grad_(False)

    def hold_factors_per_expert(self) -> None:
        """Gives adapters of experts a dimension of experts, by which they are spread with them."""
        _needs("hold_factors_per_expert", not is_parallelized(self.module), "adapters as PEFT builds them")
        for experts in self.experts:
            hold_per_expert(self.module, experts)

    def cast_constants(self) -> None:
        """Gives models that compute in bf16 the buffers that they have where transformers loads them in bf16."""
        _needs("cast_constants", not is_parallelized(self.module), "whole models, as their classes build them")
        for model in self.models:
            if in_bf16(model, self._mp_policy):
                adapter.cast_constants(model)

    def broadcast_weights(self) -> None:
        """Makes rank 0's weights everyone's, as DDP does: user code may have initialised them from unequal seeds."""
        _needs("broadcast_weights", not is_parallelized(self.module), "whole weights on every rank")
        if dist.get_world_size() == 1:
            return
        with torch.no_grad():
            for tensor in (*self.module.parameters(), *self.module.buffers()):
                if tensor.is_meta:
                    continue
                on_device = tensor.detach().to(self._device).contiguous()
                dist.broadcast(on_device, src=0)
                tensor.copy_(on_device)

    def split_matrices(self, model: PreTrainedModel, styles: Mapping[str, ParallelStyle]) -> None:
        """Splits attention, dense MLPs and the vocabulary over ``tp``; the rest of the dense part is replicated."""
        _needs("split_matrices", not _under_fsdp(model), "parameters that FSDP has not taken over")
        _needs("split_matrices", not any(map(is_parallel_experts, self.experts)), "experts that are whole")
        assert self._meshes.tp is not None
        apply_tensor_plan(model, styles, self._meshes.tp)

    def spread_experts(self, experts: nn.Module) -> None:
        """Whole experts over ``ep`` and, before another layer is on the device, their matrices over ``fsdp``."""
        _needs("spread_experts", not _under_fsdp(self.module, but=self.experts), "layers that FSDP has not taken over")
        style = self.experts[experts]
        parallelize_module(experts, self._meshes.expert["ep"], style)
        if not is_parallel_experts(experts):
            raise ValueError(
                f"{type(style).__name__} in the plan spreads no experts. Use lightning_ep.ExpertParallel, as "
                "`lightning_ep.expert_plan` does, or a style that applies it."
            )
        shard_experts(experts, self._meshes, self._mp_policy, self._device)

    def wrap_layers(self, model: nn.Module, mode: ActivationCheckpointing, compile: bool) -> None:
        """Recompute and compilation: around experts that are spread, inside of FSDP's hooks."""
        _needs("wrap_layers", all(map(is_parallel_experts, self.experts)), "experts that are spread, to pass over them")
        _needs("wrap_layers", not _under_fsdp(model, but=self.experts), "layers that FSDP has not taken over")
        wrap_layers(model, mode, compile)

    def shard_dense(self, model: PreTrainedModel) -> None:
        """Everything of a model but its experts under FSDP."""
        mine = [experts for experts in self.experts if experts in set(model.modules())]
        _needs("shard_dense", all(map(is_parallel_experts, mine)), "experts that are spread, to leave them out")
        split = self._meshes.tp is None or is_parallelized(model.get_input_embeddings())
        _needs("shard_dense", split, "matrices that are split over tp, which FSDP then cuts further")
        shard_dense(model, self._meshes, self._mp_policy, getattr(self.module, "calls_its_head", False))

    def shard_beside(self) -> None:
        """What belongs to no transformers model: a value head for example, or a model of plain PyTorch."""
        _needs("shard_beside", all(isinstance(m, FSDPModule) for m in self.models), "models that are under FSDP")
        for child in [*self.plain, *_outside(self.module, [*self.models, *self.plain])]:
            shard_beside(child, self._meshes, self._mp_policy, self.models)

    def sum_gradients(self) -> None:
        """Lets every group sum."""
        left = [n for n, p in self.module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
        _needs("sum_gradients", not left, f"all that is trained to be sharded, and {left[:3]} are not")
        if dist.get_world_size() > 1:  # alone there is nothing to sum; dividing by one would still read every gradient
            sum_gradients(self.module)


def _needs(step: str, fact: bool, what: str) -> None:
    if not fact:
        raise RuntimeError(f"{step} needs {what}: the steps of `lightning_ep.parallelize.shard` are out of order.")


def _under_fsdp(module: nn.Module, but: Iterable[nn.Module] = ()) -> bool:
    return any(isinstance(child, FSDPModule) and child not in but for child in module.modules())


def check(
    module: nn.Module, layout: ParallelLayout, plan: Mapping[str, ParallelStyle]
) -> dict[PreTrainedModel, dict[str, ParallelStyle]]:
    """Raises ValueError if the layout does not fit the model or the module has parameters that nothing shards.

    Returns:
        The tensor-parallel plan of each model; empty without tensor parallelism.
    """
    _refuse_hidden_models(module)
    note_adapted_experts(module, plan)
    for name, style in plan.items():
        experts = module.get_submodule(name)
        num_experts = adapter.number_of_experts(experts_in(experts))
        if num_experts is not None:
            layout.check_num_experts(num_experts, name)
        validate = getattr(style, "validate", None)
        if validate is not None:
            validate(experts, layout.ep)
    models = adapter.called_models(module).values()
    tensor_plans = {model: tensor_plan(model, layout) for model in models} if layout.tp > 1 else {}
    for model in models:
        if layout.cp > 1:
            context_parallel.check(model, layout)
    plain = adapter.planned_models(module)
    for name, other in plain.items() if layout.tp > 1 or layout.cp > 1 else ():
        raise ValueError(
            f"{name or 'the model'} ({type(other).__name__}) is no transformers model, whose attention and plans are "
            f"known, so tp={layout.tp} and cp={layout.cp} cannot split it. Use tp=1 and cp=1."
        )
    roots = [*models, *plain.values()]
    _refuse_shared_parameters(module, [*roots, *_outside(module, roots)], plan)
    return tensor_plans


def _refuse_hidden_models(module: nn.Module) -> None:
    """Raises ValueError if Python would not find a model where it was assigned: a class attribute comes first."""
    for path in adapter.pretrained_models(module):
        owner = module
        for name in path.split(".") if path else ():
            child, seen = dict(owner.named_children())[name], getattr(owner, name, None)
            if seen is not child:
                kind = type(owner).__name__
                raise ValueError(
                    f"self.{name} of {kind} is {seen!r} and not the model that was assigned to it: the class attribute "
                    f"{kind}.{name} hides modules of that name. Remove it from the class, and write "
                    f"`self.{name} = None` behind `super().__init__()` in `__init__` instead."
                )
            owner = child


def _outside(module: nn.Module, models: Iterable[nn.Module], name: str = "") -> Iterable[nn.Module]:
    """The largest submodules with parameters that contain no transformers model and belong to none."""
    models = list(models)
    if module in models:
        return
    belonging = {inner for model in models for inner in model.modules()}  # peft holds an embedding twice
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
        if holds_model or (child not in belonging and not adapter.can_be_called(child)):
            yield from _outside(child, models, where)
        elif child not in belonging and next(child.parameters(), None) is not None:
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
