"""Optimizers that were made too early: they hold parameters that shards take the place of."""

from __future__ import annotations

import gc

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn


def warn_of_early_optimizers(module: nn.Module) -> None:
    """Warns of optimizers that hold parameters of a module which is about to be sharded.

    Args:
        module: Before anything of it is sharded.
    """
    trained = tuple(param for param in module.parameters() if param.requires_grad)  # no list: those are looked for
    if not trained:
        return
    # As `torch.optim.Optimizer` keeps them: in the list "params" of a dict. Two of them stand for all, since this looks
    # at every object that there is.
    lists = [found for found in gc.get_referrers(trained[0], trained[-1]) if isinstance(found, list)]
    groups = [found for found in gc.get_referrers(*lists) if isinstance(found, dict)] if lists else []
    if any(group.get("params") is one and "lr" in group for group in groups for one in lists):
        rank_zero_warn(
            "An optimizer has been made of parameters that shards are about to take the place of. Its steps will "
            "change nothing: make it when the model is sharded, behind `parallelize` (in a LightningModule in "
            "`configure_optimizers`)."
        )
