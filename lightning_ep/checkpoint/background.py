"""Jobs that run in order, on this thread or behind it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class JobQueue:
    """Runs jobs one at a time, in order. After one has failed, the others are dropped until `wait` has told.

    The interpreter does not exit before the last job has ended.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._jobs: list[Future[None]] = []
        self._failed = False

    @property
    def busy(self) -> bool:
        """Whether a job has not ended, or has failed and nobody was told."""
        return self._failed or not all(job.done() for job in self._jobs)

    def submit(self, job: Callable[[], None]) -> None:
        """Runs ``job`` behind this thread, after those before it."""
        self._jobs.append(self._executor.submit(self._run, job))

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
        try:
            for job in self._jobs:
                job.result(timeout)
        finally:
            if all(job.done() for job in self._jobs):
                self._jobs, self._failed = [], False
