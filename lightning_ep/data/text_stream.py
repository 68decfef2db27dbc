"""Text that is packed as it is read: a corpus that is too large to prepare first."""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterable, Sequence
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
from lightning_ep.data.tokenizers import check_of_module, pad_token_id
from lightning_ep.distributed.agreement import agree, join

if TYPE_CHECKING:
    import datasets

_KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


class TextStreamDataModule(RowsDataModule):
    """Texts that are read, tokenized and packed while the model trains, with `datasets` in streaming mode.

    Nothing is prepared but rows for validation, if there are any. Texts end with an end-of-text token, long ones are
    cut, and pieces are packed as `TextDataModule` does it, over 256 windows at a time, which are mixed. The order
    depends on nothing but the data, the seed and the number of data ranks. A run goes on in mid-stream where its
    checkpoint was taken, on as many data ranks. A stream that is over begins anew.

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
        ValueError: There, if the Trainer has no ``max_steps``, or a rank's share has no row with this column; and what
            `PackedDataModule` raises.
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
        rows = list(islice(open_stream(self.stream_source), PREVIEWED))

        def read(indices: Sequence[int]) -> list[Row]:
            return [Row(f"{name}, row {index}", rows[index]) for index in indices]

        return [Rows(name, len(rows), "", read)]

    @override
    def check(self) -> None:
        refuse_without_end(self.tokenizer)

    @override
    def read_row(self, row: Row) -> str:
        text = row.columns().get(self.column)
        if not isinstance(text, str):
            raise MalformedRow(f"{row.where}: {_no_text(self.column, row.columns())}")
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
        return split_dataset_by_node(open_stream(self.stream_source), rank, world)

    def _problem(self) -> str | None:
        """What is wrong with the first row of this rank's share, if anything is."""
        row = next(iter(self._share()), None)
        if row is None:
            return f"{self.stream_source.path} has too few rows: this data rank has none. Use fewer data ranks."
        # The first row may be one without a text, which is passed over.
        found = self.column in row and isinstance(row[self.column], str | None)
        return None if found else _no_text(self.column, row)

    def _add_rows(self, rows: Sequence[Any], samples: Samples) -> None:
        texts = [row[self.column] for row in rows if isinstance(row[self.column], str)]  # None: a row without a text
        add_texts(self.tokenizer, texts, self.sequence_length, samples)


def open_stream(source: Source) -> datasets.IterableDataset:
    """The rows of a source, read as they are asked for.

    Raises:
        FileNotFoundError: If there is nothing of that name.
        ValueError: If its files are of several kinds, or of none that is read, or have no rows; or without its split.
    """
    from datasets import load_dataset

    place = Path(source.path).expanduser()
    if (place / "dataset_info.json").exists() or (place / "dataset_dict.json").exists():
        return saved_dataset(source).to_iterable_dataset()
    files = _files(source.path)
    if not files:
        return load_dataset(source.path, source.subset, split=source.split, streaming=True)
    refuse_split_of_files(source)
    kinds = {_KINDS.get(file.suffix) for file in files}
    if len(kinds) > 1 or None in kinds:
        raise ValueError(
            f"{source.path} has files that end with {', '.join(sorted({file.suffix for file in files}))}; a stream "
            f"reads files of one kind: {', '.join(_KINDS)}."
        )
    whole = {"sample_by": "document"} if kinds == {"text"} else {}
    try:
        return load_dataset(kinds.pop(), data_files=list(map(str, files)), split="train", streaming=True, **whole)
    except StopIteration:  # JSON lines, of whose first row it makes the columns
        raise ValueError(f"{source.path!r} has no rows.") from None


def _files(path: str) -> list[Path]:
    place = Path(path).expanduser()
    if place.is_dir():
        found: Iterable[Path] = (file for file in place.rglob("*") if file.suffix in _KINDS)
    else:
        found = (Path(file) for file in glob.glob(str(place), recursive=True))
    files = sorted(file for file in found if file.is_file())
    if not files and (place.is_dir() or path.count("/") != 1 or path.startswith((".", "~", "/")) or place.suffix):
        raise FileNotFoundError(
            f"There is no {place.absolute()} with files that end with {', '.join(_KINDS)}. Give one, a quoted pattern "
            "such as 'corpus/*.parquet', or the name of a dataset on the hub, 'owner/name'."
        )
    return files


def _no_text(column: str, row: Any) -> str:
    kinds = {key: type(value).__name__ for key, value in row.items()}
    return f"the column {column!r} must be a text, and the row has {kinds}. Name the column with `column`."
