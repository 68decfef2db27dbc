"""Documents one by one, as predict goes over them: each is a sequence of its own, and known by its row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from lightning_ep.data.preparation import COUNTS, Counts, MakeSamples, Part, Rows, made_of
from lightning_ep.ops.cross_entropy import IGNORE

if TYPE_CHECKING:
    from datasets import Dataset

DOCUMENTS = "documents.arrow"
"""The file that `prepare_documents` makes."""

_LENGTHS = 64  # batches are as long as a multiple of this: a compiled model is compiled for every length
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("supervised", pa.list_(pa.bool_())),
        ("source", pa.string()),
        ("row", pa.int64()),
    ]
)


def prepare_documents(
    directory: Path, sources: Sequence[Rows], make_samples: MakeSamples, sequence_length: int, num_proc: int
) -> None:
    """Write the documents that rows become, each once and in the order of the rows, and what was counted.

    Args:
        directory: An existing directory, in which `DOCUMENTS` and `COUNTS` are made.
        sources: The rows; weights have no meaning here.
        make_samples: What they become.
        sequence_length: The most tokens of a document; longer ones are left out.
        num_proc: Processes; 1 is this one.
    """
    counts = Counts()
    # A row at a time, so that its documents are known to be its own.
    parts = [Part(replace(rows, rows_per_task=1), np.arange(rows.count)) for rows in sources]
    with pa.OSFile(str(directory / DOCUMENTS), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as stream:
        for part, made in made_of(parts, make_samples, sequence_length, num_proc, "preparing rows"):
            name = sources[part].name
            row = counts.rows(name)
            counts.add(made, name)
            ends = np.cumsum(made.lengths)[:-1]
            columns = [np.split(values, ends) if len(made.lengths) else [] for values in (made.tokens, made.supervised)]
            number = len(made.lengths)
            arrays = [pa.array(values, kind.type) for values, kind in zip(columns, _SCHEMA, strict=False)]
            arrays += [pa.array([name] * number, pa.string()), pa.array([row] * number, pa.int64())]
            stream.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
    (directory / COUNTS).write_text(json.dumps(vars(counts), indent=1))


class Documents:
    """What `prepare_documents` made, mapped into memory.

    Args:
        directory: Where it is.
    """

    def __init__(self, directory: Path) -> None:
        from datasets import Dataset

        self._dataset: Dataset = Dataset.from_file(str(directory / DOCUMENTS)).with_format("numpy")
        self.counts: dict[str, Any] = json.loads((directory / COUNTS).read_text())

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        document = self._dataset[index]
        return document["input_ids"], document["supervised"]

    def row_of(self, index: int) -> dict[str, Any]:
        """The source of a document and the number of its row in there."""
        document = self._dataset[index]
        return {"source": str(document["source"]), "row": int(document["row"])}


def padded(documents: Sequence[tuple[np.ndarray, np.ndarray]], most: int, pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch with a document in each sequence: int64 ``input_ids`` and ``labels``, ``[batch, sequence]``.

    Padding is behind, where causal attention does not see it.
    """
    length = max(len(ids) for ids, _ in documents)
    length = min(-(-length // _LENGTHS) * _LENGTHS, max(most, length))
    input_ids = torch.full((len(documents), length), pad_token_id)
    labels = torch.full((len(documents), length), IGNORE)
    for place, (ids, supervised) in enumerate(documents):
        tokens = torch.from_numpy(ids.astype(np.int64))
        input_ids[place, : len(ids)] = tokens
        labels[place, : len(ids)] = torch.where(torch.from_numpy(supervised), tokens, IGNORE)
    labels[:, 0] = IGNORE
    return {"input_ids": input_ids, "labels": labels}
