"""Self-contained HTML pages: summary, tables, figures, how to reproduce.

A page needs no network: style is inline, figures are inline SVG.  Next to it tables lie as CSV and figures as PNG and
SVG.  Every file is written atomically.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from experiments import plots
from experiments.atomic import write_atomically
from experiments.validation import readable

Columns = Mapping[str, str]

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #5d5d63; --paper: #ffffff; --line: #d8d8dc; --tint: #f4f4f6;
  --accent: #0072B2; --bad: #b34700; --good: #00704f; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --soft: #a5a5ad; --paper: #17181b; --line: #3a3b40;
  --tint: #222328; --accent: #6db9ec; --bad: #ff9b57; --good: #4fd0a5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.2rem 4rem; max-width: 74rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6rem; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; } p { max-width: 52rem; } a { color: var(--accent); }
.summary { background: var(--tint); border-left: 4px solid var(--accent); padding: .9rem 1.2rem; border-radius: 4px; }
.summary li { margin: .35rem 0; max-width: 62rem; } .lead { font-size: 1.1rem; margin: .2rem 0 .6rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
th.text, td.text { text-align: left; } td.free { white-space: normal; min-width: 14rem; }
tr.new td { border-top: 2px solid var(--line); } .ci { color: var(--soft); font-size: .88em; }
.yes { color: var(--good); font-weight: 600; } .no { color: var(--bad); font-weight: 600; }
figure { margin: 1.6rem 0 2.2rem; } .paper { background: #fff; border: 1px solid var(--line); border-radius: 6px;
  padding: .6rem; } figure svg { display: block; width: 100%; height: auto; max-height: 120vh; }
figcaption, .note { color: var(--soft); font-size: .9rem; margin-top: .5rem; max-width: 58rem; }
code, pre { font: .88em ui-monospace, Menlo, Consolas, monospace; } pre { background: var(--tint); padding: .8rem 1rem;
  border-radius: 4px; overflow-x: auto; } details summary { cursor: pointer; color: var(--accent); margin: .6rem 0; }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; } figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; } .wide { overflow: visible; } table { font-size: 6.5pt; } th, td { padding: 1pt 3pt; } }
"""

_WORDS = frozenset(
    [
        "Regime",
        "Architecture",
        "Predictor",
        "Kind",
        "Tier",
        "Method",
        "Aim",
        "Theory",
        "Target",
        "Assumption",
        "Verdict",
        "Why",
        "Judged on half",
        "Met",
        "File",
        "Version",
        "Chosen or fitted on the other half",
        "Package",
        "SHA-256",
        "Name",
        "Value",
    ]
)


def escape(value: object) -> str:
    """Text for HTML."""
    return html.escape(str(value), quote=True)


def _td(name: str, text: str) -> str:
    classes = ["text"] if name in _WORDS else []
    if name in ("Why", "Assumption", "Aim", "Theory"):
        classes.append("free")
    body = escape(text)
    body = re.sub(r" (\[[^\]]*\])$", r' <span class="ci">\1</span>', body)
    good, bad = ("yes", "holds", "met"), ("no", "violated", "not met")
    if name in ("Met", "Verdict"):
        first = text.lower().strip()
        classes += ["yes"] if first in good else ["no"] if first in bad else []
    return f'<td class="{" ".join(classes)}">{body}</td>' if classes else f"<td>{body}</td>"


def html_table(table: pd.DataFrame, columns: Columns | None = None, digits: int = 3) -> str:
    """An HTML table of ``table`` through :func:`experiments.validation.readable`; a rule separates the settings."""
    shown = table.copy()
    for name in ("architecture", "predictor", "method", "chosen"):
        if name in shown:
            shown[name] = [plots.pretty(value) for value in shown[name]]
    text = readable(shown, columns, digits)
    text = text.loc[:, [name for name in text.columns if name in _WORDS or not (text[name] == "–").all()]]
    head = "".join(f'<th class="{"text" if name in _WORDS else "num"}">{escape(name)}</th>' for name in text.columns)
    body, previous = [], None
    marks = [name for name in ("Regime", "Architecture", "N") if name in text.columns]
    for values in text.to_dict("records"):
        mark = tuple(values[name] for name in marks)
        row = "".join(_td(str(name), str(value)) for name, value in values.items())
        body.append(f'<tr class="{"new" if marks and mark != previous else "same"}">{row}</tr>')
        previous = mark
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def inline_svg(svg: bytes, prefix: str) -> str:
    """An SVG document as an element for HTML.

    No prologue, metadata or namespaces, identifiers made unique by ``prefix``.
    """
    text = svg.decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    text = re.sub(r"^<svg ", '<svg role="img" ', text)
    return re.sub(r"\n\s*", "\n", text).strip()


def section(title: str, body: str, note: str = "") -> str:
    """A heading with a note and a body; nothing where the body is empty."""
    if not body:
        return ""
    about = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<h2>{escape(title)}</h2>{about}{body}"


def assumptions_table(items: Sequence[Sequence[object]]) -> str:
    """A table of (assumption, verdict, why)."""
    if not items:
        return ""
    frame = pd.DataFrame([[str(part) for part in item[:3]] for item in items], columns=["Assumption", "Verdict", "Why"])
    return html_table(frame)


def reproduce(meta: Mapping[str, Any]) -> str:
    """Command, seed, versions, hashes and settings, as far as ``meta`` has them under these names."""
    parts = []
    if meta.get("command"):
        parts.append(f"<pre>{escape(meta['command'])}</pre>")
    if meta.get("seed") is not None:
        parts.append(f"<p>Seed {escape(meta['seed'])}. The same seed and versions give the same numbers.</p>")
    for key, title, columns in (
        ("versions", "Versions", ("Package", "Version")),
        ("hashes", "Hashes", ("File", "SHA-256")),
        ("settings", "Settings", ("Name", "Value")),
    ):
        values = meta.get(key)
        if values:
            frame = pd.DataFrame([[str(a), str(b)] for a, b in dict(values).items()], columns=list(columns))
            parts.append(f"<h3>{title}</h3>{html_table(frame)}")
    return "".join(parts)


def figure_html(name: str, picture: plots.Picture, svg: bytes | None = None) -> str:
    """A figure with its caption; ``svg`` where it is rendered already."""
    drawing = inline_svg(svg or plots.svg_bytes(picture.figure), name.replace("_", "-"))
    return (
        f'<figure id="{escape(name)}"><div class="paper">{drawing}</div>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def document(title: str, sections: Sequence[str]) -> str:
    """A whole HTML document of sections that are not empty."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in sections if part)
        + "\n</body>\n</html>\n"
    )


def summary_box(title: str, lead: str, lines: Sequence[str]) -> str:
    """The top of a page: its title, the main sentence, and further ones."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    box = f'<div class="summary"><p class="lead">{escape(lead)}</p><ul>{items}</ul></div>'
    return f"<h1>{escape(title)}</h1>{box}"


@dataclass(frozen=True)
class Section:
    """One section of a study's page.

    Attributes:
        title: heading.
        note: what the tables and figures mean, a few sentences.
        tables: by file name (without ending): written as CSV and printed.
        columns: headings of columns, by table; columns without one are hidden; a table that is not named prints all.
        figures: by file name.
        skipped: figures that could not be drawn, and why.
    """

    title: str
    note: str = ""
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    columns: Mapping[str, Columns] = field(default_factory=dict)
    figures: Mapping[str, plots.Picture] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """A study's report.

    Attributes:
        title: of the page.
        lead: the main result in one sentence.
        lines: further results.
        sections: in order.
        assumptions: (assumption, verdict, why).
        meta: ``command``, ``seed``, ``versions``, ``hashes``, ``settings``: how to reproduce.
        data: further tables that are written as CSV and not printed.
    """

    title: str
    lead: str
    lines: tuple[str, ...]
    sections: tuple[Section, ...]
    assumptions: tuple[tuple[str, str, str], ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, pd.DataFrame] = field(default_factory=dict)


def render_page(page: Page, svgs: Mapping[str, bytes] | None = None) -> str:
    """The page as one HTML string; ``svgs``: figures that are rendered already."""
    ready = svgs or {}
    parts = [summary_box(page.title, page.lead, page.lines)]
    for one in page.sections:
        tables = "".join(html_table(t, one.columns.get(name)) for name, t in one.tables.items() if len(t))
        figures = "".join(figure_html(name, picture, ready.get(name)) for name, picture in one.figures.items())
        missing = "".join(f'<p class="note">{escape(f"Not drawn: {n}: {w}")}</p>' for n, w in one.skipped.items())
        parts.append(section(one.title, tables + figures + missing, one.note))
    parts.append(section("Assumptions", assumptions_table(page.assumptions)))
    parts.append(section("How to reproduce", reproduce(page.meta)))
    return document(page.title, parts)


def write_page(out: Path | str, page: Page, name: str = "report.html") -> Path:
    """Write the page, its tables as CSV, and its figures as PNG and SVG below ``figures``; returns the page's path."""
    folder = Path(out)
    tables = {**page.data, **{n: t for one in page.sections for n, t in one.tables.items()}}
    for label, table in tables.items():
        if len(table):
            write_atomically(folder / f"{label}.csv", table.to_csv(index=False).encode())
    svgs = {}
    for one in page.sections:
        for label, picture in one.figures.items():
            svgs[label] = plots.svg_bytes(picture.figure)
            write_atomically(folder / "figures" / f"{label}.svg", svgs[label])
            write_atomically(folder / "figures" / f"{label}.png", plots.png_bytes(picture.figure))
    return write_atomically(folder / name, render_page(page, svgs).encode())
