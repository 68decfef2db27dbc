"""CausalLM: a LightningModule that trains any transformers causal language model with a token-weighted loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AutoConfig, PreTrainedConfig
from typing_extensions import override

from lightning_ep.adapters import LoRA, add_adapter
from lightning_ep.adapters.saved import fill_with_base, open_adapted, source_of_whole
from lightning_ep.checkpoint.saved_weights import SavedWeights
from lightning_ep.distributed.host_copies import Lagged
from lightning_ep.hub.meta_models import config_of, from_config, from_pretrained, meta_model
from lightning_ep.loss import model_inside, summed_loss, token_losses
from lightning_ep.ops.cross_entropy import IGNORE
from lightning_ep.routing.biases import give_saved_biases
from lightning_ep.routing.router_rules import RouterRule, check_rules
from lightning_ep.strategy import ExpertParallelStrategy
from lightning_ep.trainer.adamw import AdamW
from lightning_ep.trainer.batches import refuse_unknown_ids
from lightning_ep.trainer.clipping import clip_grad_norm_
from lightning_ep.trainer.evaluation import log_token_means
from lightning_ep.trainer.frozen_parts import freeze_parts, frozen_parts
from lightning_ep.trainer.loss_scale import mean_of_sum


class CausalLM(LightningModule):
    """Trains a causal language model; the loss is the mean over all valid tokens of the step.

    "All" spans data ranks and the accumulation window: the sum of token losses over the global number of valid tokens,
    whatever the padding and however tokens are spread. Batches are dicts with ``input_ids`` and ``labels`` (int64
    ``[batch, sequence]``, labels not shifted, -100 where there is no target), and anything else that the model's
    forward takes.

    Logs ``train/loss``, ``train/grad_norm``, ``lr``, ``val/loss``, ``val/perplexity`` and the like for test; where
    there are several dataloaders, also ``val/loss/<name>``, by their keys in a dict or by their numbers. The progress
    bar shows ``loss``, on GPUs that of the step before, so that the host need not wait for the GPU.
    An evaluation in which no token of any rank has a target raises ValueError at its end; the sanity check only warns.
    ``predict`` returns, per sequence, the ``log_likelihood`` (nats) and the number of ``tokens`` it sums over.

    Args:
        model: Hub id or local path, or a configuration: an object, or a dict with ``model_type``.
        pretrained: Load weights (every rank streams its own shards), or start from random ones.
        optimizer: Builds the optimizer from the parameters. Default: AdamW with lr=1e-5, or 1e-4 with an adapter.
        lr_scheduler: Builds a scheduler from the optimizer; it steps once per optimizer step. `lightning_ep.Schedule`
            ends with the run.
        adapter: Train adapters, with the model frozen beneath.
        router: What steers the routers: rules of `lightning_ep.routing`. Default: the token loss alone, and
            transformers' balancing loss where the configuration asks for it (``output_router_logits``), which is taken
            over the tokens of all ranks.
        freeze_router: Leave the routers' weights as they are; beneath an adapter they are frozen anyway.
        freeze: Modules of the model whose weights stay as they are, by name (``model.visual``; ``*`` for any part of a
            name). Default: of pretrained weights the towers for images and sound, but not what projects their output
            into the text. ``[]``: none.

    Raises:
        TypeError: If something in ``router`` is no rule.
        ValueError: If there are no weights to load, a configuration in a dict has a key that nobody reads, or rules
            contradict each other.
    """

    def __init__(
        self,
        model: str | dict[str, Any] | PreTrainedConfig,
        pretrained: bool = True,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        adapter: LoRA | None = None,
        router: RouterRule | list[RouterRule] | None = None,
        freeze_router: bool = False,
        freeze: list[str] | None = None,
    ) -> None:
        super().__init__()
        if pretrained and not isinstance(model, str):
            raise ValueError(
                "pretrained=True needs a hub id or a path as `model`, and a configuration was given: there are no "
                "weights to load. Set pretrained=False to train from scratch."
            )
        # Now, not when the model is built: a mistyped key is told before anything else is done.
        self._source = config_of(model) if isinstance(model, dict) else model
        self._pretrained = pretrained
        self._optimizer = optimizer
        self._adapter = adapter
        self._lr_scheduler = lr_scheduler
        self.router_rules = check_rules(router)
        self.freeze_router = freeze_router
        self._freeze = freeze
        self.batch_terms: Tensor | None = None  # this rank's of a micro-batch, valid tokens
        self.model: nn.Module | None = None
        self._window: Tensor | None = None  # `loss_sums` since the last step
        self._evaluation: dict[int, Tensor] = {}  # the same of an evaluation, by dataloader
        self._step_means: Tensor | None = None  # of the last step: the loss, and what else is in `loss_sums`
        self._train_loss: Tensor | None = None
        self._grad_norm: Tensor | None = None
        self._shown_loss = Lagged()

    calls_its_head = True
    """Whether the output head's weight is read in calls of the head only, so that it can be gathered for these."""

    @property
    def pretrained_path(self) -> str | None:
        """Hub id or path of the weights that it starts from; None for random ones. Data modules look for it."""
        return self._source if self._pretrained and isinstance(self._source, str) else None

    @property
    def model_config(self) -> PreTrainedConfig:
        """The model's configuration, also before the model is built."""
        return model_inside(self.model).config if self.model is not None else _config(self._source)

    @override
    def configure_model(self) -> None:
        if self.model is not None:
            return
        if not isinstance(self.trainer.strategy, ExpertParallelStrategy):
            raise TypeError(
                "CausalLM returns sums of token losses, which only ExpertParallelStrategy scales, but the Trainer uses "
                f"{type(self.trainer.strategy).__name__}. Pass strategy=ExpertParallelStrategy(); it serves one device."
            )
        path = self.pretrained_path
        model = from_config(_config(self._source)) if path is None else from_pretrained(path)
        if self._freeze is not None or self._pretrained:
            freeze_parts(model, self._freeze)
        self.model = self._adapted(model)

    def _adapted(self, model: nn.Module) -> nn.Module:
        return model if self._adapter is None else add_adapter(model, self._adapter)

    @classmethod
    @override
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """The module with its whole model in memory, in this process alone, for use without a Trainer.

        To go on in a Trainer, pass ``ckpt_path`` to its methods instead, which loads shards only.

        Args:
            checkpoint_path: A directory or a file that ExpertParallelStrategy has saved.
            map_location: The device that the model goes to. Default: the CPU.
            hparams_file: Not supported: arguments of CausalLM are no hyperparameters of Lightning.
            strict: Refuse a checkpoint with other weights than the model's. Default: yes.
            weights_only: Build no objects from the checkpoint but tensors and plain values. Default: yes.
            **kwargs: Arguments of CausalLM. ``model`` and ``adapter`` are what the checkpoint says unless given. Of
                adapters, ``model`` is the hub id or path of their base, where that has another place now.

        Raises:
            CheckpointError: If the checkpoint is damaged, does not say what model it is of, or does not fit it; if the
                base of its adapters is not there, or another one.
        """
        if hparams_file is not None:
            raise ValueError("CausalLM has no hyperparameters file: pass its arguments to load_from_checkpoint.")
        saved = SavedWeights(Path(checkpoint_path), weights_only is not False)
        source, lora = kwargs.pop("model", None), kwargs.get("adapter")
        if "model" in saved.bases:
            model, start = open_adapted(saved, "model", source, lora)
            module = cls(**{**kwargs, **start})
            module.model = model
        else:
            source = source_of_whole(saved, "model", source, lora)
            module = cls(**{"pretrained": False, **kwargs, "model": source})
            model = meta_model(_config(module._source))
            give_saved_biases(model, saved.tensors, "model.")
            module.model = module._adapted(model)
        fill_with_base(module, saved, strict is not False)
        return module.to(map_location) if map_location is not None else module

    @override
    def forward(self, **inputs: Any) -> Any:
        assert self.model is not None
        return self.model(**inputs)

    @property
    def _strategy(self) -> ExpertParallelStrategy:
        strategy = self.trainer.strategy
        assert isinstance(strategy, ExpertParallelStrategy)  # `configure_model` has refused others
        return strategy

    def _arguments(self, batch: dict[str, Tensor]) -> tuple[nn.Module, Tensor, dict[str, Any], Tensor | None]:
        """Those of a loss: model, next tokens, the model's arguments, labels; of this rank's piece of the sequences."""
        assert self.model is not None
        inputs = self._strategy.shard_sequence(batch)
        if "shift_labels" not in inputs:
            raise ValueError(
                f"The batch has {sorted(batch)} and no labels, so that there is nothing to predict. Add `labels`: the "
                f"input_ids, with {IGNORE} where a token is no target. CausalLM shifts them itself."
            )
        inputs.pop("num_items_in_batch", None)
        labels, targets = inputs.pop("labels", None), inputs.pop("shift_labels")
        # Targets cross the borders of pieces, where labels of a piece end.
        return self.model, targets, inputs, labels if self._strategy.layout.cp == 1 else None

    def loss_sums(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum of the losses of a batch, 0-dim; and that, sums of what else is logged and how many terms, in float64."""
        loss, targets_BS = summed_loss(*self._arguments(batch))
        return loss, torch.stack([loss.detach().double(), (targets_BS != IGNORE).sum().double()])

    def refuse_batch(self, batch: Any) -> None:
        """Raises ValueError for ids that the model does not have; the strategy asks while the host has the batch."""
        assert self.model is not None
        refuse_unknown_ids(batch, model_inside(self.model).get_input_embeddings())

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, sums = self.loss_sums(batch)
        self.batch_terms = sums[-1].clone()  # the ranks' will be summed in place
        if self.trainer.accumulate_grad_batches == 1:
            # The window is this batch, so its terms are known before backward: no pass over the gradients is needed.
            return mean_of_sum(loss, self._close_window(sums), self._strategy.layout)
        self._open_window(sums)
        return loss

    def _open_window(self, sums: Tensor) -> None:
        if type(self).training_step is not CausalLM.training_step:
            rank_zero_warn(
                "With accumulate_grad_batches > 1 CausalLM.training_step returns the *sum* of its token losses, "
                "DPO's of its pairs, which are divided by the tokens (pairs) of the window at its end. What "
                f"{type(self).__name__}.training_step adds is divided with them: multiply a mean by the number of "
                "valid tokens (pairs) of the batch first."
            )
        self._window = sums if self._window is None else self._window + sums

    def _close_window(self, sums: Tensor) -> Tensor:
        """Number of terms of a window on all ranks from this rank's sums; keeps the means."""
        sums = self._summed_over_ranks(sums)
        # A window without any valid token has zero gradients; dividing by one keeps them zero.
        terms = sums[-1].clamp(min=1)
        self._step_means = (sums[:-1] / terms).float()
        self._train_loss = self._step_means[0]
        return terms.float()

    @property
    def gradient_denominator(self) -> Callable[[], Tensor] | None:
        """Gives the global number of valid tokens since the last step, by which the strategy divides the gradients.

        None while no window is open: `training_step` has divided already, or is a subclass's and returns means.
        """
        return None if self._window is None else self._end_window

    def _end_window(self) -> Tensor:
        assert self._window is not None
        sums, self._window = self._window, None
        return self._close_window(sums)

    def _summed_over_ranks(self, sums: Tensor) -> Tensor:
        # Not `strategy.reduce`: Lightning puts a barrier before it, for which the host would wait in every step.
        if dist.is_initialized():
            dist.all_reduce(sums)
        # Tensor-parallel peers have summed the same tokens: they count as often in the losses, gradients and tokens.
        return sums

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        clips = gradient_clip_val is not None and gradient_clip_val > 0
        by_norm = clips and gradient_clip_algorithm != "value"
        max_norm = float(gradient_clip_val) if by_norm else float("inf")  # type: ignore[arg-type]
        if type(self).configure_gradient_clipping is CausalLM.configure_gradient_clipping:
            self._grad_norm = self._strategy.precision_plugin.clip_in_step(optimizer, max_norm)
        else:  # a subclass that may look at the clipped gradients
            params = [param for group in optimizer.param_groups for param in group["params"]]
            self._grad_norm = clip_grad_norm_(params, max_norm)
        if clips and not by_norm:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if not self._logs_after_step:
            self.log_step(optimizer)

    @override
    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self._logs_after_step:
            self.log_step(optimizer)

    @property
    def _logs_after_step(self) -> bool:
        """Whether to log when the update has been launched: it takes milliseconds, for which the GPU would wait.

        A subclass with either hook of its own may look at what is logged, or not come to the second.
        """
        own, hooks = CausalLM, ("configure_gradient_clipping", "optimizer_step")
        return all(getattr(type(self), name) is getattr(own, name) for name in hooks)

    def log_step(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """Logs an optimizer step; called by every rank once in each."""
        if self._grad_norm is not None:
            self.log("train/grad_norm", self._grad_norm)
        if self._train_loss is not None:
            self.log("train/loss", self._train_loss)
            # Of what is in the progress bar, Lightning asks for the number after every step.
            self.log("loss", self._shown_loss.swap(self._train_loss), prog_bar=True, logger=False)
        if self._strategy.precision_plugin.guard.limit:
            self.log("train/skipped_steps", torch.tensor(float(self._strategy.skipped_steps)))
        # A tensor, on the CPU: of a number Lightning would make one on the GPU, for which the host waits.
        self.log("lr", torch.tensor(optimizer.param_groups[0]["lr"]))

    @property
    def weighs_tokens(self) -> bool:
        """Whether evaluations sum over tokens (DPO: pairs), so that windows without targets do no harm.

        Data modules that see it give a dataloader for each source. False for subclasses with a step of their own.
        """
        return type(self).validation_step is CausalLM.validation_step

    def evaluation_step(self, batch: dict[str, Tensor], dataloader_idx: int) -> None:
        """What validation and test do with a batch."""
        _, sums_2 = self.loss_sums(batch)
        self._evaluation[dataloader_idx] = sums_2 + self._evaluation.get(dataloader_idx, 0)

    def log_evaluation(self, stage: str) -> None:
        """Logs an evaluation at its end; ``stage`` is "val" or "test"."""
        sums, self._evaluation = self._evaluation, {}
        log_token_means(self, stage, sums)

    @override
    def on_train_start(self) -> None:
        # What a fit left that ended inside an accumulation window.
        self._window = None
        self._shown_loss = Lagged()

    @override
    def on_train_epoch_start(self) -> None:
        self._window = None  # of an epoch that was left inside of a window, with a -1 from `on_train_batch_start`

    @override
    def on_validation_epoch_start(self) -> None:
        self._evaluation = {}  # what an evaluation left that did not reach its end

    @override
    def on_test_epoch_start(self) -> None:
        self._evaluation = {}

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluation_step(batch, dataloader_idx)

    @override
    def on_validation_epoch_end(self) -> None:
        self.log_evaluation("val")

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluation_step(batch, dataloader_idx)

    @override
    def on_test_epoch_end(self) -> None:
        self.log_evaluation("test")

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        model, targets_BS, inputs, labels_BS = self._arguments(batch)
        losses_BS, targets_BS = token_losses(model, targets_BS, inputs, labels_BS)
        sums_2B = torch.stack([-losses_BS.double().sum(1), (targets_BS != IGNORE).sum(1)])
        if (piece := inputs.get("sequence")) is not None:
            sums_2B = piece.sum_over_ranks(sums_2B)
        return {"log_likelihood": sums_2B[0].float(), "tokens": sums_2B[1].long()}

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        trained: Iterable[nn.Parameter] = self.parameters()
        if self._adapter is not None or self.freeze_router or frozen_parts(self):
            trained = (param for param in self.parameters() if param.requires_grad)
        optimizer = (self._optimizer or partial(AdamW, lr=1e-5 if self._adapter is None else 1e-4))(trained)
        if self._lr_scheduler is None:
            return optimizer
        scheduler = self._lr_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _config(source: str | PreTrainedConfig) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(source) if isinstance(source, str) else source
