"""Text that is packed as it is read: a corpus that is too large to prepare first."""

from __future__ import annotations

import glob
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_ep.data.collate import stacked, without_positions
from lightning_ep.data.conversations import MalformedRow
from lightning_ep.data.packed_data import PREVIEWED
from lightning_ep.data.packed_stream import PackedStream, StreamLoader
from lightning_ep.data.preparation import Rows, Samples
from lightning_ep.data.resumable_loader import data_ranks
from lightning_ep.data.row_files import Row, Source, refuse_split_of_files, saved_dataset
from lightning_ep.data.rows import RowsDataModule
from lightning_ep.data.text import add_texts, refuse_without_end
from lightning_ep.data.text_files import KINDS, PASSED_OVER, no_text, refuse_unreadable, stream_files
from lightning_ep.data.tokenizers import check_of_module, pad_token_id
from lightning_ep.distributed.agreement import agree, join

if TYPE_CHECKING:
    import datasets


class TextStreamDataModule(RowsDataModule):
    """Texts that are read, tokenized and packed while the model trains.

    Nothing is prepared but rows for validation, if there are any. Texts end with an end-of-text token, long ones are
    cut, and pieces are packed as `TextDataModule` does it, over 256 windows at a time, which are mixed. The order
    depends on nothing but the data, the seed and the number of data ranks. A run goes on in mid-stream where its
    checkpoint was taken, on as many data ranks. A stream that is over begins anew.

    Of files only ``column`` is read, and other columns may differ from row to row. A row whose text is null is passed
    over; so is one that cannot be read (broken JSON, no UTF-8) or has no such text, and the first of each file is
    warned of with its line, by the process that reads it. A dataset, of the hub or saved, has the same columns in all
    rows.

    The run is one epoch of ``max_steps``, so that schedules and ``val_check_interval`` know its length.

    ```python
    data = TextStreamDataModule("corpus/*.parquet", "held_out.jsonl", sequence_length=4096, batch_size=2)
    ```

    Args:
        source: A file of JSON lines, parquet or text (.txt, a document each), a quoted pattern or a directory of
            files of one of these kinds, a directory that `datasets` has saved, or a dataset's name on the hub. A
            number of files that the data ranks divide lets each read its own; otherwise each reads all of them.
        validation_source: Rows to validate on, which are prepared; as for `ChatDataModule`, with the same column.
        column: The column of the texts; "text" for text files.
        malformed: Rows for validation that have none are refused, or left out and counted ("skip").
        across_documents: As in `TextDataModule`.
        num_workers: 1 for a process that reads ahead of the training, 0 for none.
        **packed: Those of `PackedDataModule`.

    Raises:
        FileNotFoundError: In ``setup``, if there is no such source.
        ValueError: There, if the Trainer has no ``max_steps``, a file cannot be opened or is no whole parquet, or the
            first row that can be read of a rank's share has no such column; and what `PackedDataModule` raises.
    """

    kind = "text-stream"

    def __init__(
        self,
        source: str | Source,
        validation_source: str | Source | list[str | Source] | None = None,
        column: str = "text",
        malformed: Literal["refuse", "skip"] = "refuse",
        across_documents: bool = False,
        num_workers: int = 1,
        **packed: Any,
    ) -> None:
        packed["validation_fraction"] = 0  # no row is held out of a stream
        super().__init__(source, validation_source, malformed, **packed)
        self._reads_ahead = num_workers
        self.stream_source = Source(source) if isinstance(source, str) else source
        self.column = column
        self.across_documents = across_documents
        self._told: set[tuple[str, bool]] = set()
        if num_workers not in (0, 1):
            raise ValueError(f"num_workers={num_workers}: a stream is read by one process (1), or as it is needed (0).")
        if self.stream_source.weight != 1 or self.stream_source.max_rows is not None:
            raise ValueError("A stream is read as it is: its source has no weight and no max_rows.")

    # ------------------------------------------------------------------------------------------------- rows and texts

    @override
    def sources(self) -> Sequence[Rows]:
        return super().sources() if self._predicts else []  # nothing of the stream is prepared

    @override
    def settings(self) -> Sequence[object]:
        return self.column, self.malformed

    @override
    def first_rows(self) -> Sequence[Rows]:
        name = self.stream_source.name or self.stream_source.path
        stream = open_stream(self.stream_source, self.column)
        if problem := self._problem_of(stream):
            raise ValueError(problem)
        found = list(islice(stream, PREVIEWED))
        self._tell(found)
        rows = [Row(f"{name}, row {i}", row) for i, row in enumerate(found) if PASSED_OVER not in row]

        def read(indices: Sequence[int]) -> list[Row]:
            return [rows[index] for index in indices]

        return [Rows(name, len(rows), "", read)]

    @override
    def check(self) -> None:
        refuse_without_end(self.tokenizer)

    @override
    def read_row(self, row: Row) -> str:
        text = row.columns().get(self.column)
        if not isinstance(text, str):
            raise MalformedRow(f"{row.where}: {no_text(self.column, row.columns())}")
        return text

    @override
    def add_samples(self, read: Sequence[str], samples: Samples) -> None:
        add_texts(self.tokenizer, read, self.sequence_length, samples)

    # ------------------------------------------------------------------------------------------------------ Lightning

    @override
    def setup(self, stage: str | None = None) -> None:
        """Load what was prepared for validation, and see on every rank that its share of the stream has texts."""
        trainer = self.trainer
        fits = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        if trainer is not None and fits and trainer.max_steps == -1:
            raise ValueError(
                f"{self.stream_source.path} is read as a stream, which has no end: say how many steps there are, with "
                "max_steps of the Trainer. max_epochs has no meaning here."
            )
        super().setup(stage)
        if fits:
            agree(None, self._problem(), lambda problems: ValueError(join(problems, data_ranks(trainer)[1])))

    @override
    def batches_per_epoch(self, data_world_size: int) -> None:
        """Nothing to say: the Trainer's ``max_steps`` ends the run."""

    @override
    def train_dataloader(self) -> StreamLoader:  # type: ignore[override]
        """Return this data rank's training batches; without a Trainer there is no end to them."""
        check_of_module(self.tokenizer, self._module(), self.makes_tokenizer, type(self).__name__)
        trainer, source, (rank, world) = self.trainer, self.stream_source, data_ranks(self.trainer)
        stream = PackedStream(
            self._share(),
            self._add_rows,
            self.sequence_length,
            self.batch_size,
            pad_token_id(self.tokenizer),
            self.seed,
            without_positions if self.across_documents else stacked,
        )
        what = {"source": source.path, "split": source.split, "subset": source.subset, "column": self.column}
        share = {**what, "sequence_length": self.sequence_length, "seed": self.seed, "share": f"{rank} of {world}"}
        batches = sys.maxsize if trainer is None else trainer.max_steps * trainer.accumulate_grad_batches
        on_gpu = trainer is not None and trainer.strategy.root_device.type == "cuda"
        return StreamLoader(stream, batches, share, self._reads_ahead, pin_memory=on_gpu)

    # --------------------------------------------------------------------------------------------------------- inside

    def _share(self) -> datasets.IterableDataset:
        """The rows of this data rank."""
        from datasets.distributed import split_dataset_by_node

        rank, world = data_ranks(self.trainer)
        return split_dataset_by_node(open_stream(self.stream_source, self.column), rank, world)

    def _problem(self) -> str | None:
        """What is wrong with a file, or with the first row of this rank's share, if anything is."""
        share, (rank, world) = self._share(), data_ranks(self.trainer)
        try:
            for file in _files(self.stream_source)[rank::world]:  # each is looked at by one data rank
                refuse_unreadable(file)
        except (OSError, ValueError) as error:
            return str(error)
        return self._problem_of(share)

    def _problem_of(self, rows: Iterable[Mapping[str, Any]]) -> str | None:
        """What is wrong with the first of these rows that can be read, if anything is."""
        path, unreadable = self.stream_source.path, None
        for row in rows:
            passed = row.get(PASSED_OVER)
            if passed is None:
                # The first row may be one without a text, which is passed over.
                found = self.column in row and isinstance(row[self.column], str | None)
                return None if found else no_text(self.column, row)
            if passed.readable:
                return passed.what
            unreadable = unreadable or passed.what
        if unreadable is not None:
            return f"{path} has no row that can be read. {unreadable}"
        if next(iter(open_stream(self.stream_source, self.column)), None) is None:
            return f"{path!r} has no rows."
        return f"{path} has too few rows: this data rank has none. Use fewer data ranks."

    def _add_rows(self, rows: Sequence[Any], samples: Samples) -> None:
        self._tell(rows)
        texts = [row.get(self.column) for row in rows]  # None: a row without a text
        add_texts(self.tokenizer, [text for text in texts if isinstance(text, str)], self.sequence_length, samples)

    def _tell(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Warns of rows that are passed over, once for each file, on the rank whose rows they are."""
        for row in rows:
            passed = row.get(PASSED_OVER)
            if passed is not None and (told := (passed.file, passed.readable)) not in self._told:
                self._told.add(told)
                others = "have no text there" if passed.readable else "cannot be read"
                warnings.warn(
                    f"{passed.what} It is passed over, and so are other rows of this file that {others}.", stacklevel=2
                )


def open_stream(source: Source, column: str = "text") -> datasets.IterableDataset:
    """The rows of a source, read as they are asked for; those of files are as `stream_files` says.

    Raises:
        FileNotFoundError: If there is nothing of that name.
        ValueError: If its files are of several kinds, or of none that is read; or without its split.
    """
    from datasets import load_dataset

    if _is_saved(source):
        return saved_dataset(source).to_iterable_dataset()
    files = _files(source)
    if not files:
        return load_dataset(source.path, source.subset, split=source.split, streaming=True)
    refuse_split_of_files(source)
    if len({KINDS.get(file.suffix) for file in files}) > 1 or files[0].suffix not in KINDS:
        raise ValueError(
            f"{source.path} has files that end with {', '.join(sorted({file.suffix for file in files}))}; a stream "
            f"reads files of one kind: {', '.join(KINDS)}."
        )
    return stream_files(files, column)


def _is_saved(source: Source) -> bool:
    place = Path(source.path).expanduser()
    return (place / "dataset_info.json").exists() or (place / "dataset_dict.json").exists()


def _files(source: Source) -> list[Path]:
    """The files that are read; none of a dataset."""
    place = Path(source.path).expanduser()
    if _is_saved(source):
        return []
    if place.is_dir():
        found: Iterable[Path] = (file for file in place.rglob("*") if file.suffix in KINDS)
    else:
        found = (Path(file) for file in glob.glob(str(place), recursive=True))
    files = sorted(file for file in found if file.is_file())
    path = source.path
    if not files and (place.is_dir() or path.count("/") != 1 or path.startswith((".", "~", "/")) or place.suffix):
        raise FileNotFoundError(
            f"There is no {place.absolute()} with files that end with {', '.join(KINDS)}. Give one, a quoted pattern "
            "such as 'corpus/*.parquet', or the name of a dataset on the hub, 'owner/name'."
        )
    return files
