"""A LightningDataModule of pairs of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from typing_extensions import override

from lightning_ep.data.conversations import MalformedRow
from lightning_ep.data.preparation import Samples
from lightning_ep.data.rendering import tokens_within
from lightning_ep.data.row_files import Row, Source
from lightning_ep.data.rows import RowsDataModule

MERGED = "completions that begin inside of a token of the prompt: let one of both have a space or newline between them"


class Pair(NamedTuple):
    """What is given, and what is learnt."""

    prompt: str
    completion: str


class PromptCompletionDataModule(RowsDataModule):
    r"""Pairs of texts, as they are: the completion is learnt, and the end of text behind it, with no chat template.

    Rows have two columns with texts; what stands between them (a space, a newline) belongs to one of them:

    ```json
    {"prompt": "Translate to French: cheese\n", "completion": "fromage"}
    ```

    ```python
    data = PromptCompletionDataModule(source="pairs.jsonl", sequence_length=2048)
    ```

    A tokenizer that begins texts with a token of its own (BOS) does so here. Pairs longer than a window are left out
    and counted. Pairs of messages go through the chat template: `ChatDataModule` reads them.

    Args:
        source: As for `ChatDataModule`.
        validation_source: Rows to validate on. Default: ``validation_fraction`` of each source is held out.
        prompt: The column of what is given.
        completion: The column of what is learnt.
        malformed: Rows that cannot be read are refused, by file and line, or left out and counted ("skip").
        **packed: Those of `PackedDataModule`.

    Raises:
        FileNotFoundError: In ``prepare_data``, if there is no such source.
        ValueError: There and in ``setup``, if the tokenizer's end of text is no token at which the model stops; if a
            row is malformed (`MalformedRow`); and what `PackedDataModule` raises.
    """

    kind = "pairs"

    def __init__(
        self,
        source: str | Source | list[str | Source],
        validation_source: str | Source | list[str | Source] | None = None,
        prompt: str = "prompt",
        completion: str = "completion",
        malformed: Literal["refuse", "skip"] = "refuse",
        **packed: Any,
    ) -> None:
        super().__init__(source, validation_source, malformed, **packed)
        self.prompt = prompt
        self.completion = completion

    @override
    def settings(self) -> Sequence[object]:
        return self.prompt, self.completion, self.malformed

    @override
    def check(self) -> None:
        super().check()
        end, stops = self.tokenizer.eos_token_id, self.stop_ids()
        if end is None:
            raise ValueError(
                f"The tokenizer ({self.tokenizer.name_or_path}) has no end-of-text token to end completions."
            )
        if stops is not None and end not in stops:
            raise ValueError(
                f"The tokenizer's end of text is {self.tokenizer.eos_token!r} ({end}), at which the model does not "
                f"stop: eos_token_id of its generation config is {stops}. Trained so, it would go on for ever once it "
                f'is served. Let generation_config.json beside its weights have "eos_token_id": {[*stops, end]}.'
            )

    @override
    def read_row(self, row: Row) -> Pair:
        columns = row.columns()
        for name in (self.prompt, self.completion):
            if not isinstance(columns.get(name), str):
                hint = " Lists of messages are for ChatDataModule." if isinstance(columns.get(name), list) else ""
                raise MalformedRow(
                    f"{row.where}: the column {name!r} must be a text, and the row has "
                    f"{ {key: type(value).__name__ for key, value in columns.items()} }.{hint}"
                )
        return Pair(columns[self.prompt], columns[self.completion])

    @override
    def add_samples(self, read: Sequence[Pair], samples: Samples) -> None:
        if not read:
            return
        texts = [f"{pair.prompt}{pair.completion}{self.tokenizer.eos_token}" for pair in read]
        encodings = self.tokenizer(texts, verbose=False).encodings
        for pair, text, encoding in zip(read, texts, encodings, strict=True):
            begin = len(pair.prompt)
            learnt = tokens_within(encoding.offsets, [(begin, len(text))])
            samples.note(MERGED, sum(first < begin < last for first, last in encoding.offsets))
            ids = encoding.ids
            # A tokenizer that ends texts itself has written the end twice.
            while encoding.special_tokens_mask[len(ids) - 1] and not learnt[len(ids) - 1]:
                ids = ids[:-1]
            samples.add(ids, learnt[: len(ids)].tolist())
