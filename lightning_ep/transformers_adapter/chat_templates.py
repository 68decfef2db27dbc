"""How a conversation is written for a model: the templates of tokenizers, rendered with what they mark as generated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def marks_generation(template: str) -> bool:
    """Whether a template says with ``{% generation %}`` what an assistant writes."""
    return _MARKER.search(template) is not None


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    prompt: bool = False,
    **variables: Any,
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation as ``tokenizer.apply_chat_template`` does.

    Args:
        tokenizer: Its special tokens are variables of templates.
        template: The template.
        messages: The conversation.
        tools: Schemas of the tools.
        prompt: Add what the model is given in front of its answer (``add_generation_prompt``).
        **variables: More for the template, such as ``enable_thinking``.

    Returns:
        The text, and the character ranges that the template's generation markers enclose; none without markers.

    Raises:
        ValueError: If the template refuses the conversation, or cannot render it.
    """
    marked = marks_generation(template)
    try:
        # It says that it returns a text; these are a list of one, and where its markers are.
        rendered: Any = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            tools=[dict(tool) for tool in tools] if tools is not None else None,
            chat_template=template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=prompt,
            **{**tokenizer.special_tokens_map, **variables},
        )
    except (TemplateError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(f"the chat template cannot render it: {error}") from error
    (text,), ranges = rendered
    return text, list(ranges[0]) if marked else []
