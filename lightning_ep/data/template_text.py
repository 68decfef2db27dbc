"""The text of a chat template: of a file or by the name of one that we ship, with values for its variables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SHIPPED = Path(__file__).parent / "chat_templates"
_ASKS_WITH = {"plain": "### Assistant:\n"}


def template_text(given: str) -> str:
    """The template that a user means.

    Args:
        given: A file, the text of a template, or the name of one that we ship ("plain", which needs no special token
            but the end of text).

    Raises:
        ValueError: If it is none of these.
    """
    if "{%" in given or "{{" in given:
        return given
    file = _SHIPPED / f"{given}.jinja"
    if not file.exists():
        file = Path(given).expanduser()
    if not file.is_file():
        shipped = ", ".join(repr(file.stem) for file in sorted(_SHIPPED.glob("*.jinja")))
        raise ValueError(f"chat_template={given!r} is no file here, no template's text, and none of {shipped}.")
    return file.read_text(encoding="utf-8")


def response_template(given: str | None, end: str) -> dict[str, Any] | None:
    """What answers look like to a template that we ship, for servers; None for any other.

    `transformers serve` takes the answers of every Qwen3 for those of Qwen's own template unless the tokenizer says
    otherwise, with such a dict.

    Args:
        given: What `template_text` was given.
        end: The token that ends an answer.
    """
    if given not in _ASKS_WITH:
        return None
    content = {"close": end, "content": "text"}
    return {"defaults": {"role": "assistant"}, "start_anchor": _ASKS_WITH[given], "fields": {"content": content}}


def with_defaults(template: str, variables: Mapping[str, Any]) -> str:
    """A template that takes these values for its variables where it is given none.

    Raises:
        ValueError: If a variable has no name that templates know.
    """
    begin = ""
    for name, value in sorted(variables.items()):
        if not name.isidentifier():
            raise ValueError(f"template_kwargs has {name!r}, which cannot be the name of a template's variable.")
        begin += f"{{% set {name} = {name} if {name} is defined else {value!r} %}}"  # Jinja reads Python's literals
    return begin + template
