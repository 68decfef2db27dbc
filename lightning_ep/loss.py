"""The summed token loss of a causal language model, without its logits, also through modules around the model."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.ops.cross_entropy import IGNORE, shifted
from lightning_ep.routing.observe import mark
from lightning_ep.tensor_parallel.vocabulary import head_cross_entropy, is_plain_head


@dataclass(frozen=True)
class _Head:
    """What is remembered of a module: whether its logits are all that its head does, so that a loss may replace it."""

    gives_the_logits: bool


def model_inside(module: nn.Module) -> PreTrainedModel:
    """The one transformers model that is a module, or is in it.

    Raises:
        ValueError: If there are none or several.
    """
    return _inside(module).model


def _find_model(module: nn.Module) -> PreTrainedModel:
    models = adapter.pretrained_models(module)
    if len(models) != 1:
        raise ValueError(
            f"The model of a CausalLM is a transformers model or a module around one; {type(module).__name__} holds "
            f"{len(models)}: {sorted(models)}. Hold further models beside it in a subclass of CausalLM, or write a "
            "LightningModule of your own."
        )
    return next(iter(models.values()))


def token_losses(
    module: nn.Module, targets_BS: Tensor, inputs: dict[str, Any], labels_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Losses of single tokens from the module's logits.

    Args:
        module: A transformers model, sharded or not, or a module around one that returns its logits: by themselves, or
            under that name.
        targets_BS: int64 ``[B, S]``, the target of every position, or -100.
        inputs: Arguments of the module's forward.
        labels_BS: What the targets were made of, for modules that put tokens before the sequences (prompt tuning) and
            have a parameter ``labels``: what arrives at the model then is what counts.

    Returns:
        ``[B, S]`` in fp32, zero where there is no target, and the targets.

    Raises:
        TypeError: If the module returns no logits.
        ValueError: If it returns a loss of its own, or other numbers of tokens than there are targets.
    """
    inside = _inside(module)
    forget = mark(inside.model)
    result = inside.call(module, targets_BS, inputs, labels_BS, fused=False)
    logits_BSV = _logits(module, result.output)
    if logits_BSV.shape[:2] != result.targets_BS.shape:
        if inside.begins_to_pass_labels(labels_BS):
            forget()
            return token_losses(module, targets_BS, inputs, labels_BS)
        raise ValueError(
            f"{type(module).__name__} returns logits of {tuple(logits_BSV.shape[:2])} tokens for targets of "
            f"{tuple(result.targets_BS.shape)}. A module that adds tokens to sequences needs a parameter `labels`, to "
            "which it adds as many and which it passes to the model (and runs with cp=1)."
        )
    losses_T = F.cross_entropy(
        logits_BSV.float().flatten(0, 1), result.targets_BS.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return losses_T.view_as(result.targets_BS), result.targets_BS


def summed_loss(
    module: nn.Module, targets_BS: Tensor, inputs: dict[str, Any], labels_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of the token losses, through `linear_cross_entropy` where the module's logits are its head's output.

    Modules that change or use logits, several calls of a head, and heads with a bias take the plain path over logits.

    Args:
        module: As in `token_losses`, like all others.
        targets_BS: The targets.
        inputs: The arguments.
        labels_BS: The labels.

    Returns:
        0-dim fp32 tensor, and the targets.
    """
    loss, targets_BS = _losses(module, targets_BS, inputs, labels_BS, per_token=False)
    return loss.sum(), targets_BS  # of one sum, or of the plain path's tokens


def sequence_log_probs(module: nn.Module, targets_BS: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Log-probabilities of the targets of each sequence, summed, without logits as `summed_loss` does it.

    Args:
        module: As there, like the others, with a head that is not trained; one that is takes the path over logits.
        targets_BS: The targets.
        inputs: The arguments.

    Returns:
        ``[B]`` in fp32 nats, zero for a sequence without a target.
    """
    losses, targets_BS = _losses(module, targets_BS, inputs, None, per_token=True)
    return -losses.view_as(targets_BS).sum(1)


def _losses(
    module: nn.Module, targets_BS: Tensor, inputs: dict[str, Any], labels_BS: Tensor | None, per_token: bool
) -> tuple[Tensor, Tensor]:
    """Losses of tokens, in any shape, or (unless ``per_token``) their sum; what else `token_losses` returns."""
    inside = _inside(module)
    output = inside.model.get_output_embeddings()
    head = adapter.recall(module, _Head) or _Head(is_plain_head(output))
    trained = per_token and torch.is_grad_enabled() and output.weight.requires_grad
    if head.gives_the_logits and not trained:
        try:
            result = inside.call_fused(module, targets_BS, inputs, labels_BS, per_token)
            adapter.remember(module, head)
            return result.loss, result.targets_BS
        except _LogitsAreUsed:
            rank_zero_info(f"{type(module).__name__} does more with its logits than its head: the loss holds them all.")
    if not trained:
        adapter.remember(module, _Head(False))
    return token_losses(module, targets_BS, inputs, labels_BS)


# ------------------------------------------------------------------------------------------------ inside of a module


class _LogitsAreUsed(Exception):
    """Something looks at logits, which a fused loss does not make."""


class _OtherLength(Exception):
    """A model gets other numbers of tokens than there are targets."""


class _NoLogits:
    """Takes the place of logits in what a model returns; whoever does anything with it needs the plain path."""

    def _used(self, *_: Any) -> NoReturn:
        raise _LogitsAreUsed

    __getattr__ = __getitem__ = __len__ = __neg__ = _used
    __add__ = __sub__ = __mul__ = __truediv__ = __matmul__ = _used
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = _used

    @classmethod
    def __torch_function__(cls, *_: Any) -> NoReturn:
        raise _LogitsAreUsed


_NO_LOGITS = _NoLogits()


@dataclass(frozen=True)
class _Result:
    """What a call of a module gave: its output, and of the model inside the targets and fused loss."""

    output: Any
    targets_BS: Tensor
    losses: list[tuple[Tensor, int]]  # with their versions: a module may add to one in place

    @property
    def loss(self) -> Tensor:
        return self.losses[0][0]


class _Inside:
    """The model in a module, which does something else than it would while the module is called.

    The module's own forward runs, whatever it does. One for each module: a compiled one would be compiled again for
    every other function that it finds.
    """

    def __init__(self, module: nn.Module) -> None:
        self.model = _find_model(module)
        self._names = list(inspect.signature(self.model.forward).parameters)
        self._takes_labels = module is not self.model and "labels" in inspect.signature(module.forward).parameters
        self._passes_labels = self._per_token = False
        # What torch.compile is given is the model's own forward, which these are around and inside of.
        self._around = torch.compiler.disable(self._forward, recursive=False)
        self._instead = torch.compiler.disable(self._head_forward)

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of a module, or one from a file, finds its own

    def begins_to_pass_labels(self, labels_BS: Tensor | None) -> bool:
        """From now on the module gets labels, of which it makes those of its tokens; False if it did, or takes none."""
        begins = self._takes_labels and labels_BS is not None and not self._passes_labels
        self._passes_labels |= begins
        return begins

    def call_fused(
        self,
        module: nn.Module,
        targets_BS: Tensor,
        inputs: dict[str, Any],
        labels_BS: Tensor | None,
        per_token: bool,
    ) -> _Result:
        """A call with the loss, or that of every token, in place of the head.

        Raises:
            _LogitsAreUsed: If the logits are more than what the head gives, or there is no loss for other reasons.
        """
        forget = mark(self.model)
        try:
            self._per_token = per_token
            result = self.call(module, targets_BS, inputs, labels_BS, fused=True)
            if len(result.losses) != 1 or _logits(module, result.output) is not _NO_LOGITS:
                raise _LogitsAreUsed
            return result
        except _LogitsAreUsed:
            forget()
            raise
        except _OtherLength:
            forget()
        if not self.begins_to_pass_labels(labels_BS):
            raise _LogitsAreUsed
        return self.call_fused(module, targets_BS, inputs, labels_BS, per_token)

    def call(
        self, module: nn.Module, targets_BS: Tensor, inputs: dict[str, Any], labels_BS: Tensor | None, fused: bool
    ) -> _Result:
        """A call of the module; ``fused`` with the loss in place of the model's head."""
        self._targets_BS, self._fused = targets_BS, fused
        self._losses: list[tuple[Tensor, int]] = []
        self._forward_of_model = self.model.forward
        try:
            with _in_place(self.model, self._around):
                output = module(**inputs, **({"labels": labels_BS} if self._passes_labels else {}))
            result = _Result(output, self._targets_BS, self._losses)
        finally:
            del self._targets_BS, self._losses, self._forward_of_model  # a graph hangs on them
        _refuse_other_loss(module, result)
        return result

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the model's forward, inside of all hooks around it."""
        call = {**dict(zip(self._names, args, strict=False)), **kwargs, "use_cache": False}
        if (labels_BS := call.pop("labels", None)) is not None:
            self._targets_BS = shifted(labels_BS)
        head = self.model.get_output_embeddings()
        without_packing = nullcontext() if call.get("position_ids") is not None else adapter.without_packing()
        # On the head itself: its weight is gathered inside a call of it, and the model finds it where it looks for it.
        with without_packing, _in_place(head, self._instead) if self._fused else nullcontext():
            output = self._forward_of_model(**call)
        if self._fused:
            if len(self._losses) != 1 or not isinstance(output, dict) or output.get("logits") is not _NO_LOGITS:
                raise _LogitsAreUsed
            # FSDP gathers the root for backward by hooks on what its forward returns.
            output["loss"] = self._losses[0][0]
        return output

    def _head_forward(self, hidden_BSH: Tensor) -> Any:
        if hidden_BSH.shape[:-1] != self._targets_BS.shape:
            raise _OtherLength
        head: Any = self.model.get_output_embeddings()
        targets_T = self._targets_BS.flatten()
        loss = head_cross_entropy(head, hidden_BSH.flatten(0, 1), targets_T, IGNORE, self._per_token)
        self._losses.append((loss, _version(loss)))
        return _NO_LOGITS


def _inside(module: nn.Module) -> _Inside:
    if (found := adapter.recall(module, _Inside)) is None:
        adapter.remember(module, found := _Inside(module))
    return found


@contextmanager
def _in_place(module: nn.Module | None, forward: Any) -> Generator[None, None, None]:
    """Gives a module another forward."""
    assert module is not None
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _logits(module: nn.Module, output: Any) -> Any:
    """The logits of what a module returns."""
    logits = output if isinstance(output, Tensor | _NoLogits) else _field(output, "logits")
    if not isinstance(logits, Tensor | _NoLogits):
        raise TypeError(
            f"{type(module).__name__} returns {type(output).__name__}, in which CausalLM finds no logits. Return what "
            "the transformers model returns, or a tensor of logits."
        )
    return logits


def _refuse_other_loss(module: nn.Module, result: _Result) -> None:
    """Raises ValueError if a module makes a loss of its own, or adds to the model's."""
    loss = None if isinstance(result.output, Tensor | _NoLogits) else _field(result.output, "loss")
    if loss is None or any(loss is ours and _version(loss) == version for ours, version in result.losses):
        return
    raise ValueError(
        f"{type(module).__name__} returns a loss of its own, but CausalLM trains on the mean of the token losses of "
        "its logits, and would leave it out. Return it from `training_step` of a LightningModule of your own instead, "
        "or add it there to what CausalLM's returns."
    )
