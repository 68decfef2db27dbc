"""What predict gives, as a file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from typing_extensions import override

from lightning_ep.data.resumable_loader import data_ranks
from lightning_ep.distributed.agreement import to_first_rank
from lightning_ep.distributed.console import print_once
from lightning_ep.hub.new_files import WritesSomethingNew

_Key = tuple[int, int, int, int]  # dataloader, sample, _NUMBERED, 0; or dataloader, batch, data rank, row
_NUMBERED = -1


class WritePredictions(BasePredictionWriter, WritesSomethingNew):
    """Writes predictions as JSON lines: one for each sample, once, in the order of the data, from all ranks.

    ``predict_step`` returns a dict whose values have one entry per sample of the batch, tensors or lists; with
    `CausalLM` these are ``log_likelihood`` (nats) and ``tokens``, the number that it is summed over. A line has them
    and the sample's ``index`` in its dataset (for iterable datasets its place in the file, in which ranks take turns);
    with several dataloaders the ``dataloader``, too; with data modules of `lightning_ep.data` its ``source`` and
    ``row``. Rank 0 writes the file at the end, from what the others send.

    Args:
        path: The new file. It appears when it is complete.

    Raises:
        FileExistsError: At the start of ``predict``, on the ranks that see it, if the file is there already.
        TypeError: At the first batch, if ``predict_step`` returns something else.
    """

    writes_after = "predict"

    def __init__(self, path: str) -> None:
        super().__init__("batch")
        self.path = path
        self._rows: dict[_Key, dict[str, Any]] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict":
            self.refuse_existing()

    @override
    def refuse_existing(self) -> None:
        if Path(self.path).exists():
            raise FileExistsError(f"{self.path} exists already and is not replaced; remove it, or name another file.")

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows = {}

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        rows = _rows_of(prediction)
        if batch_indices:  # of datasets that can be indexed
            keys = [(dataloader_idx, index, _NUMBERED, 0) for index in batch_indices]
        else:
            rank, _ = data_ranks(trainer)
            keys = [(dataloader_idx, batch_idx, rank, row) for row in range(len(rows))]
        self._rows.update(zip(keys, rows, strict=True))

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gathered = to_first_rank(self._rows)
        self._rows = {}
        if gathered is None:
            return
        # Ranks that share a batch have predicted the same samples.
        rows = dict(sorted((item for of_rank in gathered for item in of_rank.items()), key=lambda item: item[0]))
        several = len(trainer.num_predict_batches) > 1
        target = Path(self.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        incomplete = target.with_name(f"{target.name}.incomplete")
        with incomplete.open("w") as file:
            for line in _lines(rows, several, getattr(trainer.datamodule, "row_of", None)):  # type: ignore[attr-defined]
                file.write(json.dumps(line) + "\n")
        incomplete.replace(target)
        print_once(trainer, f"{len(rows):,} predictions in {self.path}")


def _rows_of(prediction: Any) -> list[dict[str, Any]]:
    """One dict for each sample of a batch."""
    columns = {}
    for name, values in prediction.items() if isinstance(prediction, Mapping) else ():
        columns[name] = values.tolist() if isinstance(values, Tensor) else values
    lengths = {len(values) if isinstance(values, list) else None for values in columns.values()}
    if len(lengths) != 1 or None in lengths:
        raise TypeError(
            "WritePredictions writes what `predict_step` returns as a dict whose values, tensors or lists, have one "
            f"entry per sample; it has returned {_described(prediction)}."
        )
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _described(prediction: Any) -> str:
    if not isinstance(prediction, Mapping):
        return type(prediction).__name__
    return str({name: list(getattr(value, "shape", [type(value).__name__])) for name, value in prediction.items()})


def _lines(
    rows: Mapping[_Key, dict[str, Any]], several: bool, row_of: Callable[[int], dict[str, Any]] | None
) -> Iterator[dict[str, Any]]:
    """What the file says of the samples, which come in order; ``row_of`` says where one is from."""
    seen: Counter[int] = Counter()
    for (dataloader, sample, kind, _), row in rows.items():
        index = sample if kind == _NUMBERED else seen[dataloader]
        seen[dataloader] += 1
        where = row_of(index) if row_of is not None and kind == _NUMBERED else {}
        yield {**({"dataloader": dataloader} if several else {}), "index": index, **where, **row}
