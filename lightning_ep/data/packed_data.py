"""What data modules of packed documents share: a tokenizer, prepared windows, and loaders that resume."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from typing_extensions import override

from lightning_ep.checkpoint.loop_state import close_finished_epoch, match_batches
from lightning_ep.data import corpus
from lightning_ep.data.cache import cache_root, find_prepared
from lightning_ep.data.collate import Collate, FilledUp, open_windows, stacked, without_positions
from lightning_ep.data.predicted_documents import Documents, padded, prepare_documents
from lightning_ep.data.preparation import COUNTS, FORMAT, Part, Rows, Samples, describe, prepare, refuse_sizes
from lightning_ep.data.resumable_loader import ResumableLoader, data_ranks
from lightning_ep.data.tokenizers import check_of_module, checkpoint_of, pad_token_id, refuse_too_small, tokenizer_files

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PREVIEWED = 200
"""Rows of a source that `PackedDataModule.first_rows` gives."""


class PackedDataModule(LightningDataModule):
    """Documents packed whole into windows of ``sequence_length`` tokens; they do not attend to each other.

    A subclass says where rows come from and what documents they become: `sources`, `settings` and `make_samples`; if it
    wants to, `validation_sources`, `split` and `make_tokenizer`.

    ``prepare_data`` makes the windows, in several processes, once for the same rows, tokenizer and settings. Lightning
    calls it on one process of a node while the others wait, however long it takes. After ``setup``, ``train_dataset``
    and ``val_dataset`` are the windows, ``tokenizer`` is what made them, and ``counts`` says what is in them and what
    was left out; the same on all ranks. Batches are dicts of ``input_ids``, ``labels`` and ``position_ids``, int64
    ``[batch_size, sequence_length]``; see `lightning_ep.data.windows.Window`. Every data rank gets the same number of
    batches. Training batches are shuffled anew in every epoch, and a checkpoint taken in mid-epoch resumes at the next
    one; validation sees every window once (see ``ResumableLoader``).

    Args:
        sequence_length: Tokens per window.
        batch_size: Windows per batch and data rank.
        validation_fraction: Share of the rows of every source that is held out; 0 for no validation. It has no meaning
            where a subclass gives rows for validation.
        seed: Seed of the split, of the mixture of sources and of the order of the training windows.
        cache_dir: Where windows are kept. Default: $LIGHTNING_EP_CACHE, or ~/.cache/lightning_ep.
        num_workers: Worker processes per loader. The windows lie in memory-mapped files, so 0 is rarely a bottleneck.
        num_proc: Processes that prepare the windows. Default: one for each CPU of this process.
        tokenizer: Directory or hub id of the tokenizer. Default: that of the checkpoint whose weights the model starts
            from, known for `CausalLM` and for modules with an attribute ``pretrained_path``.

    Raises:
        ValueError: If a size is too low; in ``prepare_data``, if there is no tokenizer; in ``setup``, if some data rank
            would get no batch; there, or with a loader, if the model's vocabulary is smaller than the tokenizer's.
    """

    kind: ClassVar[str] = "packed"
    """What directories in the cache begin with."""
    across_documents = False
    """Whether documents see those before them in the window; batches then have a mask in place of positions."""
    packs = True  # documents into windows
    placeholders: Sequence[int] = ()  # tokens that stand for an image or a clip together: previews show how many
    trains: LightningModule | None = None
    """The module that will be trained, where there is no Trainer to ask: its weights say which tokenizer it is."""

    tokenizer: PreTrainedTokenizerBase
    train_dataset: Dataset
    val_dataset: Dataset | None
    predict_dataset: Documents
    counts: dict[str, dict[str, Any]]

    def __init__(
        self,
        sequence_length: int = 4096,
        batch_size: int = 1,
        validation_fraction: float = 0.05,
        seed: int = 0,
        cache_dir: str | None = None,
        num_workers: int = 0,
        num_proc: int | None = None,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        refuse_sizes(sequence_length, batch_size, seed, num_workers, num_proc)
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.seed = seed
        self.cache_dir = cache_dir
        self.num_workers = num_workers
        self.num_proc = num_proc
        self._tokenizer_source = tokenizer
        self.makes_tokenizer = False  # as `setup` and `load_tokenizer` found
        self._directory: Path | None = None  # in the cache

    # ------------------------------------------------------------------------------------------ what a subclass says

    def sources(self) -> Sequence[Rows]:
        """The rows that are trained on; asked where data is prepared, one process of each node. Rows are read later."""
        raise NotImplementedError

    def validation_sources(self) -> Sequence[Rows] | None:
        """Rows of their own for validation. Default: none, so that some of `sources` are held out."""
        return None

    def settings(self) -> Sequence[object]:
        """Arguments of the subclass on which samples depend. Their ``repr`` is part of the cache's key."""
        raise NotImplementedError

    def make_samples(self, rows: Sequence[Any], samples: Samples) -> None:
        """Add what rows become to ``samples``; ``self.tokenizer`` is there.

        Called in processes forked from the one that prepares, for a few hundred rows of one source at a time, so that
        tokenizers may take many texts at once. What a row becomes must not depend on the rows beside it.
        """
        raise NotImplementedError

    def split(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the rows to train on, and of those to validate on. Default: random rows."""
        order = np.random.default_rng(self.seed).permutation(rows.count)
        # At least one, whatever the share, and never all.
        held_out = min(max(1, round(self.validation_fraction * rows.count)), rows.count - 1)
        return np.sort(order[held_out:]), np.sort(order[:held_out])

    @property
    def window_length(self) -> int:
        """Tokens of a window. Default: ``sequence_length``."""
        return self.sequence_length

    def collate_function(self) -> Collate:
        """What makes a batch of windows. Default: they are stacked."""
        return without_positions if self.across_documents else stacked

    def first_rows(self) -> Sequence[Rows]:
        """Rows of each source for a look at them. Default: the first 200."""
        return [replace(rows, count=min(rows.count, PREVIEWED)) for rows in self.sources()]

    def check(self) -> None:
        """Raise ValueError if ``self.tokenizer`` does not fit what is asked for. Default: any does."""

    def make_tokenizer(self, directory: Path, training: Sequence[Part]) -> None:
        """Save a tokenizer where the model has none. Default: that is refused."""
        checkpoint = checkpoint_of(self._module())
        because = f"{checkpoint} has none" if checkpoint is not None else "the model starts from no checkpoint"
        raise ValueError(
            f"{type(self).__name__} needs a tokenizer, and {because}. Pass the directory or hub id of one: "
            f"{type(self).__name__}(tokenizer=...)."
        )

    # ------------------------------------------------------------------------------------------------------ Lightning

    @override
    def prepare_data(self) -> None:
        """Make the windows, unless they are cached. Lightning calls it on one process of each node."""
        origin = self._tokenizer_files()
        if origin:  # what is wrong is said before thousands of rows are read
            self.use_tokenizer(origin[0].parent)
        sources = self.sources()
        validation = None if self._predicts else self.validation_sources()
        self._directory = cache_root(self.cache_dir) / self._name(origin, sources, validation)
        if self._predicts:
            corpus.build_once(self._directory, lambda directory: self._make_documents(directory, sources))
        else:
            corpus.build_once(self._directory, lambda target: self._make_windows(target, origin, sources, validation))

    @override
    def setup(self, stage: str | None = None) -> None:
        """Load what ``prepare_data`` made, on every rank."""
        origin, directory = self._tokenizer_files(), self._found()
        self._directory = directory
        self.makes_tokenizer = not origin
        self.use_tokenizer(origin[0].parent if origin else directory / "tokenizer")
        config = getattr(self._module(), "model_config", None)  # CausalLM's, before the model is built
        if config is not None:
            refuse_too_small(self.tokenizer, config, self.makes_tokenizer)
        if self._predicts:
            self.predict_dataset = Documents(directory)
            self.counts = {"predict": self.predict_dataset.counts}
        else:
            parts = [name for name in ("train", "val") if (directory / name).exists()]
            self.counts = {name: json.loads((directory / name / COUNTS).read_text()) for name in parts}
            windows = {name: open_windows(directory / name) for name in parts}
            self.val_dataset = windows.get("val")
            if "train" in windows:
                self.train_dataset = windows["train"]
        for name, counts in self.counts.items():
            rank_zero_info(f"{type(self).__name__}, {name}: {describe(counts)}")
        if not self._predicts:
            self.batches_per_epoch(data_ranks(self.trainer)[1])
        elif not len(self.predict_dataset):
            raise ValueError(f"No row of {', '.join(self.counts['predict']['sources'])} gives a document to predict.")

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
    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Return this data rank's share of the validation windows; nothing if none are held out.

        For several sources a dict of loaders, if the module weighs tokens, as `CausalLM` does.
        """
        if self.val_dataset is None:
            return []
        if not self._weighs_tokens:
            return self._loader(self.val_dataset, shuffle=False, drop_last=False)
        loaders, end = {}, 0
        for name, counts in self.counts["val"]["sources"].items():
            begin, end = end, end + counts["windows"]
            if end > begin:
                windows = FilledUp(
                    self.val_dataset.select(range(begin, end)),
                    data_ranks(self.trainer)[1],
                    self.window_length,
                    pad_token_id(self.tokenizer),
                )
                loaders[name] = self._loader(windows, shuffle=False, drop_last=False)
        return loaders if len(loaders) > 1 else next(iter(loaders.values()), [])

    @override
    def predict_dataloader(self) -> EVAL_DATALOADERS:
        """Return the documents of all rows, each once and in order, a sequence for each; ranks share them.

        Held-out rows are among them, and weights have no meaning.
        """
        check_of_module(self.tokenizer, self._module(), self.makes_tokenizer, type(self).__name__)
        return DataLoader(
            self.predict_dataset,  # type: ignore[arg-type]  # it has all that is asked of one
            batch_size=self.batch_size,
            collate_fn=partial(padded, most=self.sequence_length, pad_token_id=pad_token_id(self.tokenizer)),
            num_workers=self.num_workers,
        )

    def row_of(self, index: int) -> dict[str, Any]:
        """``source`` and ``row``, its number there, of what predict has given for a document; for what writes it."""
        return self.predict_dataset.row_of(index)

    # ------------------------------------------------------------------------------------------- without a Trainer

    def load_tokenizer(self, directory: Path, training: Sequence[Part]) -> None:
        """Load the tokenizer, or one that is made of ``training`` and saved in a directory."""
        origin = self._tokenizer_files()
        if not origin:
            self.make_tokenizer(directory, training)
        self.makes_tokenizer = not origin
        self.use_tokenizer(origin[0].parent if origin else directory)

    def use_tokenizer(self, directory: Path) -> None:
        """Load the tokenizer of a directory; raises what `check` raises."""
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.check()

    @property
    def directory(self) -> Path:
        """Where in the cache the windows are; known once ``prepare_data`` or ``setup`` was called."""
        assert self._directory is not None
        return self._directory

    def batches_per_epoch(self, data_world_size: int) -> int | None:
        """Training batches of each of so many data ranks; known after ``setup``. None if there are no epochs.

        Raises:
            ValueError: If there are too few windows to give every data rank a batch.
        """
        checks = [("training", len(self.train_dataset), self.batch_size * data_world_size)]
        if self.val_dataset is not None:
            checks.append(("validation", len(self.val_dataset), 1 if self._weighs_tokens else data_world_size))
        for name, found, needed in checks:
            if found < needed:
                raise ValueError(
                    f"{', '.join(map(repr, self.counts['train']['sources']))}: {found} {name} windows of "
                    f"sequence_length={self.sequence_length}, but {data_world_size} data ranks with batch_size="
                    f"{self.batch_size} need at least {needed} for a batch each. Use more data, shorter windows, "
                    "smaller batches, fewer data ranks or another validation_fraction (now "
                    f"{self.validation_fraction})."
                )
        return len(self.train_dataset) // (self.batch_size * data_world_size)

    # --------------------------------------------------------------------------------------------------------- inside

    @property
    def _predicts(self) -> bool:
        return self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING

    @property
    def _processes(self) -> int:
        return self.num_proc or len(os.sched_getaffinity(0))

    def _make_windows(
        self, directory: Path, origin: list[Path], sources: Sequence[Rows], validation: Sequence[Rows] | None
    ) -> None:
        parts = self._parts(sources, validation)
        if not origin:
            self.make_tokenizer(directory / "tokenizer", parts["train"])
            self.use_tokenizer(directory / "tokenizer")
        for name, rows in parts.items():
            if not rows:  # a subclass reads them otherwise
                continue
            (directory / name).mkdir()
            prepare(
                directory / name,
                rows,
                self.make_samples,
                self.window_length,
                pad_token_id(self.tokenizer),
                self._processes,
                shuffle_seed=self.seed if name == "train" else None,
                description=f"preparing {name}",
                pack=self.packs,
            )

    def _make_documents(self, directory: Path, sources: Sequence[Rows]) -> None:
        prepare_documents(directory, sources, self.make_samples, self.sequence_length, self._processes)

    def _found(self) -> Path:
        """The directory of what was prepared, on every rank."""

        def locate() -> str:
            validation = None if self._predicts else self.validation_sources()
            return self._name(self._tokenizer_files(), self.sources(), validation)

        return find_prepared(self, getattr(self._directory, "name", None), locate, cache_root(self.cache_dir))

    def _parts(self, sources: Sequence[Rows], validation: Sequence[Rows] | None) -> dict[str, list[Part]]:
        if validation is not None or self.validation_fraction == 0:
            whole = {"train": sources} | ({"val": validation} if validation is not None else {})
            return {name: [Part(rows, np.arange(rows.count)) for rows in some] for name, some in whole.items()}
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction} must lie between 0 and 1, such as 0.05.")
        split = [(rows, *self.split(rows)) for rows in sources]
        return {
            "train": [Part(rows, train) for rows, train, _ in split],
            "val": [Part(rows, val) for rows, _, val in split],
        }

    def _name(self, origin: list[Path], sources: Sequence[Rows], validation: Sequence[Rows] | None) -> str:
        """What it is called in the cache."""
        import tokenizers

        rows = [[(r.name, r.count, r.fingerprint, r.weight) for r in some] for some in (sources, validation or ())]
        windows = (self.seed, self.validation_fraction, validation is None)
        shared = (self.sequence_length, "documents" if self._predicts else windows)
        settings = (FORMAT, type(self).__qualname__, rows, shared, tuple(self.settings()), tokenizers.__version__)
        return f"{self.kind}-{corpus.fingerprint(origin, *settings)}"

    def _tokenizer_files(self) -> list[Path]:
        """The files of the tokenizer to use; none if one is to be made."""
        checkpoint = self._tokenizer_source or checkpoint_of(self._module())
        files = tokenizer_files(checkpoint) if checkpoint is not None else []
        if self._tokenizer_source is not None and not files:
            raise ValueError(f"tokenizer={self._tokenizer_source!r} has no tokenizer: no tokenizer.json or the like.")
        if self._predicts and not files:
            raise ValueError(
                "predict needs the tokenizer that the model was trained with, and its weights come with none: pass the "
                f"directory of it, {type(self).__name__}(tokenizer=...). One that a run has made is in its cache."
            )
        return files

    @property
    def _weighs_tokens(self) -> bool:
        return getattr(self._module(), "weighs_tokens", False)

    def _loader(self, dataset: Any, shuffle: bool, drop_last: bool) -> ResumableLoader:
        check_of_module(self.tokenizer, self._module(), self.makes_tokenizer, type(self).__name__)
        return ResumableLoader(
            dataset,
            self.batch_size,
            *data_ranks(self.trainer),
            shuffle=shuffle,
            seed=self.seed,
            drop_last=drop_last,
            collate_fn=self.collate_function(),
            num_workers=self.num_workers,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    def _module(self) -> LightningModule | None:
        return self.trainer.lightning_module if self.trainer is not None else self.trains
