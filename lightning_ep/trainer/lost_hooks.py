"""Hooks on parameters that FSDP2 does not call, and watchers that look at a model from one rank alone."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_ep.distributed.agreement import agree, join
from lightning_ep.fsdp.groups import unmanaged_parameters

_INSTEAD = (
    "Norms: `lightning.pytorch.utilities.grad_norm(self, 2)`, or `self.trainer.strategy.clip_grad_norm_(max_norm="
    "float('inf'))`, in `on_before_optimizer_step`. Histograms: there, `param.grad.full_tensor()` on every rank, which "
    "rank 0 logs as `wandb.Histogram`."
)


def check_hooks_before_sharding(module: nn.Module) -> None:
    """Warns of `wandb.watch`, and raises ValueError, on every rank, for other hooks on parameters that will be shards.

    Args:
        module: The module, before anything of it is sharded. Every rank must call it.
    """
    hooked = [n for n, p in module.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks]
    if _watched(module):
        rank_zero_warn(
            "wandb.watch was called on a model that is about to be sharded: it will draw no gradients, since its hooks "
            f"belong to parameters that shards take the place of. {_INSTEAD}"
        )
        hooked = []  # on this rank, those of wandb
    problem = (
        f"{len(hooked)} parameters have hooks ({hooked[0]} is the first) that nobody would call: they belong to "
        "parameters that shards take the place of. Register them when the model is sharded, in `on_fit_start` or "
        "later, with `param.register_post_accumulate_grad_hook`."
        if hooked
        else None
    )
    _agree(problem)


def check_hooks_on_shards(module: nn.Module) -> None:
    """Raises ValueError, on every rank, for hooks that FSDP2 does not call, and for `wandb.watch` on shards.

    Args:
        module: The sharded module. Every rank must call it.
    """
    called = unmanaged_parameters(module)
    hooked = {name: param for name, param in module.named_parameters() if param._backward_hooks}
    lost = [name for name, param in hooked.items() if param not in called]
    problem = None
    if _watched(module, "parameters/") or (hooked and _watched(module)):
        problem = (
            "wandb.watch was called with log='parameters' or 'all', or on a sharded model: it looks at shards on rank "
            f"0 alone, which would wait for the other ranks forever. {_INSTEAD}"
        )
    elif lost:
        problem = (
            f"{len(lost)} parameters have hooks by `register_hook` ({lost[0]} is the first), which FSDP2 does not "
            "call: their gradients come from gathered copies. Use `param.register_post_accumulate_grad_hook` instead, "
            "whose hook finds the gradient of the shard in `param.grad`."
        )
    _agree(problem)


def _watched(module: nn.Module, what: str = "") -> bool:
    """Whether `wandb.watch` has marked a module, with hooks whose names begin with ``what``."""
    names = (name for child in module.modules() for name in getattr(child, "_wandb_hook_names", ()))
    return any(name.startswith(what) for name in names)


def _agree(problem: str | None) -> None:
    def error(problems: Mapping[int, str]) -> ValueError:
        return ValueError(join(problems, len(problems)))

    agree(None, problem, error)
