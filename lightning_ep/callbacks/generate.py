"""Samples of generated text during training."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightning_ep import transformers_adapter as adapter
from lightning_ep.context_parallel import whole_sequences
from lightning_ep.data.tokenizers import check_vocabulary
from lightning_ep.distributed.console import print_once


class GenerateSamples(Callback):
    """Prints continuations of fixed prompts after validation.

    All ranks generate for the same prompts together, from the same random state, because every forward of a sharded
    model is a collective. They stay in step whatever the lengths at which they stop: ``synced_gpus`` lets a rank that
    has finished go on with forwards until all have. The sampling is seeded by the step and leaves the training's random
    state alone.

    Works with every LightningModule whose ``model`` is a transformers model that can generate.

    Args:
        prompts: Texts to continue.
        every_n_validations: Generate after every n-th validation.
        max_new_tokens: Tokens to add to each prompt at most.
        temperature: Divides the logits before sampling; 0 takes the most likely token.
        tokenizer: A transformers tokenizer. Default: the datamodule's ``tokenizer``.

    Raises:
        ValueError: If an argument is out of its range.
        ValueError: At the start of ``fit`` or ``validate``, if the tokenizer has more tokens than the model.
        TypeError: At the start of ``fit`` or ``validate``, if there is no tokenizer, or no ``model`` that can generate.
    """

    def __init__(
        self,
        prompts: list[str],
        every_n_validations: int = 1,
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        tokenizer: Any | None = None,
    ) -> None:
        if not prompts or not all(prompts):
            raise ValueError(f"prompts={prompts!r} must be at least one text, and none may be empty.")
        if every_n_validations < 1 or max_new_tokens < 1 or temperature < 0:
            raise ValueError(
                f"every_n_validations={every_n_validations} and max_new_tokens={max_new_tokens} must be at least 1, and"
                f" temperature={temperature} must not be negative."
            )
        self.prompts = prompts
        self.every_n_validations = every_n_validations
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.tokenizer = tokenizer
        self._validations = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._validations = 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, pl_module)  # the first validation may be hours away

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # here and not in `setup`: models are often built later, in `configure_model`
        if not callable(getattr(getattr(pl_module, "model", None), "generate", None)):
            raise TypeError(
                f"GenerateSamples calls `model.generate` of the LightningModule; {type(pl_module).__name__} has none. "
                "Keep a transformers causal language model as `self.model`, or leave the callback out."
            )
        tokenizer = self._tokenizer(trainer)
        if tokenizer is None:
            raise TypeError(
                "GenerateSamples needs a tokenizer, but none was passed in and"
                f" {type(getattr(trainer, 'datamodule', None)).__name__} has no `tokenizer`. Pass GenerateSamples(...,"
                " tokenizer=...), or give the datamodule one."
            )
        for model in adapter.pretrained_models(pl_module).values():
            check_vocabulary(tokenizer, model.config, "Give GenerateSamples the tokenizer of the model.")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._validations += 1
        if self._validations % self.every_n_validations == 0:
            texts = self._generate(trainer, pl_module)
            print_once(
                trainer, "\n".join(f"--- sample at step {trainer.global_step}\n{text}" for text in texts) + "\n---"
            )

    def _tokenizer(self, trainer: Trainer) -> Any | None:
        return self.tokenizer or getattr(getattr(trainer, "datamodule", None), "tokenizer", None)

    def _generate(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        model: Any = pl_module.model
        tokenizer: Any = self._tokenizer(trainer)
        # padded on the left, so that every prompt ends where its continuation begins
        padding = {"padding": True, "padding_side": "left"} if len(self.prompts) > 1 else {}
        inputs = tokenizer(self.prompts, return_tensors="pt", **padding).to(pl_module.device)
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            # Layers that are compiled for training would be compiled again for every length of the cache.
            stance = torch.compiler.set_stance("force_eager")
            with isolate_rng(), trainer.precision_plugin.forward_context(), stance, whole_sequences(model):
                torch.manual_seed(trainer.global_step)
                ids = model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    max_new_tokens=self.max_new_tokens,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id
                    if tokenizer.pad_token_id is not None
                    else tokenizer.eos_token_id,
                    synced_gpus=trainer.world_size > 1,
                    **sampling,
                )
        finally:
            for module in training:
                module.training = True
        return tokenizer.batch_decode(ids, skip_special_tokens=True)
