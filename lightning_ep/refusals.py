"""What a Trainer may hold that cannot work on shards: refused by name before anything runs, with what to do instead."""

from __future__ import annotations

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Optimizer

_AVERAGE = (
    "it copies the whole module, which FSDP2 does not allow. Average the shards (`param.to_local()`) in a callback of "
    "your own instead."
)
_CALLBACKS = {
    "StochasticWeightAveraging": _AVERAGE,
    "WeightAveraging": _AVERAGE,
    "EMAWeightAveraging": _AVERAGE,
    "ModelPruning": "it replaces parameters, which are shards here. Prune the exported model instead.",
    "BackboneFinetuning": "it changes what the optimizer holds in mid-run. Freeze parameters in `configure_model` "
    "instead, or in a BaseFinetuning of your own.",
    "BatchSizeFinder": "it retries after running out of memory, which one rank does alone while the others wait. Try "
    "sizes with `fast_dev_run=3` instead.",
    "LearningRateFinder": "it saves and restores a whole checkpoint in mid-run. Compare short runs with `max_steps` "
    "instead.",
    "OnExceptionCheckpoint": "every rank takes part in saving, and after an exception one is missing. Use "
    "ModelCheckpoint(every_n_train_steps=...) instead.",
}


def refuse_other_processes(environment: ClusterEnvironment, per_node: int, num_nodes: int) -> None:
    """Raises ValueError unless a launcher has started as many processes as the Trainer was told."""
    expected, found = num_nodes * per_node, environment.world_size()
    if expected != found:
        raise ValueError(
            f"Trainer(devices={per_node}, num_nodes={num_nodes}) makes {expected} processes, but "
            f"{type(environment).__name__} started {found}. Set devices to the processes per node and num_nodes to the "
            "nodes that the launcher (torchrun, srun) was given."
        )


def refuse_unsupported(trainer: Trainer, layer_sync: object | None) -> None:
    """Raises ValueError for callbacks and flags that cannot work with sharded experts."""
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
    if layer_sync is not None:
        raise ValueError(
            "sync_batchnorm=True cannot run with ExpertParallelStrategy: it replaces modules before they are sharded. "
            "Use normalisation without running statistics (RMSNorm, LayerNorm) instead."
        )


def refuse_optimizers(optimizers: list[Optimizer]) -> None:
    """Raises ValueError for optimizers that have no rule for shards."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.SGD) and any(group.get("fused") for group in optimizer.param_groups):
            raise ValueError("SGD(fused=True) has no rule for sharded parameters in torch; use foreach=True instead.")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("LBFGS makes one vector of all parameters, which shards do not allow; use AdamW instead.")
