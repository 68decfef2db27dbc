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
# run: start with --trainer.max_steps 20. Put in your texts, the learning rate and where checkpoints go.
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
      init_args: {{lr: {rate_of_learning}, betas: [0.9, 0.95], weight_decay: 0.1{rounding}}}
    lr_scheduler:
      class_path: lightning_ep.Schedule
      init_args: {{shape: cosine, warmup: 0.05, end: 0.1}}

data:
  class_path: lightning_ep.data.TextDataModule
  init_args:
    source: texts/**/*.txt
    sequence_length: {sequence}
    batch_size: {batch} # windows per group of ranks that share a batch
    across_documents: true
"""


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
        adapter=f"\n    adapter: {{r: {case.lora_rank}}}" if case.lora_rank else "",
        rounding=", stochastic_rounding: true" if case.precision == "bf16-true" else "",
        rate_of_learning="1.0e-4" if case.lora_rank else "1.0e-5",  # ten times, as `CausalLM` has it
        model=json.dumps(model.config if is_file else model.name), pretrained="false" if is_file else "true",
    )  # fmt: skip
    file.write_text(text)
    return start
