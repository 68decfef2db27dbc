"""What becomes of a user's loader: positions after a resume, seeds of its workers, and equal steps on all ranks."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.data import _auto_add_worker_init_fn
from lightning.pytorch import LightningModule, Trainer

from lightning_ep.checkpoint.loader_position import PlainLoaders
from lightning_ep.checkpoint.loop_state import close_finished_epoch, match_batches
from lightning_ep.distributed.agreement import from_all_ranks
from lightning_ep.trainer.uneven_inputs import share_samples, with_equal_steps


def prepare_loader(
    loader: Any, module: LightningModule, data_rank: int, data_world_size: int, plain_loaders: PlainLoaders
) -> Any:
    """The loader that the Trainer's loop gets; every rank must call it.

    Args:
        loader: What Lightning has prepared of the user's.
        module: The module that the Trainer runs.
        data_rank: This rank's index among those that see different batches.
        data_world_size: Number of these.
        plain_loaders: What lets loaders without a position of their own go on.
    """
    trainer = module.trainer
    # By data rank: Lightning would do it later, unequally for ranks that share a batch, and not behind what wraps it.
    _auto_add_worker_init_fn(loader, data_rank)
    if trainer.training:
        close_finished_epoch(trainer)
        match_batches(trainer, loader)
        loader = plain_loaders.adopt(trainer, loader)
    if data_world_size == 1:
        return loader
    if not trainer.predicting:
        return with_equal_steps(loader, from_all_ranks)
    if trainer._accelerator_connector.use_distributed_sampler:
        share_samples(loader, data_world_size, data_rank)

    def join(joined: object, batch: Any, batch_idx: int) -> None:
        _join_predict_step(module, joined, batch, batch_idx)

    return with_equal_steps(loader, from_all_ranks, trainer.limit_predict_batches, join)


def evaluated_loaders(trainer: Trainer) -> list[str]:
    """Names of the dataloaders of the evaluation that runs: those that a dict has for them, otherwise their numbers."""
    combined = trainer._evaluation_loop._combined_loader
    assert combined is not None
    named = isinstance(combined.iterables, dict) and len(combined.iterables) == len(combined.flattened)
    return [str(name) for name in (combined.iterables if named else range(len(combined.flattened)))]


def _join_predict_step(module: LightningModule, loader: object, batch: Any, batch_idx: int) -> None:
    """A predict step as the loop would run it, whose result nobody gets."""
    loop, strategy = module.trainer.predict_loop, module.trainer.strategy
    assert loop._combined_loader is not None
    index = next(i for i, other in enumerate(loop._combined_loader.flattened) if other is loader)
    batch = module._on_before_batch_transfer(strategy.precision_plugin.convert_input(batch), dataloader_idx=index)
    batch = strategy.batch_to_device(batch, dataloader_idx=index)
    arguments = loop._build_kwargs(batch, batch_idx, index if loop.num_dataloaders > 1 else None)
    strategy.predict_step(*loop._build_step_args_from_hook_kwargs(arguments, "predict_step"))
