"""Jobs that run in order, on this thread or behind it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any


class Worker:
    """One thread, started with the first job. The interpreter does not exit before the last job has ended."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None

    def submit(self, job: Callable[..., None], *args: Any) -> Future[None]:
        """Runs a job, behind all that were submitted before."""
        self._last = self._executor.submit(job, *args)
        return self._last

    def wait(self) -> None:
        """Waits for all jobs; whoever has submitted them is told of errors."""
        if self._last is not None:
            wait([self._last])


class JobQueue:
    """Jobs that run one at a time, in order. After one has failed, the others are dropped until `wait` has told.

    Args:
        worker: What runs them, between those of other queues.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._jobs: list[Future[None]] = []
        self._failed = False

    @property
    def busy(self) -> bool:
        """Whether a job has not ended, or has failed and nobody was told."""
        return self._failed or not all(job.done() for job in self._jobs)

    def submit(self, job: Callable[[], None]) -> None:
        """Runs ``job`` behind this thread, after those before it."""
        self._jobs.append(self._worker.submit(self._run, job))

    def _run(self, job: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            job()
        except BaseException:
            self._failed = True
            raise

    def wait(self, timeout: float | None = None) -> None:
        """Waits for all jobs; raises the first error, or TimeoutError."""
        if wait(self._jobs, timeout).not_done:
            raise TimeoutError
        jobs, self._jobs, self._failed = self._jobs, [], False
        for job in jobs:
            job.result()
