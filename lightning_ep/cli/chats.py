"""Commands that put chats into a model's template: one set of options, and one place where chats become tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from lightning_ep.cli.opened import Opened, opened
from lightning_ep.data.chat_template import wants_texts_as_arguments, with_text_arguments
from lightning_ep.data.template_text import template_text


@dataclass(frozen=True)
class ChatOptions:
    """What a command is told of chats.

    Attributes:
        variables: The template's variables.
    """

    variables: Mapping[str, Any]

    def ids(
        self, tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Any = None, answer_follows: bool = False
    ) -> list[int]:
        """The tokens of a chat: those that the template writes, with every special token that there is to be.

        Args:
            tokenizer: The model's, as `opened_for_chats` has left it.
            messages: The chat.
            tools: Their schemas.
            answer_follows: Whether the model's answer comes next.

        Raises:
            ValueError: If there is no template, or it refuses the chat.
        """
        if not tokenizer.chat_template:
            raise ValueError(
                "the model's tokenizer has no chat template: give the one that it was trained with as --chat_template, "
                "a file or 'plain'."
            )
        calls_tools = any(message.get("tool_calls") for message in messages)  # else the template need not be tried
        if calls_tools and wants_texts_as_arguments(tokenizer, tokenizer.get_chat_template(), self.variables):
            messages = [with_text_arguments(message) for message in messages]
        try:
            return tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=answer_follows, return_dict=False, **self.variables
            )
        except (TemplateError, TypeError, AttributeError, KeyError, IndexError) as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error


@contextmanager
def opened_for_chats(
    checkpoint: str,
    chat_template: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
    **opening: Any,
) -> Iterator[tuple[Opened, ChatOptions]]:
    """Opens a model as `opened` does, for chats in its template or in another one.

    Commands hand their options on to it, so that the sentences here are those of their help.

    Args:
        checkpoint: As in `opened`.
        chat_template: Of chats, another template (Jinja) than the one that is saved with the model: a file, or "plain",
            which we ship.
        template_kwargs: Variables of the chat template: --template_kwargs.enable_thinking false. Default: what is saved
            with the model.
        **opening: Options of `opened`.

    Raises:
        ValueError: If there is no such template.
    """
    template = template_text(chat_template) if chat_template is not None else None
    with opened(checkpoint, **opening) as found:
        if template is not None:
            found.tokenizer.chat_template = template
            found.tokenizer.response_template = None  # what answers to the saved one look like
        yield found, ChatOptions(template_kwargs or {})
