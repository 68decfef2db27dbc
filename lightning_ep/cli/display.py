"""What a run of the command line shows: a summary of the model, one line of progress, no advertising."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count
from typing_extensions import override


class Summary(ModelSummary):
    """Parameters of the modules. Lightning's also counts operations, of which it sees none in sharded models."""

    @staticmethod
    @override
    def summarize(
        summary_data: list[tuple[str, list[str]]], total_parameters: int, trainable_parameters: int, *_: Any, **__: Any
    ) -> None:
        columns = dict(summary_data)
        for name, kind, count in zip(columns["Name"], columns["Type"], columns["Params"], strict=True):
            rank_zero_info(f"{name}: {kind}, {count.strip()} parameters")
        trainable, total = map(get_human_readable_count, (trainable_parameters, total_parameters))
        rank_zero_info(f"{trainable.strip()} of {total.strip()} parameters are trained")


class Progress(TQDMProgressBar):
    """One line, also with many metrics, and without the version of a logger's directory."""

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


def add_defaults(config: dict[str, Any]) -> None:
    """Puts both into the ``callbacks`` of a Trainer's arguments, where the user wants such and has none of his own."""
    callbacks = config["callbacks"] = list(config.get("callbacks") or [])
    for flag, kind, default in (
        ("enable_progress_bar", ProgressBar, Progress),
        ("enable_model_summary", ModelSummary, Summary),
    ):
        wanted = config.get(flag) is not False and not config.get("barebones")
        if wanted and not any(isinstance(callback, kind) for callback in callbacks):
            callbacks.append(default())


def leave_out_tips() -> None:
    """Keeps two messages of Lightning's from the log: for a service, and that the callbacks above were found."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)


def _is_no_tip(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return "litlogger" not in text and "Trainer already configured with model summary callbacks" not in text
