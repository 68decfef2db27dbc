"""The command ``lightning-ep generate``: what a trained model says to a prompt, or in a conversation."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from transformers import TextStreamer

from lightning_ep.cli.chats import ChatOptions, opened_for_chats
from lightning_ep.cli.opened import Opened
from lightning_ep.data.tokenizers import ends_of
from lightning_ep.distributed.agreement import Ranks

_PATIENCE = timedelta(days=30)  # for the next line of whoever types


def generate(
    checkpoint: str,
    prompt: str | None = None,
    chat: bool = False,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 1,
    **opening: Any,
) -> None:
    """Prints what a model adds to a prompt or answers in a chat, as it is generated.

    Without --prompt it reads prompts, one a line, until the input ends; with --chat these are one conversation. Under
    torchrun the model is sharded over all processes: torchrun --nproc-per-node 8 -m lightning_ep generate ...

    Args:
        checkpoint: A training checkpoint, a directory in the hub's layout (an export), or the id of a model on the hub.
        prompt: The text to go on from, or the user's message.
        chat: Put what is said into the model's chat template. The option alone is enough.
        system: The system message of the chat.
        max_new_tokens: Tokens to generate at most.
        temperature: Divides the logits before sampling; 0 takes the most likely token.
        top_p: Sample among the most likely tokens that have this probability together.
        seed: Of the sampling.
        **opening: Options of `opened_for_chats`.

    Raises:
        ValueError: If an argument is out of its range, a prompt is not UTF-8, or the chat has no template.
        CheckpointError: If there is no such checkpoint, it is damaged, or it has no tokenizer.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} must be at least 1, temperature={temperature} must not be negative, and "
            f"top_p={top_p} must be above 0 and at most 1."
        )
    for text in (prompt, system):
        refuse_other_encodings(text or "")
    given = {"system": system} | {name: opening.get(name) for name in ("chat_template", "template_kwargs")}
    if not chat and (names := [f"--{name}" for name, value in given.items() if value is not None]):
        raise ValueError(f"{', '.join(names)} is for chats: add --chat.")
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    with opened_for_chats(checkpoint, **opening) as (found, chats):
        writer = Writer(found, max_new_tokens, sampling if temperature else {"do_sample": False})
        answer = Conversation(writer, system, chats).answer if chat else writer.go_on
        torch.manual_seed(seed)
        with contextlib.suppress(KeyboardInterrupt):
            for text in [prompt] if prompt is not None else _lines():
                refuse_other_encodings(text)
                answer(text)


def refuse_other_encodings(text: str) -> None:
    """Raises ValueError if a text that was typed has bytes that are no UTF-8: tokenizers do not read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text!r} is no UTF-8, in which texts are read.") from error


class Writer:
    """Generates and prints on rank 0, word by word; every rank makes the same calls and gets the same tokens.

    Args:
        found: The model.
        max_new_tokens: Tokens to generate at most.
        sampling: As `generate` of transformers has it.
    """

    def __init__(self, found: Opened, max_new_tokens: int, sampling: dict[str, Any]) -> None:
        self.tokenizer = found.tokenizer
        self._found = found
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self._ends = ends_of(found.model, found.tokenizer)
        self._pad = next((token for token in (found.tokenizer.pad_token_id, *self._ends) if token is not None), None)

    def go_on(self, text: str) -> None:
        """Continues a text."""
        self.write(self.tokenizer(text)["input_ids"])

    def write(self, prompt: list[int]) -> list[int]:
        """Prints what comes after a prompt, and returns its ids.

        Raises:
            ValueError: If the prompt has no tokens, or as many as the model has positions.
        """
        length = model_length(self._found.model.config)
        if not 0 < len(prompt) < length:
            raise ValueError(
                f"what was said has {len(prompt)} tokens; a model needs some, and fewer than the model's {length} "
                "positions."
            )
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = torch.tensor([prompt], device=self._found.device)
        model: Any = self._found.model
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=int(min(length - len(prompt), self._max_new_tokens)),
            num_beams=1,
            eos_token_id=self._ends or None,
            pad_token_id=self._pad,
            streamer=streamer if self._found.rank == 0 else None,
            **self._sampling,
        )
        return found[0, len(prompt) :].tolist()


class Conversation:
    """A chat through the model's template.

    Args:
        writer: What generates.
        system: The system message.
        chats: How chats become tokens.
    """

    def __init__(self, writer: Writer, system: str | None, chats: ChatOptions) -> None:
        self._writer = writer
        self._messages = [{"role": "system", "content": system}] if system is not None else []
        self._chats = chats

    def answer(self, text: str) -> None:
        """Prints the answer to a user's message.

        Raises:
            ValueError: If there is no template, or it refuses the conversation.
        """
        self._messages.append({"role": "user", "content": text})
        tokenizer = self._writer.tokenizer
        prompt = self._chats.ids(tokenizer, self._messages, answer_follows=True)
        ids = self._writer.write(prompt)
        if getattr(tokenizer, "response_template", None):
            self._messages.append({"content": "", **tokenizer.parse_response(ids, prefix=prompt)})
        else:
            self._messages.append({"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)})


def model_length(config: Any) -> float:
    """Positions that a model has been made for, from its configuration; infinite if that does not say."""
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return float("inf") if length is None else length


def _lines() -> Iterator[str]:
    """What is typed on rank 0, on every rank."""
    ranks = Ranks(RuntimeError, _PATIENCE)
    while (line := ranks.on_first("reading", _read)) is not None:
        if line.strip():
            yield line


def _read() -> str | None:
    """The next line, None at the end of the input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # with which `input` lets a line be edited
    try:
        return input("> ")
    except EOFError:
        return None
