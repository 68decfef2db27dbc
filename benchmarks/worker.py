"""One rank of a cell, a process of its own: ``python -m benchmarks.worker CELL RESULT`` with torchrun's variables."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cells import Cell
from benchmarks.measure import Meter
from benchmarks.records import machine

_MODULES = {"lightning_ep": "ours", "transformers": "peer_transformers", "torchtitan": "peer_torchtitan"}


def main() -> None:
    """Runs the cell and writes what this rank measured, or why it could not."""
    _end_with_parent()
    cell, path = Cell(**json.loads(sys.argv[1])), Path(sys.argv[2])
    device = torch.device(cell.device, int(os.environ["LOCAL_RANK"])) if cell.device == "cuda" else torch.device("cpu")
    torch.manual_seed(0)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            _cap_memory(cell, device)
        else:
            torch.set_num_threads(1)
        meter = Meter(cell, device)
        importlib.import_module(f"benchmarks.{_MODULES[cell.trainer.split('/')[0]]}").run(cell, meter)
        _write(path, {"measured": meter.results(), "machine": machine(device)})
    except BaseException as error:
        traceback.print_exc()
        _write(path, {"status": status(error), "error": last_line(error)})
        sys.stderr.flush()
        os._exit(1)  # an ordinary exit can wait for peers that wait for this rank
    if dist.is_initialized():
        dist.barrier()  # rank 0 keeps the others' store
    sys.stdout.flush()
    os._exit(0)  # nothing that is torn down from here on could change the result, and all of it can hang


def _end_with_parent() -> None:
    """Has the kernel kill this rank when the command ends, however: a rank left behind would keep the GPU's memory."""
    parent_dies = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(parent_dies, signal.SIGKILL)


def _cap_memory(cell: Cell, device: torch.device) -> None:
    """Limits torch's allocator to ``cell.memory_cap_gib``, which stands in for a smaller card."""
    if cell.memory_cap_gib is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cell.memory_cap_gib * 2**30 / total), device)


def _write(path: Path, result: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.replace(path)  # never half a result


def status(error: BaseException) -> str:
    """``out of memory``, whoever ran out of it (torch's allocator, NCCL, cuBLAS), or ``failed``."""
    out = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
    return "out of memory" if out else "failed"


def last_line(error: BaseException) -> str:
    """The error on one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


if __name__ == "__main__":
    main()
