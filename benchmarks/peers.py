"""Runs a cell with transformers (its FSDP2, its expert parallelism, PEFT's adapters on one GPU) or with torchtitan."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from benchmarks.cells import PEFT, TORCHTITAN, TRANSFORMERS_EP, Cell
from benchmarks.measure import Meter
from benchmarks.workload import Popularity, batches, fill_parameters, max_over_mean

Step = Callable[[Tensor], Tensor]
"""Takes token ids ``[B, S]`` on the device, runs all of a step, clipping included, and returns the mean loss."""

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def run(cell: Cell, meter: Meter) -> None:
    """Trains ``meter.num_steps`` steps."""
    step = (_torchtitan if cell.base == TORCHTITAN else _transformers)(cell, meter)
    for batch in batches(cell, meter.num_steps):
        loss = step(batch["input_ids"].to(meter.device, non_blocking=True))
        meter.step_ended(loss.clone)


# ---------------------------------------------------------------------- transformers


def _transformers(cell: Cell, meter: Meter) -> Step:
    model = _build(cell, meter.device)
    meter.read_popularity = Popularity(model).read
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=meter.device.type == "cuda" or None)
    # As transformers' Trainer with bf16=True: adapters are fp32 and computed with in bf16.
    amp = torch.autocast(meter.device.type, torch.bfloat16) if cell.base == PEFT else contextlib.nullcontext()

    def step(ids_BS: Tensor) -> Tensor:
        with amp:
            loss = model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
        loss.backward()
        _clip(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _build(cell: Cell, device: torch.device) -> Any:
    """A model with random weights in train mode.

    ``from_pretrained(distributed_config=...)`` is the public way to a distributed model, but it needs a checkpoint.
    The two functions that it calls before and after it has built the model on meta are called here in its place;
    only the loading is replaced, by `fill_parameters`.
    """
    if cell.base == PEFT and cell.ranks > 1:
        raise ValueError(f"{cell.trainer} runs on one GPU, and the cell has {cell.ranks}.")
    with torch.device("meta"):
        dtype = torch.bfloat16 if cell.base == PEFT or cell.bf16_weights else torch.float32
        model: Any = AutoModelForCausalLM.from_config(cell.config(), dtype=dtype)
        model.set_experts_implementation("grouped_mm" if device.type == "cuda" else "eager")  # its fast path on each
        if cell.lora is not None:
            _add_adapter(model, *cell.lora.split(","))
    with torch.device(device):  # its buffers are no weights: computed on the device, never cast
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    if cell.recompute == "full":
        model.activation_checkpointing_enable()
        if cell.base == PEFT:
            model.enable_input_require_grads()
    if cell.compile:
        for layer in model.model.layers:
            # Around the checkpoint of a layer a compiler on GPUs gave up (torch 2.11: not one Triton kernel in the
            # profile); inside of it its parts compile.
            for part in layer.children() if cell.recompute == "full" else [layer]:
                part.compile()
    if cell.base != PEFT:
        model = _distribute(model, cell, device)
    fill_parameters(model, device)
    return model.train()


def _add_adapter(model: Any, where: str, rank: str) -> None:
    from peft import LoraConfig

    experts = _EXPERTS if where == "all" else None
    alpha = 2 * int(rank)
    model.add_adapter(LoraConfig(r=int(rank), lora_alpha=alpha, target_modules=_ATTENTION, target_parameters=experts))


def _distribute(model: Any, cell: Cell, device: torch.device) -> Any:
    if cell.ranks > 1:
        settings = DistributedConfig(
            fsdp_size=cell.ranks, ep_size=cell.ranks if cell.base == TRANSFORMERS_EP else 1,
            ep_implementation="all_to_all", fsdp_mixed_precision=True,
        )  # fmt: skip
        settings, _, meshes = model.prepare_distribute_model(settings)
        return model.maybe_distribute_model(model, settings, meshes)
    if cell.base == TRANSFORMERS_EP:
        raise ValueError("transformers has no expert parallelism over one rank.")
    # transformers leaves a single rank unsharded; FSDP2 around each layer of it is what gives fp32 masters with bf16
    # compute there, as its own plan does on several ranks.
    dist.init_process_group(device_id=device if device.type == "cuda" else None)
    mesh = init_device_mesh(device.type, (1,), mesh_dim_names=("fsdp",))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def _clip(params: list[Tensor], max_norm: float) -> None:
    """Clips by norm over any number of meshes, as transformers' Trainer does for such models."""
    by_mesh = defaultdict(list)
    for param in params:
        if param.grad is not None:
            by_mesh[param.grad.device_mesh if isinstance(param.grad, DTensor) else None].append(param)
    norms: list[Any] = [get_total_norm([p.grad for p in group if p.grad is not None]) for group in by_mesh.values()]
    total = torch.linalg.vector_norm(torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]))
    for group in by_mesh.values():
        clip_grads_with_norm_(group, max_norm, total)


# ---------------------------------------------------------------------- torchtitan


def _torchtitan(cell: Cell, meter: Meter) -> Step:
    """Its Qwen3-MoE (torchtitan 0.2), sharded and compiled by its own functions, in the order of its Trainer."""
    if importlib.util.find_spec("tensorboard") is None:  # it imports the writer wherever that comes from
        module = types.ModuleType("torch.utils.tensorboard")
        module.SummaryWriter = None  # type: ignore[attr-defined]
        sys.modules.setdefault("torch.utils.tensorboard", module)
    from torchtitan.config import JobConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed import utils as dist_utils
    from torchtitan.models.qwen3 import get_train_spec

    if cell.sizes != "qwen3-30b-a3b":
        raise ValueError(f"torchtitan runs here with qwen3-30b-a3b only, not {cell.sizes}.")
    dist.init_process_group(device_id=meter.device)
    job, spec, ranks = JobConfig(), get_train_spec(), cell.ranks
    job.compile.enable = True  # the rest as it comes
    job.activation_checkpoint.mode = cell.recompute
    job.training.seq_len, job.training.dtype, job.optimizer.lr = cell.sequence, "float32", 1e-5
    dims = ParallelDims(dp_replicate=1, dp_shard=ranks, cp=1, tp=1, pp=1, ep=ranks, etp=1, world_size=ranks)
    dims.build_mesh()
    ours = spec.model_args["30B-A3B"]
    # Without the buffer of its bias-based balancing, which the other trainers do not have.
    moe = dataclasses.replace(ours.moe_args, load_balance_coeff=None)
    args = dataclasses.replace(ours, n_layers=cell.layers, moe_args=moe)
    args.update_from_config(job)
    with torch.device("meta"):
        model = spec.model_cls(args)
    layers = list(model.layers.values())
    spec.parallelize_fn(model, dims, job)
    model.to_empty(device=meter.device)
    with torch.no_grad():
        model.init_weights(buffer_device=meter.device)
    fill_parameters(model, meter.device)
    meter.read_popularity = lambda: max_over_mean(layer.moe.tokens_per_expert for layer in layers)
    optimizers = spec.build_optimizers_fn([model.train()], job.optimizer, dims)
    loss_fn = spec.build_loss_fn(job, parallel_dims=dims)
    amp = dist_utils.maybe_enable_amp(dims, job.training.mixed_precision_param, meter.device.type)
    # As its Trainer counts: the sum over local tokens divided by the tokens of all ranks, whose gradients FSDP sums.
    targets = cell.batch * (cell.sequence - 1) * ranks

    def step(ids_BS: Tensor) -> Tensor:
        optimizers.zero_grad()
        labels_BS = torch.nn.functional.pad(ids_BS[:, 1:], (0, 1), value=-100)  # its labels come shifted
        with amp:
            loss = loss_fn(model(ids_BS), labels_BS) / targets
        loss.backward()
        dist_utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True, ep_enabled=dims.ep_enabled)
        optimizers.step()
        return loss.detach() * ranks

    return step
