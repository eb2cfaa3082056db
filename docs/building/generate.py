"""Pages that are made from the code when the site is built: formulas, proofs, methods, commands, the interface."""

from __future__ import annotations

from pathlib import Path

from docs.building.api_pages import api_pages
from docs.building.command_pages import command_pages
from docs.building.method_pages import method_pages
from docs.building.theory_pages import theory_pages


def write_pages(folder: Path) -> list[Path]:
    """Write all pages below ``folder`` and remove older ones there; files whose text is the same are left alone."""
    wanted: dict[Path, str] = {}
    made = {"theory": theory_pages, "methods": method_pages, "commands": command_pages, "api": api_pages}
    for name, make in made.items():
        wanted |= {folder / name / path: text for path, text in make().items()}
    for path in sorted(folder.rglob("*.md")):
        if path not in wanted and "gallery" not in path.relative_to(folder).parts:
            path.unlink()
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    return sorted(wanted)


def toctree(names: list[str], depth: int = 1, hidden: bool = False) -> str:
    """A table of contents in MyST."""
    options = [f":maxdepth: {depth}", *([":hidden:"] if hidden else [])]
    return "\n".join(["```{toctree}", *options, "", *names, "```", ""])
