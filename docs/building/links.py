"""Check the finished site: every internal link leads to a page that exists and, where it names one, to an anchor in it.

``python docs/building/links.py out/docs`` lists what does not, and ends with code 1.  Links to other
sites are not tried.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """Links and anchors of one page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif value and ((name == "href" and tag in ("a", "link")) or name == "src"):
                self.links.append(value)


def read(path: Path) -> _Page:
    """Parse one page."""
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def dead(site: Path) -> Iterator[str]:
    """What does not lead anywhere, one line each."""
    site = site.resolve()
    pages = {path: read(path) for path in sorted(site.rglob("*.html")) if "_static" not in path.parts}
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            where = path.relative_to(site)
            if not target.is_file():
                yield f"{where}: {link}: there is no such file"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{where}: {link}: there is no such anchor"


if __name__ == "__main__":
    found = list(dict.fromkeys(dead(Path(sys.argv[1]))))
    print("\n".join(found) or "every internal link leads somewhere")
    sys.exit(bool(found))
