"""What data modules have in common whose sources are files or datasets with a row per sample."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from typing_extensions import override

from lightning_ep.data.conversations import MalformedRow, refuse
from lightning_ep.data.packed_data import PREVIEWED, PackedDataModule
from lightning_ep.data.preparation import Rows, Samples
from lightning_ep.data.rendering import MALFORMED
from lightning_ep.data.row_files import Row, Source, first_rows, open_source
from lightning_ep.data.tokenizers import checkpoint_of
from lightning_ep.hub.meta_models import small_files


class RowsDataModule(PackedDataModule):
    """What data modules of files with a row per sample share: where the rows are, and what becomes of malformed ones.

    Args:
        source: One or several; see `Source`. A path alone is a source with weight 1.
        validation_source: Rows to validate on. Default: ``validation_fraction`` of each source is held out.
        malformed: Rows that cannot be read are refused, by file and line, or left out and counted ("skip").
        **packed: Those of `PackedDataModule`.
    """

    def __init__(
        self,
        source: str | Source | list[str | Source],
        validation_source: str | Source | list[str | Source] | None = None,
        malformed: Literal["refuse", "skip"] = "refuse",
        **packed: Any,
    ) -> None:
        super().__init__(**packed)
        self.source = source
        self.validation_source = validation_source
        self.malformed = malformed

    @cached_property
    def _opened(self) -> list[Rows]:
        return open_sources(self.source)

    @cached_property
    def _opened_for_validation(self) -> list[Rows] | None:
        return open_sources(self.validation_source) if self.validation_source is not None else None

    @override
    def sources(self) -> Sequence[Rows]:
        return self._opened

    @override
    def validation_sources(self) -> Sequence[Rows] | None:
        return self._opened_for_validation

    @override
    def make_samples(self, rows: Sequence[Row], samples: Samples) -> None:
        conversations, malformed = [], []
        for row in rows:
            try:
                conversations.append(self.read_row(row))
            except MalformedRow as error:
                malformed.append(error)
                samples.drop(MALFORMED)
        if self.malformed == "refuse":
            refuse(malformed)
        self.add_samples(conversations, samples)

    @override
    def first_rows(self) -> Sequence[Rows]:
        sources = self.source if isinstance(self.source, list) else [self.source]
        return [first_rows(source, PREVIEWED) for source in sources]

    @override
    def check(self) -> None:
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"The tokenizer ({self.tokenizer.name_or_path}) is a {type(self.tokenizer).__name__}, which does not "
                "know which characters a token stands for, and so not which tokens are to be learnt. Pass one with a "
                "tokenizer.json as `tokenizer`."
            )

    def stop_ids(self) -> list[int] | None:
        """The tokens at which the model stops once it is exported: ``eos_token_id`` of its generation config."""
        module, ids = self._module(), None
        checkpoint = checkpoint_of(module) if module is not None else self._tokenizer_source
        if checkpoint is not None:
            files = [small_files(checkpoint) / name for name in ("generation_config.json", "config.json")]
            found = (json.loads(file.read_text()).get("eos_token_id") for file in files if file.exists())
            ids = next((value for value in found if value is not None), None)
        elif (config := getattr(module, "model_config", None)) is not None:
            ids = getattr(config, "eos_token_id", None)
        # A configuration without such a token has none, an empty list or -1.
        stops = [token for token in (ids if isinstance(ids, list) else [ids]) if token is not None and token >= 0]
        return sorted(stops) or None

    def read_row(self, row: Row) -> Any:
        """What a row means; raises MalformedRow."""
        raise NotImplementedError

    def add_samples(self, read: Sequence[Any], samples: Samples) -> None:
        """Adds what rows become."""
        raise NotImplementedError


def open_sources(sources: str | Source | list[str | Source]) -> list[Rows]:
    """The rows of one source or several; see `open_source`."""
    return [open_source(one) for one in (sources if isinstance(sources, list) else [sources])]
