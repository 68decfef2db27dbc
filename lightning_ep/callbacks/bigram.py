"""The bigram baseline beside the validation loss."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_ep.callbacks.console import print_once
from lightning_ep.data.bigram import bigram_cross_entropy


class BigramBaseline(Callback):
    """Logs what a discounted bigram model, fitted on the training data, reaches on the validation data.

    The value, in nats per token and logged as ``val/bigram_loss``, is over all predictions that a language model makes
    on all validation windows: compare it with a loss that is not cut short by ``limit_val_batches``. It is computed
    once, on every rank for itself (a second for some million tokens), and printed beside the loss after each validation
    and at the end of ``fit``. See ``lightning_ep.data.bigram_cross_entropy`` for the model.

    The Trainer's datamodule must have ``tokenizer`` and, with a column ``input_ids`` of windows of equal length,
    ``train_dataset`` and ``val_dataset``, as ``lightning_ep.data.TextDataModule`` has.

    Args:
        monitor: The logged validation loss to print it beside, in nats per token.

    Raises:
        TypeError: In ``setup``, if the datamodule lacks one of these.
    """

    def __init__(self, monitor: str = "val/loss") -> None:
        self.monitor = monitor
        self._loss: float | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        datamodule = getattr(trainer, "datamodule", None)
        missing = [name for name in ("tokenizer", "train_dataset", "val_dataset") if not hasattr(datamodule, name)]
        if missing:
            raise TypeError(
                f"BigramBaseline counts the tokens of the datamodule, but {type(datamodule).__name__} has no"
                f" {', '.join(missing)}. Use lightning_ep.data.TextDataModule, or leave the callback out."
            )
        self._loss = None  # of the datamodule of another run

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if self._loss is None:
            data = trainer.datamodule  # type: ignore[attr-defined]
            train, val = (part.with_format("numpy")[:]["input_ids"] for part in (data.train_dataset, data.val_dataset))
            self._loss = bigram_cross_entropy(train, val, len(data.tokenizer))
        # equal on all ranks; sync_dist only because Lightning warns without it
        pl_module.log("val/bigram_loss", self._loss, sync_dist=True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            print_once(trainer, f"step {trainer.global_step}: {self._comparison(trainer)}")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the progress bar is gone by now
        if self._loss is not None and trainer.is_global_zero:
            print(f"after training: {self._comparison(trainer)}")

    def _comparison(self, trainer: Trainer) -> str:
        loss = trainer.callback_metrics.get(self.monitor)
        name = "validation loss" if loss is not None else f"{self.monitor} was not logged"
        value = f" {loss:.2f} nats/token" if loss is not None else ""
        return f"{name}{value}, discounted bigram {self._loss:.2f}"
