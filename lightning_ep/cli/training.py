"""The commands with a Trainer, ``fit``, ``validate``, ``test`` and ``predict``: LightningCLI on a YAML recipe."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from transformers.utils import logging as transformers_logging
from typing_extensions import override

import lightning_ep
import lightning_ep.callbacks
import lightning_ep.data
from lightning_ep.callbacks import WritePredictions
from lightning_ep.cli.display import add_defaults, leave_out_tips
from lightning_ep.cli.mistakes import OneLineParser, refusal
from lightning_ep.hub.new_files import refuse_existing
from lightning_ep.trainer.signals import KnowsCommand
from lightning_ep_start import SENTENCES, TRAINER_COMMANDS, fail

_OUTPUT = "New file for the predictions, as JSON lines: one for each sample, from all processes, in order."


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


class _Begun(Callback):
    """Notes that a Trainer works on batches: what is wrong from then on is shown with the place that it came from."""

    is_true = False

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.is_true = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.is_true = True

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.is_true = True

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.is_true = True

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.is_true = True


class CLI(LightningCLI):
    """Lightning's commands, with errors of one line and a display of our own."""

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Lightning's own warns of arguments that are not those of the process, in which recipes have names.
        self.config = parser.parse_args(args)

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, OSError) as error:  # of every process alike
            if (cause := refusal(error)) is None:
                raise
            fail(str(cause))

    @override
    def init_parser(self, takes_output: bool = False, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        if takes_output:
            parser.add_argument("--output", type=str | None, help=_OUTPUT)
        return parser

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand]
        add_defaults(config["trainer"])
        if (output := config.get("output")) is not None:
            config["trainer"]["callbacks"].append(WritePredictions(output))
            config["return_predictions"] = False  # they would be kept until the end
        trainer = super().instantiate_trainer(**kwargs)
        refuse_existing(trainer.callbacks, self.subcommand)  # type: ignore[attr-defined]  # before processes start
        return trainer


def run(args: list[str], prog: str, kind: type[CLI] = CLI) -> CLI:
    """Runs one of Lightning's commands.

    Args:
        args: The command and its options.
        prog: Name of the program, for its help.
        kind: What runs it.
    """
    leave_out_tips()
    begun = _Begun()
    try:
        return kind(
            args=args,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_defaults={
                "strategy": {"class_path": "lightning_ep.ExpertParallelStrategy"},
                "callbacks": [begun],
            },
            # The same seed on every rank, whatever starts the processes.
            seed_everything_default=1,
            parser_class=OneLineParser,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            # It would build the optimizer before the strategy has sharded the parameters.
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": prog,
                "version": lightning_ep.__version__,
                "allow_abbrev": False,  # a misspelt option is an error, not another option
                **{c: {"description": SENTENCES[c], "takes_output": c == "predict"} for c in TRAINER_COMMANDS},
            },
        )
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if begun.is_true or (cause := refusal(error)) is None:
            raise
        if rank := rank_zero_only.rank:  # type: ignore[attr-defined]
            print(f"error on rank {rank}: {cause}", file=sys.stderr)  # perhaps of this one alone
            sys.exit(2)
        fail(str(cause))


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
