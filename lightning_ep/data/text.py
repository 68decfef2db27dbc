"""Text files as packed windows of tokens, for training a language model from scratch or further."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import AutoTokenizer
from typing_extensions import override

from lightning_ep import transformers_adapter as adapter
from lightning_ep.checkpoint.loop_state import close_finished_epoch, match_batches
from lightning_ep.data import corpus
from lightning_ep.data.resumable_loader import ResumableLoader, data_ranks
from lightning_ep.data.tokenizers import (
    check_vocabulary,
    checkpoint_of,
    tokenizer_files,
    vocabulary_size,
    warn_of_other_special_tokens,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class TextDataModule(LightningDataModule):
    """Plain-text files, a tokenizer, and windows of tokens packed from them.

    Weights of a checkpoint come with its tokenizer: `CausalLM` with ``pretrained=True`` is trained with that. A model
    with random weights gets a byte-level BPE tokenizer that is trained on the files.

    The files are split into training and validation by file. Each file is followed by an end-of-text token, and the
    concatenation is cut into windows, so a window may cross documents. Batches are dicts of ``input_ids`` and
    ``labels``, int64 ``[batch_size, sequence_length]`` with equal contents: transformers' models shift the labels
    themselves.

    Tokenizer and windows are cached under a key made of the files' contents and the arguments. After ``setup`` they are
    ``tokenizer``, ``train_dataset`` and ``val_dataset``, the same on all ranks. Every data rank gets the same number of
    batches. Training batches are shuffled anew in every epoch, and a checkpoint taken in mid-epoch resumes at the next
    one; validation sees every window once (see ``ResumableLoader``).

    Args:
        source: 'stdlib' for the source files of the running Python's standard library, or a directory, file or glob
            pattern ('corpus/**/*.txt') of UTF-8 text files.
        sequence_length: Tokens per window.
        batch_size: Windows per batch and data rank.
        vocab_size: Size of the vocabulary of a tokenizer that is trained here. Small texts give fewer tokens.
        validation_fraction: Share of the bytes that is held out, between 0 and 1; whole files.
        seed: Seed of the split and of the order of the training windows.
        cache_dir: Where tokenizer and windows are kept. Default: $LIGHTNING_EP_CACHE, or ~/.cache/lightning_ep.
        num_workers: Worker processes per loader. The windows lie in memory-mapped files, so 0 is rarely a bottleneck.
        tokenizer: Directory or hub id of the tokenizer. Default: that of the checkpoint whose weights the model starts
            from, known for `CausalLM` and for modules with an attribute ``pretrained_path``; else one is trained.

    Raises:
        FileNotFoundError: In ``prepare_data``, if the source has no files.
        ValueError: In ``prepare_data``, if files cannot be split, are not UTF-8, or an argument is out of its range; in
            ``setup``, if the text is too short for one batch per data rank; there, or when a loader is asked for, if
            the model's vocabulary is smaller than the tokenizer's, or its weights are those of a checkpoint with
            another tokenizer.
    """

    tokenizer: PreTrainedTokenizerBase
    train_dataset: Dataset
    val_dataset: Dataset

    def __init__(
        self,
        source: str = "stdlib",
        sequence_length: int = 256,
        batch_size: int = 8,
        vocab_size: int = 4096,
        validation_fraction: float = 0.05,
        seed: int = 0,
        cache_dir: str | None = None,
        num_workers: int = 0,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        self.source = source
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.vocab_size = vocab_size
        self.validation_fraction = validation_fraction
        self.seed = seed
        self.cache_dir = cache_dir
        self.num_workers = num_workers
        self._tokenizer_source = tokenizer
        self._trains_tokenizer = False

    @override
    def prepare_data(self) -> None:
        """Make the tokenizer and the windows, unless they are cached. Lightning calls it on one process."""
        files = corpus.find_files(self.source)
        train, val = corpus.split_files(files, self.validation_fraction, self.seed)
        origin = self._tokenizer_files()

        def build(directory: Path) -> None:
            where = f"{len(train)} files of {self.source!r}"
            tokenizer: PreTrainedTokenizerBase
            if origin:
                rank_zero_info(f"Packing the tokens of {where} ...")
                tokenizer = AutoTokenizer.from_pretrained(origin[0].parent)
            else:
                rank_zero_info(f"Training a tokenizer on {where} and packing their tokens ...")
                tokenizer = corpus.train_tokenizer(map(corpus.read_text, train), self.vocab_size)
                tokenizer.save_pretrained(directory / "tokenizer")
            for name, part in (("train", train), ("val", val)):
                corpus.pack(part, tokenizer, self.sequence_length).save_to_disk(directory / name)

        corpus.build_once(self._cached(files, origin), build)

    def _tokenizer_files(self) -> list[Path]:
        """The files of the tokenizer to use; none if one is to be trained."""
        checkpoint = self._tokenizer_source or checkpoint_of(self._module())
        files = tokenizer_files(checkpoint) if checkpoint is not None else []
        if self._tokenizer_source is not None and not files:
            raise ValueError(f"tokenizer={self._tokenizer_source!r} has no tokenizer: no tokenizer.json or the like.")
        if checkpoint is not None and not files:
            rank_zero_warn(
                f"{checkpoint}, whose weights the model starts from, has no tokenizer: a new one is trained, whose ids "
                "mean nothing to these weights. Pass the one that they were trained with as `tokenizer`."
            )
        return files

    @override
    def setup(self, stage: str | None = None) -> None:
        """Load what ``prepare_data`` made, on every rank."""
        from datasets import load_from_disk

        origin = self._tokenizer_files()
        directory = self._cached(corpus.find_files(self.source), origin)
        if not directory.exists():
            raise FileNotFoundError(
                f"{directory} does not exist on this process. Call prepare_data() first (a Trainer does), and let"
                " source and cache_dir be the same on all processes of a node."
            )
        self._trains_tokenizer = not origin
        self.tokenizer = AutoTokenizer.from_pretrained(origin[0].parent if origin else directory / "tokenizer")
        config = getattr(self._module(), "model_config", None)  # CausalLM's, before the model is built
        if config is not None:
            self._refuse_too_small(config)
        self.train_dataset = load_from_disk(directory / "train").with_format("torch")
        self.val_dataset = load_from_disk(directory / "val").with_format("torch")
        _, data_world_size = data_ranks(self.trainer)
        for name, windows, needed in (
            ("training", len(self.train_dataset), self.batch_size * data_world_size),
            ("validation", len(self.val_dataset), data_world_size),
        ):
            if windows < needed:
                raise ValueError(
                    f"source={self.source!r} gives {windows} {name} windows of sequence_length={self.sequence_length}, "
                    f"but {data_world_size} data ranks with batch_size={self.batch_size} need at least {needed} for a "
                    "batch each. Use more text, shorter windows, smaller batches, fewer data ranks or another "
                    f"validation_fraction (now {self.validation_fraction})."
                )

    @override
    def train_dataloader(self) -> ResumableLoader:
        """Return this data rank's training batches."""
        trainer = self.trainer
        if trainer is not None:  # as ExpertParallelStrategy does, under other strategies
            close_finished_epoch(trainer)
        # overfit_batches is meant to repeat the same batches
        shuffle = trainer is None or not trainer.overfit_batches  # type: ignore[attr-defined]
        loader = self._loader(self.train_dataset, shuffle=shuffle, drop_last=True)
        if trainer is not None:
            match_batches(trainer, loader)
        return loader

    @override
    def val_dataloader(self) -> ResumableLoader:
        """Return this data rank's share of the validation windows."""
        return self._loader(self.val_dataset, shuffle=False, drop_last=False)

    def _loader(self, dataset: Dataset, shuffle: bool, drop_last: bool) -> ResumableLoader:
        self._check_vocabulary()
        data_rank, data_world_size = data_ranks(self.trainer)
        return ResumableLoader(
            dataset,
            self.batch_size,
            data_rank,
            data_world_size,
            shuffle=shuffle,
            seed=self.seed,
            drop_last=drop_last,
            collate_fn=_collate,
            num_workers=self.num_workers,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    def _cached(self, files: list[Path], origin: list[Path]) -> Path:
        root = self.cache_dir or os.environ.get("LIGHTNING_EP_CACHE") or "~/.cache/lightning_ep"
        import tokenizers

        tokenizer = corpus.fingerprint(origin) if origin else self.vocab_size
        settings = (self.sequence_length, tokenizer, self.validation_fraction, self.seed, tokenizers.__version__)
        return Path(root).expanduser() / f"text-{corpus.fingerprint(files, *settings)}"

    def _module(self) -> LightningModule | None:
        return self.trainer.lightning_module if self.trainer is not None else None

    def _check_vocabulary(self) -> None:
        # not in `setup`: models are often built later, in `configure_model`
        module = self._module()
        models: list[Any] = list(adapter.pretrained_models(module).values()) if module is not None else []
        for model in models or [getattr(module, "model", None)]:
            if hasattr(model, "config"):
                self._refuse_too_small(model.config)
                warn_of_other_special_tokens(self.tokenizer, model)
        checkpoint = checkpoint_of(module)
        if checkpoint is not None and self._trains_tokenizer and tokenizer_files(checkpoint):
            raise ValueError(
                f"The model's weights are those of {checkpoint}, which has a tokenizer, and TextDataModule has trained "
                "a new one, whose ids mean nothing to these weights: it could not know before the model was built. "
                f"Pass TextDataModule(tokenizer={checkpoint!r}), or give {type(module).__name__} an attribute "
                "`pretrained_path`."
            )

    def _refuse_too_small(self, config: Any) -> None:
        size = vocabulary_size(config)
        check_vocabulary(
            self.tokenizer,
            config,
            f"Set the model's to {len(self.tokenizer)} or more, or the data's to {size} or less."
            if self._trains_tokenizer
            else f"Use the tokenizer of these weights, not {self.tokenizer.name_or_path}, or resize the embeddings.",
        )


def _collate(windows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    input_ids = torch.stack([window["input_ids"] for window in windows])
    return {"input_ids": input_ids, "labels": input_ids.clone()}
