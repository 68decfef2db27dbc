"""Looks at a site that was built: no link or anchor leads nowhere, and every public name is in the reference.

python docs/_ext/check.py docs/_build/site
"""

from __future__ import annotations

import importlib
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

PUBLIC = (
    "lightning_ep",
    "lightning_ep.adapters",
    "lightning_ep.callbacks",
    "lightning_ep.data",
    "lightning_ep.routing",
)


class Page(HTMLParser):
    """Where a page leads, and the anchors on it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.add(value)
            if name in ("id", "name") and value:
                self.anchors.add(value)


def dead_links(site: Path) -> list[str]:
    """``page: link`` for what leads to no file of the site, or to no anchor of a page."""
    pages = {path.resolve(): Page(path.read_text()) for path in site.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = pages.get(target)
            if not target.exists() or (known and unquote(parts.fragment) not in known.anchors):
                dead.append(f"{path.relative_to(site.resolve())}: {link}")
    return sorted(dead)


def undocumented(site: Path) -> list[str]:
    """Public names that no page of the reference describes."""
    described = set().union(*(Page(path.read_text()).anchors for path in (site / "docs/reference/api").glob("*.html")))
    public = {
        f"{module.__name__}.{name}": vars(module)[name]
        for module in map(importlib.import_module, PUBLIC)
        for name in module.__all__
        if not name.endswith("__")
    }
    shown = [thing for name, thing in public.items() if name in described]
    return sorted(name for name, thing in public.items() if not any(thing is one for one in shown))


def main(site: Path) -> None:
    """Prints what is wrong, and ends with 1 where anything is."""
    wrong = [f"leads nowhere: {link}" for link in dead_links(site)]
    wrong += [f"not in the reference: {name}" for name in undocumented(site)]
    print("\n".join(wrong) or f"{len(list(site.rglob('*.html')))} pages; every link leads somewhere")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
