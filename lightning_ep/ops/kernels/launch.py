"""Launches of Triton kernels that cost the host little.

After its rows are counted a layer launches a dozen kernels before its first GEMM, and the GPU waits for the host. In a
loop of nothing else the host takes 37 to 78 us for one by `triton.jit`, which binds, specialises and prints all
arguments again to find a kernel that it has compiled before, and 31 to 62 by this key (host of two H200, Triton 3.6);
between layers, where nothing is in its caches, several times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_INT32, _INT64 = 2**31, 2**63


class Kernel:
    """A kernel as `triton.jit` makes it of a function, whose compiled forms are found again by a key of its own.

    Triton compiles a kernel again for other dtypes, for pointers and integers that are multiples of 16 or not, for
    integers that are 1 or need 64 bits, and for other constants. These make the key, and the first launch of each goes
    through Triton.

    Args:
        function: Its constants (``tl.constexpr``) are its last parameters. It is launched as ``kernel[grid](...)`` with
            arguments by position; keywords are options of the compiler.
        do_not_specialize: Parameters whose numbers say nothing of what they will be next.
    """

    def __init__(self, function: Callable[..., None], do_not_specialize: Sequence[str] = ()) -> None:
        self.jit = triton.jit(function, do_not_specialize=do_not_specialize)
        self._is_interpreted = not isinstance(self.jit, JITFunction)
        if not self._is_interpreted:
            constant = [parameter.is_constexpr for parameter in self.jit.params]
            assert constant == sorted(constant), f"{function.__name__} has a parameter behind its constants"
            self._num_variable = constant.count(False)
        self._compiled: dict[tuple[object, ...], Any] = {}

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., Any]:
        return partial(self._launch, grid)

    def _launch(self, grid: Sequence[int], *arguments: Any, **options: Any) -> Any:
        """Launches it and returns the compiled kernel."""
        if self._is_interpreted:
            return self.jit[grid](*arguments, **options)
        key: list[object] = [torch.cuda.current_device(), *arguments[self._num_variable :], *options.values()]
        for argument in arguments[: self._num_variable]:
            kind = type(argument)
            if kind is int:
                bits = 32 if -_INT32 <= argument < _INT32 else 64 if argument < _INT64 else 65
                key.append((argument % 16 == 0, argument == 1, bits))
            elif kind is float:
                key.append(float)
            elif kind is TensorDescriptor:
                key.append((argument.base.dtype, *argument.block_shape))
            else:
                key.append((argument.dtype, argument.data_ptr() % 16 == 0))
        found = tuple(key)
        compiled = self._compiled.get(found)
        if compiled is None:
            compiled = self._compiled[found] = self.jit[grid](*arguments, **options)
        else:
            compiled[(*grid, 1, 1)[:3]](*arguments)
        return compiled


def tiles(matrix: Tensor, shape: list[int]) -> TensorDescriptor:
    """`TensorDescriptor.from_tensor` for a contiguous matrix of 16-byte rows, of which it would check that again."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base, descriptor.shape, descriptor.strides = matrix, matrix.shape, matrix.stride()
    descriptor.block_shape, descriptor.padding = shape, "zero"
    return descriptor
