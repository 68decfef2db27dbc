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
from lightning_ep.hub.adapter_files import AdapterFormat, check_adapters, export_adapters
from lightning_ep.hub.beneath import is_adapted
from lightning_ep.hub.companions import tokenizer_of
from lightning_ep.hub.directory import ExportDtype, refuse_existing
from lightning_ep.hub.export import check_export, export_sharded
from lightning_ep.hub.new_files import WritesSomethingNew


class HuggingFaceExport(Callback, WritesSomethingNew):
    """Writes the model, or its adapter, at the end of ``fit`` as a directory that transformers, PEFT and vLLM read.

    The weights are in the hub's layout (per-expert names), in safetensors files that the ranks write side by side, with
    an index, the config, the generation config, the tokenizer with its chat templates if the datamodule or the original
    checkpoint has one, and a README with the commands that serve and upload it. Nothing is written after
    ``fast_dev_run``. For a checkpoint in mid-training use ``lightning-ep export``.

    Of a model with adapters the adapter is written, as PEFT does it, or the model with the adapter in its weights.

    Args:
        path: The new directory, on a filesystem that all nodes share. It appears when it is complete.
        dtype: What parameters are in the files. Default: what they are in training (with ``bf16-mixed`` fp32, and bf16
            for a frozen model beneath adapters).
        merge: Write the whole model with the adapter (LoRA) in its weights: the sum in fp32, rounded once.
        adapter_format: ``"peft"``, or ``"vllm"`` for experts under the names that vLLM reads.

    Raises:
        FileExistsError: Before data and model are made, if ``path`` is there already and not empty.
        ValueError: At the start of ``fit``, if the module does not contain exactly one transformers model, or the
            datamodule's tokenizer has more tokens than the model.
        CheckpointError: At the start of ``fit``, for all else that the export would fail for: replaced modules, which
            no config describes, adapters that are no sums (DoRA) or that vLLM does not read, a directory that cannot
            be written, a disk that is too small.
    """

    writes_after = "fit"

    def __init__(
        self,
        path: str,
        dtype: ExportDtype | None = None,
        merge: bool = False,
        adapter_format: AdapterFormat = "peft",
    ) -> None:
        if merge and adapter_format != "peft":
            raise ValueError(f"adapter_format={adapter_format!r} is for adapters, and merge=True leaves none.")
        self.path = path
        self.dtype = dtype
        self.merge = merge
        self.adapter_format = adapter_format
        self._ended = False

    @property
    def _dtype(self) -> torch.dtype | None:
        return getattr(torch, self.dtype) if self.dtype is not None else None

    def _writes_adapter(self, model: PreTrainedModel) -> bool:
        if self.adapter_format != "peft" and not is_adapted(model):
            raise ValueError(f"adapter_format={self.adapter_format!r}: {type(model).__name__} has no adapters.")
        return is_adapted(model) and not self.merge

    @override
    def refuse_existing(self) -> None:
        refuse_existing(Path(self.path))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.refuse_existing()
        model, tokenizer = _model(pl_module), tokenizer_of(trainer)
        if tokenizer is not None:
            check_vocabulary(tokenizer, model.config, "Export, and train, with the tokenizer of the model.")
        if self._writes_adapter(model):
            check_adapters(model, Path(self.path), self._dtype, tokenizer, self.adapter_format)
        else:
            check_export(model, Path(self.path), self._dtype, tokenizer, self.merge)
        self._ended = False

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = True
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        model, tokenizer = _model(pl_module), tokenizer_of(trainer)
        if self._writes_adapter(model):
            export_adapters(model, Path(self.path), self._dtype, tokenizer, self.adapter_format)
        else:
            export_sharded(model, Path(self.path), self._dtype, tokenizer, merge=self.merge)
        print_once(trainer, f"exported to {self.path}, whose README.md says how to ask and serve it")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._ended:
            # Lightning has no hook here while the model is still on its device.
            rank_zero_warn(
                f"Nothing was trained, and {self.path} was not written: {trainer.ckpt_path}, from which this run went "
                "on, has no training step left to do. If it is another run's, give this one a directory of its own "
                "(dirpath of ModelCheckpoint); if you want what it holds, run `lightning-ep export "
                f"{trainer.ckpt_path} {self.path}`."
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
