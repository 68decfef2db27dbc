"""Precision of sharded models, and what happens to a gradient between backward and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.fabric.plugins.precision.utils import _convert_fp_tensor, _DtypeContextManager
from lightning.fabric.utilities.types import Steppable
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ep import transformers_adapter as adapter
from lightning_ep.fsdp.accumulation import forget_gradients, reduce_kept_gradients
from lightning_ep.fsdp.passes import break_off_if_it_raises
from lightning_ep.hub.beneath import is_adapted
from lightning_ep.routing.steer import Steering, steerings, step_all
from lightning_ep.trainer.adamw import AdamW
from lightning_ep.trainer.clipping import clip_grad_norm_, clip_grad_value_, clip_in_step_, scale_gradients
from lightning_ep.trainer.loss_scale import at_step, into_backward, with_router_losses
from lightning_ep.trainer.nonfinite import NonfiniteGuard


@dataclass(frozen=True)
class _ShardedWith:
    """What is remembered of a model: the precision that it was sharded with, which cannot be changed any more."""

    precision: str


ShardedPrecisionName = Literal["32-true", "bf16-mixed", "bf16-true"]


class ShardedPrecision(Precision):
    """Precision of a model under FSDP2: dtypes of shards, compute and reduction, and the scaling of gradients.

    ======================  ============  =========  =====================
    ``precision``           shards        compute    gradient reduction
    ======================  ============  =========  =====================
    ``"32-true"``           fp32          fp32       fp32
    ``"bf16-mixed"``        fp32          bf16       fp32 (FSDP2's policy, not autocast)
    ``"bf16-true"``         bf16          bf16       fp32, stored as bf16
    ======================  ============  =========  =====================

    What is frozen beneath an adapter (LoRA) is bf16 under ``"bf16-mixed"``, too, and the adapter fp32.

    Parameters that a family asks to be fp32 in bf16 (transformers' ``_keep_in_fp32_modules_strict``) are so throughout.
    Buffers have the dtype that they have where transformers loads the model in bf16, but in MoE blocks their own.
    Rotary frequencies stay fp32: in bf16 they would be wrong by whole turns at position 1024.

    Args:
        precision: One of the names above.

    Raises:
        ValueError: For any other precision, naming the choices.
    """

    def __init__(self, precision: ShardedPrecisionName = "32-true") -> None:
        if precision not in ("32-true", "bf16-mixed", "bf16-true"):
            raise ValueError(
                f"precision={precision!r} is not supported by ExpertParallelStrategy; choose '32-true', 'bf16-mixed' "
                "or 'bf16-true'. fp16 needs loss scaling across meshes, which does not exist yet; bf16 has fp32's "
                "range and needs none."
            )
        self.precision = precision
        self.guard = NonfiniteGuard(0)
        self._steerings: list[Steering] = []
        self.param_dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32

    @property
    def mp_policy(self) -> MixedPrecisionPolicy:
        """FSDP2's policy."""
        if self.precision == "32-true":
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def note_sharded(self, module: nn.Module) -> None:
        """Remembers on the models of a module that they were sharded with this precision."""
        for model in (adapter.called_models(module) | adapter.planned_models(module)).values():
            adapter.remember(model, _ShardedWith(self.precision))
        self._steerings = steerings(module)

    def check_sharded(self, module: nn.Module) -> None:
        """Raises ValueError if a module was sharded with another precision, which cannot be changed any more."""
        for model in (adapter.called_models(module) | adapter.planned_models(module)).values():
            found = adapter.recall(model, _ShardedWith)
            if found is not None and found.precision != self.precision:
                raise ValueError(
                    f"{type(module).__name__} was sharded with precision={found.precision!r} by an earlier run, and "
                    f"this Trainer has precision={self.precision!r}. Pass the same, or build the module anew (a "
                    "checkpoint loads with any)."
                )
        self._steerings = steerings(module)
        for steering in self._steerings:
            steering.begin()

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        models = list(adapter.pretrained_models(module).values())
        in_bf16 = models if self.param_dtype == torch.bfloat16 else list(filter(is_adapted, models))
        fp32 = {param for model in in_bf16 for param in adapter.fp32_parameters(model).values()}
        # What an adapter has frozen needs no digits for updates: it is held as it is computed with.
        frozen = {p for model in filter(is_adapted, models) for p in model.parameters() if not p.requires_grad}
        computed = self.mp_policy.param_dtype or self.param_dtype
        for param in module.parameters():
            dtype = torch.float32 if param in fp32 else computed if param in frozen else self.param_dtype
            if param.is_floating_point() and param.dtype != dtype:
                param.data = param.data.to(dtype)
        return module

    @override
    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return _DtypeContextManager(self.param_dtype)

    @override
    def module_init_context(self) -> AbstractContextManager[Any]:
        return self.tensor_init_context()

    @override
    def convert_input(self, data: Any) -> Any:
        if self.precision != "bf16-true":
            return data
        return apply_to_collection(data, function=_convert_fp_tensor, dtype=Tensor, dst_type=self.param_dtype)

    @override
    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: LightningModule, optimizer: Steppable | None, *args: Any, **kwargs: Any
    ) -> None:
        trainer = model.trainer
        layout = trainer.strategy.layout  # type: ignore[attr-defined]
        tensor = into_backward(tensor, model, layout, trainer.accumulate_grad_batches)
        tensor = with_router_losses(tensor, model, self._steerings, trainer.accumulate_grad_batches)
        window = trainer.accumulate_grad_batches if model.automatic_optimization else 1
        if window > 1 and trainer.fit_loop.epoch_loop.batch_idx % window == 0:
            # Lightning has set gradients to zero, but not those that nobody has reduced of a window that its epoch left
            # unfinished, as with a -1 from `on_train_batch_start`.
            forget_gradients(model)
        with break_off_if_it_raises(model):
            super().backward(tensor, model, optimizer, *args, **kwargs)

    @override
    def _after_closure(self, model: LightningModule, optimizer: Steppable) -> None:
        # Before on_before_optimizer_step, so that callbacks and clipping see the gradients of the step.
        if model.trainer.accumulate_grad_batches > 1 or not model.automatic_optimization:
            reduce_kept_gradients(model)
        if (factor := at_step(model)) is not None:
            scale_gradients(self.main_params(optimizer), factor)  # type: ignore[arg-type]
        if not self.guard.limit:
            self._step_routers(model)
        super()._after_closure(model, optimizer)

    def _step_routers(self, model: LightningModule, skipped: bool = False) -> None:
        for name, value in step_all(self._steerings, model.device, skipped).items():
            model.log(f"train/{name}", value)

    @override
    def optimizer_step(  # type: ignore[override]
        self, optimizer: Steppable, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        if not self.guard.limit:
            return super().optimizer_step(optimizer, model, closure, **kwargs)
        # Before the optimizer is asked, since its step cannot be broken off.
        result = closure()
        self._after_closure(model, optimizer)
        assert isinstance(optimizer, Optimizer)
        skips = self.guard.skips(optimizer, self.main_params(optimizer), model.trainer.global_step)
        self._step_routers(model, skips)  # here, since their biases stay as they are in a step that is left out
        if skips:
            if isinstance(optimizer, AdamW):
                optimizer.forget_factors()  # of clipping: `optimizer_zero_grad` may be the module's own
            return result
        return optimizer.step(closure=lambda: result, **kwargs)

    def clip_in_step(self, optimizer: Optimizer, max_norm: float) -> Tensor:
        """Clips all gradients of an optimizer whose step follows, with nothing of the user's in between.

        Args:
            optimizer: The optimizer.
            max_norm: The bound; ``inf`` only computes the norm.

        Returns:
            The norm before clipping, a 0-dim fp32 tensor, the same on every rank.
        """
        norm = clip_in_step_(optimizer, max_norm)
        self.guard.note(optimizer, norm)
        return norm

    @override
    def _clip_gradients(
        self,
        model: LightningModule | nn.Module,
        optimizer: Steppable,
        clip_val: int | float | None = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        # Where nothing of the user's runs between this and the update, the step may do it. Elsewhere something may
        # look at the clipped gradients, clip them once more or add to them.
        theirs = any(is_overridden(name, model) for name in ("configure_gradient_clipping", "clip_gradients"))
        by_norm = clip_val is not None and clip_val > 0 and gradient_clip_algorithm != "value"
        if by_norm and not theirs and model.automatic_optimization:
            self.clip_in_step(optimizer, clip_val)  # type: ignore[arg-type]
        else:
            super()._clip_gradients(model, optimizer, clip_val, gradient_clip_algorithm)

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        clip_grad_norm_(self.main_params(optimizer), clip_val)

    @override
    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        self.guard.note_norm_of(optimizer, self.main_params(optimizer))
        clip_grad_value_(self.main_params(optimizer), clip_val)
