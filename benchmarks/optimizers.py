"""The step of AdamW alone on one device, over the matrices of some layers, in fp32 and in bf16, beside torchao's.

    python -m benchmarks.optimizers --layers 4
    python -m benchmarks.optimizers --sizes tiny --layers 1 --device cpu  # to try it

torchao's rows need torchao. Its ``bf16_stochastic_round`` rounds weights so and moments to the nearest, or holds these
in 8 bits. A step reads gradients, and reads and writes the rest; bytes are those, once each.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cells import SIZES
from benchmarks.measure import elapsed_ms, mark, synchronize
from benchmarks.records import machine, provenance
from benchmarks.tables import lines
from lightning_ep import AdamW

Build = Callable[[list[Tensor]], torch.optim.Optimizer]


def main(arguments: list[str] | None = None) -> None:
    """Times them one after another; prints the table, then everything as a JSON line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.optimizers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sizes", default="qwen3-30b-a3b", choices=sorted(SIZES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    found = [measure(*case, options, device) for case in cases()]
    rows = [[r["name"], f"{r['ms_per_billion']:.2f}", f"{r['tb_per_s']:.2f}", str(r["bytes"])] for r in found]
    print("\n".join(lines(["optimizer", "ms per 1e9 parameters", "TB/s", "bytes per parameter, gradients too"], rows)))
    print(json.dumps({**provenance(), "machine": machine(device), "layers": options.layers, "found": found}))


def cases() -> Iterator[tuple[str, torch.dtype, int, int, Build]]:
    """Name, dtype of weights and gradients, bytes held and bytes moved per parameter, and the optimizer."""
    fp32, bf16 = torch.float32, torch.bfloat16
    yield "torch, fused, fp32", fp32, 16, 28, functools.partial(torch.optim.AdamW, fused=True)
    yield "lightning_ep, fp32", fp32, 16, 28, AdamW
    yield "torch, fused, bf16 to the nearest", bf16, 8, 14, functools.partial(torch.optim.AdamW, fused=True)
    yield "lightning_ep, bf16 to the nearest", bf16, 8, 14, AdamW
    yield "lightning_ep, bf16 stochastically", bf16, 8, 14, functools.partial(AdamW, stochastic_rounding=True)
    if importlib.util.find_spec("torchao") is not None:
        from torchao.optim import AdamW8bit, _AdamW

        rounds = {"lr": 1e-3, "bf16_stochastic_round": True}
        yield "torchao, bf16, weights stochastically", bf16, 8, 14, functools.partial(_AdamW, **rounds)
        yield "torchao, bf16, moments in 8 bits", bf16, 6, 10, functools.partial(AdamW8bit, **rounds)


def measure(
    name: str,
    dtype: torch.dtype,
    held: int,
    moved: int,
    build: Build,
    options: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Milliseconds of a step; the first ones, which make the state and compile, are left out."""
    params = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes(options)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = build(params)
    times = []
    for repeat in range(3 + options.repeats):
        synchronize(device)
        before = mark(device)
        optimizer.step()
        after = mark(device)
        synchronize(device)
        times += [elapsed_ms(before, after)] if repeat >= 3 else []
    count = sum(param.numel() for param in params)
    ms = statistics.median(times)
    del params, optimizer
    gc.collect()
    return {"name": name, "ms_per_billion": ms / count * 1e9, "tb_per_s": moved * count / ms / 1e9, "bytes": held}


def shapes(options: argparse.Namespace) -> Iterator[tuple[int, ...]]:
    """Of the parameters of decoder layers: half the experts, as on each of two GPUs, attention, and norms."""
    sizes = SIZES[options.sizes]
    hidden, inner, experts = sizes["hidden_size"], sizes["moe_intermediate_size"], sizes["num_experts"] // 2
    heads = sizes["head_dim"] * (sizes["num_attention_heads"] + sizes["num_key_value_heads"])
    for _ in range(options.layers):
        yield from ((experts, 2 * inner, hidden), (experts, hidden, inner), (heads, hidden), (hidden,))


if __name__ == "__main__":
    main()
