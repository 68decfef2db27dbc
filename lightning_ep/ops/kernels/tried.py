"""Kernels that are tried once per size before they are used: not every version of Triton has been seen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from triton.errors import TritonError

_log = logging.getLogger(__name__)
_WORKS: dict[tuple[object, ...], bool] = {}

ROWS = 200  # a whole tile of 128 and a part of one


def works(what: str, sizes: Sequence[object], stored: object, agrees: Callable[[], bool]) -> bool:
    """Whether Triton makes a kernel for these sizes that fits the chip and computes what torch does.

    Args:
        what: The kernel, for the message that it is not used.
        sizes: Of its operands, for that message, too.
        stored: What else tells two kernels of these sizes apart: the device, and how operands lie in memory.
        agrees: Runs it and compares; called once.
    """
    key = (what, tuple(sizes), stored)
    if key not in _WORKS:
        try:
            reason = "" if agrees() else "its results differ"
        except torch.OutOfMemoryError:
            raise  # says nothing of the kernel
        except (TritonError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
        if reason:
            shown = " and ".join(map(str, sizes))
            _log.warning(f"No {what} of lightning_ep for weights {shown}, torch's instead: {reason}")
        _WORKS[key] = not reason
    return _WORKS[key]


def numbers(width: int, like: Tensor) -> Tensor:
    """Rows ``[ROWS, width]`` to try a kernel with, exact in any dtype."""
    return (torch.arange(ROWS * width, device=like.device) % 17 - 8).to(like.dtype).view(ROWS, width)


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether results differ by rounding only."""
    return bool((found.float() - expected).norm() <= 1e-2 * expected.norm())
