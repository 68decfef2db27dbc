"""The MoE body alone, forward and backward, beside transformers' and bare GEMMs: ``python -m benchmarks.moe_layer``.

The body is what follows the router: tokens, expert ids and routing weights in, weighted sums out, on one rank.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.cells import SIZES, Cell, Sizes
from benchmarks.report import moe_table
from benchmarks.router import max_over_mean, zipf_bias
from benchmarks.timing import spread, stages, time_ms, write_report
from lightning_ep import ExpertParallel

Body = Callable[..., Any]
_LOGIT_STD = 0.9  # of a router with weights of standard deviation 0.02 on normalised rows of width 2048


def main(arguments: list[str] | None = None) -> None:
    """Times the bodies and prints the table."""
    options = _parser().parse_args(arguments)
    device, sizes = torch.device(options.device), SIZES[options.sizes]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29531")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    try:
        rows = measure(sizes, options.tokens, device, dtype, options.repeats, options.experts_implementation)
    finally:
        dist.destroy_process_group()
    content = {"tokens": options.tokens, "sizes": options.sizes, "dtype": str(dtype), "rows": rows}
    write_report(options.json, "benchmarks.moe_layer", device, content)
    print(moe_table(content))


def measure(
    sizes: Sizes, tokens: int, device: torch.device, dtype: torch.dtype, repeats: int, implementation: str = "auto"
) -> list[dict[str, Any]]:
    """One row per body and popularity of experts.

    Args:
        sizes: Widths of the layer.
        tokens: Rows of the input.
        device: Where to run; a process group of one rank must exist.
        dtype: Of activations and weights.
        repeats: Measured calls of each.
        implementation: Our local experts, as ``experts_implementation`` of the strategy.
    """
    peer = "grouped_mm" if device.type == "cuda" else "eager"
    bodies = {
        "lightning_ep, ep=1": forward_backward(our_experts(sizes, device, dtype, implementation)),
        f"transformers, {peer}": forward_backward(transformers_experts(sizes, device, dtype, peer)),
    }
    rows = []
    for router in ("balanced", "skewed"):
        inputs = [_inputs(sizes, tokens, router, seed, device, dtype) for seed in range(3)]
        counts = torch.bincount(inputs[0][1].reshape(-1), minlength=sizes.experts)
        for name, body in bodies.items():
            rows.append(
                {
                    "name": name,
                    "router": router,
                    "max_over_mean": max_over_mean([counts]),
                    **spread(time_ms(body, inputs, repeats)),
                    "stages": stages(body, inputs[0]),
                }
            )
    floor, operands = gemms(sizes, tokens, device, dtype)
    rows.append(
        {
            "name": "the six grouped GEMMs alone",
            "router": "even",
            "max_over_mean": 1.0,
            **spread(time_ms(floor, operands, repeats)),
            "stages": stages(floor, operands[0]),
        }
    )
    return rows


def our_experts(sizes: Sizes, device: torch.device, dtype: torch.dtype, implementation: str = "auto") -> nn.Module:
    """An experts module whose forward is the package's whole body, as the plan sets it up on an EP group of one."""
    experts = transformers_experts(sizes, device, dtype, "eager")
    mesh = init_device_mesh(device.type, (1,), mesh_dim_names=("ep",))
    return parallelize_module(experts, mesh, ExpertParallel(experts_implementation=implementation))


def transformers_experts(sizes: Sizes, device: torch.device, dtype: torch.dtype, implementation: str) -> nn.Module:
    """transformers' own experts module with random weights."""
    widths = next(name for name, value in SIZES.items() if value == sizes)
    config = Cell("lightning_ep/ep=1", 1, 2, 1, sizes=widths, layers=1).config()
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config).to(dtype)
    experts.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for param in experts.parameters():
            param.normal_(std=0.02, generator=generator)
    return experts


def forward_backward(experts: nn.Module) -> Body:
    """Calls the experts and differentiates by tokens, routing weights and parameters."""

    def body(hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, grad_TH: Tensor) -> tuple[Tensor, ...]:
        out_TH = experts(hidden_TH, ids_TK, weights_TK)
        return torch.autograd.grad(out_TH, [hidden_TH, weights_TK, *experts.parameters()], grad_TH)

    return body


def gemms(sizes: Sizes, tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[Body, list[tuple[Tensor, ...]]]:
    """Forward, input-gradient and weight-gradient GEMMs of both projections on rows already sorted, even splits.

    Nothing that an MoE layer needs can be faster than these, unless it uses a better grouped GEMM.
    """
    width, inner = sizes.hidden, sizes.moe_intermediate
    rows = tokens * sizes.top_k // sizes.experts * sizes.experts
    ends_E = torch.arange(1, sizes.experts + 1, dtype=torch.int32, device=device) * (rows // sizes.experts)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype) * 0.02

    up_EIH, down_EHI = random(sizes.experts, 2 * inner, width), random(sizes.experts, width, inner)

    def body(x_PH: Tensor, act_PI: Tensor, grad_up_PI: Tensor, grad_PH: Tensor) -> tuple[Tensor, ...]:
        return (
            F.grouped_mm(x_PH, up_EIH.transpose(1, 2), offs=ends_E),
            F.grouped_mm(act_PI, down_EHI.transpose(1, 2), offs=ends_E),
            F.grouped_mm(grad_PH, down_EHI, offs=ends_E),
            F.grouped_mm(grad_PH.t(), act_PI, offs=ends_E),
            F.grouped_mm(grad_up_PI, up_EIH, offs=ends_E),
            F.grouped_mm(grad_up_PI.t(), x_PH, offs=ends_E),
        )

    operands: list[tuple[Tensor, ...]] = [
        (random(rows, width), random(rows, inner), random(rows, 2 * inner), random(rows, width)) for _ in range(2)
    ]
    return body, operands


def _inputs(
    sizes: Sizes, tokens: int, router: str, seed: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = _LOGIT_STD * torch.randn(tokens, sizes.experts, generator=generator)
    if router == "skewed":
        logits_TE += zipf_bias(sizes.experts, 0)
    weights_TK, ids_TK = logits_TE.softmax(-1).topk(sizes.top_k)
    weights_TK = (weights_TK / weights_TK.sum(-1, keepdim=True)).to(device, dtype).requires_grad_()
    hidden_TH, grad_TH = (torch.randn(tokens, sizes.hidden, generator=generator).to(device, dtype) for _ in range(2))
    return hidden_TH.requires_grad_(), ids_TK.to(device), weights_TK, grad_TH


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe_layer", description=__doc__)
    add = parser.add_argument
    add("--tokens", type=int, default=16_384)
    add("--sizes", default="qwen3-30b-a3b", choices=sorted(SIZES))
    add("--experts-implementation", default="auto", help="our local experts, as the strategy's argument")
    add("--repeats", type=int, default=30)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--json", type=Path, default=Path("runs/benchmarks/moe_layer.json"))
    return parser


if __name__ == "__main__":
    main()
