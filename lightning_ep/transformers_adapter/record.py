"""What this package remembers of modules that are not its own: one record on each, by type."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")

_RECORD = "_lightning_ep"  # the one attribute in which anything is remembered


def remember(module: nn.Module, value: Any) -> None:
    """Keeps ``value`` on ``module``, in place of an earlier one of its type; it lives and dies with the module."""
    record: dict[type, Any] = module.__dict__.setdefault(_RECORD, {})
    record[type(value)] = value


def recall(module: nn.Module, kind: type[T]) -> T | None:
    """What was remembered on ``module`` of exactly this type, or None."""
    found: T | None = module.__dict__.get(_RECORD, {}).get(kind)
    return found
