"""Text files as packed windows of tokens, for training a language model from scratch or further."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_ep.data import corpus
from lightning_ep.data.packed_data import PREVIEWED, PackedDataModule
from lightning_ep.data.preparation import Part, Rows, Samples
from lightning_ep.data.tokenizers import checkpoint_of

if TYPE_CHECKING:
    from datasets import Dataset

_BEGINNING = 100_000
"""Characters of a file that are looked at in a preview."""


class TextDataModule(PackedDataModule):
    """Plain-text files, a tokenizer, and windows of tokens packed from them.

    Weights of a checkpoint come with its tokenizer: `CausalLM` with ``pretrained=True`` is trained with that. A model
    with random weights gets a byte-level BPE tokenizer that is trained on the files.

    The files are split into training and validation by file. Each is a document and ends with an end-of-text token.
    Long ones are cut into pieces of ``sequence_length`` tokens, and pieces are packed whole into windows, in which they
    do not attend to each other. Every token is predicted but the first of each piece. See `PackedDataModule` for
    batches, the cache, and what there is after ``setup``.

    Args:
        source: 'stdlib' for the source files of the running Python's standard library, or a directory, file or glob
            pattern (``corpus/**/*.txt``) of UTF-8 text files.
        sequence_length: Tokens per window.
        batch_size: Windows per batch and data rank.
        vocab_size: Size of the vocabulary of a tokenizer that is trained here. Small texts give fewer tokens.
        validation_fraction: Share of the bytes that is held out, between 0 and 1; whole files. 0 for no validation.
        seed: Seed of the split and of the order of the training windows.
        cache_dir: Where tokenizer and windows are kept. Default: $LIGHTNING_EP_CACHE, or ~/.cache/lightning_ep.
        num_workers: Worker processes per loader. The windows lie in memory-mapped files, so 0 is rarely a bottleneck.
        tokenizer: Directory or hub id of the tokenizer. Default: that of the checkpoint whose weights the model starts
            from, known for `CausalLM` and for modules with an attribute ``pretrained_path``; else one is trained.
        num_proc: Processes that prepare the windows. Default: one for each CPU of this process.
        across_documents: Whether tokens see all that is before them in the window, other documents too: for models with
            layers that cannot keep documents apart (linear attention, convolutions).

    Raises:
        FileNotFoundError: In ``prepare_data`` and ``setup``, if the source has no files.
        ValueError: In ``prepare_data``, if files cannot be split, are not UTF-8, or an argument is out of its range; in
            ``setup``, if the text is too short for one batch per data rank; there, or when a loader is asked for, if
            the model's vocabulary is smaller than the tokenizer's, or its weights are those of a checkpoint with
            another tokenizer.
    """

    kind = "text"

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
        num_proc: int | None = None,
        across_documents: bool = False,
    ) -> None:
        super().__init__(
            sequence_length, batch_size, validation_fraction, seed, cache_dir, num_workers, num_proc, tokenizer
        )
        self.source = source
        self.vocab_size = vocab_size
        self.across_documents = across_documents

    @override
    def sources(self) -> list[Rows]:
        files = corpus.find_files(self.source)

        def read(indices: Sequence[int]) -> list[str]:
            return [corpus.read_text(files[index]) for index in indices]

        return [Rows(self.source, len(files), corpus.fingerprint(files), read, rows_per_task=16)]

    @override
    def first_rows(self) -> list[Rows]:
        """The beginnings of the first files."""
        files = corpus.find_files(self.source)[: PREVIEWED // 8]

        def read(indices: Sequence[int]) -> list[str]:
            return [corpus.read_text(files[index], _BEGINNING) for index in indices]

        return [Rows(self.source, len(files), "", read)]

    @override
    def settings(self) -> Sequence[object]:
        return [self.vocab_size]

    @override
    def split(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        files = corpus.find_files(self.source)
        train, val = (set(part) for part in corpus.split_files(files, self.validation_fraction, self.seed))
        indices = np.arange(len(files))
        return indices[[file in train for file in files]], indices[[file in val for file in files]]

    @override
    def make_tokenizer(self, directory: Path, training: Sequence[Part]) -> None:
        """Train one, on the training files."""
        checkpoint = checkpoint_of(self._module())
        if checkpoint is not None:
            rank_zero_warn(
                f"{checkpoint}, whose weights the model starts from, has no tokenizer: a new one is trained, whose ids "
                "mean nothing to these weights. Pass the one that they were trained with as `tokenizer`."
            )
        rank_zero_info(f"Training a tokenizer on {sum(len(part.indices) for part in training)} files ...")
        texts = (text for part in training for index in part.indices.tolist() for text in part.rows.read([index]))
        corpus.train_tokenizer(texts, self.vocab_size).save_pretrained(directory)

    @override
    def check(self) -> None:
        refuse_without_end(self.tokenizer)

    @override
    def make_samples(self, rows: Sequence[str], samples: Samples) -> None:
        add_texts(self.tokenizer, rows, self.sequence_length, samples)


def refuse_without_end(tokenizer: Any) -> None:
    """Raises ValueError if a tokenizer has no end-of-text token."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer ({tokenizer.name_or_path}) has no end-of-text token, with which documents end. Set its "
            "`eos_token` and save it, or pass another one as `tokenizer`."
        )


def add_texts(tokenizer: Any, texts: Sequence[str], sequence_length: int, samples: Samples) -> None:
    """Tokenizes texts, ends each with the end-of-text token, and cuts those that no window holds.

    A tokenizer that begins texts with a token of its own, or ends them, does so for every one.
    """
    end = tokenizer.eos_token_id
    # Not verbose: it would warn of texts longer than a model's input, which are cut here.
    for ids in tokenizer(list(texts), verbose=False)["input_ids"] if texts else ():
        if ids[-1:] != [end]:
            ids.append(end)
        pieces = [ids[begin : begin + sequence_length] for begin in range(0, len(ids), sequence_length)]
        for piece in pieces:
            if len(piece) > 1:  # a single token is predicted from nothing, and predicts nothing
                samples.add(piece, [True] * len(piece))
        samples.note("long texts were cut", int(len(pieces) > 1))
