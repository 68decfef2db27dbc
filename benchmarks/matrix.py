"""The named cells of one node, and what others published for the same model."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.cells import COMPILE, FULL, OURS, TRANSFORMERS, Cell, parse_shape

# Few steps, so that about seven cells of full depth fit into nine minutes. The first step compiles, the second does so
# again without the counters of the first, and two more settle the allocator.
_STEPS, _WARMUP = 8, 4
_SHORTER = 256  # sequences of the tiny model, which is for trying the command itself


class Mark(NamedTuple):
    """A published rate of Qwen3-30B-A3B, measured by others on other hardware."""

    who: str
    hardware: str
    setting: str
    tokens_per_second: float


MARKS = (
    Mark("NeMo Automodel", "8 x H100", "48 layers, 4,096 tokens, full recompute, balanced routing", 12_040),
    Mark("Megatron-Bridge", "16 x H100", "48 layers, 4,096 tokens", 13_011),
)


def node_matrix(
    ranks: int = 8, layers: int = 48, sizes: str = "qwen3-30b-a3b", device: str = "cuda"
) -> dict[str, Cell]:
    """At most 16 cells by name, most informative first.

    Peers are compiled, and recompute where they would not fit otherwise at full depth on 8 GPUs: transformers keeps
    2.2 GiB per layer at 16,384 tokens (91.5 and 78.4 GiB without and with recompute, 6 layers on one H200).

    Args:
        ranks: GPUs; 8 stands for all of them in the names.
        layers: Depth.
        sizes: Key into `benchmarks.cells.SIZES`; ``tiny`` has shorter sequences, too.
        device: ``cuda`` or ``cpu``, where nothing is compiled.
    """

    def cell(trainer: str, shape: str = "4x4096", **settings: Any) -> Cell:
        batch, sequence = parse_shape(shape)
        return Cell(
            trainer + (COMPILE if device == "cuda" and settings.get("task") != "weights" else ""),
            batch,
            sequence // _SHORTER if sizes == "tiny" else sequence,
            ranks,
            sizes,
            layers,
            steps=_STEPS,
            warmup=_WARMUP,
            device=device,
            **settings,
        )

    every, one = f"{OURS}{ranks}", f"{OURS}1"
    fsdp2, exchange, _ = TRANSFORMERS
    between = [ep for ep in (2, 4) if ep < ranks and ranks % ep == 0]
    peer_ep = {f"transformers EP={ranks}, full recompute": cell(exchange + FULL)} if ranks > 1 else {}
    return {
        f"ep={ranks}, full recompute": cell(every + FULL),
        "transformers FSDP2, full recompute": cell(fsdp2 + FULL),
        f"ep={ranks}": cell(every),
        "ep=1": cell(one),
        "ep=1, full recompute": cell(one + FULL),
        **peer_ep,
        **{f"ep={ep}": cell(f"{OURS}{ep}") for ep in between},
        f"ep={ranks}, 1 x 4096": cell(every, "1x4096"),
        f"ep={ranks}, 1 x 16384": cell(every, "1x16384"),
        f"ep={ranks}, 1 x 32768, full recompute": cell(every + FULL, "1x32768"),
        f"ep={ranks}, skewed router, full recompute": cell(every + FULL, router="skewed"),
        f"ep={ranks}, 76 GiB, full recompute": cell(every + FULL, memory_cap_gib=76.0),
        "transformers FSDP2, 1 x 4096": cell(fsdp2, "1x4096"),
        "transformers FSDP2, 1 x 16384, full recompute": cell(fsdp2 + FULL, "1x16384"),
        f"weights saved and loaded, ep={ranks}": cell(every, task="weights"),
    }
