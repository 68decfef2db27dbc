"""Runs a cell with transformers and PEFT on one GPU: LoRA over frozen bf16 weights, as their documentation has it."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.cells import Cell
from benchmarks.measure import Meter, run_loop
from benchmarks.workload import Popularity, fill_parameters

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def run(cell: Cell, meter: Meter) -> None:
    """Trains ``meter.num_steps`` steps.

    Raises:
        ValueError: If the cell has several ranks.
    """
    if cell.ranks > 1:
        raise ValueError(f"{cell.trainer} runs on one GPU, and the cell has {cell.ranks}.")
    model = _build(cell, meter.device)
    meter.read_popularity = Popularity(model).read
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=meter.device.type == "cuda" or None)

    def step(ids_BS: Tensor) -> Tensor:
        # As transformers' Trainer with bf16=True: adapters are fp32 and computed with in bf16.
        with torch.autocast(meter.device.type, torch.bfloat16):
            loss = model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    run_loop(cell, meter, step)


def _build(cell: Cell, device: torch.device) -> Any:
    assert cell.lora is not None
    where, _, rank = cell.lora.partition(",")
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(cell.config(), dtype=torch.bfloat16)
        model.set_experts_implementation("grouped_mm" if device.type == "cuda" else "eager")  # its fast path on each
        model.add_adapter(
            LoraConfig(
                r=int(rank),
                lora_alpha=2 * int(rank),
                target_modules=_ATTENTION,
                target_parameters=_EXPERTS if where == "all" else None,
            )
        )
    with torch.device(device):  # its buffers are no weights: computed on the device, never cast
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    if cell.recompute == "full":
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
    if cell.compile:
        for layer in model.model.layers:
            for part in layer.children() if cell.recompute == "full" else [layer]:
                part.compile()
    fill_parameters(model, device)
    return model.train()
