"""Ranks that share a GPU run side by side (CUDA's Multi-Process Service), not in turns of a millisecond.

Each turn of a rank would be spent on waiting for ranks that have none. Every group of ranks has a service of its own,
since one process that is killed or fails on the GPU takes all others of its service with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

_COMMAND = "nvidia-cuda-mps-control"
_STARTS = 20.0  # seconds


class SharedGPUs:
    """A service for some ranks, where it is needed and this machine has it.

    Attributes:
        environment: The variables by which ranks find it; empty where there is none.
    """

    def __init__(self, needed: bool) -> None:
        self.environment: dict[str, str] = {}
        if not needed or shutil.which(_COMMAND) is None:
            return
        self._folder = Path(tempfile.mkdtemp(prefix="mps-"))
        self.environment = dict.fromkeys(("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"), str(self._folder))
        self._daemon = subprocess.Popen(
            [_COMMAND, "-f"], env={**os.environ, **self.environment}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._start_server()

    def _start_server(self) -> None:
        """Clients that came before it was ready would be turned away."""
        deadline = time.monotonic() + _STARTS
        while not (self._folder / "control").exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{_COMMAND} has made no {self._folder}/control in {_STARTS:g} s")
            time.sleep(0.02)
        self._ask(f"start_server -uid {os.getuid()}")
        while "ACTIVE" not in (said := self._ask(f"get_server_status {self._ask('get_server_list').strip()}")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{_COMMAND} has no server in {_STARTS:g} s: {said}")
            time.sleep(0.05)

    def _ask(self, command: str) -> str:
        environment = {**os.environ, **self.environment}
        answer = subprocess.run([_COMMAND], input=command, env=environment, capture_output=True, text=True, timeout=30)
        return answer.stdout + answer.stderr

    def end(self) -> None:
        """Ends it when its ranks have ended."""
        if not self.environment:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._daemon.pid, signal.SIGKILL)
        self._daemon.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
