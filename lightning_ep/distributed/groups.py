"""Process groups that the first run of a process makes, and all later ones use."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
_made: dict[Hashable, Any] = {}
_world: weakref.ref[Any] | None = None


def once(key: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` gives, from the first call with this ``key``; every rank must make the same calls.

    A group cannot end with its run: the module stays sharded over its meshes. torch keeps all of them until they are
    destroyed, each with threads, on GPUs with a communicator's memory, so that runs share theirs: one behind the
    other, or one inside the other's callback.

    Args:
        key: Tells apart what differs. It holds as long as the default process group does.
        make: Makes groups, of which collectives are called one at a time: by the main thread, or as it waits.
    """
    global _world
    if _world is None or _world() is not dist.group.WORLD:
        _made.clear()
        _world = weakref.ref(dist.group.WORLD)
    if key not in _made:
        _made[key] = make()
    return _made[key]
