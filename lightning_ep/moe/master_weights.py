"""Experts whose parameters are wider than what their GEMMs take: fp32 masters, bf16 rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_ep.distributed.shards import as_gradient_of, local_tensor

_STEPS_TO_PEAK = 2  # the first makes the optimizer's state
_SPARE = 0.1  # of the GPU's memory stays free beside kept copies: rows of a step with an unlucky router


class MasterWeights:
    """How one layer casts its experts' parameters, and in which dtype it returns their gradients.

    Attributes:
        keep_copies: Backward uses the copies that forward made, in calls with no more tokens than those before it was
            set. Otherwise it makes its own: casting twice costs less than the memory of every layer's copy, where that
            is short.
    """

    def __init__(self) -> None:
        self.keep_copies = False
        self._own: tuple[Tensor, ...] = ()
        self._narrow = False
        self._calls = 0
        self._most_tokens = 0

    def own(self, params: Iterable[Tensor]) -> None:
        """Takes charge of leaf parameters whose gradients nothing reduces after the layer (no FSDP)."""
        self._own = tuple(params)
        self.keep_copies, self._most_tokens = False, 0  # until this run has shown what memory it needs
        for param in self._own:
            param.grad_dtype = None  # autograd then takes gradients as they come

    def begin_step(self, narrow_gradients: bool) -> None:
        """Starts an optimizer step.

        Args:
            narrow_gradients: Gradients to which nothing is added stay in the dtype of the GEMMs. Widening them adds no
                digit, but moves three times their bytes, and then twice as many for everyone who reads them.
        """
        self._narrow = narrow_gradients
        self._calls = 0

    def end_run(self) -> None:
        """Ends a run: gradients have the parameters' dtype from now on, and others are forgotten.

        `nn.Module.to` makes new parameters, which take no gradients of another dtype.
        """
        self._narrow = False
        for param in self._own:
            if param.grad is not None and param.grad.dtype != param.dtype:
                param.grad = None

    def begin_call(
        self, params: Sequence[Tensor], dtype: torch.dtype, num_tokens: int, needs_grad: bool
    ) -> CallWeights:
        """The weights of one forward and its backward, if it ``needs_grad``; ``dtype`` is the GEMMs'."""
        keep = needs_grad and self.keep_copies and num_tokens <= self._most_tokens
        if needs_grad:
            self._calls += 1
        if needs_grad and not self.keep_copies:
            self._most_tokens = max(self._most_tokens, num_tokens)
        return CallWeights(self, params, dtype, keep)

    def gradient_dtype(self, param: Tensor, dtype: torch.dtype) -> torch.dtype:
        """In which dtype a backward with GEMMs in ``dtype`` returns a parameter's gradient.

        It is about to: a narrow gradient of an earlier backward is widened, so that the sum is not rounded to bf16.
        """
        if not any(param is own for own in self._own):
            return param.dtype
        widen_gradient(param)
        return dtype if self._narrow and self._calls == 1 and param.grad is None else param.dtype

    @property
    def bytes_of_copies(self) -> int:
        """What `keep_copies` costs with bf16 GEMMs."""
        return sum(2 * local_tensor(param).numel() for param in self._own if param.dtype == torch.float32)


class CallWeights:
    """The parameters of one call as its GEMMs take them: this rank's parts, in the dtype of the rows."""

    def __init__(self, masters: MasterWeights, params: Sequence[Tensor], dtype: torch.dtype, keep: bool) -> None:
        self.params = params
        self._masters = masters
        self._dtype = dtype
        self._keep = keep
        self._begun: list[Tensor | None] = [None] * len(params)
        self._kept: list[Tensor] | None = None

    def begin_forward(self) -> None:
        """Casts all but the largest: work for the GPU while the host waits for counts.

        What the GPU is given then, the exchange of the rows waits for, so that there is something left to cast beside.
        """
        largest = max(self.params, key=torch.numel)
        self._begun = [None if param is largest else self._cast(param) for param in self.params]

    def for_forward(self) -> list[Tensor]:
        """The weights; kept for backward if this call does that."""
        pairs = zip(self._begun, self.params, strict=True)
        local = [self._cast(param) if begun is None else begun for begun, param in pairs]
        self._begun = [None] * len(local)
        self._kept = local if self._keep else None
        return local

    def for_backward(self) -> list[Tensor]:
        """The weights, once."""
        kept, self._kept = self._kept, None
        return kept or [self._cast(param) for param in self.params]

    def _cast(self, param: Tensor) -> Tensor:
        return local_tensor(param).to(self._dtype)

    def gradient_dtypes(self) -> list[torch.dtype | None]:
        """In which dtypes the gradients are wanted; None for parameters that are frozen."""
        trained = (param if param.requires_grad else None for param in self.params)
        return [None if param is None else self._masters.gradient_dtype(param, self._dtype) for param in trained]

    def gradients(self, local: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The parameters' gradients, from those of this rank's parts."""
        pairs = zip(local, self.params, strict=True)
        return [grad if grad is None else as_gradient_of(grad, param) for grad, param in pairs]

    def zero_gradients(self) -> list[Tensor | None]:
        """Gradients of experts that got no row."""
        return self.gradients([torch.zeros_like(local_tensor(p)) if p.requires_grad else None for p in self.params])


def widen_gradient(param: Tensor) -> None:
    """Gives a gradient that was left in the dtype of its GEMMs the parameter's, before something rounds it."""
    if param.grad is not None and param.grad.dtype != param.dtype:
        param.grad = param.grad.to(param.dtype)


class ModelMasterWeights:
    """The `MasterWeights` of all layers of a model in training.

    Args:
        layers: Those in charge of their gradients.
        device: This rank's device.
    """

    def __init__(self, layers: Sequence[MasterWeights], device: torch.device) -> None:
        self._layers = layers
        self._device = device
        self._steps = 0

    def begin_step(self, narrow_gradients: bool) -> None:
        """See `MasterWeights.begin_step`."""
        for layer in self._layers:
            layer.begin_step(narrow_gradients)

    def end_run(self) -> None:
        """See `MasterWeights.end_run`."""
        for layer in self._layers:
            layer.end_run()

    def end_step(self) -> None:
        """To be called after every optimizer step: with the second one, memory has seen everything that a step needs.

        Copies are kept from then on if they leave room, in calls that are no larger. Ranks may differ: no number does.
        """
        self._steps += 1
        if self._steps != _STEPS_TO_PEAK or self._device.type != "cuda":
            return
        needed = sum(layer.bytes_of_copies for layer in self._layers)
        free, total = torch.cuda.mem_get_info(self._device)
        limit = total * torch.cuda.get_per_process_memory_fraction(self._device)
        reachable = min(limit, free + torch.cuda.memory_reserved(self._device))
        room = reachable - torch.cuda.max_memory_reserved(self._device)
        for layer in self._layers:
            layer.keep_copies = needed + _SPARE * total <= room
