"""A LightningDataModule of preferences: pairs of answers, of which one was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from typing_extensions import override

from lightning_ep.data.chat import ChatDataModule
from lightning_ep.data.collate import Collate, stacked, with_mask
from lightning_ep.data.conversations import Conversation, Preference, preference
from lightning_ep.data.preparation import Samples
from lightning_ep.data.row_files import Row, Source
from lightning_ep.data.windows import PADDING, Sample

SAME = "pairs of equal answers"
UNLEARNT = "pairs without an answer that is learnt"


class PreferenceDataModule(ChatDataModule):
    """Pairs of conversations that differ in how they end, written as the checkpoint's chat template says; for `DPO`.

    A row has ``chosen`` and ``rejected``: whole conversations, which begin alike, or answers to a ``prompt``. Each is a
    list of messages as in `ChatDataModule`; a text stands for one message, of the user in ``prompt``, of the assistant
    elsewhere. ``system`` and ``tools`` may be beside them:

    ```json
    {"prompt": "What is 6 x 7?", "chosen": "42.", "rejected": "41, I think."}
    ```

    ```python
    data = PreferenceDataModule(source="my_pairs.jsonl", sequence_length=2048, batch_size=2)
    ```

    Only the assistant's turns behind what both have in common count. Batches are ``input_ids`` and ``labels``, int64
    ``[2 * batch_size, sequence_length]``: the chosen ones, then the rejected ones in the same order, each in a row of
    its own with padding behind it. Pairs of which one is longer than a row are left out and counted, like those of
    equal answers. ``attention_mask`` beside them says where padding is.

    Args:
        source: As in `ChatDataModule`, like all that follow.
        validation_source: Rows to validate on.
        chat_template: A template in place of the tokenizer's.
        template_kwargs: Variables of the template.
        malformed: Rows that cannot be read or rendered are refused, or left out and counted.
        **packed: Those of `PackedDataModule`: ``sequence_length`` is that of one of a pair, ``batch_size`` in pairs.
    """

    kind = "preference"

    def __init__(
        self,
        source: str | Source | list[str | Source],
        validation_source: str | Source | list[str | Source] | None = None,
        chat_template: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        malformed: Literal["refuse", "skip"] = "refuse",
        **packed: Any,
    ) -> None:
        super().__init__(
            source,
            validation_source,
            chat_template=chat_template,
            template_kwargs=template_kwargs,
            split_turns=False,
            too_long="drop",  # two that lost other turns could not be compared
            malformed=malformed,
            **packed,
        )

    @property
    @override
    def window_length(self) -> int:
        return 2 * self.sequence_length

    @override
    def prepare_data(self) -> None:
        if self._predicts:
            raise ValueError("PreferenceDataModule has pairs for DPO, and predict takes documents: ChatDataModule's.")
        super().prepare_data()

    @override
    def read_row(self, row: Row) -> Any:
        return preference(row.columns(), row.where)

    @override
    def add_samples(self, read: Sequence[Any], samples: Samples) -> None:
        for pair in read:
            self._add_pair(pair, samples)

    def _add_pair(self, pair: Preference, samples: Samples) -> None:
        if pair.chosen.messages == pair.rejected.messages:
            samples.drop(SAME)
            return
        rendered = [self._rendered(conversation, samples) for conversation in pair]
        found = [sample for sample in rendered if sample is not None]
        if len(found) < 2:
            return
        (ids, supervised), (other_ids, other_supervised) = found
        # The second begins where the second row of a window does; what is left behind it is filled with padding.
        gap = self.sequence_length - len(ids)
        samples.add([*ids, *[PADDING] * gap, *other_ids], [*supervised, *[False] * gap, *other_supervised])

    def _rendered(self, conversation: Conversation, samples: Samples) -> Sample | None:
        assert self._renders is not None
        alone = Samples()
        self._renders([conversation], alone)
        samples.dropped.update(alone.dropped)
        samples.notes.update(alone.notes)
        if not alone.samples:
            return None
        (sample,) = alone.samples
        if len(sample.input_ids) > self.sequence_length:
            samples.drop(f"of a pair longer than {self.sequence_length} tokens")
        elif not any(sample.supervised[1:]):
            samples.drop(UNLEARNT)
        else:
            return sample
        return None

    @override
    def collate_function(self) -> Collate:
        return _pairs


def _pairs(windows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Windows ``[2 S]`` as rows: what was chosen, then what was rejected."""
    batch = {name: values.unflatten(1, (2, -1)) for name, values in stacked(windows).items()}
    return with_mask({name: values.transpose(0, 1).flatten(0, 1) for name, values in batch.items()})
