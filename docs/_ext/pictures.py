"""Draws the pictures of the site, light and dark: what expert parallelism is, and which rank holds what.

python docs/_ext/pictures.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lightning_ep.layout import ParallelLayout

DOCS = Path(__file__).parents[1]
RANKS = 8
EXPERTS = 128
# Okabe and Ito: told apart by every eye, on white and on black.
GPU_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


@dataclass(frozen=True)
class Theme:
    """Colours of paper and ink."""

    ink: str
    faint: str
    box: str


THEMES = {"light": Theme("#1f2328", "#8c959f", "#f6f8fa"), "dark": Theme("#e6edf3", "#7d8590", "#1c2128")}


def text(x: float, y: float, words: str, fill: str, size: int = 14, anchor: str = "middle", bold: bool = False) -> str:
    style = f'fill="{fill}" font-size="{size}" text-anchor="{anchor}"' + (' font-weight="600"' if bold else "")
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", radius: int = 6) -> str:
    size = f'width="{width:g}" height="{height:g}" rx="{radius}"'
    return f'<rect x="{x:g}" y="{y:g}" {size} fill="{fill}" stroke="{stroke}"/>'


def line(x: float, y: float, to_x: float, to_y: float, stroke: str, width: float = 2) -> str:
    middle = (y + to_y) / 2
    return (
        f'<path d="M{x:g} {y:g}C{x:g} {middle:g} {to_x:g} {middle:g} {to_x:g} {to_y:g}" fill="none" '
        f'stroke="{stroke}" stroke-width="{width:g}"/>'
    )


def svg(width: int, height: int, title: str, parts: Iterator[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'font-family="system-ui, sans-serif"><title>{escape(title)}</title>\n' + "\n".join(parts) + "\n</svg>\n"
    )


# Words of two batches, and which two of eight experts the router picks for each.
_WORDS = ((("The", 0, 5), ("cat", 2, 3), ("sat", 1, 6)), (("Two", 4, 7), ("plus", 6, 2), ("two", 5, 4)))


def expert_parallelism(theme: Theme) -> str:
    """One MoE layer on two GPUs: every token goes to the GPUs that have its experts, and its answers come home."""
    left, wide, gap = 186, 330, 30

    def start(gpu: int) -> float:
        return left + gpu * (wide + gap)

    def word_x(gpu: int, place: int) -> float:
        return start(gpu) + 65 + 100 * place

    def expert_x(expert: int) -> float:
        return start(expert // 4) + 48 + 78 * (expert % 4)

    def parts() -> Iterator[str]:
        steps = (
            (76, "1  a batch of its own", "on every GPU"),
            (122, "2  the router", "picks 2 of 8 experts"),
            (196, "3  tokens travel", "to their experts"),
            (262, "4  experts compute", "4 on each GPU"),
            (318, "5  answers travel home", "and are added up"),
        )
        for y, first, second in steps:
            yield text(6, y, first, theme.ink, 13, "start", bold=True)
            yield text(22, y + 16, second, theme.faint, 12, "start")
        for gpu in range(2):
            yield box(start(gpu), 10, wide, 350, theme.box, GPU_COLORS[gpu], 10)
            yield text(start(gpu) + wide / 2, 34, f"GPU {gpu}", GPU_COLORS[gpu], 15, bold=True)
            yield box(start(gpu) + 16, 108, wide - 32, 28, "none", theme.faint)
            yield text(start(gpu) + wide / 2, 127, "router", theme.faint, 13)
        for gpu, words in enumerate(_WORDS):
            for place, (_, *experts) in enumerate(words):
                x = word_x(gpu, place)
                yield line(x, 92, x, 108, GPU_COLORS[gpu])
                for expert in experts:
                    away = expert // 4 != gpu
                    yield line(x, 136, expert_x(expert), 236, GPU_COLORS[gpu], 3.5 if away else 1.5)
                    yield line(expert_x(expert), 276, x, 320, GPU_COLORS[gpu], 3.5 if away else 1.5)
        for expert in range(8):
            color = GPU_COLORS[expert // 4]
            yield box(expert_x(expert) - 33, 236, 66, 40, color)
            yield text(expert_x(expert), 261, f"expert {expert}", "#ffffff", 12, bold=True)
        for gpu, words in enumerate(_WORDS):
            for place, (word, *_) in enumerate(words):
                for y in (64, 320):
                    yield box(word_x(gpu, place) - 32, y, 64, 28, theme.box, GPU_COLORS[gpu], 14)
                    yield text(word_x(gpu, place), y + 19, word, theme.ink, 14)

    return svg(886, 372, "A mixture-of-experts layer under expert parallelism on two GPUs", parts())


def ranks(theme: Theme) -> str:
    """Eight GPUs by three layouts: whose experts, which groups, whose batch."""
    layouts = (
        ("ep=8: tokens travel among all", ParallelLayout(RANKS, ep=8)),
        ("ep=4, fsdp=2: each expert's matrices are shared by two GPUs", ParallelLayout(RANKS, ep=4, fsdp=2)),
        ("ep=4, fsdp=2, cp=2: two GPUs share a sequence", ParallelLayout(RANKS, ep=4, fsdp=2, cp=2)),
        ("ep=4, fsdp=2, tp=2: two GPUs share the matrices of attention", ParallelLayout(RANKS, ep=4, fsdp=2, tp=2)),
        ("ep=4, replicate=2: two copies, only gradients are shared", ParallelLayout(RANKS, ep=4, replicate=2)),
    )
    left, wide, row, panel = 92, 94, 24, 152

    def parts() -> Iterator[str]:
        for index, (title, layout) in enumerate(layouts):
            top = index * panel
            yield text(0, top + 18, title, theme.ink, 14, "start", bold=True)
            for name, y in (("GPU", 42), ("experts", 66), ("the rest", 90), ("batch", 114)):
                yield text(0, top + y, name, theme.faint, 13, "start")
            for rank in range(RANKS):
                yield from _rank(layout, rank, left + rank * wide, top, wide - 6, row, theme)

    return svg(left + RANKS * wide, panel * len(layouts) - 26, "Which of eight GPUs holds what", parts())


def _rank(
    layout: ParallelLayout, rank: int, x: float, top: float, width: float, row: int, theme: Theme
) -> Iterator[str]:
    place = layout.place(rank)
    each = EXPERTS // layout.ep
    middle = x + width / 2
    yield text(middle, top + 42, str(rank), theme.ink, 13)
    group = rank // layout.ep  # of EP
    yield box(x, top + 50, width, row - 2, GPU_COLORS[group])
    half = f" {'ab'[place.fsdp]}" if layout.fsdp > 1 else ""
    yield text(middle, top + 66, f"{place.ep * each}-{(place.ep + 1) * each - 1}{half}", "#ffffff", 12)
    parts = layout.shards // layout.tp
    piece = rank % layout.shards // layout.tp
    column = f", tp {place.tp}" if layout.tp > 1 else ""
    yield box(x, top + 74, width, row - 2, theme.box, theme.faint)
    yield text(middle, top + 90, f"{piece + 1} of {parts}{column}", theme.ink, 12)
    shared = GPU_COLORS[place.data] if layout.tp * layout.cp > 1 else theme.faint
    yield box(x, top + 98, width, row - 2, theme.box, shared)
    share = f" {('first', 'second')[place.cp]} half" if layout.cp > 1 else ""
    yield text(middle, top + 114, f"{place.data}{share}", theme.ink, 12)


PICTURES = {"start/expert_parallelism": expert_parallelism, "choose/ranks": ranks}


def files() -> dict[Path, str]:
    """What each file of a picture holds."""
    return {
        DOCS / f"{name}_{theme}.svg": draw(colors)
        for name, draw in PICTURES.items()
        for theme, colors in THEMES.items()
    }


if __name__ == "__main__":
    for path, content in files().items():
        path.write_text(content)
