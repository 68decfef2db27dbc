"""Samples of generated text during training."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from jinja2 import TemplateError
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from typing_extensions import override

from lightning_ep.callbacks.in_step import OfValidations, generate_in_step, generation_tokenizer, refuse_placeholders
from lightning_ep.data.windows import last_answers
from lightning_ep.distributed.agreement import from_all_ranks
from lightning_ep.distributed.console import print_once

_TAG = "samples"
_OF_DATA = 2  # questions of the data that are answered


class GenerateSamples(OfValidations):
    """Prints continuations of fixed prompts, or answers to questions, after validation.

    They go to TensorBoard and W&B too, as text under "samples", where the Trainer has these loggers. All ranks generate
    for the same prompts together, from the same random state, because every forward of a sharded model is a collective.
    The sampling is seeded by the step and leaves the training's random state alone.

    Works with every LightningModule whose ``model`` is a transformers model that can generate.

    Args:
        prompts: Texts to continue. With ``chat`` what a user says, or a whole conversation up to there: a list of dicts
            of ``role`` and ``content``. Default: the first questions of the validation data, as `GradeAnswers` finds
            them; what is expected is printed beside the answers.
        chat: Put prompts into the tokenizer's chat template, and have them answered.
        every_n_validations: Generate after every n-th validation.
        max_new_tokens: Tokens to add to each prompt at most.
        temperature: Divides the logits before sampling; 0 takes the most likely token.
        tokenizer: A transformers tokenizer. Default: the datamodule's ``tokenizer``.

    Raises:
        ValueError: If an argument is out of its range.
        ValueError: At the start of ``fit`` or ``validate``, if the tokenizer has more tokens than the model, or no chat
            template, or that refuses a prompt; in a validation, if there are neither prompts nor questions in the data.
        TypeError: At the start of ``fit`` or ``validate``, if there is no tokenizer, or no ``model`` that can generate.
    """

    def __init__(
        self,
        prompts: list[str | list[dict[str, Any]]] | None = None,
        chat: bool = False,
        every_n_validations: int = 1,
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        tokenizer: Any | None = None,
    ) -> None:
        if prompts is None and chat:
            raise ValueError("chat=True is for prompts: questions of the data are in its template. Give prompts too.")
        if prompts is not None and (not prompts or not all(prompts)):
            raise ValueError(f"prompts={prompts!r} must be at least one text, and none may be empty.")
        if prompts is not None and not chat and not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("prompts that are lists of messages are for chats: set chat=True.")
        if every_n_validations < 1 or max_new_tokens < 1 or temperature < 0:
            raise ValueError(
                f"every_n_validations={every_n_validations} and max_new_tokens={max_new_tokens} must be at least 1, and"
                f" temperature={temperature} must not be negative."
            )
        super().__init__(every_n_validations)
        self.prompts = prompts
        self.chat = chat
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.tokenizer = tokenizer
        self._questions: list[tuple[list[int], list[int]]] = []  # of the data, with what is expected

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prompts(trainer, pl_module)  # the first validation may be hours away

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        # here and not in `setup`: models are often built later, in `configure_model`
        self._prompts(trainer, pl_module)
        self._questions = []

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        missing = _OF_DATA - len(self._questions) if self.prompts is None and self.due else 0
        if missing and isinstance(batch, Mapping) and {"input_ids", "labels"} <= batch.keys():
            self._questions += islice(last_answers(batch), missing)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.due:
            texts = self._generate(trainer, pl_module)
            print_once(
                trainer, "\n".join(f"--- sample at step {trainer.global_step}\n{text}" for text in texts) + "\n---"
            )
            if trainer.is_global_zero:
                self._log(trainer, texts)

    def _prompts(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Any, list[list[int]]]:
        """The tokenizer, and the ids of prompts, of which there are none where they come from the data."""
        tokenizer = generation_tokenizer(type(self).__name__, self.tokenizer, trainer, pl_module)
        if self.prompts is None:
            refuse_placeholders(type(self).__name__, trainer)
            return tokenizer, []
        if not self.chat:
            return tokenizer, tokenizer(self.prompts)["input_ids"]
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "GenerateSamples(chat=True) needs a chat template, and the tokenizer has none: pass it to the data "
                "module (ChatDataModule(chat_template=...)), or leave chat out."
            )
        try:
            # The template writes every special token that there is to be.
            return tokenizer, [
                tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
                for conversation in map(_conversation, self.prompts)
            ]
        except TemplateError as error:
            raise ValueError(f"the chat template refuses a prompt of GenerateSamples: {error}") from error

    def _generate(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Each prompt with what follows it."""
        tokenizer, prompts = self._prompts(trainer, pl_module)
        # All ranks answer those of one; the first may have none.
        questions = next(filter(None, from_all_ranks(self._questions)), []) if self.prompts is None else []
        if self.prompts is None and not questions:
            raise ValueError(
                "GenerateSamples found no question: no document of the validation batches has supervised tokens behind "
                "others. Chats and pairs of texts have them; for other data give prompts."
            )
        prompts = prompts or [question for question, _ in questions]
        found = generate_in_step(trainer, pl_module, tokenizer, prompts, self.max_new_tokens, self.temperature)

        def text(ids: list[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=True)

        if self.prompts is None:
            return [
                f"{text(question).strip()}\n> {text(answer).strip()}\n(expected: {text(expected).strip()})"
                for (question, expected), answer in zip(questions, found, strict=True)
            ]
        if not self.chat:
            return [text([*prompt, *ids]) for prompt, ids in zip(prompts, found, strict=True)]
        asked = [_conversation(prompt)[-1]["content"] for prompt in self.prompts]
        return [f"{question}\n> {text(answer)}" for question, answer in zip(asked, found, strict=True)]

    def _log(self, trainer: Trainer, texts: list[str]) -> None:
        step = trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_text(_TAG, ["step", "text"], [[str(step), text] for text in texts], step=step)
            elif isinstance(logger, TensorBoardLogger):
                for number, text in enumerate(texts):
                    indented = "\n".join(f"    {line}" for line in text.splitlines())  # Markdown's text as it is
                    logger.experiment.add_text(f"{_TAG}/{number}", indented, step)


def _conversation(prompt: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
