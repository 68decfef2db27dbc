"""Experts that a rank's batch does not come to: those of a layer for the tokens of images, where there is no image.

A layer that has several experts modules calls those that it has tokens for (ERNIE-4.5-VL: text, and images), and other
ranks wait in the exchanges of those that it leaves out. So they are entered without tokens where the layer ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lightning_ep.moe.experts import expert_context, is_parallel_experts
from lightning_ep.ops.autograd import in_backward

Leave = Callable[[Tensor], Callable[[], Tensor] | None]


def blocks_apart(layer: nn.Module) -> dict[nn.Module, nn.Module]:
    """The experts modules of a layer that has several, by the block around each, in the order in which they run."""
    parents = {child: parent for parent in layer.modules() for child in parent.children()}
    found = {parents[child]: child for child in layer.modules() if is_parallel_experts(child)}
    return found if len(found) > 1 else {}


class EntersAll:
    """Has every forward of a layer with several experts modules enter them all, each once.

    Args:
        layer: The layer.
        blocks: As `blocks_apart` gives them.

    Attributes:
        used: The experts modules that were given tokens, in forwards with gradients, since `forget_idle`.
    """

    def __init__(self, layer: nn.Module, blocks: Mapping[nn.Module, nn.Module]) -> None:
        self._blocks = blocks
        self._called: set[nn.Module] = set()
        self.used: set[nn.Module] = set()
        self._leaves = self._entering = False
        for experts in blocks.values():
            experts.register_forward_pre_hook(lambda module, args: self._called.add(module))
            context = expert_context(experts)
            if context.leave is not None:
                context.leave = partial(self._leave, context.leave)
        # Before FSDP's hooks: what they return is where a backward gathers the layer, before it comes to any experts.
        layer.register_forward_hook(self._enter_rest, prepend=True)

    @property
    def experts(self) -> list[nn.Module]:
        """The experts modules, in the order in which they run."""
        return list(self._blocks.values())

    def forget_idle(self, used: Iterable[bool]) -> None:
        """Takes the gradients of zeros from the experts that no rank has used, and begins anew."""
        for experts, anywhere in zip(self.experts, used, strict=True):
            for param in () if anywhere else experts.parameters():
                param.grad = None
        self.used.clear()

    def _leave(self, leave: Leave, hidden: Tensor) -> Callable[[], Tensor] | None:
        """Has experts without tokens send their rows again in backward if the others of the layer do."""
        if self._entering:
            return (lambda: hidden) if self._leaves else None
        later = leave(hidden)
        self._leaves = later is not None
        return later

    def _enter_rest(self, layer: nn.Module, args: Any, output: Any) -> Any:
        if in_backward():
            return None
        called, self._called = self._called, set()
        if torch.is_grad_enabled():  # a reference's forward uses them for nothing that is trained
            self.used |= called
        hidden = output[0] if isinstance(output, tuple) else output
        self._entering = True
        for block, experts in self._blocks.items():
            if experts not in called:
                # Their backward, too, is entered where that of the layer begins.
                hidden = hidden + enter_without_tokens(block, experts, hidden.detach()).sum() * 0
        self._entering = False
        self._called.clear()
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def enter_without_tokens(block: nn.Module, experts: nn.Module, hidden: Tensor) -> Tensor:
    """The experts' output for no token, ``[0, H]``, behind which a backward enters their exchanges.

    Args:
        block: The block around them, which routes.
        experts: An experts module that is spread over ranks.
        hidden: ``[..., H]``; only its width and dtype matter.
    """
    no_tokens = hidden.reshape(-1, hidden.shape[-1])[:0]
    handle = experts.register_forward_pre_hook(_stop, prepend=True)
    try:
        # How many experts per token, and in which dtype their weights are, is known to the block.
        with torch.no_grad():
            block(no_tokens)
        raise RuntimeError(f"{type(block).__name__} did not call its experts when it was called without tokens.")
    except _Reached as reached:
        rows, ids, weights = reached.args
    finally:
        handle.remove()
    needs_gradient = torch.is_grad_enabled()
    return experts(rows.detach().requires_grad_(needs_gradient), ids, weights.detach().requires_grad_(needs_gradient))


class _Reached(Exception):
    """A block has come to its experts, with these arguments."""


def _stop(module: nn.Module, args: Any) -> NoReturn:
    raise _Reached(*args)
