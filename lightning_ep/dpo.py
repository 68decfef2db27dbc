"""DPO: a LightningModule that trains an adapter on preferences, with the model beneath it as the reference."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ep.adapters import LoRA, adapters_off
from lightning_ep.causal_lm import CausalLM
from lightning_ep.loss import model_inside, sequence_log_probs
from lightning_ep.ops.cross_entropy import IGNORE
from lightning_ep.trainer.adamw import AdamW
from lightning_ep.trainer.evaluation import explain_no_targets

_METRICS = ("loss", "reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")


class DPO(CausalLM):
    """Direct preference optimization (Rafailov et al., 2023) of an adapter; the reference is the model without it.

    The loss of a pair is ``-log sigmoid(beta * (margin of the model - margin of the reference))``, where a margin is
    the log-probability of what was chosen minus that of what was rejected; that of a step is the mean over its pairs.
    A step runs the model twice, once without gradients and adapter, and holds no logits.

    Batches are those of `lightning_ep.data.PreferenceDataModule`: ``input_ids`` and ``labels`` as for `CausalLM`,
    ``[2 * pairs, sequence]``, the chosen answers in front and the rejected ones behind them, in the same order.

    Logs ``train/loss``, ``train/reward_chosen``, ``train/reward_rejected`` (``beta`` times what the adapter has changed
    in a log-probability), ``train/reward_margin``, ``train/reward_accuracy`` (the share of pairs with a positive one),
    what else `CausalLM` logs of a step, and the same for validation and test.

    Args:
        model: Hub id or local path: what was fine-tuned before. An adapter that did it is to be merged first
            (``lightning-ep export --merge``), since the reference has none.
        adapter: What is trained.
        beta: How strongly the model is held to the reference.
        optimizer: Builds the optimizer from what is trained. Default: AdamW with a learning rate of 1e-5.
        lr_scheduler: As in `CausalLM`.

    Raises:
        ValueError: If ``beta`` is not positive; when the model is built, with ``cp``, whose ranks hold pieces of
            sequences, and for models that add a balancing loss.
    """

    def __init__(
        self,
        model: str,
        adapter: LoRA,
        beta: float = 0.1,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        if not beta > 0:
            raise ValueError(f"DPO(beta={beta}) must be positive: with 0 nothing is learnt.")
        super().__init__(model, True, optimizer or partial(AdamW, lr=1e-5), lr_scheduler, adapter)
        self.beta = beta

    @override
    def configure_model(self) -> None:
        if self.model is not None:
            return
        super().configure_model()
        assert self.model is not None
        if self._adapter is not None and self._adapter.pretrained is not None:
            rank_zero_warn(
                f"DPO goes on with {self._adapter.pretrained}, and its reference is the model without that. If it was "
                "fine-tuned before, merge it first: lightning-ep export --merge."
            )
        if self._strategy.layout.cp > 1:
            raise ValueError(
                f"DPO compares whole sequences, and cp={self._strategy.layout.cp} gives every rank a piece: use cp=1."
            )
        if getattr(model_inside(self.model).config, "output_router_logits", False):
            raise ValueError(
                "DPO trains on preferences alone, and the model's config asks for a balancing loss: set "
                "output_router_logits to false in it. The router is frozen beneath an adapter."
            )

    @override
    def loss_sums(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        # Of the losses of the pairs; with them those of `_METRICS`, and how many pairs.
        model, targets_BS, inputs, _ = self._arguments(batch)
        if targets_BS.shape[0] % 2:
            raise ValueError(
                f"The batch has {targets_BS.shape[0]} sequences, and DPO needs pairs: the chosen ones, then as many "
                "rejected ones, as PreferenceDataModule gives them."
            )
        with torch.no_grad(), adapters_off(model):
            reference_B = sequence_log_probs(model, targets_BS, inputs)
        rewards_B = self.beta * (sequence_log_probs(model, targets_BS, inputs) - reference_B)
        chosen, rejected = rewards_B.chunk(2)
        margin = chosen - rejected
        losses = -F.logsigmoid(margin)
        # Windows that fill an evaluation up, so that ranks take equally many, are no pairs. All else of them is zero.
        is_pair = (targets_BS != IGNORE).any(1).view(2, -1).any(0).float()
        losses = losses * is_pair
        metrics = (losses, chosen, rejected, margin, (margin > 0).float(), is_pair)
        return losses.sum(), torch.stack([metric.detach().double().sum() for metric in metrics])

    @override
    def log_step(self, optimizer: Optimizer | LightningOptimizer) -> None:
        if self._step_means is not None:
            for name, mean in zip(_METRICS[1:], self._step_means[1:], strict=True):
                self.log(f"train/{name}", mean)
        super().log_step(optimizer)

    @override
    def evaluation_step(self, batch: dict[str, Tensor], dataloader_idx: int) -> None:
        super().evaluation_step(batch, 0)  # of all loaders together

    @override
    def log_evaluation(self, stage: str) -> None:
        none = torch.zeros(len(_METRICS) + 1, dtype=torch.float64, device=self.device)
        *totals, pairs = self._summed_over_ranks(self._evaluation.get(0, none))
        had_batches, self._evaluation = bool(self._evaluation), {}
        if pairs == 0:
            explain_no_targets(self, stage, had_batches)
            return
        means = (torch.stack(totals) / pairs).float()
        for name, mean in zip(_METRICS, means, strict=True):
            # Equal on all ranks already; sync_dist only tells Lightning so.
            self.log(f"{stage}/{name}", mean, prog_bar=name in ("loss", "reward_accuracy"), sync_dist=True)
