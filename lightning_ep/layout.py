"""Which rank holds what: one set of ranks, seen once by the experts and once by everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class ParallelLayout:
    """The sizes of the parallel dimensions, validated against the number of ranks.

    Every rank is in two views. In the *expert* view the ranks form an (fsdp, ep) grid: whole experts are split over
    ``ep``, each expert's matrices over ``fsdp``. In the *dense* view all ranks form one data-parallel dimension over
    which everything else is sharded. ``ep`` is the inner dimension, so an EP group is a run of consecutive ranks and
    stays inside a node whenever ``ep`` divides the processes of a node.

    Args:
        world_size: Number of ranks.
        ep: Ranks that share one set of experts; each holds ``num_experts / ep`` of them.
        fsdp: Ranks over which each expert's matrices are sharded.

    Raises:
        ValueError: If a size is not a positive integer or ``fsdp * ep`` is not ``world_size``.
    """

    world_size: int
    ep: int = 1
    fsdp: int = 1

    def __post_init__(self) -> None:
        for name in ("world_size", "ep", "fsdp"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}={size!r}: must be a positive integer.")
        if self.ep * self.fsdp != self.world_size:
            raise ValueError(
                f"ep={self.ep} times fsdp={self.fsdp} is {self.ep * self.fsdp}, but there are {self.world_size} "
                f"processes. ep * fsdp must equal the number of processes; {self._suggestion()}"
            )

    def _suggestion(self) -> str:
        if self.world_size % self.ep == 0:
            return f"with ep={self.ep} use fsdp={self.world_size // self.ep}, or leave fsdp='auto'."
        choices = [ep for ep in range(1, self.world_size + 1) if self.world_size % ep == 0]
        return f"ep must divide {self.world_size}: choose one of {choices} and leave fsdp='auto'."

    @classmethod
    def resolve(
        cls,
        ep: int | Literal["auto"],
        fsdp: int | Literal["auto"],
        world_size: int,
        processes_per_node: int,
    ) -> ParallelLayout:
        """Fills in ``"auto"`` sizes: EP inside the node, FSDP of the experts across nodes.

        Args:
            ep: Expert-parallel size, or ``"auto"`` for ``world_size // fsdp`` if ``fsdp`` is given and
                ``processes_per_node`` otherwise.
            fsdp: FSDP size of the experts, or ``"auto"`` for ``world_size // ep``.
            world_size: Number of ranks.
            processes_per_node: Ranks on one node.

        Raises:
            ValueError: As the constructor; also if a string other than ``"auto"`` is given.
        """
        for name, size in (("ep", ep), ("fsdp", fsdp)):
            if isinstance(size, str) and size != "auto":
                raise ValueError(f"{name}={size!r}: must be a positive integer or 'auto'.")
        if ep == "auto":
            fits = isinstance(fsdp, int) and fsdp > 0 and world_size % fsdp == 0
            ep = world_size // fsdp if fits and isinstance(fsdp, int) else min(processes_per_node, world_size)
        if fsdp == "auto":
            fsdp = max(1, world_size // ep) if isinstance(ep, int) and ep > 0 else 1
        return cls(world_size=world_size, ep=int(ep), fsdp=int(fsdp))

    @property
    def data_world_size(self) -> int:
        """Number of ranks that see different batches."""
        return self.world_size

    def data_rank(self, global_rank: int) -> int:
        """Index of ``global_rank`` among the ranks that see different batches."""
        return global_rank

    def expert_groups(self) -> list[list[int]]:
        """Global ranks of every EP group, outer to inner."""
        return [list(range(start, start + self.ep)) for start in range(0, self.world_size, self.ep)]

    def build_meshes(self, device_type: str) -> Meshes:
        """Creates the device meshes; every rank must call it, once, after the process group exists."""
        from torch.distributed.device_mesh import init_device_mesh

        return Meshes(
            expert=init_device_mesh(device_type, (self.fsdp, self.ep), mesh_dim_names=("fsdp", "ep")),
            dense=init_device_mesh(device_type, (self.world_size,), mesh_dim_names=("dp",)),
        )

    def check_num_experts(self, num_experts: int, where: str) -> None:
        """Raises ValueError if ``ep`` does not divide ``num_experts``, naming the largest layout that works."""
        if num_experts % self.ep == 0:
            return
        best = max(ep for ep in range(1, self.ep + 1) if num_experts % ep == 0 and self.world_size % ep == 0)
        raise ValueError(
            f"ep={self.ep} does not divide the {num_experts} experts of {where}. Each rank of an EP group holds "
            f"num_experts / ep whole experts; use ep={best}, fsdp={self.world_size // best} on these "
            f"{self.world_size} processes."
        )


@dataclass(frozen=True)
class Meshes:
    """The two views of the ranks as device meshes; dimensions are addressed by name.

    Attributes:
        expert: ``("fsdp", "ep")``.
        dense: ``("dp",)``.
    """

    expert: DeviceMesh
    dense: DeviceMesh
