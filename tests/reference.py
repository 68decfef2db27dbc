"""What the package is compared with: transformers on one process, plain PyTorch optimizers, no code of ours."""

from __future__ import annotations

import copy
import functools
from importlib.metadata import version
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from lightning.fabric.plugins.precision.utils import _DtypeContextManager
from packaging.version import Version
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCAB = 128


def tiny_config(**overrides: Any) -> Qwen3MoeConfig:
    """A Qwen3-MoE of two layers and eight experts that still has everything: GQA, q/k norms, normalised top-4."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "max_position_embeddings": 64,
    }
    return Qwen3MoeConfig(**{**sizes, **overrides})


def tiny_model(seed: int = 0, **overrides: Any) -> Qwen3MoeForCausalLM:
    """Weights large enough that routing, losses and gradients differ clearly between tokens.

    In fp32 whatever the precision of the caller: torch 2.11 draws other random numbers in bf16.
    """
    with torch.random.fork_rng(devices=[]), _DtypeContextManager(torch.float32):
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(tiny_config(**overrides))
        with torch.no_grad():
            for name, param in model.named_parameters():
                if name.endswith("gate.weight"):
                    param.normal_(std=1.0)
                elif "norm" not in name:
                    param.mul_(5.0)
    model.set_experts_implementation("eager")
    return model


def family_model(family: str, config: dict[str, Any], attention: str = "eager", std: float = 0.1) -> PreTrainedModel:
    """A causal language model of any family, with equal random weights wherever it is built and eager experts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config), attn_implementation=attention)
        with torch.no_grad():
            for name, param in model.named_parameters():
                if "norm" not in name:
                    param.normal_(std=std)
    model.set_experts_implementation("eager")
    return model


@functools.cache
def why_no_adapters() -> str | None:
    """What keeps transformers from this PEFT, if anything: a new minor may ask for one that is yet to come."""
    found = version("peft")
    if Version(found) >= Version(MIN_PEFT_VERSION):
        return None
    return f"transformers {transformers.__version__} needs PEFT {MIN_PEFT_VERSION}, and {found} is installed"


ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "down": {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    "both": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}


def adapted_by_peft(model: PreTrainedModel, where: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """The model with PEFT's LoRA, of a rank that is none of the model's sizes, both factors random."""
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **ADAPTERS[where], **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(config)
    return model


def batches(num: int, size: int, length: int = 12, padded: bool = False, seed: int = 0) -> list[dict[str, Tensor]]:
    """``num`` batches of ``size`` random sequences; ``padded`` ones hide a different share of the labels each."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for index in range(num):
        ids = torch.randint(0, VOCAB, (size, length), generator=generator)
        labels = ids.clone()
        if padded:
            # Batch 1 has no valid token at all; the others keep between 5 and all of them.
            keep = 0 if index == 1 else 5 + (3 * index) % (length - 4)
            labels[:, keep:] = -100
        out.append({"input_ids": ids, "labels": labels})
    return out


class Trace(dict[str, Any]):
    """``losses`` and ``norms`` (one per step), ``grads`` (of the first step, before clipping), ``weights`` (after)."""


def train(
    model: Qwen3MoeForCausalLM,
    windows: list[list[dict[str, Tensor]]],
    lr: float,
    max_norm: float | None,
    token_weighted: bool,
) -> Trace:
    """SGD on one process; a window holds all batches (of every rank and micro-step) of one optimizer step."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    trace = Trace(losses=[], norms=[], grads={}, weights={})
    for step, window in enumerate(windows):
        optimizer.zero_grad()
        # A window without any valid token has a loss of zero.
        total = max(1, sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window))
        step_loss = 0.0
        for batch in window:
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            targets = batch["labels"][:, 1:].flatten()
            if token_weighted:
                loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / total
            else:
                loss = F.cross_entropy(logits, targets, ignore_index=-100) / len(window)
            loss.backward()
            step_loss += loss.item()
        trace["losses"].append(step_loss)
        if step == 0:
            trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
            trace["grads"] = {name: grad_or_zero(param) for name, param in trained.items()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm if max_norm is not None else float("inf"))
        trace["norms"].append(norm.item())
        optimizer.step()
    trace["weights"] = {name: param.detach().clone() for name, param in model.named_parameters()}
    return trace


def grad_or_zero(param: Tensor) -> Tensor:
    """The gradient, or zeros where the eager experts leave none because no token came."""
    return param.grad.clone() if param.grad is not None else torch.zeros_like(param)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; absolute where that is zero."""
    found, expected = found.double().cpu(), expected.double().cpu()
    scale = expected.norm().item()
    return ((found - expected).norm() / (scale if scale > 0 else 1.0)).item()
