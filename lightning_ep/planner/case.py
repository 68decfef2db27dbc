"""What a plan is of: one way to train a model."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_ep.planner.widths import ModelWidths

_PRECISIONS = ("bf16-mixed", "bf16-true")
_RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Case:
    """A model, its depth, and how it is trained: AdamW with two moments, gradients clipped.

    Attributes:
        widths: The widths of its layers.
        layers: Decoder layers.
        batch: Sequences per group of ranks that share a batch, and micro-batch.
        sequence: Tokens per sequence.
        ranks: GPUs.
        ep: Ranks over which the experts are split; the rest of a copy is FSDP.
        cp: Ranks that split every sequence.
        precision: ``bf16-mixed`` (fp32 master weights) or ``bf16-true``.
        recompute: ``none``, ``selective`` or ``full``, as the strategy's ``activation_checkpointing``.
        compile: Whether decoder layers are compiled.
        tp: Ranks that split the matrices of attention, and sequences between them.
        replicate: Copies of the model.
        accumulate: Micro-batches per optimizer step.
        node: GPUs per node, which fill node after node.
        lora_rank: Of low-rank adapters over frozen bf16 weights; 0 trains all weights.
        lora_experts: Whether adapters are of experts too, or of attention only.
        skew: Rows of the busiest rank over the mean of its EP group.
        stochastic_rounding: Whether moments are bf16 beside fp32 weights; beside bf16 weights they always are.

    Raises:
        ValueError: If the sizes do not divide each other, or a mode does not exist.
    """

    widths: ModelWidths
    layers: int
    batch: int
    sequence: int
    ranks: int
    ep: int = 1
    cp: int = 1
    precision: str = "bf16-mixed"
    recompute: str = "none"
    compile: bool = True
    tp: int = 1
    replicate: int = 1
    accumulate: int = 1
    node: int = 8
    lora_rank: int = 0
    lora_experts: bool = True
    skew: float = 1.0
    stochastic_rounding: bool = False

    def __post_init__(self) -> None:
        for name, size in (("ep", self.ep), ("replicate", self.replicate)):
            if self.ranks % size:
                raise ValueError(f"{name}={size} does not divide ranks={self.ranks}.")
        if self.ranks % (self.ep * self.replicate):
            raise ValueError(f"ep={self.ep} times replicate={self.replicate} does not divide ranks={self.ranks}.")
        for name, size in (("cp", self.cp), ("tp", self.tp), ("tp * cp", self.tp * self.cp)):
            if self.shards % size:
                raise ValueError(f"{name}={size} does not divide ranks={self.shards} of a copy of the model.")
        if self.widths.experts % self.ep:
            raise ValueError(f"ep={self.ep} does not divide the {self.widths.experts} experts of a layer.")
        if self.precision not in _PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is not planned; choose one of {', '.join(_PRECISIONS)}.")
        if self.recompute not in _RECOMPUTE:
            raise ValueError(f"recompute={self.recompute!r} does not exist; choose one of {', '.join(_RECOMPUTE)}.")
        if self.skew < 1:
            raise ValueError(f"skew={self.skew}: the busiest rank has at least the mean of the rows.")

    @property
    def tokens(self) -> int:
        """Distinct tokens per rank and micro-batch."""
        return self.batch * self.sequence // (self.cp * self.tp)

    @property
    def tokens_per_step(self) -> int:
        """Distinct tokens of all ranks in an optimizer step."""
        return self.batch * self.sequence * self.data_ranks * self.accumulate

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that see different batches."""
        return self.ranks // (self.cp * self.tp)

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the model."""
        return self.ranks // self.replicate

    @property
    def fsdp(self) -> int:
        """Ranks that share the matrices of their experts by FSDP."""
        return self.shards // self.ep

    @property
    def managed_experts(self) -> bool:
        """Whether FSDP has the experts: to gather their shards, or to add what copies of the model found."""
        return self.fsdp > 1 or self.replicate > 1

    @property
    def narrow_gradients(self) -> bool:
        """Whether gradients of experts stay in bf16 until AdamW reads them: nobody reduces or adds them in fp32."""
        alone = not self.managed_experts and self.accumulate == 1
        return alone and self.precision == "bf16-mixed" and not self.lora_rank

    @property
    def weight_bytes(self) -> int:
        """Bytes of a trained parameter as the optimizer has it."""
        return 2 if self.precision == "bf16-true" else 4

    @property
    def moment_bytes(self) -> int:
        """Bytes of each of its two moments."""
        return 2 if self.stochastic_rounding else self.weight_bytes

    @property
    def expert_gradient_bytes(self) -> int:
        """Bytes of the gradient of an expert's parameter."""
        return 2 if self.narrow_gradients else self.weight_bytes
