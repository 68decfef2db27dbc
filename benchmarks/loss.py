"""Projection onto the vocabulary and cross-entropy, forward and backward: ``python -m benchmarks.loss``."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import loss_table
from benchmarks.timing import spread, stages, time_ms, write_report

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [T, H], weight [V, H], targets [T]) to the sum of the losses."""


def main(arguments: list[str] | None = None) -> None:
    """Times what is installed and prints the table."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = measure(options.tokens, options.hidden, options.vocab, device, dtype, options.repeats)
    content = {"tokens": options.tokens, "hidden": options.hidden, "vocab": options.vocab, "rows": rows}
    write_report(options.json, "benchmarks.loss", device, content)
    print(loss_table(content))


def plain(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> Tensor:
    """Full logits, in fp32 for the softmax: what a transformers model does."""
    return F.cross_entropy(F.linear(hidden_TH, weight_VH).float(), targets_T, reduction="sum")


def candidates() -> dict[str, Loss | str]:
    """Every implementation by name, or why it is not here."""
    found: dict[str, Loss | str] = {"plain": plain}
    for name, module, attribute in (
        ("lightning_ep", "lightning_ep.ops.cross_entropy", "linear_cross_entropy"),
        ("Liger", "liger_kernel.transformers.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss"),
        ("torch F.linear_cross_entropy", "torch.nn.functional", "linear_cross_entropy"),
    ):
        try:
            found[name] = _adapt(name, getattr(importlib.import_module(module), attribute))
        except (ImportError, AttributeError) as error:
            found[name] = f"not available: {error}"
    return found


def _adapt(name: str, function: Any) -> Loss:
    if name == "Liger":
        liger = function(reduction="sum")
        return lambda hidden, weight, targets: liger(weight, hidden, targets)
    if name.startswith("torch"):
        return lambda hidden, weight, targets: function(hidden, weight, targets, reduction="sum")
    loss: Loss = function
    return loss


def measure(
    tokens: int, hidden: int, vocab: int, device: torch.device, dtype: torch.dtype, repeats: int
) -> list[dict[str, Any]]:
    """One row per implementation, with the relative difference of its loss to the plain one's in fp32."""
    generator = torch.Generator(device).manual_seed(0)
    weight_VH = (torch.randn(vocab, hidden, device=device, generator=generator) * 0.02).to(dtype).requires_grad_()
    inputs = [_inputs(tokens, vocab, weight_VH, generator) for _ in range(2)]
    with torch.no_grad():
        parts = zip(inputs[0][0].split(1024), inputs[0][2].split(1024), strict=True)
        expected = sum(plain(h.float(), weight_VH.float(), t).double() for h, t in parts)
    rows: list[dict[str, Any]] = []
    for name, loss in candidates().items():
        if isinstance(loss, str):
            rows.append({"name": name, "error": loss})
            continue
        try:
            rows.append({"name": name, **_measure_one(loss, inputs, float(expected), repeats)})
        except Exception as error:  # a peer that breaks or runs out of memory is a result
            rows.append({"name": name, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})
    return rows


def _inputs(tokens: int, vocab: int, weight_VH: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    device, hidden = weight_VH.device, weight_VH.shape[1]
    hidden_TH = torch.randn(tokens, hidden, device=device, generator=generator).to(weight_VH.dtype).requires_grad_()
    return hidden_TH, weight_VH, torch.randint(0, vocab, (tokens,), device=device, generator=generator)


def _measure_one(
    loss: Loss, inputs: list[tuple[Tensor, Tensor, Tensor]], expected: float, repeats: int
) -> dict[str, Any]:
    def run(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        value = loss(hidden_TH, weight_VH, targets_T)
        return value.detach(), torch.autograd.grad(value, [hidden_TH, weight_VH])

    value, gradients = run(*inputs[0])
    row: dict[str, Any] = {"relative_difference": abs(float(value) - expected) / expected}
    if inputs[0][0].device.type == "cuda":
        size = sum(gradient.numel() * gradient.element_size() for gradient in gradients)
        del gradients
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(*inputs[0])
        row["memory_gib"] = (torch.cuda.max_memory_allocated() - before - size) / 2**30
    return {**row, **spread(time_ms(run, inputs, repeats)), "stages": stages(run, inputs[0])}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__)
    add = parser.add_argument
    add("--tokens", type=int, default=16_384)
    add("--hidden", type=int, default=2048)
    add("--vocab", type=int, default=151_936)
    add("--repeats", type=int, default=20)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--json", type=Path, default=Path("runs/benchmarks/loss.json"))
    return parser


if __name__ == "__main__":
    main()
