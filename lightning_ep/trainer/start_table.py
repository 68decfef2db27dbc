"""What a run says at its first step: layout, model and kernels, what the planner expects, and what may be better."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Iterator

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import AdamW
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.layout import ParallelLayout
from lightning_ep.moe.adapted import experts_in
from lightning_ep.moe.experts import expert_context, is_parallel_experts
from lightning_ep.ops.fused_experts import FusedExperts
from lightning_ep.planner import Device, find_device, model_of
from lightning_ep.planner.candidates import Estimate, Request, better, estimate
from lightning_ep.trainer.planned import gpu_of_process, planned_case

_PRECISION = {
    "bf16-mixed": "weights in fp32, arithmetic in bf16, gradients summed in fp32",
    "bf16-true": "weights and arithmetic in bf16, gradients summed in fp32",
    "32-true": "all of it in fp32",
}


def say_start(
    module: LightningModule, layout: ParallelLayout, mode: str, compile: bool, shape: tuple[int, int] | None
) -> None:
    """Prints the table on the first rank, where the run has a model summary; it asks no other rank, and never raises.

    Args:
        module: The module of the run, sharded.
        layout: Its layout.
        mode: ``activation_checkpointing``.
        compile: Whether layers are compiled.
        shape: Sequences and tokens of a batch; None if they are not known.
    """
    trainer = module.trainer
    if trainer.global_rank != 0 or not any(isinstance(one, ModelSummary) for one in trainer.callbacks):  # type: ignore[attr-defined]
        return
    rows: list[tuple[str, str]] = []
    how = (module, layout, mode, compile, shape)
    try:
        rows += _facts(*how)
        rows += _estimates(*how)
    except Exception as error:  # what only says something must not end a run
        rows.append(("estimates", f"none: {type(error).__name__}: {error}"))
    rank_zero_info("\n".join(["Training starts:", *(_wrapped(name, what) for name, what in rows)]))


def _wrapped(name: str, what: str) -> str:
    return textwrap.fill(f"  {name:<11} {what}", 118, subsequent_indent=" " * 14, break_on_hyphens=False)


def _facts(
    module: LightningModule, layout: ParallelLayout, mode: str, compile: bool, shape: tuple[int, int] | None
) -> Iterator[tuple[str, str]]:
    """What is so."""
    trainer, models = module.trainer, list(adapter.pretrained_models(module).values())
    sizes = ", ".join(f"{name}={getattr(layout, name)}" for name in ("ep", "fsdp", "replicate", "tp", "cp"))
    where = torch.cuda.get_device_name() if module.device.type == "cuda" else "CPU"
    yield "layout", f"{sizes} on {layout.world_size} x {where}"
    for model in models:
        yield "parameters", _parameters(model)
        for name, tower in adapter.towers(model).items():
            yield "tower", _tower(name, tower)
    if shape is not None:
        groups, times = layout.data_world_size, trainer.accumulate_grad_batches
        factors = f"{groups} data rank{'s' * (groups > 1)} x {times} micro-batch{'es' * (times > 1)}"
        tokens = math.prod(shape) * groups * times
        yield "batch", f"{shape[0]} x {shape[1]:,} tokens x {factors} = {tokens:,} tokens per step"
    yield "precision", f"{trainer.precision}: {_precision(module)}"
    again = "nothing is recomputed" if mode == "none" else f"{mode} recompute"
    yield "layers", f"{again}, {'compiled' if compile else 'not compiled'}"
    for model in models:
        yield "experts", _experts(model)
        yield "attention", _attention(model, layout)
    for optimizer in trainer.optimizers:
        yield "optimizer", f"{type(optimizer).__module__.partition('.')[0]}'s {type(optimizer).__name__}"


def _precision(module: LightningModule) -> str:
    said = _PRECISION[str(module.trainer.precision)]
    if any(p.dtype == torch.bfloat16 and not p.requires_grad for p in module.parameters()):
        said = said.replace("weights in fp32", "trained weights in fp32, frozen ones in bf16")
    return said


def _parameters(model: PreTrainedModel) -> str:
    params = list(model.parameters())
    total, trained = (sum(p.numel() for p in some) for some in (params, (p for p in params if p.requires_grad)))
    config = model.config.get_text_config(decoder=True)
    top_k, experts = getattr(config, "num_experts_per_tok", None), _num_experts(model)
    said = _rounded(total)
    if top_k and experts:
        each = sum(p.numel() for module in adapter.experts_modules(model).values() for p in module.parameters())
        active = total - each * (experts - top_k) // experts
        said += f", {_rounded(active)} active: {top_k} of {experts} experts"
    return f"{said}; {'all are trained' if trained == total else f'{_rounded(trained)} are trained'}"


def _tower(name: str, tower: nn.Module) -> str:
    """What is trained of a tower for images or sound, apart from what projects its output into the text."""
    projects = {inner: child for inner, child in tower.named_children() if adapter.projects(inner)}
    said = f"{name}: {_rounded(sum(p.numel() for p in tower.parameters()))}, "
    within = {p for child in projects.values() for p in child.parameters()}
    said += _trained([p for p in tower.parameters() if p not in within])
    for inner, child in projects.items():
        said += f"; its {inner} {_trained(list(child.parameters()))}"
    return said


def _trained(params: list[nn.Parameter]) -> str:
    trained = [param.requires_grad for param in params]
    return "is trained" if all(trained) else "is trained in part" if any(trained) else "is frozen"


def _rounded(count: int) -> str:
    """30,532,122,624 as 30.53 B."""
    for size, name in ((10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:,.2f} {name}"
    return f"{count:,}"


def _num_experts(model: PreTrainedModel) -> int:
    """Of a layer, on all ranks."""
    for module in adapter.experts_modules(model).values():
        if is_parallel_experts(module):
            return expert_context(module).dispatcher.num_experts
    return 0


def _experts(model: PreTrainedModel) -> str:
    """Which kernels run the experts, and why not the fused ones."""
    for module in adapter.experts_modules(model).values():
        if not is_parallel_experts(module):
            continue
        context = expert_context(module)
        held = f"{context.dispatcher.num_local_experts} of a layer on a rank"
        if isinstance(context.experts, FusedExperts):
            on = "Triton and grouped GEMMs" if next(module.parameters()).is_cuda else "in PyTorch, without a GPU"
            return f"fused kernels ({on}), {held}"
        reason = adapter.why_not_fused(experts_in(module)) or "experts_implementation asks for them"
        return f"transformers' kernels, {held}: {reason}"
    return "none"


def _attention(model: PreTrainedModel, layout: ParallelLayout) -> str:
    """Which attention there is, and why packed documents get a mask, where they do."""
    if layout.cp > 1:
        return f"whole sequences of a part of the heads on each of {layout.cp} ranks"
    if adapter.is_told_documents(model):
        return "packed documents cost no mask"
    reason = adapter.why_not_bounds(model) or "the kernel without one computes in bf16 on a GPU"
    return f"{adapter.attention_implementation(model)}; packed documents would cost a mask: {reason}"


def _estimates(
    module: LightningModule, layout: ParallelLayout, mode: str, compile: bool, shape: tuple[int, int] | None
) -> Iterator[tuple[str, str]]:
    """What the planner expects, and what it would change; or why it says nothing."""
    try:
        device = _known_gpu(module.device)
        case = planned_case(module, layout, mode, compile, shape)
        _check_optimizers(module.trainer)
    except ValueError as reason:
        yield "estimates", f"none: {str(reason).rstrip('.')}"
        return
    case = dataclasses.replace(case, skew=1.2 if case.ep > 1 else 1.0)  # as `lightning-ep plan` has it
    now = estimate(case, device)
    (model,) = adapter.pretrained_models(module).values()
    request = Request(
        model_of(model.config.to_dict()), device, case.ranks, case.node, case.sequence, case.tokens_per_step,
        case.precision, case.lora_rank, case.lora_experts, case.skew, case.stochastic_rounding,
    )  # fmt: skip
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in now.memory.items() if gib >= 0.05)
    fits = "" if now.gib <= request.planned_gib else ", MORE THAN FITS"
    yield "memory", f"estimated {now.gib:.1f} of {request.limit_gib:.0f} GiB{fits}: {parts}"
    if compile:
        yield "speed", f"estimated {now.rate:,.0f} tokens/s per GPU, {now.mfu:.0%} MFU"
        change = better(now, request)
        if change is not None:
            yield "advice", _change(now, change)


def _known_gpu(device: torch.device) -> Device:
    gpu = gpu_of_process() if device.type == "cuda" else None
    if gpu is None:
        raise ValueError("there is no GPU")
    if find_device(torch.cuda.get_device_name()) is None:
        raise ValueError(f"{torch.cuda.get_device_name()} is not known to the planner")
    return gpu


def _check_optimizers(trainer: Trainer) -> None:
    for optimizer in trainer.optimizers:
        if not isinstance(optimizer, AdamW):
            raise ValueError(f"they are of AdamW, and the optimizer is {type(optimizer).__name__}")


def _change(now: Estimate, then: Estimate) -> str:
    """What to change of a recipe, and what that is estimated to give."""
    names = {
        "ep": "strategy.init_args.ep",
        "fsdp": "strategy.init_args.fsdp",
        "cp": "strategy.init_args.cp",
        "recompute": "strategy.init_args.activation_checkpointing",
        "batch": "data.init_args.batch_size",
        "accumulate": "trainer.accumulate_grad_batches",
    }
    changes = ", ".join(
        f"{name}: {getattr(then.case, field)}"
        for field, name in names.items()
        if getattr(then.case, field) != getattr(now.case, field)
    )
    return (
        f"{changes} is estimated at {then.rate:,.0f} tokens/s per GPU, {then.rate / now.rate:.2f} times as many, and "
        f"{then.gib:.1f} GiB (`lightning-ep plan` compares layouts)"
    )
