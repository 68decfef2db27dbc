"""Ctrl-C, SIGTERM and SLURM's requeue signal: a flag on one rank, an agreement of all, a checkpoint, and the end."""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose, _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_ep.process_groups import once
from lightning_ep.trainer.interrupts import EXIT_CODE, Interrupts
from lightning_ep.trainer.steering import Settings, fingerprint, raise_difference, settings

LAST = {"SIGTERM": "last-sigterm.ckpt", "Ctrl-C": "last-interrupted.ckpt"}
"""Names of the checkpoints that signals leave: ``fit(ckpt_path="last")`` takes the newest that begins with "last"."""

_NOTHING, _INTERRUPT, _TERMINATE, _REQUEUE = range(4)


class Interrupted(SystemExit):
    """Leaves ``fit`` on all ranks after Ctrl-C, once a checkpoint is on the disk."""


class SignalFlags(_SignalConnector):
    """In place of Lightning's handlers, which broadcast or save inside the handler and so can meet any collective.

    Attributes:
        flag: The strongest signal that this rank got since the training began.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.flag = _NOTHING
        self._interrupts = Interrupts(self._note_interrupt, self._kill_others)

    @override
    def register_signal_handlers(self) -> None:
        self.flag = _NOTHING
        self.received_sigterm = False
        self._original_handlers = self._get_current_signal_handlers()
        if self.trainer.state.fn != TrainerFn.FITTING:
            return  # nothing to save: signals do what they do without us
        handlers: list[Any] = [self._note_sigterm]
        if self._has_already_handler(signal.SIGTERM):
            handlers.append(signal.getsignal(signal.SIGTERM))
        self._register_signal(signal.SIGTERM, _HandlersCompose(handlers))
        self._interrupts.begin()
        environment = self.trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            assert environment.requeue_signal is not None
            if not self._has_already_handler(environment.requeue_signal):
                self._register_signal(environment.requeue_signal, self._note_requeue)

    def _note_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self.flag = max(self.flag, _TERMINATE)

    @override
    def teardown(self) -> None:
        self._interrupts.end()
        super().teardown()

    def _note_interrupt(self) -> None:
        self.flag = max(self.flag, _INTERRUPT)
        # Once, and from a thread, which may not print beside a progress bar in the middle of its line.
        if self.trainer.is_global_zero:
            text = "Ctrl-C: saving a checkpoint after the next steps, then stopping. Once more stops at once, without."
            os.write(2, f"\n{text}\n".encode())

    def _kill_others(self) -> None:
        launcher = self.trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            # They may wait in a collective for this process until it times out.
            launcher.kill(signal.SIGKILL)

    def _note_requeue(self, signum: int, frame: FrameType | None) -> None:
        self.flag = _REQUEUE

    def save_and_requeue(self) -> None:
        """What Lightning does on SLURM: saves ``hpc_ckpt_N.ckpt`` in ``default_root_dir``, and requeues.

        Lightning resumes from there by itself only if no ``ckpt_path`` is given; a link lets ``"last"`` find it too.
        """
        directory = _checkpoint_directory(self.trainer)
        if directory is not None and self.trainer.is_global_zero:
            # Before it is saved: requeueing may end this process at once. A link to nothing is not found.
            saved = Path(self.trainer._checkpoint_connector.hpc_save_path(self.trainer.default_root_dir)).absolute()
            link = directory / f"last-{saved.name}"
            link.unlink(missing_ok=True)
            directory.mkdir(parents=True, exist_ok=True)
            link.symlink_to(saved)
        self._slurm_sigusr_handler_fn(signal.SIGUSR1, None)  # type: ignore[arg-type]


class AgreeOnSignals(Callback):
    """Once per optimizer step all ranks learn whether any of them was signalled; then they save and stop together.

    They also learn whether the settings of their optimizers differ (`steering.py`), and then raise together. In manual
    optimization, where each rank could take steps of its own, they look once per batch.

    The exchange is a CPU all-reduce of three numbers that runs behind the next step, so nothing waits for it: ranks act
    one step after the signal.

    Args:
        timeout: Of the exchange.
        at_once: Inside this context a checkpoint is on the disk when saving returns.
    """

    def __init__(self, timeout: timedelta, at_once: Callable[[], AbstractContextManager[None]]) -> None:
        self._at_once = at_once
        self._flags: SignalFlags | None = None
        self._group = once(("signals", timeout), lambda: dist.new_group(backend="gloo", timeout=timeout))
        self._value = torch.zeros(3, dtype=torch.int64)
        self._exchange: Any = None
        self._compared: Settings = (0, [])
        self._step = 0
        self._agreed = _NOTHING

    def watch(self, trainer: Trainer) -> None:
        """Takes part in the fit that is about to start."""
        if not isinstance(trainer._signal_connector, SignalFlags):
            trainer._signal_connector = SignalFlags(trainer)
        self._flags = trainer._signal_connector
        # Lightning's own exchange, a broadcast and a host sync in every batch, has nothing to tell any more.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]
        if self not in trainer.callbacks:  # type: ignore[attr-defined]
            trainer.callbacks.append(self)  # type: ignore[attr-defined]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._exchange = None
        self._agreed = _NOTHING

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        inside_window = trainer.global_step == self._step
        if inside_window and pl_module.automatic_optimization:
            return
        self._step = trainer.global_step
        assert self._flags is not None
        agreed = self._agreed = max(self._agreed, self._finish_exchange(trainer))
        if agreed == _NOTHING or inside_window:
            self._compared = settings(trainer)
            compared = fingerprint(self._compared)
            self._value = torch.tensor([self._flags.flag, compared, -compared])
            self._exchange = dist.all_reduce(self._value, dist.ReduceOp.MAX, group=self._group, async_op=True)
            return
        with self._at_once():
            if agreed == _REQUEUE:
                self._flags.save_and_requeue()
            else:
                self._save(trainer, "SIGTERM" if agreed == _TERMINATE else "Ctrl-C")
        if agreed == _INTERRUPT:
            # A process that Lightning started and that ends with an error makes it kill the first one.
            environment = trainer._accelerator_connector.cluster_environment
            started = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
            raise Interrupted(0 if started else EXIT_CODE)
        self._flags.received_sigterm = True
        raise SIGTERMException

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_exchange(trainer)

    def _finish_exchange(self, trainer: Trainer) -> int:
        """The strongest signal of all ranks; raises on all if their optimizers' settings differ."""
        if self._exchange is None:
            return _NOTHING
        self._exchange.wait()
        self._exchange = None
        flag, largest, smallest_negated = self._value.tolist()
        if largest != -smallest_negated:
            raise_difference(trainer, self._compared, self._group)
        return int(flag)

    def _save(self, trainer: Trainer, cause: str) -> None:
        """Saves where `ckpt_path="last"` looks; nowhere, if the user has no ModelCheckpoint."""
        directory = _checkpoint_directory(trainer)
        if directory is None:
            rank_zero_info(f"{cause}: stopping without a checkpoint, since there is no ModelCheckpoint callback.")
            return
        path = directory / LAST[cause]
        trainer.save_checkpoint(path)
        commands = [c.resume_command(path) for c in trainer.callbacks if isinstance(c, KnowsCommand)]  # type: ignore[attr-defined]
        command = commands[0] if commands else f"trainer.fit(..., ckpt_path={str(path)!r})"
        rank_zero_info(f"{cause}: saved {path} after step {trainer.global_step}. Resume with\n  {command}")


class KnowsCommand(ABC):
    """A callback that knows by which command the run was started."""

    @abstractmethod
    def resume_command(self, checkpoint: Path) -> str:
        """The command that goes on from a checkpoint."""


def _checkpoint_directory(trainer: Trainer) -> Path | None:
    """Where ``ckpt_path="last"`` looks; None without a ModelCheckpoint."""
    directory = next((c.dirpath for c in trainer.callbacks if isinstance(c, ModelCheckpoint)), None)  # type: ignore[attr-defined]
    return None if directory is None else Path(directory)


def _nothing() -> None:
    pass
