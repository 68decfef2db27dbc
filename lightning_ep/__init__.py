"""Expert parallelism for mixture-of-experts transformers as an ordinary Lightning strategy."""

from lightning_ep_start import __version__, answer_first

# `python -m lightning_ep --help` and `lightning-ep plan` need nothing of what follows, which takes seconds.
answer_first()

import gc
import os

from lightning.pytorch.strategies import StrategyRegistry

from lightning_ep.adapters import LoRA, add_adapter
from lightning_ep.causal_lm import CausalLM
from lightning_ep.context_parallel import shard_sequence, whole_sequences
from lightning_ep.dpo import DPO
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.meta_models import from_config, from_pretrained
from lightning_ep.layout import ParallelLayout
from lightning_ep.moe.expert_parallel import ExpertParallel, expert_plan
from lightning_ep.parallelize import parallelize
from lightning_ep.strategy import ExpertParallelStrategy
from lightning_ep.trainer.adamw import AdamW
from lightning_ep.trainer.clipping import clip_grad_norm_
from lightning_ep.trainer.schedules import Schedule

__all__ = [
    "DPO",
    "AdamW",
    "CausalLM",
    "CheckpointError",
    "ExpertParallel",
    "ExpertParallelStrategy",
    "LoRA",
    "ParallelLayout",
    "Schedule",
    "__version__",
    "add_adapter",
    "clip_grad_norm_",
    "expert_plan",
    "from_config",
    "from_pretrained",
    "parallelize",
    "shard_sequence",
    "whole_sequences",
]

for _name in ("expert_parallel", "ep"):
    if _name not in StrategyRegistry:
        StrategyRegistry.register(_name, ExpertParallelStrategy, "Experts over EP, everything under FSDP2.")

# What is garbage at a fork stays so in the child. A process group of a run before (in a notebook, or a script that fits
# twice) waits, when it is collected, for threads that only the parent has: a worker of a loader would hang, or crash.
os.register_at_fork(after_in_child=gc.freeze)
