"""A figure with its caption, and files of it whose bytes depend on the drawing only."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure


class Picture(NamedTuple):
    """A figure and the sentence printed under it."""

    figure: Figure
    caption: str


def save_svg(figure: Figure, path: Path | str) -> Path:
    """Write ``figure`` as SVG; the bytes depend on the drawing only (no date, no random identifiers)."""
    target = Path(path)
    target.write_bytes(svg_bytes(figure))
    return target


def svg_bytes(figure: Figure) -> bytes:
    """``figure`` as deterministic SVG."""
    return _render(figure, "svg", {"Date": None, "Creator": None})


def save_png(figure: Figure, path: Path | str, dpi: int = 150) -> Path:
    """Write ``figure`` as PNG without software metadata."""
    target = Path(path)
    target.write_bytes(png_bytes(figure, dpi))
    return target


def png_bytes(figure: Figure, dpi: int = 150) -> bytes:
    """``figure`` as PNG without software metadata."""
    return _render(figure, "png", {"Software": None}, dpi)


def _render(figure: Figure, kind: str, metadata: dict[str, Any], dpi: int = 150) -> bytes:
    buffer = io.BytesIO()
    if figure.get_layout_engine() is not None:  # solve the layout once, not at every rendering
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    with mpl.rc_context({"svg.hashsalt": "mergebound", "svg.fonttype": "path"}):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata, facecolor="white")
    return buffer.getvalue()
