"""Two "nodes" on one machine: network namespaces joined by a virtual cable, each with an address of its own.

```python
with TwoNodes() as nodes:
    jobs = [nodes.start(node, [sys.executable, "train.py"], output) for node in range(2)]
    nodes.kill(jobs[1])  # the node dies: SIGKILL to all that was started there
```
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, Self

INTERFACE = "veth-lep"
_TOOLS = ("ip", "unshare", "nsenter", "setpriv")


class TwoNodes:
    """The namespaces; everything in them ends with the context."""

    addresses = ("10.231.7.1", "10.231.7.2")

    def __init__(self) -> None:
        self._holders: list[subprocess.Popen[str]] = []
        self._jobs: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._holders = [_hold_namespace() for _ in self.addresses]
            first, second = (str(holder.pid) for holder in self._holders)
            _run("ip", "link", "add", INTERFACE, "netns", first, "type", "veth", "peer", INTERFACE, "netns", second)
            for node, address in enumerate(self.addresses):
                self.run(node, "ip", "address", "add", f"{address}/24", "dev", INTERFACE)
                self.run(node, "ip", "link", "set", "lo", "up")
                self.run(node, "ip", "link", "set", INTERFACE, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for job in self._jobs:
            self.kill(job)
        for holder in self._holders:
            holder.kill()
            holder.wait()

    def run(self, node: int, *command: str) -> None:
        """Runs a command of a moment with the network of ``node``."""
        _run(*self._enter(node), *command)

    def start(self, node: int, command: list[str], output: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Starts a command on ``node``; its output is appended to a file.

        It is process 1 of a process namespace: the kernel kills all that it started when it ends.
        """
        isolated = ["unshare", "--pid", "--fork", "--kill-child", *command]
        with open(output, "ab") as file:
            job = subprocess.Popen(
                [*self._enter(node), *isolated], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                env={**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, **environment},
            )  # fmt: skip
        self._jobs.append(job)
        return job

    @staticmethod
    def kill(job: subprocess.Popen[bytes]) -> None:
        """SIGKILL to a job and all its descendants, at once."""
        job.send_signal(signal.SIGKILL)
        job.wait()

    def cut_cable(self) -> None:
        """Packets vanish from now on; nobody is told."""
        self.run(1, "ip", "link", "set", INTERFACE, "down")

    def _enter(self, node: int) -> list[str]:
        # Whoever dies, pytest included, takes its children along.
        return ["setpriv", "--pdeathsig", "KILL", "nsenter", f"--net=/proc/{self._holders[node].pid}/ns/net"]


@functools.cache
def why_not() -> str | None:
    """Why this machine allows no namespaces, or None if it does."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    with contextlib.ExitStack() as stack:
        try:
            nodes = stack.enter_context(TwoNodes())
            job = nodes.start(0, ["true"], Path(os.devnull))
        except (OSError, RuntimeError) as error:
            return str(error)
        return None if job.wait() == 0 else "process namespaces are not permitted"


def _hold_namespace() -> subprocess.Popen[str]:
    # `cat` ends when this process does, which closes the pipe; the namespace goes with it.
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo ready && exec cat"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stderr is not None
    if holder.stdout.readline() != "ready\n":
        raise RuntimeError(f"network namespaces are not permitted: {holder.stderr.read().strip()}")
    return holder


def _run(*command: str) -> None:
    done: Any = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
