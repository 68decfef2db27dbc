"""Ranks that wait for one another in different places: found in seconds, and said with the lines that they are at.

A sharded model's forward, a checkpoint and a metric with ``sync_dist`` are collectives. Where only one rank calls one
(``if trainer.is_global_zero: ...``) it waits for the others, which wait for it in the next step, until the time-out. A
thread of each rank looks once a second at where training is, and tells the others if it stands still.
"""

from __future__ import annotations

import itertools
import json
import sys
import sysconfig
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_ep.distributed.progress import Progress, end_process
from lightning_ep.distributed.stacks import Call, calls_of, own_calls

_PATIENCE = 6.0  # seconds on one line, twice, until ranks that all wait are said to wait for ever
_WARN_AFTER = 30.0  # seconds until a rank says for which others it waits, which may be slow only
_INTERVAL = 1.0
_GRACE = 5.0
_SHOWN = 16  # ranks, in messages
_COLLECTIVE_FRAMES = 2  # innermost ones: a collective, and the decorator or method around it
_PACKAGE = str(Path(__file__).resolve().parents[1])
_TORCH = str(Path(torch.__file__).parent)
_WAITING = (
    f"{_TORCH}/distributed/",
    *(f"{_PACKAGE}/{room}/" for room in ("distributed", "moe/dispatch", "context_parallel", "tensor_parallel")),
)
_LIBRARIES = (_PACKAGE, _TORCH, *{sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib")}, "<frozen")
_instances = itertools.count()


@dataclass
class Place:
    """Where a rank is.

    Attributes:
        steps: Steps of any stage that it has begun.
        stage: Where training stands, in words.
        line: The user's line that it is in.
        collective: The function of torch that it has called, such as ``all_to_all_single``.
        waits: Whether it waits in a collective, or does something of its own.
        still: For how many seconds.
        answered: The question that it has answered last, by number.
    """

    steps: int
    stage: str
    line: str
    collective: str
    waits: bool
    still: float
    answered: int

    @classmethod
    def of(cls, calls: Sequence[Call], progress: Progress, still: float = 0.0, answered: int = 0) -> Place:
        """That of a thread which is in these calls, innermost first."""
        users = [call for call in calls if not call.file.startswith(_LIBRARIES)]
        # The first function of torch behind all others, which may call further ones or be wrapped.
        inside = itertools.takewhile(lambda call: call.file.startswith(_TORCH), calls)
        names = [call.function for call in reversed(list(inside)) if call.function != "wrapper"]
        waits = any(call.file.startswith(_WAITING) for call in calls[:_COLLECTIVE_FRAMES])
        line = str(next(iter(users), calls[0]))
        return cls(progress.steps, progress.step, line, names[0] if names else "", waits, still, answered)

    def __str__(self) -> str:
        return f"{self.line} ({self.stage})"


def are_apart(places: Sequence[Place]) -> bool:
    """Whether ranks that all wait do so in different collectives, so that none of them will end.

    Not by the lines that call them: a broadcast may be called on one line by who sends and on another by who receives.
    """
    return all(place.waits for place in places) and len({(place.steps, place.collective) for place in places}) > 1


def explain(places: dict[int, Place]) -> str:
    """What ranks that are apart are told."""
    where: dict[str, list[int]] = {}
    for rank, place in places.items():
        where.setdefault(str(place), []).append(rank)
    lines = [f"  {'ranks' if len(ranks) > 1 else 'rank'} {_listed(ranks)}: {text}" for text, ranks in where.items()]
    return (
        "The ranks of this job are in different places, where each waits for all, so that none can go on:\n"
        + "\n".join(lines)
        + "\nSaving a checkpoint, a forward of the model (`generate` too), `self.log(..., sync_dist=True)` and other "
        "collectives are for all ranks. Call them on every rank: take the line out of `if self.global_rank == 0`, "
        "`if trainer.is_global_zero` or `@rank_zero_only` (`trainer.save_checkpoint(path)` on all ranks writes one "
        "checkpoint), and leave inside only what one rank does alone, such as printing."
    )


def _listed(ranks: list[int]) -> str:
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return ", ".join(map(str, ranks[:_SHOWN])) + more


class ApartError(RuntimeError):
    """Ranks meet in one collective that have called different ones."""


def meet_apart(progress: Progress, ranks: Sequence[int]) -> ApartError:
    """The error of ranks that have met in an exchange of different forwards; each of them must call it.

    Args:
        progress: Where this rank stands.
        ranks: The ranks of the exchange.
    """
    store, mine = _store("met"), Place.of(own_calls()[1:], progress)
    store.set(str(dist.get_rank()), json.dumps(asdict(mine)))
    deadline = time.monotonic() + 5
    while not store.check([str(rank) for rank in ranks]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return ApartError(explain({rank: _place(store, str(rank)) for rank in ranks if store.check([str(rank)])}))


def _store(name: str) -> Any:
    """A connection of its own: another thread may wait on the default one."""
    default: Any = dist.distributed_c10d._get_default_store()
    return dist.distributed_c10d.PrefixStore(f"lightning_ep/apart/{name}", default.clone())


def _place(store: Any, key: str) -> Place:
    return Place(**json.loads(store.get(key)))


class Watch:
    """A thread that ends the job when all ranks wait in different places, and says so when some wait long.

    Nothing reaches a thread that waits in a collective, so processes are ended. Rank 0 is given time: over gloo it gets
    an error when the others have left, and `Progress.verdict` says what of.

    Args:
        progress: Where this rank stands; the thread ends with it.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = weakref.ref(progress)
        self._watched = threading.get_ident()
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._store = _store(str(next(_instances)))
        self._seen: tuple[int, list[Call]] = (-1, [])
        self._since = time.monotonic()
        self._answered = 0
        self._suspects = 0
        self._question = 0
        self._warned: set[int] = set()
        self._ended = threading.Event()
        thread = threading.Thread(target=self._run, name="lightning-ep-apart", daemon=True)
        thread.start()
        # Also when the interpreter ends: a thread that comes back from the store after that aborts the process.
        weakref.finalize(progress, _join, thread, self._ended)

    def _run(self) -> None:
        while not self._ended.is_set() and (progress := self._progress()) is not None:
            try:
                self._look(progress)
            except RuntimeError:
                return  # the process that holds the store has ended
            del progress
            self._ended.wait(_INTERVAL)

    def _look(self, progress: Progress) -> None:
        # A thread that goes on is left alone.
        calls = calls_of(self._watched) if progress.moves == self._seen[0] else []
        still = self._standing(calls, progress)
        if self._rank != 0 and self._store.check(["verdict"]):
            end_process()
        asks = still > _PATIENCE and bool(calls) and Place.of(calls, progress).waits
        asked = self._store.add("asked", int(asks))
        if asked == self._answered:
            return
        self._answered = asked
        if not (calls := calls or calls_of(self._watched)):
            return  # it has ended
        self._store.set(str(self._rank), json.dumps(asdict(Place.of(calls, progress, still, asked))))
        if self._rank == 0:
            self._judge(progress)

    def _standing(self, calls: list[Call], progress: Progress) -> float:
        """Seconds since the thread has moved."""
        if (seen := (progress.moves, calls)) != self._seen:
            self._seen, self._since = seen, time.monotonic()
        return time.monotonic() - self._since

    def _judge(self, progress: Progress) -> None:
        """Rank 0's part, once per question: whether the answers of all ranks to the one before are hopeless."""
        question, self._question = self._question, self._answered
        keys = [str(rank) for rank in range(self._size)]
        if not self._store.check(keys):
            return
        places = {rank: Place(**json.loads(text)) for rank, text in enumerate(self._store.multi_get(keys))}
        if min(place.answered for place in places.values()) < question:
            return
        stand = all(place.still > _PATIENCE for place in places.values())
        self._suspects = self._suspects + 1 if stand and are_apart(list(places.values())) else 0
        if self._suspects > 1:
            verdict = explain(places)
            progress.end(verdict)
            print(f"\n{verdict}", file=sys.stderr, flush=True)
            self._store.set("verdict", "")
            time.sleep(_GRACE)
            if (calls := calls_of(self._watched)) and self._standing(calls, progress) > _GRACE:
                end_process()
        self._warn(places)

    def _warn(self, places: dict[int, Place]) -> None:
        waiting = {rank for rank, place in places.items() if place.waits and place.still > _WARN_AFTER}
        if waiting - self._warned:
            lines = "\n".join(f"  rank {rank}: {place}" for rank, place in list(places.items())[:_SHOWN])
            print(
                f"\nRanks {_listed(sorted(waiting))} have waited for others for {_WARN_AFTER:.0f} s. If these are not "
                f"just slow, a line that is for all ranks runs on some only:\n{lines}",
                file=sys.stderr,
                flush=True,
            )
        self._warned = waiting


def _join(thread: threading.Thread, ended: threading.Event) -> None:
    ended.set()
    if thread is not threading.current_thread():  # which may have held the last reference
        thread.join(2 * _GRACE)
