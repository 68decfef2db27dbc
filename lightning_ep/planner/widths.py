"""The widths of a model, and what of them belongs to which layer; read from a ``config.json`` by `planner.families`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LatentAttention:
    """Attention whose keys and values pass a narrow latent (DeepSeek-V2, arXiv:2405.04434); heads are not shared.

    Attributes:
        query_rank: Width of the queries' latent; 0 if queries are projected directly.
        rank: Width of the latent of keys and values.
        key_dim: Of a head's queries and keys, without position.
        rope_dim: Of the part that carries the position; the keys' is one for all heads.
        value_dim: Of a head's values.
    """

    query_rank: int
    rank: int
    key_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True)
class LinearAttention:
    """Gated DeltaNet layers (arXiv:2412.06464) in place of attention, as Qwen3-Next has them.

    Attributes:
        share: Of all layers.
        key_heads: Heads of queries and keys.
        value_heads: Heads of values.
        key_dim: Width of a query's or key's head.
        value_dim: Width of a value's head.
        kernel: Tokens that the convolution before them sees.
    """

    share: float
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int


@dataclass(frozen=True)
class ModelWidths:
    """The widths of a mixture-of-experts transformer with gated MLPs: what all its layers have in common.

    Attributes:
        hidden: Hidden size.
        experts: Experts per layer.
        top_k: Experts per token.
        moe_intermediate: Width of an expert.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        vocab: Vocabulary.
        shared_intermediate: Width of the expert that every token goes to, all of them together.
        shared_gate: Whether a gate of one number per token weighs that expert.
        dense_layers: Layers with an MLP in place of experts.
        dense_intermediate: Width of that MLP.
        tied: Whether embedding and head are one matrix.
        qk_norm: Norms of queries and keys: of each ``head``, over ``all`` of them, or ``none``.
        biases: Which have biases: ``qkv``, ``output``, ``router``, ``experts``.
        sinks: Whether each head has a learned sink.
        gated_attention: Whether queries come with a gate of their width.
        window: Tokens that a layer with a sliding window sees.
        windowed: Share of the layers that have one.
        latent: For latent attention, in place of ``kv_heads`` and ``head_dim``.
        linear: Layers without softmax attention.
    """

    hidden: int
    experts: int
    top_k: int
    moe_intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    shared_intermediate: int = 0
    shared_gate: bool = False
    dense_layers: int = 0
    dense_intermediate: int = 0
    tied: bool = False
    qk_norm: Literal["head", "all", "none"] = "head"
    biases: tuple[str, ...] = ()
    sinks: bool = False
    gated_attention: bool = False
    window: int = 0
    windowed: float = 0.0
    latent: LatentAttention | None = None
    linear: LinearAttention | None = None

    def expert_layers(self, layers: int) -> int:
        """Those of so many layers that have experts."""
        return max(layers - self.dense_layers, 0)

    def linear_layers(self, layers: int) -> int:
        """Those of so many layers that have linear attention."""
        return round(layers * self.linear.share) if self.linear else 0

    @property
    def query(self) -> int:
        """Width of all queries of a token."""
        return self.heads * (self.latent.key_dim + self.latent.rope_dim if self.latent else self.head_dim)

    @property
    def value(self) -> int:
        """Width of what attention returns for a token."""
        return self.heads * (self.latent.value_dim if self.latent else self.head_dim)

    @property
    def keys_and_values(self) -> int:
        """Width of all keys and values of a token, as attention reads them."""
        return self.query + self.value if self.latent else 2 * self.kv_heads * self.head_dim


QWEN3_30B_A3B = ModelWidths(2048, 128, 8, 768, 32, 4, 128, 151_936)
"""The widths at which all that is measured was measured; that model has 48 layers."""
