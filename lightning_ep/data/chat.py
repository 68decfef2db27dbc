"""A LightningDataModule of conversations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_ep import transformers_adapter as adapter
from lightning_ep.data.chat_template import ChatTemplate
from lightning_ep.data.conversations import Conversation, conversation
from lightning_ep.data.preparation import Samples
from lightning_ep.data.rendering import RendersConversations
from lightning_ep.data.row_files import Row, Source
from lightning_ep.data.rows import RowsDataModule
from lightning_ep.data.template_text import response_template, template_text, with_defaults


class ChatDataModule(RowsDataModule):
    """Conversations, written as the checkpoint's chat template says; only what the assistant writes is learnt.

    A row has ``messages`` (dicts of ``role`` and ``content``) or ``conversations`` (dicts of ``from`` and ``value``),
    and ``tools`` if there are any; or ``prompt`` and ``completion``, lists of messages of which only the second is
    learnt. Messages of an assistant may have ``reasoning_content`` (``thinking``) and ``tool_calls``, whose arguments
    are dicts or JSON text, and ``train: false`` (or ``weight: 0``) if they are not to be learnt:

    ```json
    {"messages": [{"role": "user", "content": "What is 6 x 7?"}, {"role": "assistant", "content": "42."}]}
    ```

    ```python
    data = ChatDataModule(source="my_chats.jsonl", sequence_length=4096, batch_size=2)
    ```

    What follows the generation prompt is learnt, up to the token that ends the turn, which must be one at which the
    model stops (``eos_token_id`` of its generation config). What the prompt supplies itself (empty think blocks) is
    not. Many templates render earlier turns differently from how they were generated: they drop reasoning. Such turns
    are not learnt, and counted, unless ``split_turns`` makes a sample of each.

    Args:
        source: One source or several: a file of JSON lines or parquet, a directory or quoted pattern of them, a
            dataset's name on the hub or directory. `Source` adds a weight, a split and a limit.
        validation_source: Rows to validate on. Default: ``validation_fraction`` of each source is held out.
        chat_template: A file, the text of a template, or "plain", which needs no special token but the end of text.
            Default: the tokenizer's. A template with generation markers is for training, where the tokenizer has one
            of its own; any other goes with the model, into exports too.
        template_kwargs: Variables of the template, such as ``enable_thinking: false``. They become its defaults, in
            exports too, so that the model is asked as it was trained.
        split_turns: Make a sample of each assistant's turn, with what came before it, as the model will be asked.
            Default: one of each conversation.
        too_long: What happens to conversations longer than a window: they lose whole turns from their front, behind
            the system prompt ("shorten"), or are left out ("drop").
        malformed: Rows that cannot be read or rendered are refused, by file and line, or left out and counted ("skip").
        **packed: Those of `PackedDataModule`.

    Raises:
        FileNotFoundError: In ``prepare_data``, if there is no such source.
        ValueError: There and in ``setup``, if there is no chat template, it does not fit the tokenizer, or ends turns
            with a token at which the model does not stop; if a row is malformed (`MalformedRow`); and what
            `PackedDataModule` raises.
    """

    kind = "chat"

    def __init__(
        self,
        source: str | Source | list[str | Source],
        validation_source: str | Source | list[str | Source] | None = None,
        chat_template: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        split_turns: bool = False,
        too_long: Literal["shorten", "drop"] = "shorten",
        malformed: Literal["refuse", "skip"] = "refuse",
        **packed: Any,
    ) -> None:
        super().__init__(source, validation_source, malformed, **packed)
        self.chat_template = chat_template
        self.template_kwargs = template_kwargs or {}
        self.split_turns = split_turns
        self.too_long: Literal["shorten", "drop"] = too_long
        self._renders: RendersConversations | None = None

    @override
    def settings(self) -> Sequence[object]:
        template = json.dumps([self._given_template(), self.template_kwargs])
        return template, self.split_turns, self.too_long, self.malformed, self.stop_ids()

    @override
    def check(self) -> None:
        super().check()
        given, own = self._given_template(), self._own_template()
        if given is None and own is None:
            raise ValueError(
                f"The tokenizer ({self.tokenizer.name_or_path}) has no chat template, as those of base models. Pass "
                "one as `chat_template`: a file, that of a model of the same family for instance, or 'plain', which "
                "asks '### User:' and needs no special token but the end of text."
            )
        for_training_only = own is not None and given is not None and adapter.marks_generation(given)
        template, kept = given or own or "", (own if for_training_only else given or own) or ""
        template = with_defaults(template, self.template_kwargs)
        ids = self.stop_ids() or [token for token in (self.tokenizer.eos_token_id,) if token is not None]
        written = ChatTemplate(self.tokenizer, template, {}, ids)
        if written.unwritten and self._renders is None:
            rank_zero_warn(
                f"The chat template asks for an answer with {written.unwritten!r} at the end, and does not write that "
                "in front of the answers it is given: the model is trained without it and will be asked with it. A "
                "template that writes it can be passed as `chat_template`."
            )
        self._renders = self.renders(written)
        self.tokenizer.chat_template = with_defaults(kept, self.template_kwargs)
        if (response := response_template(self.chat_template, self.tokenizer.eos_token)) is not None:
            self.tokenizer.response_template = response

    def renders(self, template: ChatTemplate) -> RendersConversations:
        """What makes samples of conversations, by a template."""
        return RendersConversations(
            self.tokenizer, template, self.sequence_length, self.split_turns, self.too_long, self.malformed
        )

    @override
    def read_row(self, row: Row) -> Conversation:
        return conversation(row.columns(), row.where)

    @override
    def add_samples(self, read: Sequence[Conversation], samples: Samples) -> None:
        assert self._renders is not None
        self._renders(read, samples)

    def _own_template(self) -> str | None:
        """The checkpoint's template; of several, the one that is not for a purpose."""
        return None if self.tokenizer.chat_template is None else self.tokenizer.get_chat_template()

    def _given_template(self) -> str | None:
        """The text of the template that was passed."""
        return template_text(self.chat_template) if self.chat_template is not None else None
