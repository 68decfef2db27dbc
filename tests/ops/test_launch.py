"""Launches by our key take the compiled kernel that Triton would take, and do not ask it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from triton.runtime import JITFunction  # noqa: E402

from lightning_ep.ops.kernels.launch import Kernel, tiles  # noqa: E402

pytestmark = pytest.mark.gpu

_SIZE = 64


@Kernel
def _line_kernel(x, out, scale, summand, TWICE: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.load(x + at).to(tl.float64) * scale + summand
    if TWICE:
        value *= 2
    tl.store(out + at, value)


@Kernel
def _first_tile_kernel(x, out, ROWS: tl.constexpr, COLS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(out + at, x.load([0, 0]))


def _of_triton(monkeypatch: pytest.MonkeyPatch) -> list[JITFunction]:
    """The kernels that Triton is asked to find from now on."""
    asked: list[JITFunction] = []
    run = JITFunction.run

    def noted(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        asked.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", noted)
    return asked


def test_a_key_belongs_to_one_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.randn(4 * _SIZE, device="cuda")
    out = torch.empty(_SIZE, dtype=torch.float64, device="cuda")
    seen = set()
    for dtype in (torch.float32, torch.bfloat16):
        for begin in (0, 1, 16):  # of which one is no multiple of 16 bytes
            for summand in (0, 1, 2, 16, 17, 48, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), 2**40, 2**63):
                for scale in (1.0, 0.5):
                    for twice in (False, True):
                        x = memory.to(dtype)[begin : begin + _SIZE]
                        arguments = x, out, scale, summand, twice, _SIZE
                        first = _line_kernel[(1,)](*arguments)
                        asked = _of_triton(monkeypatch)
                        out.zero_()
                        again = _line_kernel[(1,)](*arguments)
                        assert asked == []
                        torch.testing.assert_close(out, (x.double() * scale + summand) * (1 + twice))
                        assert _line_kernel.jit[(1,)](*arguments) is again is first
                        assert asked == [_line_kernel.jit]
                        monkeypatch.undo()
                        seen.add(first)
    assert len(seen) > 20  # what compilers are told differs


def test_options_and_tiles_of_a_descriptor_belong_to_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    x, seen = torch.randn(64, 64, device="cuda"), set()
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ([16, 16], [16, 32]):
            for warps in (1, 4):
                out = torch.empty(shape, dtype=dtype, device="cuda")
                for _ in range(2):
                    compiled = _first_tile_kernel[(1,)](tiles(x.to(dtype), shape), out.zero_(), *shape, num_warps=warps)
                    assert torch.equal(out, x.to(dtype)[: shape[0], : shape[1]])
                    seen.add(compiled)
    assert len(seen) == 8
    asked = _of_triton(monkeypatch)
    _first_tile_kernel[(1,)](tiles(x, [16, 16]), torch.empty(16, 16, device="cuda"), 16, 16, num_warps=4)
    assert asked == []
