"""Everything that a Trainer's run does with checkpoints; the strategy's hooks lead here."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch.optim import Optimizer

from lightning_ep.checkpoint.loader_position import PlainLoaders
from lightning_ep.checkpoint.loop_state import batches_done
from lightning_ep.checkpoint.metadata import companion_files, rank_state, set_random_state
from lightning_ep.checkpoint.model_checkpoint import AdoptedCallbacks
from lightning_ep.checkpoint.optimizers import clean, name_state
from lightning_ep.checkpoint.pack import pack_directory, pack_file
from lightning_ep.checkpoint.resume import Resume
from lightning_ep.checkpoint.saver import Checkpoints
from lightning_ep.checkpoint.single_file import gather, gather_optimizer
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.frozen_base import base_names, note_bases
from lightning_ep.layout import ParallelLayout
from lightning_ep.process_groups import doubt

_SETTLE_SECONDS = 60.0


class RunCheckpoints:
    """Saving and resuming for the runs of one strategy. Every rank must make the same calls.

    Attributes:
        loaders: Where plain loaders of the training go on, once its optimizers are restored.

    Args:
        layout: The layout of this job.
        device: This rank's device.
        ranks_per_node: Processes that share this machine.
        timeout: How long ranks wait for one another.
        distributed: Save directories to which every rank writes, or single files that rank 0 writes.
        asynchronous: Write behind the training.
    """

    def __init__(
        self,
        layout: ParallelLayout,
        device: torch.device,
        ranks_per_node: int,
        timeout: timedelta,
        distributed: bool,
        asynchronous: bool,
    ) -> None:
        self._layout = layout
        self._device = device
        self._distributed = distributed
        self._asynchronous = asynchronous
        self._checkpoints = Checkpoints(timeout, ranks_per_node)
        self._adopted: AdoptedCallbacks | None = None
        self._resume: Resume | None = None
        self._random: dict[str, Any] | None = None
        self.loaders = PlainLoaders()
        self._files: dict[str, bytes] | None = None  # what goes with the model; it is large, and the same in every save
        self._may_write_behind = True
        self._failed = False

    @property
    def _first(self) -> bool:
        return self._checkpoints.ranks.rank == 0

    def begin(self, trainer: Trainer) -> None:
        """Prepares a Trainer that is about to fit, validate, test or predict."""
        self._failed = False
        self._resume = self._random = self._files = None
        self.loaders = PlainLoaders()
        self._adopted = AdoptedCallbacks(trainer, self._checkpoints)

    # ------------------------------------------------------------------ saving

    def weights(self, module: LightningModule) -> dict[str, Any]:
        """State of the module by name, but for a frozen base: its own shards, or on rank 0 everything in full."""
        base = base_names(module)
        state = {clean(name): value for name, value in module.state_dict().items() if clean(name) not in base}
        return state if self._distributed else gather(state, keep=self._first)

    def optimizer_state(self, module: LightningModule, optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
        """State of an optimizer: its own shards by name of the parameter, or on rank 0 everything in full by number."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return name_state(module, optimizer) if self._distributed else gather_optimizer(optimizer, keep=self._first)

    def save(self, module: LightningModule, checkpoint: dict[str, Any], path: Path) -> None:
        """Saves what Lightning has collected, behind the training if that is asked for and goes on.

        Raises:
            CheckpointError: On every rank, if this checkpoint (or the one written behind before) cannot be saved.
        """
        trainer, ranks = module.trainer, self._checkpoints.ranks
        self._checkpoints.begin()
        try:
            states = ranks.together("saving", lambda: rank_state(checkpoint, trainer, self._device))
        except (RuntimeError, ConnectionError) as error:
            if isinstance(error, CheckpointError):
                raise
            doubt()
            raise CheckpointError(
                f"{path} is not saved: another rank has left before. It failed (see its output), or has not called "
                "`trainer.save_checkpoint`, which is for all ranks: take the call out of `if self.global_rank == 0`, "
                "`if trainer.is_global_zero` or `@rank_zero_only`."
            ) from error
        # After the end of a run nobody would wait for what is written behind.
        running = trainer.state.fn == TrainerFn.FITTING and trainer.state.status == TrainerStatus.RUNNING
        behind = self._asynchronous and self._may_write_behind and running
        if self._files is None:
            self._files = companion_files(module) if self._first else {}
        layout, files = self._layout, self._files
        if self._distributed:
            writes = self._first
            state, blobs = ranks.alone(
                "saving", lambda: pack_directory(checkpoint, module, layout, states, files, writes)
            )
            self._checkpoints.save_directory(path, state, blobs, behind)
        else:
            content = ranks.alone("saving", lambda: pack_file(checkpoint, module, layout, states, files))
            self._checkpoints.save_file(path, content, behind)

    def remove(self, path: Path) -> None:
        """Deletes a checkpoint once those before it are durable."""
        self._checkpoints.remove(path)

    @contextmanager
    def at_once(self) -> Generator[None, None, None]:
        """Inside, a checkpoint is on the disk when saving returns."""
        self._may_write_behind = False
        try:
            yield
        finally:
            self._may_write_behind = True

    # ------------------------------------------------------------------ resuming

    def open(self, module: LightningModule, path: Path, weights_only: bool | None) -> dict[str, Any]:
        """Verifies a checkpoint and returns what is no tensor, for Lightning to restore.

        Raises:
            CheckpointError: On every rank, if it is damaged or training cannot go on from it.
        """
        self._checkpoints.begin()
        self._resume = Resume(path, self._checkpoints.ranks, weights_only)
        if module.trainer.state.fn == TrainerFn.FITTING:
            self._resume.prepare_fit(module.trainer, self._layout)
        return self._resume.metadata

    def allocate(self, module: LightningModule) -> None:
        """Allocates what the checkpoint that was opened, if any, fills, so that it is not read or drawn before.

        Raises:
            CheckpointError: On every rank, if the checkpoint does not fit the module, or has adapters of another base.
        """
        note_bases(module)
        if self._resume is not None:
            self._resume.allocate(module, self._device)

    def restore(self, module: LightningModule) -> None:
        """Fills the module from the checkpoint that was opened, if any."""
        if self._resume is not None:
            self._resume.restore(module)
            if module.trainer.state.fn != TrainerFn.FITTING:
                self._resume = None

    def restore_optimizers(self, module: LightningModule) -> None:
        """Fills the optimizers of a fit from the checkpoint that was opened.

        Raises:
            CheckpointError: On every rank, if optimizers or schedulers differ from the checkpoint's.
        """
        if self._resume is not None:
            self._resume.restore_optimizers(module)
            self._random, self.loaders = self._resume.random, self._resume.loaders
            self._resume = None

    def before_epoch(self, trainer: Trainer) -> None:
        """As `before_batch`, if the run goes on with a whole epoch: its loaders will draw as they would have."""
        if trainer.training and not trainer.fit_loop.epoch_loop.restarting:
            self.before_batch(trainer)

    def before_training(self, trainer: Trainer) -> None:
        """Ends an epoch of which no batch is left: saved behind its last validation, it is not over for Lightning.

        A loader without workers has not begun its pass then, and would leave out that many batches of the next epoch.
        """
        if batches_done(trainer) >= trainer.num_training_batches > 0:
            self.loaders.end_epoch()
            self.before_batch(trainer)

    def before_batch(self, trainer: Trainer) -> None:
        """Puts random generators where the checkpoint found them, once the run goes on.

        As late as possible: loaders and the sanity check have drawn numbers since the start.
        """
        if self._random is not None and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            set_random_state(self._random, self._device)
            self._random = None

    # ------------------------------------------------------------------ the end

    def wait(self) -> None:
        """Waits for what is being written behind; raises as `finish`."""
        self._checkpoints.wait()

    def fail(self) -> None:
        """Lets what is being written behind end before the job does, with an error of its own."""
        self._failed = True
        doubt()
        self._checkpoints.settle(_SETTLE_SECONDS)

    def finish(self) -> None:
        """Ends a run: waits for what is being written behind.

        Raises:
            CheckpointError: On every rank, if it could not be saved and the run has not failed for another reason.
        """
        if self._adopted is not None:
            self._adopted.release()
        if not self._failed:
            self._checkpoints.wait()
