"""One cell of the benchmark: what is trained, by whom, on which shape. A cell is also the key of its record."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

OURS = "lightning_ep/ep="
_OURS = re.compile(r"lightning_ep/ep=(\d+)(?:,cp=(\d+))?(?:,tp=(\d+))?")
TRANSFORMERS = ("transformers/fsdp2", "transformers/ep", "transformers/single")
TORCHTITAN = "torchtitan/ep"
SELECTIVE, FULL = "+selective", "+full"
COMPILE = "+compile"


@dataclass(frozen=True)
class Sizes:
    """The widths of a Qwen3-MoE."""

    hidden: int
    experts: int
    top_k: int
    moe_intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


SIZES = {
    "qwen3-30b-a3b": Sizes(2048, 128, 8, 768, 32, 4, 128, 151_936),
    "tiny": Sizes(32, 8, 4, 16, 4, 2, 8, 128),
}


@dataclass(frozen=True)
class Cell:
    """Everything that identifies a measurement.

    Attributes:
        trainer: ``lightning_ep/ep=N[,cp=M][,tp=M]``, one of `TRANSFORMERS` or `TORCHTITAN`; then how it
            recomputes (`SELECTIVE`, ours only, or `FULL`) and `COMPILE` (not for torchtitan, which always does).
        batch: Sequences per rank and step; with ``cp`` and ``tp`` the ranks that split sequences share them.
        sequence: Tokens per sequence.
        ranks: Processes, one per GPU.
        sizes: Key into `SIZES`.
        layers: Depth.
        precision: ``bf16-mixed`` (fp32 master weights), ``bf16-true`` or ``32-true``.
        router: ``balanced`` or ``skewed`` (see `benchmarks.router`).
        steps: Measured steps.
        warmup: Steps before them.
        memory_cap_gib: Limit of torch's allocator per GPU, or None.
        device: ``cuda`` or ``cpu``.
        task: ``train``, or ``weights`` (see `benchmarks.weights`; only layout, sizes, depth and device matter then).
        rehearse: Run rank 0 of ``ranks`` alone, with its own data for its peers' (see `benchmarks.rehearsal`).
    """

    trainer: str
    batch: int
    sequence: int
    ranks: int
    sizes: str = "qwen3-30b-a3b"
    layers: int = 12
    precision: str = "bf16-mixed"
    router: str = "balanced"
    steps: int = 30
    warmup: int = 5
    memory_cap_gib: float | None = None
    device: str = "cuda"
    task: str = "train"
    rehearse: bool = False

    def __post_init__(self) -> None:
        recompute = (SELECTIVE, FULL) if self.ours else (FULL,)
        known = self.ours or self.base in (*TRANSFORMERS, TORCHTITAN)
        compiled = ("",) if self.base == TORCHTITAN else ("", COMPILE)
        suffixes = {first + second for first in ("", *recompute) for second in compiled}
        if not known or self.trainer.removeprefix(self.base) not in suffixes:
            choices = [
                f"{OURS}N[,cp=M][,tp=M][{SELECTIVE}|{FULL}][{COMPILE}]",
                *(f"{t}[{FULL}][{COMPILE}]" for t in TRANSFORMERS),
            ]
            raise ValueError(
                f"trainer={self.trainer!r} does not exist; choose one of {', '.join(choices)}, {TORCHTITAN}[{FULL}]."
            )
        if self.warmup < 1 or self.steps < 1:
            raise ValueError(f"warmup={self.warmup} and steps={self.steps} must both be at least 1.")
        if self.task not in ("train", "weights") or (self.task == "weights" and not self.ours):
            raise ValueError(
                f"task={self.task!r} of {self.trainer} does not exist; choose 'train', or 'weights' of {OURS}N."
            )
        if self.rehearse and not self.can_rehearse:
            raise ValueError(
                f"{self.label} cannot be rehearsed: train {OURS}N or {TRANSFORMERS[0]} with balanced routers."
            )

    @property
    def can_rehearse(self) -> bool:
        """Whether it runs without its peers: not with others' exchanges of tokens, nor where ranks get unequal rows."""
        alike = self.ranks > 1 and self.router == "balanced" and self.task == "train"
        return alike and (self.ours or self.base == TRANSFORMERS[0])

    @property
    def rehearsal(self) -> Cell:
        """The same cell, rehearsed."""
        return dataclasses.replace(self, rehearse=True)

    @property
    def processes(self) -> int:
        """Processes to start, one per GPU."""
        return 1 if self.rehearse else self.ranks

    @property
    def base(self) -> str:
        """The trainer without its suffixes."""
        return self.trainer.partition("+")[0]

    @property
    def ours(self) -> bool:
        """Whether it is no peer."""
        return _OURS.fullmatch(self.base) is not None

    @property
    def recompute(self) -> str:
        """``none``, ``selective`` or ``full``: what backward computes again."""
        return self.trainer.removesuffix(COMPILE).partition("+")[2] or "none"

    @property
    def compile(self) -> bool:
        """Whether decoder layers are compiled one by one (torchtitan's always are)."""
        return self.trainer.endswith(COMPILE)

    @property
    def ep(self) -> int:
        """Ranks over which the experts are split."""
        if ours := _OURS.fullmatch(self.base):
            return int(ours[1])
        return self.ranks if self.base in ("transformers/ep", TORCHTITAN) else 1

    @property
    def cp(self) -> int:
        """Ranks that split every sequence."""
        ours = _OURS.fullmatch(self.base)
        return int(ours[2] or 1) if ours else 1

    @property
    def tp(self) -> int:
        """Ranks that split attention and the vocabulary, and sequences between."""
        ours = _OURS.fullmatch(self.base)
        return int(ours[3] or 1) if ours else 1

    @property
    def tokens(self) -> int:
        """Distinct tokens per rank and step."""
        return self.batch * self.sequence // (self.cp * self.tp)

    @property
    def shape(self) -> str:
        """As on the command line, ``4x4096``."""
        return f"{self.batch}x{self.sequence}"

    @property
    def label(self) -> str:
        """What tells it from others of a run, on one line."""
        if self.task == "weights":
            return f"{self.trainer} weights"
        cap = "" if self.memory_cap_gib is None else f" {self.memory_cap_gib:g}GiB"
        alone = f", rank 0 of {self.ranks} rehearsed" if self.rehearse else ""
        return f"{self.trainer} {self.shape} {self.router}{cap}{alone}"

    @property
    def widths(self) -> Sizes:
        """The widths of the model."""
        return SIZES[self.sizes]

    @property
    def case(self) -> dict[str, Any]:
        """All but the trainer: cells of one case are compared with each other, so with recompute or without."""
        settings = {key: value for key, value in dataclasses.asdict(self).items() if key != "trainer"}
        return {**settings, "recompute": self.recompute != "none"}

    def config(self) -> Any:
        """The transformers configuration."""
        from transformers.models.qwen3_moe import Qwen3MoeConfig

        w = self.widths
        sizes: dict[str, Any] = {
            "vocab_size": w.vocab,
            "hidden_size": w.hidden,
            "intermediate_size": 3 * w.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": w.heads,
            "num_key_value_heads": w.kv_heads,
            "head_dim": w.head_dim,
            "moe_intermediate_size": w.moe_intermediate,
            "num_experts": w.experts,
            "num_experts_per_tok": w.top_k,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
            "max_position_embeddings": max(40_960, self.sequence),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        }
        return Qwen3MoeConfig(**sizes)


def parse_shape(text: str) -> tuple[int, int]:
    """``"4x4096"`` to (sequences, tokens per sequence)."""
    batch, _, sequence = text.partition("x")
    if not (batch.isdigit() and sequence.isdigit() and int(batch) > 0 and int(sequence) > 1):
        raise ValueError(f"{text!r} is no shape; write sequences x tokens per sequence, such as 4x4096.")
    return int(batch), int(sequence)


def default_trainers(ranks: int) -> list[str]:
    """Ours and the peers that this number of ranks allows."""
    ours = [f"{OURS}{ep}{suffix}" for ep in sorted({ranks, 1}, reverse=True) for suffix in (COMPILE, "")]
    if ranks == 1:
        return [*ours, f"transformers/fsdp2{COMPILE}", "transformers/fsdp2", "transformers/single", TORCHTITAN]
    return [*ours, f"transformers/fsdp2{COMPILE}", "transformers/fsdp2", "transformers/ep", TORCHTITAN]
