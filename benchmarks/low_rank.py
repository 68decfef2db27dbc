"""Low-rank products of experts alone on a GPU: before (a GEMM and an addition each) and now; tiles; a GEMM beside others' SMs."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from lightning_ep.ops import low_rank as ops
from lightning_ep.ops.grouped_mm import grouped_mm, grouped_outer
from lightning_ep.ops.kernels import grouped_mm as gmm
from lightning_ep.ops.kernels import low_rank as kernel

ROWS, H, I, K = 131_072, 2048, 768, 8


def ms(function: Callable[[], Any], repeats: int = 9) -> float:
    function()
    function()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        function()
        b.record()
        times.append((a, b))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in times)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def case(experts: int, rank: int, skew: float) -> None:
    torch.manual_seed(0)
    popular = torch.rand(experts, device="cuda").pow(-skew) if skew else torch.ones(experts, device="cuda")
    ids = torch.multinomial(popular / popular.sum(), ROWS, replacement=True)
    counts = torch.bincount(ids, minlength=experts)
    ends = counts.cumsum(0).int()
    print(f"--- E={experts} r={rank} hottest {counts.max().item() * experts / ROWS:.1f}", flush=True)
    bf = dict(device="cuda", dtype=torch.bfloat16)
    x = torch.randn(ROWS, H, **bf)
    up = torch.randn(experts, 2 * I, H, **bf) / 45
    down = torch.randn(experts, H, I, **bf) / 28
    h, act = torch.randn(ROWS, 2 * I, **bf), torch.randn(ROWS, I, **bf)
    a_up, b_up = torch.randn(experts, rank, H, **bf) / 45, torch.randn(experts, 2 * I, rank, **bf)
    a_down, b_down = torch.randn(experts, rank, I, **bf) / 28, torch.randn(experts, H, rank, **bf)
    low = torch.randn(ROWS, rank, **bf)
    tokens, row = torch.randn(ROWS // K, H, **bf), (torch.randperm(ROWS, device="cuda") // K).int()

    def old_add(rows: Any, weight: Any, factor: Any) -> Any:
        return grouped_mm(rows, weight, ends).add_(grouped_mm(low, factor, ends))

    products = [("forward up", x, up.transpose(1, 2), b_up.transpose(1, 2)), ("forward down", act, down.transpose(1, 2), b_down.transpose(1, 2)),
                ("backward down", x, down, a_down), ("backward up", h, up, a_up)]
    total_old = total_new = 0.0
    for name, rows, weight, factor in products:
        old, new = old_add(rows, weight, factor), grouped_mm(rows, weight, ends, (low, factor))
        wrong = error(new, old)
        del old, new
        base, before, now = ms(lambda: grouped_mm(rows, weight, ends)), ms(lambda: old_add(rows, weight, factor)), ms(lambda: grouped_mm(rows, weight, ends, (low, factor)))
        times = 2 if name == "forward up" else 1
        total_old, total_new = total_old + times * (before - base), total_new + times * (now - base)
        print(f"{name:14s} GEMM {base:.3f}  + add {before:.3f}  beside {now:.3f} ms  serves {gmm.serves(rows, weight, (low, factor))} differs {wrong:.1e}", flush=True)
    for name, rows, factor, times in [("project x", x, a_up.transpose(1, 2), 2), ("project act", act, a_down.transpose(1, 2), 2),
                                      ("project grad_out", x, b_down, 1), ("project grad_h", h, b_up, 1)]:
        wrong = error(ops.project(rows, factor, 0.5, ends), grouped_mm(rows, factor, ends).mul_(0.5))
        before, now = ms(lambda: grouped_mm(rows, factor, ends).mul_(0.5)), ms(lambda: ops.project(rows, factor, 0.5, ends))
        total_old, total_new = total_old + times * before, total_new + times * now
        print(f"{name:16s} before {before:.3f} now {now:.3f} ms ({rows.nbytes / now / 1e9:.2f} TB/s) differs {wrong:.1e}", flush=True)
    for name, rows, first in [("A of down", act, True), ("B of down", x, False), ("A of up", x, True), ("B of up", h, False)]:
        out = torch.empty((experts, rank, rows.shape[1]) if first else (experts, rows.shape[1], rank), device="cuda")
        view = out.transpose(1, 2) if first else out

        def old() -> Any:
            left, right = (low, rows) if first else (rows, low)
            return grouped_outer(left, right, ends, torch.float32)

        def new(into: Any = view, source: Any = rows, index: Any = None) -> Any:
            ops.outer_(into, source, low, ends, index)
            return out

        wrong = error(new(), old())
        before, now, more = ms(old), ms(new), ""
        total_old, total_new = total_old + before, total_new + now
        if name == "A of up":
            gathered = ms(lambda: new(view, tokens, row))
            more = f"; gathered {gathered:.3f}, index_select {ms(lambda: tokens.index_select(0, row.int())):.3f}"
        print(f"{name:16s} before {before:.3f} now {now:.3f} ms ({rows.nbytes / now / 1e9:.2f} TB/s) differs {wrong:.1e}{more}", flush=True)
    print(f"per layer and step: before {total_old:.2f} ms, now {total_new:.2f} ms; of 48 layers {48 * total_old:.0f} and {48 * total_new:.0f}", flush=True)


def tiles(experts: int = 128, rank: int = 8) -> None:
    """Other sizes of tiles."""
    ends = torch.full((experts,), ROWS // experts, device="cuda").cumsum(0).int()
    x = torch.randn(ROWS, H, device="cuda", dtype=torch.bfloat16)
    factor, low = torch.randn(experts, rank, H, device="cuda").bfloat16(), torch.randn(ROWS, rank, device="cuda").bfloat16()
    out = torch.empty(experts, rank, H, device="cuda")
    low_out = torch.empty_like(low)
    tokens, row = x[: ROWS // K].clone(), (torch.randperm(ROWS, device="cuda") // K).int()
    for rows, depth, warps, stages in [(64, 128, 4, 4), (64, 64, 4, 4), (64, 64, 4, 6), (128, 64, 4, 4), (128, 128, 8, 3), (128, 64, 8, 5), (64, 256, 4, 3)]:
        grid = (triton.cdiv(ROWS, rows) + experts, 1)
        def project() -> None:
            f = factor.transpose(1, 2)
            kernel._project_kernel[grid](x, f, low_out, ends, H, rank, H, *f.stride(), 1.0, experts, 128, rows, depth, 16, num_warps=warps, num_stages=stages)
        print(f"project {rows}x{depth} warps {warps} stages {stages}: {ms(project):.3f}", flush=True)
    for rows, cols, warps, stages in [(64, 128, 4, 4), (64, 256, 4, 3), (64, 256, 8, 4), (128, 128, 4, 4), (64, 64, 4, 4), (32, 256, 4, 5), (32, 128, 4, 6)]:
        grid = (triton.cdiv(H, cols), experts, 1)
        line = []
        for source, index in [(x, None), (tokens, row)]:
            def outer() -> None:
                kernel._outer_kernel[grid](source, low, low if index is None else index, out, ends, H, rank, H, rank, rank * H, 1, H, index is not None, rows, cols, 16, num_warps=warps, num_stages=stages)
            line.append(f"{ms(outer):.3f}")
        print(f"outer {rows}x{cols} warps {warps} stages {stages}: in order, gathered {line}", flush=True)


@triton.jit
def _hold(out, n):
    value = tl.arange(0, 1024).to(tl.float32)
    for _ in range(n):
        value = value * 1.0001 + 0.5
    tl.store(out + tl.program_id(0) * 1024 + tl.arange(0, 1024), value)


def beside_others(experts: int = 64) -> None:
    """A GEMM while 16 multiprocessors are held by something else for 0.3 ms, as by NCCL, by its number of programs."""
    ends = torch.full((experts,), ROWS // experts, device="cuda").cumsum(0).int()
    sm = torch.cuda.get_device_properties(0).multi_processor_count
    out, side = torch.empty(16 * 1024, device="cuda"), torch.cuda.Stream()
    hold = lambda n: _hold[(16,)](out, n, num_warps=32)  # noqa: E731
    n = int(20_000 * 0.3 / ms(lambda: hold(20_000)))
    print(f"held for {ms(lambda: hold(n)):.3f} ms", flush=True)
    for a, b, transposed in [(H, 2 * I, True), (I, H, True), (H, I, False), (2 * I, H, False)]:
        x = torch.randn(ROWS, a, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(experts, *((b, a) if transposed else (a, b)), device="cuda", dtype=torch.bfloat16)
        w = w.transpose(1, 2) if transposed else w
        line = []
        for programs in (sm, sm - 16, 2 * sm, 4 * sm, 8 * sm, 100_000):
            def both() -> None:
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    hold(n)
                gmm.grouped_mm(x, w, ends, programs=programs)
            alone = ms(lambda: gmm.grouped_mm(x, w, ends, programs=programs))
            line.append(f"{programs}: {alone:.3f} -> {ms(both):.3f}")
            torch.cuda.current_stream().wait_stream(side)
        print(f"{a} to {b}: programs, ms alone -> beside: " + ", ".join(line), flush=True)


def main() -> None:
    """Prints as it goes; each part on its own, so that one that fails leaves the others."""
    start = time.monotonic()
    parts: list[Callable[[], None]] = [lambda: case(128, 8, 0.0), lambda: case(128, 8, 0.7), lambda: case(64, 16, 0.0), tiles, beside_others, lambda: case(128, 64, 0.0)]
    for part in parts:
        try:
            part()
        except Exception as failure:  # noqa: BLE001
            print("FAILED", type(failure).__name__, str(failure)[:2000], file=sys.stderr, flush=True)
        print(f"{time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
