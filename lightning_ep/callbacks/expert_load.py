"""How tokens are spread over experts and ranks in the course of a run: numbers, pictures, warnings."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_ep.distributed.host_copies import OnHost
from lightning_ep.routing import pictures
from lightning_ep.routing.history import LATEST, History, findings
from lightning_ep.routing.load_table import write_loads
from lightning_ep.routing.run_pictures import figures
from lightning_ep.routing.watched import Watched
from lightning_ep.routing.words import short_names

_REST = 400  # times as long as drawing took, until it is done again: the other ranks wait for it


class ExpertLoadMonitor(Callback):
    """Logs how tokens are spread over experts, draws it, and warns of layers that have collapsed and of dead experts.

    It looks at the steps that are logged (``log_every_n_steps``), at all their micro-batches and ranks, and leaves
    padding out. The means over all MoE layers go to every logger:

    - ``routing/max_violation``: how far the most popular expert is above the mean, and of the worst layer
      ``routing/max_violation_worst_layer``; ``routing/load_variation``: coefficient of variation. 0 is balanced.
    - ``routing/entropy``: of a token's router probabilities, as a share of the largest that there can be.
    - ``routing/dead_experts``: how many experts of all layers got no token in that step.
    - ``routing/straggler_factor``: tokens that the busiest rank computes over the mean of all ranks: 1 is balanced.
    - ``routing/rows_per_token``: rows that a token is sent in to other ranks.

    The progress bar has the first of them. Every 10 logged steps ``routing/`` of the log directory gets
    ``expert_load.csv``, the load of every expert in them (first_step, last_step, layer, expert, and tokens over the
    mean of the layer), then also, as often as it takes less than 0.3 % of the time, and at the end, pictures:
    ``expert_load.png``, ``load_curves.png`` and, of several ranks, ``straggler_factor.png``. TensorBoard and Weights &
    Biases get the pictures, too. They need matplotlib: ``pip install matplotlib``. docs/operate/routing.md says how to
    read them.

    A layer is named in a warning once, if in the last 10 logged steps its tokens went to hardly more experts than one
    token goes to, or experts that should have got many got none.

    Raises:
        ValueError: At the start, if the model has no MoE layers.
    """

    def __init__(self) -> None:
        self._watched: Watched | None = None
        self._history = History()
        self._taken: OnHost | None = None
        self._folder: Path | None = None
        self._named: set[int] = set()
        self._drawn = 0
        self._draw_from = 0.0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()
        self._watched = Watched(pl_module, getattr(trainer.strategy, "layout", None), trainer.global_rank)
        self._watched.active = False
        self._history, self._taken, self._named = History(), None, set()
        self._drawn, self._draw_from = 0, 0.0
        # Every rank asks: the first one's answer is taken.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "routing"
        if not pictures.available():
            rank_zero_info(
                "ExpertLoadMonitor draws no pictures: matplotlib is not installed. `pip install matplotlib` brings it."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._watched is not None
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._watched.active = every > 0 and (trainer.global_step + 1) % every == 0

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        # Before the update, under which the sums arrive at the host.
        if self._watched is not None and self._watched.active and self._taken is None:
            self._taken = self._watched.take()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._taken is None:
            return
        assert self._watched is not None
        measures, self._taken = self._watched.measures(self._taken), None
        for name, value in measures.means().items():
            pl_module.log(f"routing/{name}", value.float(), prog_bar=name == "max_violation")
        if trainer.is_global_zero:
            self._history.add(trainer.global_step, measures)
            if len(self._history) % LATEST == 0:
                self._warn()
                self._write_table()
                if time.monotonic() >= self._draw_from:
                    self._draw(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(self._history):  # which the first rank has
            self._write_table()
        self._draw(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        with contextlib.suppress(Exception):  # what ended the run is to be seen
            self._draw(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._watched is not None:
            self._watched.remove()
            self._watched = None

    def _warn(self) -> None:
        assert self._watched is not None
        last = self._history.latest()
        new = [finding for finding in findings(last.measures) if finding.layer not in self._named]
        if not new:
            return
        self._named |= {finding.layer for finding in new}
        names = short_names(self._watched.layers)
        found = "; ".join(finding.sentence(names[finding.layer]) for finding in new)
        rank_zero_warn(
            f"Routing in steps {last.first} to {last.last}: {found}. Such routers seldom recover by themselves. Lower "
            "the learning rate or warm it up for longer, balance the routers (CausalLM(router=...), "
            "docs/operate/routing.md), and look whether the data of these steps is all of one kind. Published weights "
            "may have had no use for some experts on such data before: `lightning-ep routing` says it of any weights "
            "and text." + (f" Pictures: {self._folder}." if pictures.available() else "")
        )

    def _write_table(self) -> None:
        assert self._folder is not None
        assert self._watched is not None
        if not self._folder.exists():
            rank_zero_info(f"The load of experts is in {self._folder}, anew every {LATEST} logged steps.")
        last = self._history.latest()
        steps = {"first_step": last.first, "last_step": last.last}
        write_loads(self._folder / "expert_load.csv", {"load": last.measures.load_ME}, self._watched.layers, steps)

    def _draw(self, trainer: Trainer) -> None:
        number = len(self._history)
        if number == self._drawn or not trainer.is_global_zero or not pictures.available() or self._watched is None:
            return
        assert self._folder is not None
        self._drawn, since = number, time.monotonic()
        self._folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures(self._history, self._watched.layers).items():
            path = pictures.save(figure, self._folder / f"{name}.png")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure(f"routing/{name}", figure, trainer.global_step)
                elif isinstance(logger, WandbLogger):
                    logger.log_image(f"routing/{name}", [str(path)], step=trainer.global_step)
        self._draw_from = time.monotonic() + _REST * (time.monotonic() - since)
