"""The recipe of a plan: what ``lightning-ep fit --config`` takes, with the data left to fill in."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_ep.planner.candidates import Estimate, Request

_RECIPE = """\
# {title}
#
#   {start}
#
# Written by `lightning-ep plan`, which estimates {rate:,.0f} tokens/s and {gib:.0f} GiB per GPU. Nothing of it has been
# run: start with --trainer.max_steps 20. Put in your {yours}, the learning rate and where checkpoints go.
{note}seed_everything: 1

trainer:
  accelerator: gpu
  devices: {devices} # processes per node
  num_nodes: {nodes}
  strategy:
    class_path: lightning_ep.ExpertParallelStrategy
    init_args:
      ep: {ep}
      fsdp: {fsdp}
      replicate: {replicate}
      tp: {tp}
      cp: {cp}
      activation_checkpointing: {recompute}
      compile: true
  precision: {precision}
  accumulate_grad_batches: {accumulate} # {tokens_per_step:,} tokens per step
  max_steps: {steps}
  gradient_clip_val: 1.0
  callbacks:
    - class_path: lightning_ep.callbacks.Throughput

model:
  class_path: lightning_ep.CausalLM
  init_args:
    model: {model}
    pretrained: {pretrained}{adapter}
    optimizer:
      class_path: lightning_ep.AdamW
      init_args: {{{optimizer}{rounding}}}
    lr_scheduler:
      class_path: lightning_ep.Schedule
      init_args: {{shape: cosine, warmup: {warmup}, end: 0.1}}

data:
  class_path: lightning_ep.data.{data}
  init_args:
    source: {source}
    sequence_length: {sequence}
    batch_size: {batch} # windows per group of ranks that share a batch{windows}
"""

# What differs where adapters are trained is that of the recipe `qwen3_30b_a3b_lora`.
_OF_TEXTS = {
    "optimizer": "lr: 1.0e-5, betas: [0.9, 0.95], weight_decay: 0.1",
    "warmup": 0.05,
    "data": "TextDataModule",
    "source": "texts/**/*.txt",
    "windows": "\n    across_documents: true",
    "yours": "texts",
}
_OF_CHATS = {
    "optimizer": "lr: 1.0e-4, weight_decay: 0.0",
    "warmup": 0.03,
    "data": "ChatDataModule",
    "source": "my_chats.jsonl",
    "windows": "\n    validation_fraction: 0.02",
    "yours": "chats",
}


def write_recipe(file: Path, request: Request, chosen: Estimate, tokens: float) -> str:
    """Writes a recipe of a plan for so many tokens; returns the command that starts it.

    Raises:
        ValueError: If the file exists.
    """
    if file.exists():
        raise ValueError(f"{file} exists already. Remove it, or name another file.")
    case, model = chosen.case, request.model
    nodes = max(1, case.ranks // case.node)
    start = f"lightning-ep fit --config {file}"
    if nodes > 1:
        torchrun = "torchrun --nnodes={} --nproc-per-node={} --rdzv-backend=c10d --rdzv-endpoint=FIRST_NODE:29500"
        start = f"{torchrun.format(nodes, case.node)} -m {start.replace('lightning-ep', 'lightning_ep')}"
    is_file = Path(model.name).is_file()
    text = _RECIPE.format(
        title=f"{model.name} on {case.ranks} x {request.device.name}.", start=start, rate=chosen.rate, gib=chosen.gib,
        note=f"# {model.note}\n" if model.note else "", devices=min(case.ranks, case.node), nodes=nodes, ep=case.ep,
        fsdp=case.fsdp, replicate=case.replicate, tp=case.tp, cp=case.cp, recompute=case.recompute,
        precision=case.precision, accumulate=case.accumulate, tokens_per_step=case.tokens_per_step,
        steps=max(1, round(tokens / case.tokens_per_step)), sequence=case.sequence, batch=case.batch,
        adapter=f"\n    adapter: {{r: {case.lora_rank}, lora_alpha: 32}}" if case.lora_rank else "",
        rounding=", stochastic_rounding: true" if case.stochastic_rounding or case.precision == "bf16-true" else "",
        model=json.dumps(model.config if is_file else model.name), pretrained="false" if is_file else "true",
        **(_OF_CHATS if case.lora_rank else _OF_TEXTS),
    )  # fmt: skip
    file.write_text(text)
    return start
