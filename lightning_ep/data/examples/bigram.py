"""The baseline that a language model has to beat, a discounted bigram model, and its loss beside that of a run."""

from __future__ import annotations

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_ep.distributed.console import print_once
from lightning_ep.ops.cross_entropy import IGNORE


def bigram_cross_entropy(
    train: np.ndarray,
    validation: np.ndarray,
    vocab_size: int,
    train_labels: np.ndarray | None = None,
    validation_labels: np.ndarray | None = None,
) -> float:
    """Cross-entropy of an interpolated Kneser-Ney bigram model on the predictions that a causal language model makes.

    With ``c`` the counts of pairs in ``train`` and the discount ``D = n1 / (n1 + 2 n2)`` from the numbers of pairs seen
    once and twice,

    ``p(w | v) = max(c(v, w) - D, 0) / c(v) + D * |{x: c(v, x) > 0}| / c(v) * p_low(w)``,

    where ``p_low(w)`` is the share of distinct pairs that end in ``w``, discounted by ``D`` in favour of the uniform
    distribution so that no token has probability zero. A ``v`` that is not in ``train`` leaves ``p_low(w)``. See Chen
    and Goodman (1999), "An empirical study of smoothing techniques for language modeling".

    Args:
        train: Windows to count, integers ``[N, S]``.
        validation: Windows to predict, integers ``[M, S]``. Each predicts its positions 1 to ``S - 1`` from the token
            before, as a causal language model does whose labels are its inputs.
        vocab_size: Number of different tokens, more than the largest id.
        train_labels: ``[N, S]``, -100 where a token is not predicted: such pairs are not counted. Default: all are.
        validation_labels: The same ``[M, S]`` of what is predicted.

    Returns:
        Nats per token.
    """
    pairs, counts = np.unique(_pairs(train, train_labels, vocab_size), return_counts=True)
    first, second = pairs // vocab_size, pairs % vocab_size
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / (once + 2 * twice) if once else 0.5  # nothing to estimate it from: any value between 0 and 1

    endings = np.bincount(second, minlength=vocab_size)
    spread = discount * np.count_nonzero(endings) / vocab_size
    p_low = (np.maximum(endings - discount, 0) + spread) / len(pairs)

    total = np.bincount(first, weights=counts, minlength=vocab_size)
    distinct = np.bincount(first, minlength=vocab_size)
    # the weight of p_low; 1 for a token that never came first
    backoff = np.divide(discount * distinct, total, out=np.ones(vocab_size), where=total > 0)

    wanted = _pairs(validation, validation_labels, vocab_size)
    v, w = wanted // vocab_size, wanted % vocab_size
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, counts[place], 0)
    p = np.maximum(seen - discount, 0) / np.maximum(total[v], 1) + backoff[v] * p_low[w]
    return float(-np.log(p).mean())


def _pairs(windows: np.ndarray, labels: np.ndarray | None, vocab_size: int) -> np.ndarray:
    """Number the pairs of neighbours inside each window ``[N, S]``, ``first * V + second``; int64, one dimension."""
    windows = windows.astype(np.int64)
    pairs = windows[:, :-1] * vocab_size + windows[:, 1:]
    return pairs.ravel() if labels is None else pairs[labels[:, 1:] != IGNORE]


class BigramBaseline(Callback):
    """Logs what a discounted bigram model, fitted on the training data, reaches on the validation data.

    The value, in nats per token and logged as ``val/bigram_loss``, is over all predictions that a language model makes
    on all validation windows: compare it with a loss that is not cut short by ``limit_val_batches``. It is computed
    once, on every rank for itself (a second for some million tokens), and printed beside the loss after each validation
    and at the end of ``fit``. See `bigram_cross_entropy` for the model.

    The Trainer's datamodule must have ``tokenizer`` and, with a column ``input_ids`` of windows of equal length (and
    ``labels``, if not all tokens are predicted), ``train_dataset`` and ``val_dataset``, as
    ``lightning_ep.data.TextDataModule`` has.

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
            train, val = (part.with_format("numpy")[:] for part in (data.train_dataset, data.val_dataset))
            windows, labels = (train["input_ids"], val["input_ids"]), (train.get("labels"), val.get("labels"))
            self._loss = bigram_cross_entropy(*windows, len(data.tokenizer), *labels)
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
