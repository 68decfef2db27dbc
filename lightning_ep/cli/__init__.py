"""The command line ``lightning-ep``: Lightning's ``fit``, ``validate``, ``test`` and ``predict`` on a YAML recipe."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings

from jsonargparse import auto_cli
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from transformers.utils import logging as transformers_logging
from typing_extensions import override

import lightning_ep

PROG = "lightning-ep"

COMMANDS: dict[str, str] = {
    "consolidate": "lightning_ep.cli.consolidate:consolidate",
    "export": "lightning_ep.cli.export:export",
}
"""Commands that run without a Trainer: the name, and ``module:function`` to call. The function's signature and
docstring become the command's options and help; its module is imported only when the command is called."""


class SaveConfig(SaveConfigCallback):
    """Saves the configuration of the run to ``config.yaml`` in the directory of its logger.

    Without a logger that directory would be ``default_root_dir``, where a recipe of this name may be the user's own.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


def main(args: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: The arguments, by default those of the process. When a run has more than one process on this node and
            no launcher such as torchrun, Lightning starts the others with the arguments *of the process*.
    """
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")  # Lightning 2.6 meets torch 2.13
    _quiet_other_ranks()
    _import_from_working_directory()
    arguments = sys.argv[1:] if args is None else args
    if arguments and arguments[0] in COMMANDS:
        module, _, function = COMMANDS[arguments[0]].partition(":")
        command = getattr(importlib.import_module(module), function)
        auto_cli(command, args=arguments[1:], prog=f"{PROG} {arguments[0]}")
        return
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
            "prog": PROG,
            "version": lightning_ep.__version__,
            "description": _description(),
            "allow_abbrev": False,  # a misspelt option is an error, not another option
        },
    )


def _description() -> str:
    description = (
        "Trains mixture-of-experts transformers with expert parallelism. A run is a YAML recipe (see recipes/), and "
        "every value in it can be overridden by an option."
    )
    if COMMANDS:
        description += f" Further commands, each with its own --help: {', '.join(COMMANDS)}."
    return description


def _quiet_other_ranks() -> None:
    """Leaves progress bars, information and warnings to rank 0; errors are shown by the rank that has them."""
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        return
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when `datasets` is imported, if it is


def _import_from_working_directory() -> None:
    """Finds the user's own modules from the console script as ``python -m`` does."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
