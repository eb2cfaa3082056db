"""Verdicts as one HTML page."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.measure.verdicts.result import Verdicts

if TYPE_CHECKING:
    from experiments.page import Page

_ASSUMPTIONS = {
    "about": "Of", "name": "Section", "assumption": "Assumption", "verdict": "Verdict", "seen": "Numbers say",
    "why": "Why", "evidence": "Evidence", "remedy": "Aim",
}  # fmt: skip
_STATEMENTS = {
    "about": "Of", "statement": "Name", "bounds": "Target", "standing": "Verdict", "tier": "Tier", "broken": "Why",
    "open": "Open", "covered": "Covered", "measured": "Measured",
}  # fmt: skip
_EVIDENCE = {"about": "Of", "key": "Name", "name": "What", "value": "Value", "covers": "Covers", "tier": "Tier"}
_COSINES = {"first": "Expert", "second": "Other", "value": "Cosine", "null": "Null deviation", "z": "z",
            "chance": "Chance", "units": "Units"}  # fmt: skip


def headline(found: Verdicts) -> str:
    """How many statements hold, are open and are broken, in one sentence."""
    count = Counter(item.standing for item in found.judged)
    experts = f"{len(found.names)} expert{'s' if len(found.names) != 1 else ''}"
    return (
        f"{experts}: of {len(found.judged)} statements {count['holds']} hold, {count['open']} are open (an assumption "
        f"is not decided) and {count['broken']} are broken (an assumption is violated)"
    )


def lines_of(found: Verdicts) -> tuple[str, ...]:
    """One sentence per violated assumption that nothing covers, experts together, then how to read the tables."""
    groups: dict[tuple[str, str], list[str]] = {}
    for item in found.findings:
        if item.verdict == "violated" and not item.covered:
            text = f"{item.assumption.statement}: violated, {item.assumption.why}"
            groups.setdefault((item.key, text), []).append(item.about)
    lines = [f"{text} ({', '.join(owners)})" for (_, text), owners in groups.items()]
    lines.append(
        "'holds' is a theorem, an exact count, or a stated constant that nothing measured contradicts; numbers at "
        "points refute and never prove, so that what they do not refute is 'unknown', with what they say beside it"
    )
    return tuple(lines)


def page_of(found: Verdicts, *, command: str = "", title: str = "Does the theory apply?") -> Page:
    """The page, for :func:`experiments.page.write_page`."""
    from experiments.page import Page, Section

    evidence = found.evidence_frame().rename(columns={"low": "value_low", "high": "value_high"})
    cosines = found.cosines_frame().rename(columns={"low": "value_low", "high": "value_high"})
    sections = [
        Section(
            "Statements",
            "Each theorem and form with what the verdicts make of it. Open: no assumption is violated, some are not "
            "decided. Broken: the number that the formula gives is no bound. The tier is what theory.assumptions."
            "tier_of says.",
            {"summary_of_statements": found.summary("statements")},
            {"summary_of_statements": _STATEMENTS},
        ),
        Section(
            "Assumptions",
            "Of every expert, and of the merge. Section: where the theory asks for it.",
            {"assumptions": found.to_frame()},
            {"assumptions": _ASSUMPTIONS},
        ),
        Section("Evidence", "Numbers behind the verdicts, with intervals.", {"evidence": evidence},
                {"evidence": _EVIDENCE}),
    ]  # fmt: skip
    if len(cosines):
        note = "Null deviation: of the cosine if the products of units had random signs; chance: Hoeffding's bound."
        sections.append(Section("Task vectors", note, {"cosines": cosines}, {"cosines": _COSINES}))
    meta: dict[str, Any] = {"seed": found.seed}
    if command:
        meta["command"] = command
    return Page(title, headline(found), (*lines_of(found), *found.notes), tuple(sections), meta=meta,
                data={"statements": found.statements_frame()})  # fmt: skip


def write(found: Verdicts, out: Path, *, command: str = "") -> Path:
    """Write ``verdicts.html`` and its tables (CSV) to a folder; returns the page's path."""
    from experiments.page import write_page

    return write_page(out, page_of(found, command=command), "verdicts.html")
