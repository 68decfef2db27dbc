"""The commands with a Trainer, ``fit``, ``validate``, ``test`` and ``predict``: LightningCLI on a YAML recipe."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from transformers.utils import logging as transformers_logging
from typing_extensions import override

import lightning_ep
from lightning_ep.trainer.signals import KnowsCommand


class SaveConfig(SaveConfigCallback, KnowsCommand):
    """Saves the configuration of the run to ``config.yaml`` in the directory of its logger.

    Without a logger that directory would be ``default_root_dir``, where a recipe of this name may be the user's own.
    """

    @override
    def resume_command(self, checkpoint: Path) -> str:
        """The command of this process, with this checkpoint in place of the one that it may name."""
        spec = sys.modules["__main__"].__spec__
        program = ["lightning-ep"] if spec is None else ["python", "-m", "lightning_ep"]
        path = checkpoint.relative_to(Path.cwd()) if checkpoint.is_relative_to(Path.cwd()) else checkpoint
        old = [i for i, word in enumerate(sys.argv) if word == "--ckpt_path" or word.startswith("--ckpt_path=")]
        named = {i + offset for i in old for offset in range(1 + ("=" not in sys.argv[i]))}
        kept = [word for i, word in enumerate(sys.argv[1:], start=1) if i not in named]
        return shlex.join([*program, *kept, "--ckpt_path", str(path)])

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


def run(args: list[str] | None, prog: str, other_commands: Iterable[str]) -> None:
    """Runs one of Lightning's commands.

    Args:
        args: As in `lightning_ep.cli.main`.
        prog: Name of the program, for its help.
        other_commands: Names of the commands that run without a Trainer, for its help.
    """
    LightningCLI(
        args=args,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_defaults={"strategy": {"class_path": "lightning_ep.ExpertParallelStrategy"}},
        # The same seed on every rank, whatever starts the processes.
        seed_everything_default=1,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        # It would build the optimizer before the strategy has sharded the parameters.
        auto_configure_optimizers=False,
        parser_kwargs={
            "prog": prog,
            "version": lightning_ep.__version__,
            "description": (
                "Trains mixture-of-experts transformers with expert parallelism. A run is a YAML recipe (see "
                "recipes/), and every value in it can be overridden by an option. Further commands, each with its own "
                f"--help: {', '.join(other_commands)}."
            ),
            "allow_abbrev": False,  # a misspelt option is an error, not another option
        },
    )


def quiet_other_ranks() -> None:
    """Leaves progress bars, information and warnings to rank 0; errors are shown by the rank that has them."""
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        return
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when `datasets` is imported, if it is
