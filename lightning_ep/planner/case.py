"""What a plan is of: the widths of a model, and one way to train it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_PRECISIONS = ("bf16-mixed", "bf16-true")
_RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class ModelWidths:
    """The widths of a mixture-of-experts transformer whose layers are all alike, SwiGLU experts in each.

    Attributes:
        hidden: Hidden size.
        experts: Experts per layer.
        top_k: Experts per token.
        moe_intermediate: Width of an expert.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        vocab: Vocabulary; embedding and head are two matrices.
    """

    hidden: int
    experts: int
    top_k: int
    moe_intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, config: Any) -> ModelWidths:
        """The widths in a transformers configuration of Qwen3-MoE, or of another family with its names."""
        return cls(
            hidden=config.hidden_size,
            experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            moe_intermediate=config.moe_intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab=config.vocab_size,
        )


QWEN3_30B_A3B = ModelWidths(2048, 128, 8, 768, 32, 4, 128, 151_936)
"""The widths at which all that is measured was measured; that model has 48 layers."""


@dataclass(frozen=True)
class Case:
    """A model, its depth, and how it is trained: AdamW with two moments, gradients clipped, routers balanced.

    Attributes:
        widths: The widths of its layers.
        layers: Decoder layers.
        batch: Sequences per rank and step; with ``cp`` the ranks that split sequences share them.
        sequence: Tokens per sequence.
        ranks: GPUs.
        ep: Ranks over which the experts are split; the rest is FSDP.
        cp: Ranks that split every sequence.
        precision: ``bf16-mixed`` (fp32 master weights) or ``bf16-true``.
        recompute: ``none``, ``selective`` or ``full``, as the strategy's ``activation_checkpointing``.
        compile: Whether decoder layers are compiled.

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

    def __post_init__(self) -> None:
        for name, size in (("ep", self.ep), ("cp", self.cp)):
            if self.ranks % size:
                raise ValueError(f"{name}={size} does not divide ranks={self.ranks}.")
        if self.widths.experts % self.ep:
            raise ValueError(f"ep={self.ep} does not divide the {self.widths.experts} experts of a layer.")
        if self.precision not in _PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is not planned; choose one of {', '.join(_PRECISIONS)}.")
        if self.recompute not in _RECOMPUTE:
            raise ValueError(f"recompute={self.recompute!r} does not exist; choose one of {', '.join(_RECOMPUTE)}.")

    @property
    def tokens(self) -> int:
        """Distinct tokens per rank and step."""
        return self.batch * self.sequence // self.cp

    @property
    def fsdp(self) -> int:
        """Ranks that share the matrices of their experts by FSDP."""
        return self.ranks // self.ep

    @property
    def narrow_gradients(self) -> bool:
        """Whether gradients of experts stay in bf16 until AdamW reads them: nobody reduces them in fp32."""
        return self.fsdp == 1 and self.precision == "bf16-mixed"

    @property
    def weight_bytes(self) -> int:
        """Bytes of a parameter as the optimizer has it, and of each of its moments."""
        return 2 if self.precision == "bf16-true" else 4

    @property
    def expert_gradient_bytes(self) -> int:
        """Bytes of the gradient of an expert's parameter."""
        return 2 if self.narrow_gradients else self.weight_bytes
