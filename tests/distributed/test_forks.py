"""What forks after a run: workers of loaders, and processes that prepare data."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, Dataset

import lightning_ep

assert lightning_ep.__version__  # imported for what it does to forked processes


class Collecting(Dataset[int]):
    """Rows whose workers collect garbage, as Python does now and then."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> int:
        gc.collect()
        return row


def test_workers_leave_the_process_groups_of_a_run_before_alone() -> None:
    """Collecting one in a forked process hung there, or was a segmentation fault."""
    gc.disable()  # as if it had not come to it yet: a run that has ended is garbage
    try:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        trainer = SimpleNamespace(mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=("ep", "fsdp")))
        trainer.itself = trainer
        dist.all_reduce(torch.ones(1))
        dist.destroy_process_group()
        del trainer
        batches = [batch.tolist() for batch in DataLoader(Collecting(), batch_size=2, num_workers=2, timeout=60)]
    finally:
        gc.enable()
    assert batches == [[0, 1], [2, 3]]
