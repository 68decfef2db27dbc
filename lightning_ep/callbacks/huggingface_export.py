"""The trained model as a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_ep import transformers_adapter as adapter
from lightning_ep.data.tokenizers import check_vocabulary
from lightning_ep.distributed.console import print_once
from lightning_ep.hub.companions import tokenizer_of
from lightning_ep.hub.directory import ExportDtype, refuse_existing
from lightning_ep.hub.export import check_export, export_sharded


class HuggingFaceExport(Callback):
    """Writes the model at the end of ``fit`` as a directory that transformers and vLLM read.

    The weights are in the hub's layout (per-expert names), in safetensors files that the ranks write side by side, with
    an index, the config, the generation config, the tokenizer with its chat templates if the datamodule or the original
    checkpoint has one, and a README with the commands that serve and upload it. Nothing is written after
    ``fast_dev_run``. For a checkpoint in mid-training use ``lightning-ep export``.

    Args:
        path: The new directory, on a filesystem that all nodes share. It appears when it is complete.
        dtype: What parameters are in the files. Default: what they are in training (fp32 with ``bf16-mixed``).

    Raises:
        FileExistsError: At the start of ``fit``, if ``path`` is there already and not empty.
        ValueError: At the start of ``fit``, if the module does not contain exactly one transformers model, or the
            datamodule's tokenizer has more tokens than the model.
        CheckpointError: At the start of ``fit``, for all else that the export would fail for: adapters or replaced
            modules, which no config describes, a directory that cannot be written, a disk that is too small.
    """

    def __init__(self, path: str, dtype: ExportDtype | None = None) -> None:
        self.path = path
        self.dtype = dtype
        self._ended = False

    @property
    def _dtype(self) -> torch.dtype | None:
        return getattr(torch, self.dtype) if self.dtype is not None else None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_existing(Path(self.path))
        model, tokenizer = _model(pl_module), tokenizer_of(trainer)
        if tokenizer is not None:
            check_vocabulary(tokenizer, model.config, "Export, and train, with the tokenizer of the model.")
        check_export(model, Path(self.path), self._dtype, tokenizer)
        self._ended = False

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = True
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        export_sharded(_model(pl_module), Path(self.path), self._dtype, tokenizer_of(trainer))
        print_once(trainer, f"exported to {self.path}")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._ended:
            # Lightning has no hook here while the model is still on its device.
            rank_zero_warn(
                f"{self.path} was not written: the checkpoint of this run has no training step left to do. Run "
                f"`lightning-ep export {trainer.ckpt_path} {self.path}` instead."
            )


def _model(module: LightningModule) -> PreTrainedModel:
    models = adapter.pretrained_models(module)
    if len(models) != 1:
        raise ValueError(
            f"HuggingFaceExport writes one transformers model, and {type(module).__name__} contains {len(models)} "
            f"({', '.join(models) or 'none'}). To write several, leave the callback out and call "
            "`lightning_ep.hub.export.export_sharded(model, path)` for each on all ranks, in `on_train_end`."
        )
    return next(iter(models.values()))
