"""Buffers that a layer writes into by itself (running statistics, spectral norms), for a second run of the layer.

What a first run has left in them would make the second compute something else, and count its tokens twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

Buffers = Sequence[tuple[nn.Module, str, Tensor]]
"""Each with the module that holds it, and its name there."""


def copied_buffers(modules: Iterable[nn.Module]) -> Buffers:
    """Copies of what the modules hold now: of all, since kernels (of BatchNorm) write without a new version."""
    held = [(module, name, buffer) for module in modules for name, buffer in module._buffers.items()]
    return [(module, name, buffer.detach().clone()) for module, name, buffer in held if buffer is not None]


@contextmanager
def in_place(buffers: Buffers) -> Iterator[None]:
    """Inside, modules have these buffers; what they have now is neither read nor written to."""
    now = [(module, name, module._buffers[name]) for module, name, _ in buffers]
    for module, name, buffer in buffers:
        module._buffers[name] = buffer
    try:
        yield
    finally:
        for module, name, own in now:
            module._buffers[name] = own
