"""What a rank is waiting for, so that a collective time-out names a layer and not only a sequence number."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from zlib import crc32

import torch
import torch.distributed as dist

_KEPT = 64  # exchanges before finished ones are looked for: each look asks the GPU


@dataclass
class Exchange:
    """An exchange that was started; `Progress` keeps it until it is over."""

    layer: str
    hop: str
    step: str
    work: dist.Work | torch.cuda.Event | None
    since: float = field(default_factory=time.monotonic)

    def waited(self, on_gpu: bool) -> None:
        """To be called after ``work.wait()``: lets go of the work, which keeps the received rows alive.

        The host may be whole layers ahead of a GPU, whose memory is reused in the order of its stream: rows kept until
        the GPU gets there would add up. An event tells as well when it does.
        """
        event = torch.cuda.Event() if on_gpu else None
        if event is not None:
            event.record()
        self.work = event

    @property
    def is_over(self) -> bool:
        """Whether the rows have arrived."""
        work = self.work  # once: the watching thread asks, too
        return work is None or (work.query() if isinstance(work, torch.cuda.Event) else work.is_completed())

    def __str__(self) -> str:
        return f"{self.hop} of layer {self.layer}, {self.step}"


class Progress:
    """Keeps the exchanges that one rank has started and says which of them has not finished.

    The host runs ahead of a GPU, so the last call made says little; the oldest unfinished one is where the rank
    really stands. A CPU rank blocks in the call itself.

    Attributes:
        step: Where training stands, for messages, such as ``"training step 12"``.
        steps: Steps of any stage that this rank has begun.
        moves: What it has begun in all, steps and exchanges: unchanged while it stands.
        verdict: Why the job is being ended, if it is: ranks wait for one another in different places.
    """

    def __init__(self) -> None:
        self.step = "before the first step"
        self.steps = 0
        self.moves = 0
        self.verdict: str | None = None
        self._first_layer: str | None = None
        self._started: deque[Exchange] = deque()
        self._waiting: str | None = None
        self._last: str | None = None
        self._lock = threading.Lock()
        self._watch: threading.Thread | None = None
        self._stop = threading.Event()

    def begin_step(self, step: str) -> None:
        """Notes a step that begins; all ranks begin the same ones."""
        self.step = step
        self.steps += 1
        self.moves += 1

    def end(self, verdict: str) -> None:
        """Notes why the job is being ended."""
        self.verdict = verdict

    def pass_number(self, layer: str, hop: str) -> int:
        """What is the same on all ranks that are in the same forward, 1 to 2**30; 0 in layers after the first.

        Ranks compare it where they exchange numbers anyway, so that they do not take one another's tokens for theirs.
        """
        if self._first_layer is None:
            self._first_layer = layer
        return crc32(f"{self.steps} {hop}".encode()) % 2**30 + 1 if layer == self._first_layer else 0

    def started(self, layer: str, hop: str, work: dist.Work) -> Exchange:
        """Notes an exchange that is in flight.

        Args:
            layer: Whose rows.
            hop: What travels.
            work: Says whether they have arrived.
        """
        exchange = Exchange(layer, hop, self.step, work)
        self.moves += 1
        with self._lock:
            if len(self._started) >= _KEPT:
                self._drop_finished()
            self._started.append(exchange)
        return exchange

    @contextmanager
    def blocking(self, layer: str, hop: str) -> Iterator[None]:
        """Notes that the host may block on an exchange."""
        self._waiting = f"{hop} of layer {layer}, {self.step}"
        self.moves += 1
        yield
        # Not in a finally: after an exception the note must still say where it happened.
        self._waiting, self._last = None, self._waiting

    def _drop_finished(self) -> None:
        while self._started and self._started[0].is_over:
            self._last = str(self._started.popleft())

    def say_failed(self, exception: BaseException, rank: int, ranks: int) -> None:
        """Prints where this rank stood, of several, when an exception ended its run."""
        position = self.describe()
        if position is not None and ranks > 1:
            print(f"[rank {rank}] {type(exception).__name__} while {position}", file=sys.stderr, flush=True)

    def describe(self) -> str | None:
        """One line on where this rank stands, or None if it never exchanged anything."""
        with self._lock:
            self._drop_finished()
            oldest = self._started[0] if self._started else None
        if self._waiting is not None:
            return f"waiting in the {self._waiting}"
        if oldest is not None:
            waited = time.monotonic() - oldest.since
            return f"waiting for the {oldest}, started {waited:.0f} s ago"
        if self._last is not None:
            return f"in {self.step}, not in an exchange of tokens; the last one to finish was the {self._last}"
        return None

    def watch(self, rank: int, timeout_s: float) -> None:
        """Starts a thread, once, that prints where this rank stands when an exchange is about to time out.

        NCCL aborts the process from its own thread when a collective times out, so nothing can be raised; a line on
        stderr shortly before is what remains.

        Args:
            rank: Global rank, for the message.
            timeout_s: Time-out of the process group in seconds; the line comes at 90 % of it.
        """
        if self._watch is not None:
            return
        # The thread holds the record only while it looks: it ends with it.
        record, stop, limit = weakref.ref(self), self._stop, 0.9 * timeout_s

        def run() -> None:
            reported: Exchange | None = None
            while not stop.wait(min(5.0, limit / 10)) and (progress := record()) is not None:
                reported = progress._report(rank, limit, reported)
                del progress

        self._watch = threading.Thread(target=run, name="lightning-ep-progress", daemon=True)
        self._watch.start()
        weakref.finalize(self, stop.set)

    def _report(self, rank: int, limit: float, reported: Exchange | None) -> Exchange | None:
        """Prints the exchange that has been waited for longer than ``limit`` seconds, once; returns it."""
        with self._lock:
            self._drop_finished()
            oldest = self._started[0] if self._started else None
        if oldest is None or oldest is reported or time.monotonic() - oldest.since <= limit:
            return reported
        print(f"[rank {rank}] {self.describe()}", file=sys.stderr, flush=True)
        return oldest

    def close(self) -> None:
        """Stops the watching thread."""
        self._stop.set()


def end_process() -> None:
    """Ends this process, with an exit status of 1, from any thread."""
    # Without handlers of exit, which would wait for the process group.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
