"""Which rank holds what: one set of ranks, seen once by the experts and once by everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning_ep.process_groups import group_options, has_two_workers, once, one_worker_per_gloo_group, renew_doubted

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_SIZES = ("ep", "fsdp", "replicate", "tp", "cp")


@dataclass(frozen=True)
class ParallelLayout:
    """The sizes of the parallel dimensions, validated against the number of ranks.

    Every rank is in two views, each from the outer to the inner dimension:

    - *expert*: (replicate, fsdp, ep). Whole experts are split over ``ep``, each expert's matrices over ``fsdp``, and
      all of it is repeated ``replicate`` times. An EP group is a run of consecutive ranks and stays inside a node
      whenever ``ep`` divides the processes of a node.
    - *dense*: (replicate, dp, cp, tp), with dp * cp * tp = fsdp * ep. Everything else is sharded over dp * cp; ``tp``
      ranks share the matrices of attention and of dense MLPs, ``cp`` ranks share sequences. Ranks that differ in
      ``tp`` or ``cp`` only see the same batch.

    Args:
        world_size: Number of ranks; must be given.
        ep: Ranks that share one set of experts; each holds ``num_experts / ep`` of them.
        fsdp: Ranks over which each expert's matrices are sharded.
        replicate: Copies of the whole model, whose gradients are all-reduced.
        tp: Tensor-parallel size of attention and dense MLPs.
        cp: Context-parallel size: ranks that share every sequence.

    Raises:
        ValueError: If a size is not a positive integer, ``replicate * fsdp * ep`` is not ``world_size``, or
            ``tp * cp`` does not divide ``fsdp * ep``.
    """

    world_size: int = 0
    ep: int = 1
    fsdp: int = 1
    replicate: int = 1
    tp: int = 1
    cp: int = 1

    def __post_init__(self) -> None:
        for name in ("world_size", *_SIZES):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                problem = f"{name}={size!r}: must be a positive integer."
                given: list[object] = [self.ep, self.fsdp]
                if "auto" in given:
                    problem += (
                        f" Only ParallelLayout.resolve fills in 'auto', from the processes that there are: "
                        f"`ParallelLayout.resolve({self.ep!r}, 'auto', world_size, processes_per_node)`."
                    )
                raise ValueError(problem)
        product = self.replicate * self.fsdp * self.ep
        if product != self.world_size:
            raise ValueError(
                f"replicate={self.replicate} times fsdp={self.fsdp} times ep={self.ep} is {product}, but there are "
                f"{self.world_size} processes. replicate * fsdp * ep must equal the number of processes; "
                f"{self._suggestion()}"
            )
        if self.shards % (self.tp * self.cp) != 0:
            fitting = [tp * self.cp for tp in _divisors(self.tp) if self.shards % (tp * self.cp) == 0]
            fix = f"tp={max(fitting) // self.cp}" if fitting else f"cp={_largest_divisor(self.shards, self.cp)}, tp=1"
            raise ValueError(
                f"tp={self.tp} times cp={self.cp} is {self.tp * self.cp}, which does not divide fsdp * ep = "
                f"{self.fsdp} * {self.ep} = {self.shards}, the processes of one copy of the model. Use {fix}."
            )

    def _suggestion(self) -> str:
        if self.world_size % self.replicate != 0:
            return f"replicate must divide {self.world_size}: choose one of {_divisors(self.world_size)}."
        copy = self.world_size // self.replicate
        if copy % self.ep == 0:
            return f"with ep={self.ep} use fsdp={copy // self.ep}."
        return f"ep must divide {copy}: choose one of {_divisors(copy)}, with fsdp={copy}/ep."

    @classmethod
    def resolve(
        cls,
        ep: int | Literal["auto"],
        fsdp: int | Literal["auto"],
        world_size: int,
        processes_per_node: int,
        replicate: int = 1,
        tp: int = 1,
        cp: int = 1,
    ) -> ParallelLayout:
        """Fills in ``"auto"`` sizes: EP inside the node, FSDP of the experts across nodes.

        Args:
            ep: Expert-parallel size, or ``"auto"`` for all that ``fsdp`` and ``replicate`` leave if ``fsdp`` is given,
                and for ``processes_per_node`` (or a whole copy of the model, if that is smaller) otherwise.
            fsdp: FSDP size of the experts, or ``"auto"`` for all that ``ep`` and ``replicate`` leave.
            world_size: Number of ranks.
            processes_per_node: Ranks on one node.
            replicate: As in the constructor.
            tp: As in the constructor.
            cp: As in the constructor.

        Raises:
            ValueError: As the constructor; also if a string other than ``"auto"`` is given.
        """
        for name, size in (("ep", ep), ("fsdp", fsdp)):
            if isinstance(size, str) and size != "auto":
                raise ValueError(f"{name}={size!r}: must be a positive integer or 'auto'.")
        copies = isinstance(replicate, int) and replicate > 0 and world_size % replicate == 0
        copy = world_size // replicate if copies else world_size  # ranks of one copy of the model
        if ep == "auto":
            fits = isinstance(fsdp, int) and fsdp > 0 and copy % fsdp == 0
            ep = copy // fsdp if fits and isinstance(fsdp, int) else min(processes_per_node, copy)
        if fsdp == "auto":
            fsdp = max(1, copy // ep) if isinstance(ep, int) and ep > 0 else 1
        return cls(world_size, int(ep), int(fsdp), replicate, tp, cp)

    @property
    def shards(self) -> int:
        """Number of ranks that share one copy of the model."""
        return self.fsdp * self.ep

    @property
    def data_world_size(self) -> int:
        """Number of groups of ranks that see different batches: replicate * dp."""
        return self.world_size // (self.tp * self.cp)

    @property
    def loss_world_size(self) -> int:
        """Number of ranks whose losses gradients are summed over: all of them.

        Tensor-parallel peers compute the same loss, and the gradients that each contributes are parts of one sum.
        """
        return self.world_size

    def data_rank(self, global_rank: int) -> int:
        """Index of ``global_rank``'s batch among those of a step; the same for ranks that share a batch."""
        return global_rank // (self.tp * self.cp)

    def place(self, global_rank: int) -> Place:
        """Where ``global_rank`` is in both views."""
        return Place(
            replicate=global_rank // self.shards,
            fsdp=global_rank // self.ep % self.fsdp,
            ep=global_rank % self.ep,
            data=self.data_rank(global_rank),
            cp=global_rank // self.tp % self.cp,
            tp=global_rank % self.tp,
        )

    def expert_groups(self) -> list[list[int]]:
        """Global ranks of every EP group, outer to inner."""
        return [list(range(start, start + self.ep)) for start in range(0, self.world_size, self.ep)]

    def build_meshes(self, device_type: str) -> Meshes:
        """The device meshes, made at the first call for these sizes; every rank must call it, with a process group.

        Those of a run that has failed are made anew.

        The EP and TP groups have communicators of their own, also where one spans all ranks: in the one that FSDP uses,
        tokens would queue behind parameters and gradients.
        """
        one_worker_per_gloo_group(device_type)
        renew_doubted()
        return once(("meshes", self, device_type), lambda: self._make_meshes(device_type))

    def _make_meshes(self, device_type: str) -> Meshes:
        from torch.distributed.device_mesh import init_device_mesh

        all_own = has_two_workers(device_type)

        def mesh(sizes: dict[str, int], kept: tuple[str, ...]) -> DeviceMesh:
            sizes = {name: size for name, size in sizes.items() if size > 1 or name in kept}
            urgent = ("ep", "tp")
            own = [name for name, size in sizes.items() if name in urgent or size != self.world_size or all_own]
            options: Any = {
                name: option for name in own if (option := group_options(device_type, urgent=name in urgent))
            }
            return init_device_mesh(
                device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes), backend_override=options
            )

        dp_cp = self.shards // self.tp
        dense = mesh({"replicate": self.replicate, "dp_cp": dp_cp, "tp": self.tp}, ("dp_cp",))
        whole = mesh({"replicate": self.replicate, "shards": self.shards}, ("shards",)) if self.tp > 1 else None
        sequence = None
        if self.cp > 1:
            sequence = mesh({"data": self.data_world_size, "cp": self.cp, "tp": self.tp}, ("data", "cp"))["cp"]
        return Meshes(
            expert=mesh({"replicate": self.replicate, "fsdp": self.fsdp, "ep": self.ep}, ("fsdp", "ep")),
            dense=dense,
            cp=sequence,
            whole=whole,
        )

    def check_num_experts(self, num_experts: int, where: str) -> None:
        """Raises ValueError if ``ep`` does not divide ``num_experts``, naming the largest layout that works."""
        if num_experts % self.ep == 0:
            return
        best = max(ep for ep in range(1, self.ep + 1) if num_experts % ep == 0 and self.shards % ep == 0)
        raise ValueError(
            f"ep={self.ep} does not divide the {num_experts} experts of {where}. Each rank of an EP group holds "
            f"num_experts / ep whole experts; use ep={best}, fsdp={self.shards // best} on these "
            f"{self.world_size} processes."
        )

    def check_key_value_heads(self, heads: int, key_value_heads: int, where: str) -> None:
        """Raises ValueError if ``tp`` does not divide the key/value heads of attention that it splits."""
        if key_value_heads % self.tp != 0:
            problem = f"tp={self.tp} does not divide the {key_value_heads} key/value heads of {where}"
            raise ValueError(f"{problem}. {self._fitting_heads(heads, key_value_heads)}")

    def check_attention_heads(self, heads: int, key_value_heads: int, where: str) -> None:
        """Raises ValueError if ``tp * cp`` does not divide the heads of attention; key/value heads are repeated."""
        both = self.tp * self.cp
        if heads % both != 0:
            problem = f"tp={self.tp} times cp={self.cp} is {both}, which does not divide the {heads} attention heads of"
            raise ValueError(f"{problem} {where}. {self._fitting_heads(heads, key_value_heads)}")

    def _fitting_heads(self, heads: int, key_value_heads: int) -> str:
        """What to use instead, by the rules of both."""
        tp, cp = max(
            (tp, cp)
            for tp in range(1, self.tp + 1)
            for cp in range(1, self.cp + 1)
            if key_value_heads % tp == 0 and heads % (tp * cp) == 0 and self.shards % (tp * cp) == 0
        )
        return (
            "Only attention is bound by its heads, of which a rank needs whole ones; expert parallelism is not: keep "
            f"ep={self.ep}, fsdp={self.fsdp} and use tp={tp}" + (f", cp={cp}." if self.cp > 1 else ".")
        )


@dataclass(frozen=True)
class Place:
    """A rank's coordinates in both views of `ParallelLayout`.

    Attributes:
        replicate: Which copy of the model, in both.
        fsdp: Which part of its experts' matrices, in the expert view.
        ep: Which experts, in the expert view.
        data: Which batch of a step, in the dense view.
        cp: Which piece of the batch's sequences, in the dense view.
        tp: Which part of the dense matrices, in the dense view.
    """

    replicate: int
    fsdp: int
    ep: int
    data: int
    cp: int
    tp: int


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _largest_divisor(number: int, bound: int) -> int:
    """The largest divisor of ``number`` that is at most ``bound``."""
    return max(divisor for divisor in _divisors(number) if divisor <= bound)


@dataclass(frozen=True)
class Meshes:
    """The two views of the ranks as device meshes; dimensions are addressed by name.

    Attributes:
        expert: ``("fsdp", "ep")``, with ``"replicate"`` in front where there is more than one copy of the model.
        dense: ``("dp_cp",)``, with ``"replicate"`` in front and ``"tp"`` behind where they are larger than 1.
        cp: 1-D, the ranks that share this rank's sequences; None if ``cp`` is 1.
        whole: As ``dense`` without splitting into dp_cp and tp: ``("shards",)``; None if ``tp`` is 1.
    """

    expert: DeviceMesh
    dense: DeviceMesh
    cp: DeviceMesh | None = None
    whole: DeviceMesh | None = None

    @property
    def expert_shards(self) -> DeviceMesh:
        """What FSDP takes for experts: ``("fsdp",)``, or 2-D with ``"replicate"`` in front."""
        return _with_replicas(self.expert, "fsdp")

    @property
    def dense_shards(self) -> DeviceMesh:
        """What FSDP takes for everything else: ``("dp_cp",)``, or 2-D with ``"replicate"`` in front."""
        return _with_replicas(self.dense, "dp_cp")

    @property
    def all_shards(self) -> DeviceMesh:
        """What FSDP takes for modules that know nothing of tensor parallelism: all ranks of a copy as one dimension."""
        return self.dense_shards if self.whole is None else _with_replicas(self.whole, "shards")

    @property
    def tp(self) -> DeviceMesh | None:
        """1-D, the ranks that share matrices of attention and dense MLPs; None if ``tp`` is 1."""
        return self.dense["tp"] if "tp" in _names(self.dense) else None


def _names(mesh: DeviceMesh) -> tuple[str, ...]:
    return mesh.mesh_dim_names or ()


def _with_replicas(mesh: DeviceMesh, dim: str) -> DeviceMesh:
    return mesh["replicate", dim] if "replicate" in _names(mesh) else mesh[dim]
