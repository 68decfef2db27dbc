"""Modules in eval mode for a while, each back in its own mode behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """Has ``module`` and what is in it draw nothing at random; afterwards each is in the mode that it had."""
    training = [inner for inner in module.modules() if inner.training]
    for inner in training:
        inner.training = False
    try:
        yield
    finally:
        for inner in training:
            inner.training = True
