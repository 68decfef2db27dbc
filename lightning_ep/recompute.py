"""What a replay of the experts by activation checkpointing needs: its cost said aloud, and FSDP put back in order."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule


def handle_replay(experts: nn.Module) -> None:
    """To be called in the forward of an experts module; does nothing outside of backward.

    A replay that comes after the experts' own backward (checkpointing without early stop) makes FSDP gather their
    parameters again, and nobody would let go of them: the next forward would run on weights from before the optimizer
    step. So they are resharded when this backward ends.
    """
    if torch._C._current_graph_task_id() == -1:
        return
    rank_zero_warn(
        "Activation checkpointing replays the experts in backward, so that their forward and (with ep > 1) every "
        "exchange of tokens between ranks is repeated. The activation checkpointing of transformers does so with "
        "use_reentrant=True, and in families with shared experts. Where memory allows, leave it off, with smaller "
        "batches and Trainer(accumulate_grad_batches=...)."
    )
    if isinstance(experts, FSDPModule):
        Variable._execution_engine.queue_callback(experts.reshard)
