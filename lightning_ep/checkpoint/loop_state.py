"""Repairs of Lightning's loop state that exact resuming needs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.utilities import rank_zero_warn


def close_finished_epoch(trainer: Trainer) -> None:
    """Let a trainer that resumes after the last batch of an epoch start the next one.

    Lightning 2.6 gets two kinds of checkpoint wrong, whatever the loader does:

    - One saved in ``on_train_epoch_end`` (where ``ModelCheckpoint`` saves by default), resumed with ``max_steps``: the
      finished epoch is run again. It takes one batch too many or none, and the epochs count one too far, so a run that
      ``max_epochs`` ends as well loses an epoch of training.
    - One saved in ``on_train_batch_end`` of the last batch (``every_n_train_steps``): the first resume works, but
      leaves counters behind that make a second one start its epoch anew.

    Both become what Lightning gets right, a finished epoch from which nothing is left to restart. Call it between the
    loading of the checkpoint and the start of the fit loop, where training loaders are made or processed. It does
    nothing to other checkpoints, to a fresh run, or when called again.

    Args:
        trainer: The trainer that is about to fit.
    """
    fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if not epoch_loop.restarting:
        return
    epochs, batches = fit_loop.epoch_progress, epoch_loop.batch_progress
    epoch, batch = asdict(epochs.current), asdict(batches.current)
    saved_in_batch_end = batch["completed"] < batch["processed"] and epoch["processed"] < epoch["started"]
    if saved_in_batch_end and batches.is_last_batch:
        batches.increment_completed()
        epoch_loop._batches_that_stepped += 1
        epochs.increment_processed()
        epoch = asdict(epochs.current)
    if epoch["ready"] == epoch["started"] == epoch["processed"]:
        # the loop's own setter would turn this back to True whenever max_steps is set
        _Loop.restarting.fset(fit_loop, False)  # type: ignore[attr-defined]


def forget_early_loaders(trainer: Trainer) -> None:
    """Let a trainer that resumes make its training loaders once it knows where they stood.

    ``trainer.estimated_stepping_batches``, which Lightning recommends for `configure_optimizers`, makes them before the
    loops are restored. They would not be given their positions any more, and start at the first sample. Call it between
    the loading of the checkpoint and the start of the fit loop.

    Args:
        trainer: The trainer that is about to fit.
    """
    trainer.fit_loop._combined_loader = None


def match_batches(trainer: Trainer, loader: Any) -> None:
    """Let a trainer count the batches of an epoch it resumes as this run cuts them.

    Lightning counts batches per rank, so its count means something else on another number of data ranks or with another
    batch size, and an epoch would end early or late. Call it before Lightning gives the loader its position. It does
    nothing when called again, and to loaders whose position is not kept in samples of the whole job.

    Args:
        trainer: The trainer that is about to fit.
        loader: The training loader, the only one; `lightning_ep.data.ResumableLoader` keeps its position so.
    """
    states = trainer.fit_loop._combined_loader_states_to_load
    epoch_loop = trainer.fit_loop.epoch_loop
    batches_before = getattr(getattr(loader, "batch_sampler", None), "batches_before", None)
    if not epoch_loop.restarting or len(states) != 1 or "samples" not in states[0] or batches_before is None:
        return
    shift_batches(trainer, batches_before(states[0]["samples"]) - batch_counts(trainer).ready)


def batch_counts(trainer: Trainer) -> Any:
    """Lightning's counters of the batches of this epoch on this rank."""
    return trainer.fit_loop.epoch_loop.batch_progress.current


def batches_done(trainer: Trainer) -> int:
    """Batches of the epoch that a resumed training goes on with; 0 at its beginning, and if nothing is resumed."""
    return batch_counts(trainer).processed if trainer.fit_loop.epoch_loop.restarting else 0


def shift_batches(trainer: Trainer, by: int) -> None:
    """Moves all of Lightning's counters of an epoch's batches."""
    current = batch_counts(trainer)
    for counter in ("ready", "started", "processed", "completed"):
        setattr(current, counter, getattr(current, counter) + by)


def resume_accumulation(trainer: Trainer) -> None:
    """Lets a trainer that resumes in mid-epoch accumulate as it did, and warns of gradients that are lost.

    `GradientAccumulationScheduler` speaks at the start of an epoch, which Lightning does not start again. Call it right
    before the first epoch, after the `on_train_start` of callbacks.

    Args:
        trainer: The trainer that is about to train.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            trainer.accumulate_grad_batches = callback.get_accumulate_grad_batches(trainer.current_epoch)
    done, window = batches_done(trainer), trainer.accumulate_grad_batches
    if done % window and done < trainer.num_training_batches:
        rank_zero_warn(
            f"Training goes on after batch {done} of its epoch, inside a window of accumulate_grad_batches={window}: "
            f"gradients are not in a checkpoint, so that those of {done % window} batches are lost, and the next step "
            "is made of the rest of the window alone. ModelCheckpoint(every_n_train_steps=...) saves between windows, "
            "train_time_interval=... does not."
        )
