"""Tables in Markdown."""

from __future__ import annotations


def lines(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table."""
    all_rows = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in all_rows]
