"""Process groups: how they are made, and that a process makes each of them once."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Hashable
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")
_made: dict[Hashable, Any] = {}
_world: weakref.ref[Any] | None = None
_doubted = False


def once(key: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` gives, from the first call with this ``key``; every rank must make the same calls.

    A group cannot end with its run: the module stays sharded over its meshes. torch keeps all of them until they are
    destroyed, each with threads, on GPUs with a communicator's memory, so that runs share theirs: one behind the
    other, or one inside the other's callback.

    Args:
        key: Tells apart what differs. It holds as long as the default process group does.
        make: Makes groups, of which collectives are called one at a time: by the main thread, or as it waits.
    """
    import torch.distributed as dist

    global _world
    world = dist.distributed_c10d._get_default_group()  # raises ValueError if there is none
    if _world is None or _world() is not world:
        _made.clear()
        _world = weakref.ref(world)
    if key not in _made:
        _made[key] = make()
    return _made[key]


def hosts() -> Any:
    """All ranks, over their hosts; every rank must call it."""
    import torch.distributed as dist

    if dist.get_backend() in ("gloo", "fake"):  # which has no others
        return dist.group.WORLD
    return once("hosts", lambda: dist.new_group(backend="gloo"))


def doubt() -> None:
    """Notes that a run, or a collective, has failed: a time-out breaks a group for good."""
    global _doubted
    _doubted = True


def renew_doubted() -> None:
    """Has groups made anew from now on if any rank doubts them; every rank must call it, with a process group."""
    import torch.distributed as dist

    global _doubted
    if dist.get_backend() != "fake":  # which has no others
        # Through the store: no GPU has been chosen yet, and the default group may be broken, too.
        store: Any = dist.distributed_c10d._get_default_store()
        name = f"lightning_ep/doubts/{store.add(f'lightning_ep/doubts/of {dist.get_rank()}', 1)}"
        store.add(name, int(_doubted))
        if store.add(f"{name}/ranks", 1) == dist.get_world_size():
            store.set(f"{name}/in all", str(store.add(name, 0)))
        if int(store.get(f"{name}/in all")):
            _made.clear()
    _doubted = False


def one_worker_per_gloo_group(device_type: str) -> None:
    """Has groups of gloo that a process makes from now on run one collective at a time, if it computes on the CPU.

    torch gives each two threads, which note without a lock what they have done last. The name of a functional gather
    (`DTensor.full_tensor`, tensor parallelism) does not fit into a string's own 15 characters: once in a hundred
    thousand gathers or so both free the same memory, and malloc aborts the process, then or later.
    """
    import torch.distributed as dist

    if device_type != "cpu" or hasattr(dist.ProcessGroupGloo.__init__, "__wrapped__"):
        return
    group: Any = dist.ProcessGroupGloo
    init = group.__init__

    @functools.wraps(init)
    def init_with_one_worker(self: Any, *args: Any, timeout: timedelta | None = None) -> None:
        if timeout is None:  # somebody has made options
            init(self, *args)
            return
        options = group._Options()
        options._timeout, options._threads = timeout, 1
        names = os.environ.get("GLOO_SOCKET_IFNAME", "")
        devices = [group.create_device(interface=name) for name in names.split(",") if name]
        options._devices = devices or [group.create_default_device()]
        init(self, *args, options)

    group.__init__ = init_with_one_worker


def has_two_workers(device_type: str) -> bool:
    """Whether the default group is one of gloo that was made before `one_worker_per_gloo_group`."""
    backend = _default_backend(device_type)
    return backend is not None and backend.name() == "gloo" and backend.options._threads > 1


def _default_backend(device_type: str) -> Any | None:
    """What the default group has for a kind of device, which may be one of several; None if it moves nothing."""
    import torch
    import torch.distributed as dist

    if dist.get_backend() == "fake":
        return None
    return dist.distributed_c10d._get_default_group()._get_backend(torch.device(device_type))


def group_options(device_type: str, urgent: bool) -> tuple[str, Any] | None:
    """Backend and options of a mesh dimension's groups; without them torch would give these its own time-out.

    Args:
        device_type: The mesh's.
        urgent: Run its transfers before other work that the GPU has been given: somebody waits for them.
    """
    import torch
    import torch.distributed as dist

    default = _default_backend(device_type)
    if default is None or default.name() not in ("nccl", "gloo"):
        return None
    timeout = default.options._timeout
    if default.name() == "gloo":
        return "gloo", torch._C._distributed_c10d.Backend.Options("gloo", timeout)
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=urgent)
    options._timeout = timeout
    return "nccl", options
