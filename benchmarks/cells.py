"""One cell of the benchmark: what is trained, by whom, on which shape. A cell is also the key of its record."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

OURS = "lightning_ep/ep="
FSDP2, TRANSFORMERS_EP, TORCHTITAN = "transformers/fsdp2", "transformers/ep", "torchtitan/ep"
PEFT = "transformers/peft"
SELECTIVE, FULL, COMPILE = "+selective", "+full", "+compile"

_OURS = r"lightning_ep/ep=\d+(,cp=\d+)?(,tp=\d+)?"
_TRAINERS = (  # by pattern, as on the command line
    (rf"{_OURS}(\+selective|\+full)?(\+compile)?", f"{OURS}N[,cp=M][,tp=M][{SELECTIVE}|{FULL}][{COMPILE}]"),
    (r"transformers/(fsdp2|ep|peft)(\+full)?(\+compile)?", f"{FSDP2}|ep|peft[{FULL}][{COMPILE}]"),
    (rf"{TORCHTITAN}(\+full)?", f"{TORCHTITAN}[{FULL}]"),
)
TRAINERS = ", ".join(written for _, written in _TRAINERS)

SIZES: dict[str, dict[str, Any]] = {  # as transformers names them
    "qwen3-30b-a3b": {
        "hidden_size": 2048, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151_936,
    },
    "small": {
        "hidden_size": 512, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096,
    },
    "tiny": {
        "hidden_size": 32, "num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 512,
    },
}  # fmt: skip
DATA = RANDOM, CHATS, BOUNDARIES = "random", "chats", "boundaries"
EXCHANGES = COLLECTIVE, LEFT_OUT = "collective", "none"
# Fields that peers leave as they are.
_OF_OURS = ("data", "bf16_moments", "balanced", "accumulate", "exchange", "monitor", "tree")


@dataclass(frozen=True)
class Cell:
    """Everything that identifies a measurement: bf16 compute, AdamW, clipping at norm 1."""

    trainer: str  # one of TRAINERS: who shards, then what is recomputed and whether layers are compiled
    batch: int  # sequences per rank and step; with cp and tp the ranks that split sequences share them
    sequence: int  # tokens of each
    ranks: int  # processes, one per GPU
    sizes: str = "qwen3-30b-a3b"  # key into SIZES
    layers: int = 12
    steps: int = 30  # measured
    warmup: int = 5  # steps before them
    memory_cap_gib: float | None = None  # limit of torch's allocator per GPU
    # Adapters over frozen bf16 weights: "attention,16" (their rank), or, with experts, "all,8"; of ours and PEFT only.
    lora: str | None = None
    bf16_weights: bool = False  # and gradients and moments: ours rounds stochastically, peers to the nearest
    bf16_moments: bool = False  # beside fp32 weights, rounded stochastically; of ours only
    device: str = "cuda"
    data: str = RANDOM  # one document of random tokens per sequence, packed chats, or random tokens in place of those
    balanced: bool = False  # every expert gets equally many tokens, whatever its router says
    accumulate: int = 1  # micro-batches per step
    # How rows travel between ranks of experts: by all-to-all; left out, every rank takes its own.
    exchange: str = COLLECTIVE
    monitor: int = 0  # ExpertLoadMonitor looks at every so many steps; 0: there is none
    tree: str | None = None  # folder of another commit, whose lightning_ep runs in place of this one's
    turn: int = 0  # which of several runs, where two trees take turns

    def __post_init__(self) -> None:
        if not any(re.fullmatch(pattern, self.trainer) for pattern, _ in _TRAINERS):
            raise ValueError(f"trainer={self.trainer!r} does not exist; choose one of {TRAINERS}.")
        if min(self.warmup, self.steps, self.accumulate) < 1:
            numbers = f"warmup={self.warmup}, steps={self.steps} and accumulate={self.accumulate}"
            raise ValueError(f"{numbers} must all be at least 1.")
        if self.lora is not None and not re.fullmatch(r"(attention|all),[1-9]\d*", self.lora):
            raise ValueError(f"lora={self.lora!r} is neither attention,RANK nor all,RANK.")
        if self.exchange == LEFT_OUT and self.layout.get("cp", 1) > 1:
            raise ValueError(f"{self.trainer} exchanges parts of sequences too: only those of tokens can be left out.")
        if self.ours:
            return
        changed = [name for name in _OF_OURS if getattr(self, name) != getattr(Cell, name)]
        if changed:
            found = ", ".join(f"{name}={getattr(self, name)!r}" for name in changed)
            raise ValueError(f"{self.trainer} knows no {found}: only {OURS}N does.")
        if (self.base == PEFT) != (self.lora is not None):
            raise ValueError(f"{self.trainer}, lora={self.lora!r}: of the peers {PEFT} trains adapters, and only it.")

    @property
    def base(self) -> str:
        """The trainer without its suffixes."""
        return self.trainer.partition("+")[0]

    @property
    def ours(self) -> bool:
        """Whether it is no peer."""
        return self.base.startswith(OURS)

    @property
    def layout(self) -> dict[str, int]:
        """The sizes that its name gives, by the strategy's names; of peers none."""
        pairs = self.base.partition("/")[2].split(",") if self.ours else []
        return {name: int(size) for name, _, size in (pair.partition("=") for pair in pairs)}

    @property
    def recompute(self) -> str:
        """``none``, ``selective`` or ``full``: what backward computes again."""
        return self.trainer.removesuffix(COMPILE).partition("+")[2] or "none"

    @property
    def compile(self) -> bool:
        """Whether decoder layers are compiled one by one (torchtitan's always are)."""
        return self.trainer.endswith(COMPILE)

    @property
    def sharing(self) -> int:
        """Ranks that share the tokens of ``batch`` sequences."""
        return self.layout.get("cp", 1) * self.layout.get("tp", 1)

    @property
    def tokens(self) -> int:
        """Distinct tokens per rank and step."""
        return self.accumulate * self.batch * self.sequence // self.sharing

    @property
    def shape(self) -> str:
        """What it computes per GPU, in short: ``4x4096``, and what differs from the default."""
        more = {
            self.data: self.data != RANDOM,
            "balanced": self.balanced,
            f"{self.accumulate} micro-batches": self.accumulate > 1,
            "no exchange": self.exchange == LEFT_OUT,
            f"monitor of every {self.monitor}": self.monitor,
            f"{self.memory_cap_gib or 0:g} GiB": self.memory_cap_gib is not None,
            "bf16 weights": self.bf16_weights,
            "bf16 moments": self.bf16_moments,
            f"LoRA {(self.lora or '').replace(',', ' r=')}": self.lora is not None,
        }
        return ", ".join([f"{self.batch}x{self.sequence}", *(name for name, differs in more.items() if differs)])

    @property
    def label(self) -> str:
        """What tells it from others of a run, on one line."""
        turn = f", turn {self.turn} with {self.tree or 'this tree'}" if self.tree or self.turn else ""
        return f"{self.trainer} {self.shape}{turn}"

    def config(self) -> Any:
        """The transformers configuration."""
        return model_config(self.sizes, self.layers, max(40_960, self.sequence))

    def in_turns(self, tree: str) -> list[Cell]:
        """Itself on another commit's tree and on this one, twice each, so that neither gets the warmer machine."""
        return [dataclasses.replace(self, tree=t, turn=i) for i, t in enumerate((tree, None, None, tree))]


def model_config(sizes: str, layers: int, positions: int = 40_960) -> Any:
    """The transformers configuration of a Qwen3-MoE, by a key into `SIZES`, its depth and longest sequence."""
    from transformers.models.qwen3_moe import Qwen3MoeConfig

    return Qwen3MoeConfig(
        **SIZES[sizes], intermediate_size=3 * SIZES[sizes]["hidden_size"],
        num_hidden_layers=layers, norm_topk_prob=True, tie_word_embeddings=False, max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip


def parse_shape(text: str) -> tuple[int, int]:
    """``"4x4096"`` to (sequences, tokens per sequence)."""
    batch, _, sequence = text.partition("x")
    if not (batch.isdigit() and sequence.isdigit() and int(batch) > 0 and int(sequence) > 1):
        raise ValueError(f"{text!r} is no shape; write sequences x tokens per sequence, such as 4x4096.")
    return int(batch), int(sequence)


def default_trainers(ranks: int, peers: bool = True) -> list[str]:
    """Ours, and the peers that this number of ranks allows, compiled."""
    ours = [f"{OURS}{ep}{COMPILE}" for ep in sorted({ranks, 1}, reverse=True)]
    others = [FSDP2 + COMPILE, *([TRANSFORMERS_EP + COMPILE] if ranks > 1 else []), TORCHTITAN]
    return [*ours, *others] if peers else ours
