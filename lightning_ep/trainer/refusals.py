"""What a Trainer may hold that cannot work on shards: refused by name before anything runs, with what to do instead."""

from __future__ import annotations

import os
import sys
from typing import Any

from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Optimizer

from lightning_ep.hub.new_files import refuse_existing
from lightning_ep.trainer.loss_scale import denominator_of

_AVERAGE = (
    "it copies the whole module, which FSDP2 does not allow. Average the shards (`param.to_local()`) in a callback of "
    "your own instead."
)
_CALLBACKS = {
    "StochasticWeightAveraging": _AVERAGE,
    "WeightAveraging": _AVERAGE,
    "EMAWeightAveraging": _AVERAGE,
    "ModelPruning": "it replaces parameters, which are shards here. Prune the exported model instead.",
    "BatchSizeFinder": "it retries after running out of memory, which one rank does alone while the others wait. Try "
    "sizes with `fast_dev_run=3` instead.",
    "LearningRateFinder": "it saves and restores a whole checkpoint in mid-run. Compare short runs with `max_steps` "
    "instead.",
    "OnExceptionCheckpoint": "every rank takes part in saving, and after an exception one is missing. Use "
    "ModelCheckpoint(every_n_train_steps=...) instead.",
}
_NO_RULE = "torch has no rule for what it does to them."
_OPTIMIZERS = {  # by name, and by the flag that makes the difference
    ("LBFGS", None): "it makes one vector of all parameters. Use AdamW instead.",
    ("Adafactor", None): f"{_NO_RULE} Use AdamW(fused=True), or SGD with momentum for less state, instead.",
    ("Rprop", None): f"{_NO_RULE} Use AdamW instead.",
    ("SparseAdam", None): "it takes sparse gradients only, and theirs are dense. Use AdamW instead.",
    ("SGD", "fused"): f"{_NO_RULE} Use foreach=True instead.",
    ("Adagrad", "fused"): f"{_NO_RULE} Use foreach=True instead.",
    ("ASGD", "foreach"): "experts and other parameters would be in one call, on two meshes, as by default on GPUs. "
    "Pass foreach=False instead.",
}
_PROCESSES_PER_NODE = {TorchElasticEnvironment: "LOCAL_WORLD_SIZE", SLURMEnvironment: "SLURM_NTASKS_PER_NODE"}


def refuse_other_processes(environment: ClusterEnvironment, per_node: int, num_nodes: int) -> None:
    """Raises ValueError unless the processes are those that the Trainer was told of, node by node in order of rank.

    Args:
        environment: What Lightning found to have started the processes, or will start them.
        per_node: The Trainer's ``devices``.
        num_nodes: The Trainer's.
    """
    if isinstance(environment, LightningEnvironment) and num_nodes > 1:
        _refuse_lonely_node(per_node, num_nodes)
    if hasattr(sys, "ps1") and per_node * num_nodes > 1 and not environment.creates_processes_externally:
        raise ValueError(
            f"Trainer(devices={per_node}) means {per_node * num_nodes} processes, and a notebook or an interactive "
            "interpreter is one: the others could not run its cells. Put the code into a script and start that, with "
            f"`python script.py` or `torchrun --nproc-per-node {per_node} script.py`; in the notebook use devices=1. "
            "(Strategies such as ddp_notebook know no expert parallelism.)"
        )
    launcher = type(environment).__name__.removesuffix("Environment")
    found, here = environment.world_size(), per_node
    for kind, variable in _PROCESSES_PER_NODE.items():
        if isinstance(environment, kind) and variable in os.environ:
            here = int(os.environ[variable])
    if (found, here) != (num_nodes * per_node, per_node):
        fix = f"Use Trainer(devices={here}, num_nodes={found // here})"
        if found % here != 0:
            fix = "Start as many processes on every node"
        raise ValueError(
            f"Trainer(devices={per_node}, num_nodes={num_nodes}) means {num_nodes * per_node} processes, {per_node} on "
            f"every node, but {launcher} started {found}, of which {here} on this node. {fix}: devices are the "
            "processes per node (torchrun --nproc-per-node, sbatch --ntasks-per-node), num_nodes the nodes (--nnodes, "
            "--nodes)."
        )
    node, local, rank = environment.node_rank(), environment.local_rank(), environment.global_rank()
    if rank != node * per_node + local:
        raise ValueError(
            f"Rank {rank} is process {local} of node {node}, where rank {node * per_node + local} belongs "
            f"(node * {per_node} + process): EP groups are runs of consecutive ranks, meant to lie inside a node. "
            "Place ranks node by node (srun --distribution=block)."
        )


def _refuse_lonely_node(per_node: int, num_nodes: int) -> None:
    variables = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    missing = [name for name in variables if name not in os.environ]
    if missing:
        raise ValueError(
            f"Trainer(num_nodes={num_nodes}) was started without torchrun or srun and without {', '.join(missing)} in "
            "the environment, so that this process would wait for other nodes that cannot find it. Start it on every "
            f"node with `torchrun --nnodes={num_nodes} --nproc-per-node={per_node} --rdzv-backend=c10d "
            "--rdzv-endpoint=FIRST_NODE:29500 --rdzv-id=JOB ...` or with srun, or set all three."
        )


def refuse_unsupported(trainer: Trainer, layer_sync: object | None) -> None:
    """Raises ValueError for what cannot work with sharded experts, FileExistsError for what could not be written."""
    refuse_existing(trainer.callbacks, trainer.state.fn)  # type: ignore[attr-defined]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for name in (cls.__name__ for cls in type(callback).__mro__ if cls.__module__.startswith("lightning.")):
            if name in _CALLBACKS:
                raise ValueError(
                    f"{type(callback).__name__} cannot run with ExpertParallelStrategy: {_CALLBACKS[name]}"
                )
        if isinstance(callback, ModelCheckpoint) and getattr(callback, "save_on_exception", False):
            raise ValueError(
                "ModelCheckpoint(save_on_exception=True) cannot run with ExpertParallelStrategy: every rank takes part "
                "in saving, and after an exception one is missing. Use every_n_train_steps instead."
            )
    module = trainer.lightning_module
    if not module.automatic_optimization and denominator_of(module) is not None:
        raise ValueError(
            f"{type(module).__name__} has gradient_denominator and optimizes manually, where the strategy cannot know "
            "before which clipping or step gradients are to be divided. Leave gradient_denominator out and pass "
            "`loss * strategy.layout.loss_world_size / terms` to manual_backward instead, with the terms of all ranks."
        )
    if layer_sync is not None:
        raise ValueError(
            "sync_batchnorm=True cannot run with ExpertParallelStrategy: it replaces modules before they are sharded. "
            "Use normalisation without running statistics (RMSNorm, LayerNorm) instead."
        )


def refuse_optimizers(optimizers: list[Optimizer]) -> None:
    """Raises ValueError for optimizers of torch and transformers that would fail on shards in their first step."""
    for optimizer in optimizers:
        theirs = [cls for cls in type(optimizer).__mro__ if cls.__module__.startswith(("torch.optim", "transformers."))]
        names = {cls.__name__ for cls in theirs}
        for (name, flag), reason in _OPTIMIZERS.items():
            if name in names and (flag is None or any(_is_on(flag, group) for group in optimizer.param_groups)):
                what = name if flag is None else f"{name}({flag}=True)"
                raise ValueError(f"{what} cannot run on sharded parameters: {reason}")


def _is_on(flag: str, group: dict[str, Any]) -> bool:
    """Whether a flag is on, or left to torch, which takes ``foreach`` on GPUs."""
    by_itself = flag == "foreach" and any(param.is_cuda for param in group["params"])
    return bool(by_itself if group.get(flag) is None else group[flag])
