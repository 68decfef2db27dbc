"""Generation in the midst of a run, by all ranks in step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightning_ep import transformers_adapter as adapter
from lightning_ep.context_parallel import whole_sequences
from lightning_ep.data.tokenizers import check_vocabulary, ends_of
from lightning_ep.ops.eval_mode import evaluated


class OfValidations(Callback):
    """Has something to do in every n-th validation, of which sanity checks are none.

    Attributes:
        every_n_validations: n, counted from the start of each stage.
        due: Whether there is something to do in the validation that runs, or ran last.
    """

    def __init__(self, every_n_validations: int) -> None:
        self.every_n_validations = every_n_validations
        self.due = False
        self._validations = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._validations = 0

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validations += not trainer.sanity_checking
        self.due = not trainer.sanity_checking and self._validations % self.every_n_validations == 0


def generation_tokenizer(name: str, given: Any | None, trainer: Trainer, module: LightningModule) -> Any:
    """The tokenizer to generate with: what was passed, or the datamodule's.

    Args:
        name: The callback, for errors.
        given: What was passed to it.
        trainer: The Trainer.
        module: The module, whose models are built.

    Raises:
        TypeError: If there is none, or the module has no ``model`` that can generate.
        ValueError: If it has more tokens than the model.
    """
    if not callable(getattr(getattr(module, "model", None), "generate", None)):
        raise TypeError(
            f"{name} calls `model.generate` of the LightningModule; {type(module).__name__} has none. "
            "Keep a transformers causal language model as `self.model`, or leave the callback out."
        )
    datamodule = getattr(trainer, "datamodule", None)
    tokenizer = given or getattr(datamodule, "tokenizer", None)
    if tokenizer is None:
        raise TypeError(
            f"{name} needs a tokenizer, but none was passed in and {type(datamodule).__name__} has no `tokenizer`. "
            f"Pass {name}(..., tokenizer=...), or give the datamodule one."
        )
    for model in adapter.pretrained_models(module).values():
        check_vocabulary(tokenizer, model.config, f"Give {name} the tokenizer of the model.")
    return tokenizer


def refuse_placeholders(name: str, trainer: Trainer) -> None:
    """Raises ValueError if a callback of that name would ask questions of the data that have more than text in them."""
    datamodule = getattr(trainer, "datamodule", None)
    if len(getattr(datamodule, "placeholders", ())):
        raise ValueError(
            f"{name} asks with texts alone, and the questions of {type(datamodule).__name__} have images or sound in "
            "them. Leave it out: val/loss is what there is of these data."
        )


def generate_in_step(
    trainer: Trainer,
    module: LightningModule,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[list[int]]:
    """What the model of a module adds to prompts, as ids up to a token that ends a text.

    Every forward of a sharded model is a collective, so that every rank must call it, as often; ranks that share
    batches with the same prompts. Ranks stay in step whatever the lengths at which they stop: ``synced_gpus`` lets a
    rank that has finished go on with forwards until all have. The sampling is seeded by the step, and leaves modes and
    random state of the training alone.

    Args:
        trainer: The Trainer.
        module: Its ``model`` generates.
        tokenizer: Says what ends a text, beside the model's generation config.
        prompts: Ids.
        max_new_tokens: Tokens to add to each prompt at most.
        temperature: Divides the logits before sampling; 0 takes the most likely token.
    """
    model: Any = module.model
    ends = ends_of(model, tokenizer)
    pad = next((token for token in (getattr(tokenizer, "pad_token_id", None), *ends) if token is not None), 0)
    # padded on the left, so that every prompt ends where its continuation begins
    size = max(map(len, prompts))
    rows = [[pad] * (size - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (size - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    # Layers that are compiled for training would be compiled again for every length of the cache.
    stance = torch.compiler.set_stance("force_eager")
    with evaluated(model), isolate_rng(), trainer.precision_plugin.forward_context(), stance, whole_sequences(model):
        torch.manual_seed(trainer.global_step)
        ids = model.generate(
            input_ids=torch.tensor(rows, device=module.device),
            attention_mask=torch.tensor(mask, device=module.device),
            max_new_tokens=max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=pad,
            synced_gpus=trainer.world_size > 1,
            **sampling,
        )
    return [_until(row, ends) for row in ids[:, size:].tolist()]


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids)) + 1]
