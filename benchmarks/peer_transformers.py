"""Runs a cell with transformers: its FSDP2, its all-to-all expert parallelism, or PEFT's adapters on one GPU."""

from __future__ import annotations

import contextlib
from collections import defaultdict
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

from benchmarks.cells import PEFT, TRANSFORMERS_EP, Cell
from benchmarks.measure import Meter, run_loop
from benchmarks.workload import Popularity, fill_parameters

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def run(cell: Cell, meter: Meter) -> None:
    """Trains ``meter.num_steps`` steps."""
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

    run_loop(cell, meter, step)


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
