"""Runs a cell with torchtitan's Qwen3-MoE, sharded and compiled by its own functions, in the order of its Trainer."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.cells import Cell
from benchmarks.measure import Meter, run_loop
from benchmarks.workload import fill_parameters, max_over_mean


def _do_without_tensorboard() -> None:
    """torchtitan imports TensorBoard's writer wherever it comes from; nothing here writes with it."""
    if importlib.util.find_spec("tensorboard") is None:
        module = types.ModuleType("torch.utils.tensorboard")
        module.SummaryWriter = None  # type: ignore[attr-defined]
        sys.modules.setdefault("torch.utils.tensorboard", module)


def run(cell: Cell, meter: Meter) -> None:
    """Trains ``meter.num_steps`` steps (torchtitan 0.2)."""
    _do_without_tensorboard()
    from torchtitan.distributed import utils as dist_utils
    from torchtitan.models.qwen3 import get_train_spec

    dist.init_process_group(device_id=meter.device)
    spec = get_train_spec()
    job, dims = _job(cell), _dims(cell)
    model = _build(cell, meter, spec, job, dims)
    optimizers = spec.build_optimizers_fn([model], job.optimizer, dims)
    loss_fn = spec.build_loss_fn(job, parallel_dims=dims)
    amp = dist_utils.maybe_enable_amp(dims, job.training.mixed_precision_param, meter.device.type)
    # As its Trainer counts: the sum over local tokens divided by the tokens of all ranks, whose gradients FSDP sums.
    targets = cell.batch * (cell.sequence - 1) * cell.ranks

    def step(ids_BS: Tensor) -> Tensor:
        optimizers.zero_grad()
        labels_BS = torch.nn.functional.pad(ids_BS[:, 1:], (0, 1), value=-100)  # its labels come shifted
        with amp:
            loss = loss_fn(model(ids_BS), labels_BS) / targets
        loss.backward()
        dist_utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True, ep_enabled=dims.ep_enabled)
        optimizers.step()
        return loss.detach() * cell.ranks

    run_loop(cell, meter, step)


def _job(cell: Cell) -> Any:
    """Its configuration: everything compiled, the rest as it comes."""
    from torchtitan.config import JobConfig

    job = JobConfig()
    job.compile.enable = True
    job.activation_checkpoint.mode = cell.recompute
    job.training.seq_len = cell.sequence
    job.training.dtype = "float32"
    job.optimizer.lr = 1e-5
    return job


def _dims(cell: Cell) -> Any:
    from torchtitan.distributed import ParallelDims

    ranks = cell.ranks
    dims = ParallelDims(dp_replicate=1, dp_shard=ranks, cp=1, tp=1, pp=1, ep=ranks, etp=1, world_size=ranks)
    dims.build_mesh()
    return dims


def _build(cell: Cell, meter: Meter, spec: Any, job: Any, dims: Any) -> Any:
    if cell.sizes != "qwen3-30b-a3b":
        raise ValueError(f"torchtitan runs here with qwen3-30b-a3b only, not {cell.sizes}.")
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
    return model.train()
