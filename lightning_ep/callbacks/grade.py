"""How good the answers are that a model generates, during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torchmetrics import Metric
from typing_extensions import override

from lightning_ep.callbacks.in_step import OfValidations, generate_in_step, generation_tokenizer, refuse_placeholders
from lightning_ep.data.resumable_loader import data_ranks
from lightning_ep.data.windows import last_answers
from lightning_ep.distributed.agreement import from_all_ranks


class GradeAnswers(OfValidations):
    """Has the model answer questions of the validation data, and logs how good its answers are.

    The questions are the first documents of every rank's validation batches, of any data module whose batches have
    ``input_ids`` and ``labels`` (and ``position_ids``, if they are packed): what stands before the last run of
    supervised tokens is asked, and that run is the answer that is expected. The most likely tokens are taken. Each data
    rank answers its own share, all ranks in step, and the metric sees all answers on every rank.

    ```python
    Trainer(callbacks=[GradeAnswers(samples=128)])  # logs val/exact_match
    Trainer(callbacks=[GradeAnswers(metric=torchmetrics.text.CharErrorRate())])  # logs val/CharErrorRate
    ```

    Args:
        metric: A torchmetrics metric whose ``update`` takes two lists of texts, the answers and what is expected, with
            neither special tokens nor white space around them. Default: exact match, the share that are equal.
        samples: Questions at most, of all ranks together.
        max_new_tokens: Tokens of an answer at most. What is longer is cut there.
        batch_size: Questions that a rank answers at a time.
        every_n_validations: Ask at every n-th validation.
        name: What is logged; a metric that gives a dict has its keys behind it. Default: val/ and the metric's name.
        tokenizer: A transformers tokenizer. Default: the datamodule's ``tokenizer``.

    Raises:
        ValueError: If an argument is out of its range; in a validation, if no document of any rank has a question.
        TypeError: At the start of ``fit`` or ``validate``, if the metric takes no texts, there is no tokenizer, or no
            ``model`` that can generate; in a validation, if batches have no ``input_ids`` and ``labels``.
    """

    def __init__(
        self,
        metric: Metric | None = None,
        samples: int = 64,
        max_new_tokens: int = 128,
        batch_size: int = 8,
        every_n_validations: int = 1,
        name: str | None = None,
        tokenizer: Any | None = None,
    ) -> None:
        least = {"samples": samples, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
        least["every_n_validations"] = every_n_validations
        if wrong := {key: value for key, value in least.items() if value < 1}:
            raise ValueError(f"{', '.join(f'{key}={value}' for key, value in wrong.items())} must be at least 1.")
        super().__init__(every_n_validations)
        self.metric = metric
        self.samples = samples
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.name = name or ("val/exact_match" if metric is None else f"val/{type(metric).__name__}")
        self.tokenizer = tokenizer
        self._wanted = 0
        self._asked: list[tuple[list[int], list[int]]] = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, pl_module)  # the first validation may be hours away

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._check(trainer, pl_module)
        rank, ranks = data_ranks(trainer)
        self._wanted = len(range(rank, self.samples, ranks)) if self.due else 0
        self._asked = []

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if missing := self._wanted - len(self._asked):
            if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= batch.keys():
                found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
                raise TypeError(f"GradeAnswers looks for `input_ids` and `labels` in validation batches, not {found}.")
            self._asked += islice(last_answers(batch), missing)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.due:
            return
        answers, expected = self._answer(trainer, pl_module)
        if not answers:
            raise ValueError(
                "GradeAnswers found no question: no document of the validation batches has supervised tokens behind "
                "others. Chats and pairs of texts have them; leave the callback out for other data."
            )
        for key, value in _values(self._metric(), answers, expected).items():
            # Equal on all ranks already; sync_dist only tells Lightning so.
            pl_module.log(f"{self.name}/{key}" if key else self.name, value, sync_dist=True, prog_bar=True)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        generation_tokenizer(type(self).__name__, self.tokenizer, trainer, pl_module)
        refuse_placeholders(type(self).__name__, trainer)
        try:
            _values(self._metric(), ["an answer"], ["the answer"])
        except Exception as error:
            raise TypeError(
                f"GradeAnswers calls `metric.update(answers, expected)` with two lists of texts, for which "
                f"{type(self.metric).__name__} raises {type(error).__name__}: {error}. torchmetrics.text has such "
                "metrics."
            ) from error

    def _metric(self) -> Metric:
        metric = deepcopy(self.metric) if self.metric is not None else ExactMatch()
        metric.reset()
        for part in metric.modules():  # of metrics made of metrics too
            if isinstance(part, Metric):
                # Every rank has all answers. (torchmetrics looks at `sync_on_compute` in constructors alone.)
                part.distributed_available_fn = _never
        return metric

    def _answer(self, trainer: Trainer, pl_module: LightningModule) -> tuple[list[str], list[str]]:
        """The answers of all data ranks, and what is expected."""
        tokenizer = generation_tokenizer(type(self).__name__, self.tokenizer, trainer, pl_module)
        prompts = [prompt for prompt, _ in self._asked]
        rounds = range(0, max(from_all_ranks(len(prompts))), self.batch_size)
        answers: list[list[int]] = []
        for begin in rounds:
            # A rank that has no question left takes part with one of no meaning.
            some = prompts[begin : begin + self.batch_size]
            found = generate_in_step(trainer, pl_module, tokenizer, some or [[0]], self.max_new_tokens)
            answers += found[: len(some)]

        def texts(ids: Sequence[list[int]]) -> list[str]:
            return [tokenizer.decode(one, skip_special_tokens=True).strip() for one in ids]

        mine = texts(answers), texts([answer for _, answer in self._asked])
        by_data_rank = dict(from_all_ranks((data_ranks(trainer)[0], mine)))  # ranks that share batches: one of them
        every = [by_data_rank[rank] for rank in sorted(by_data_rank)]
        return [text for found, _ in every for text in found], [text for _, found in every for text in found]


class ExactMatch(Metric):
    """The share of texts that are equal."""

    right: torch.Tensor
    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0.0), "sum")
        self.add_state("total", torch.tensor(0.0), "sum")

    @override
    def update(self, preds: Sequence[str], target: Sequence[str]) -> None:
        self.right += sum(one == other for one, other in zip(preds, target, strict=True))
        self.total += len(target)

    @override
    def compute(self) -> torch.Tensor:
        return self.right / self.total


def _never() -> bool:
    return False


def _values(metric: Metric, answers: list[str], expected: list[str]) -> dict[str, torch.Tensor]:
    metric.update(answers, expected)
    value = metric.compute()
    found = value if isinstance(value, Mapping) else {"": value}
    return {key: torch.as_tensor(number, dtype=torch.float32) for key, number in found.items()}
