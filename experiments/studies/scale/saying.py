"""The report's sentences: verdicts first, then the open checks, what is borderline or not testable, and the laws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.studies.scale.findings import FINDINGS
from experiments.studies.scale.runner import Measured
from experiments.studies.scale.saying_held_out import base_words, changed, interval_words, on_these, rule_words
from experiments.studies.scale.spec import ScaleSpec
from experiments.studies.scale.theory_says import theory_words
from experiments.studies.scale.training_table import say_choices
from experiments.studies.scale.verdicts import VERDICTS


def say(spec: ScaleSpec, measured: Measured, frames: Mapping[str, pd.DataFrame]) -> tuple[str, tuple[str, ...]]:
    """The main sentence of a report, and its further lines."""
    rows = frames["findings"]
    own = rows[rows["papers_own"] == "yes"]
    counts = counted(own["verdict"])
    merges = int((frames["score_points"]["kind"] == "merge").sum())
    lead = (
        f"Of the paper's five findings, here {counts} ({merges} merges in {len(measured.points)} cells, family "
        f"{spec.families[0].name})."
    )
    checks = frames["open_checks"]
    hardest = rows[rows["papers_own"] == "optimised multitask"]
    mine = hardest[hardest["scope"].str.startswith(f"{spec.families[0].name}:")]
    for row in mine.to_dict("records"):
        here = on_these(row)
        lead += f" Against an optimised multitask model finding 4 {_said(row)}: {number(row)} {row['unit']}"
        lead += f" ({here})." if here else "."
    lines = [
        f"{FINDINGS[row['finding']]} {row['scope']}: {number(row)} {row['unit']}, {_said(row)}{_beside(row)}."
        for row in own.to_dict("records")
    ]
    if words := base_words(frames["held_out_against_base"], spec):
        lines.append(words)
    if len(checks):
        part = checks[checks["check"] == "optimised multitask"]
        if len(part):
            lines.append(
                f"Open check, optimised multitask: {counted(part['verdict'])} (networks, scores and families together)"
                f"; on these held-out tasks as they are {counted(part['verdict_on_these_tasks'])}."
            )
        for name, what in (("barriers", "barriers against size"), ("flatness", "flatness against size")):
            part = checks[checks["check"] == name]
            if len(part):
                lines.append(f"Open check, {what}: {counted(part['verdict'])} (bases, measures and families together).")
    if words := say_choices(frames["multitask_choices"]):
        lines.append(words)
    other = rows[rows["papers_own"] == "other family"]
    for name in dict.fromkeys(f.name for f in spec.families[1:]):
        part = other[other["scope"].str.startswith(f"{name}:")]
        said = ", ".join(f"{str(r['finding'])[0]} {_said(r)}{changed(r)}" for r in part.to_dict("records"))
        if said:
            known = [r for r in part.to_dict("records") if np.isfinite(r["experts_accuracy"])]
            low = min((r["experts_accuracy"] for r in known), default=np.nan)
            about = f" Its poorest experts reach {low:.0%} on their own tasks." if np.isfinite(low) else ""
            lines.append(f"Open check, other family ({name}): {said}.{about}")
    if len(frames["account"]):
        lines.append(theory_words(frames["theory_says"]))
    lines += [interval_words(spec), rule_words(spec, rows)]
    if spec.scope:
        lines.append(spec.scope.strip())
    if measured.missing:
        lines.append(
            f"Not finished: {measured.done} of {measured.total} files; missing cells: "
            f"{', '.join(cell.folder for cell in measured.missing)}."
        )
    return lead, tuple(lines)


def counted(verdicts: pd.Series) -> str:
    """How many of each verdict, in words; agreement, disagreement and indecision are named even where there is none."""
    found = {name: int((verdicts == name).sum()) for name in VERDICTS}
    kept = [name for name in VERDICTS if found[name] or name in VERDICTS[:3]]
    words = {"agrees": "agree in direction", "disagrees": "disagree", "undecided": "undecided"}
    return ", ".join(f"{found[name]} {words.get(name, name)}" for name in kept)


def law_words(laws: pd.DataFrame, fits: pd.DataFrame | None = None) -> str:
    """Which comparisons of laws say something: a law that may only fall says nothing of a loss that rises.

    Args:
        laws: as :func:`experiments.studies.scale.laws.compared` gives it.
        fits: of the empirical law, as :func:`experiments.studies.scale.laws.fits` gives them: how many determine what.
    """
    if laws.empty:
        return ""
    parts = []
    for target, part in laws.groupby("target", sort=False):
        rising, later, cells = (int(part[name].iloc[0]) for name in ("rising", "rising_merges", "cells"))
        inner = part[part["held_out"] == "inner k"]
        errors = (inner if len(inner) else part).set_index("law")["error"]
        said = ", ".join(f"{law} {errors[law]:.3g}" for law in errors.index)
        words = (
            f"Target {target} ({said}): the loss at the largest k is above that at k = 1 in {rising} of {cells} cells, "
            f"and above that at the smallest k >= 2 in {later}."
        )
        if 2 * rising > cells:
            words += (
                " The empirical and the quadratic law have a >= 0 and can only fall: there they are about the "
                "constant, and a comparison with them is one-sided. It shows that the loss rises as the dispersion "
                "law allows, not that this law beats the empirical one."
            )
        else:
            names = errors.drop(labels=[n for n in ("constant",) if n in errors.index])
            words += (
                f" Here the empirical law can be judged: the smallest error is that of the {names.idxmin()} law. The "
                "dispersion law can only rise with k, so that on a falling loss it is the constant."
            )
            if later:
                words += (
                    f" In {later} of {cells} cells the fall is over once experts are merged: merges of the most lose "
                    "more than merges of the fewest, which no law with a >= 0 can follow."
                )
        if fits is not None and len(fits):
            words += f" {_identified_words(fits[fits['target'] == target])}"
        parts.append(words)
    return " ".join(parts)


def _identified_words(fits: pd.DataFrame) -> str:
    missing = [str(which).split() for which in fits["not_identified"]]
    said = ", ".join(f"{what} in {sum(name not in one for one in missing)}" for name, what in
                     (("floor", "l_inf"), ("tail", "a"), ("shift", "c")))  # fmt: skip
    return (
        f"Of {len(fits)} fits of the empirical law to all k, the points identify {said}; elsewhere the parameter lies "
        "on a bound, or its interval is wider than the range of the data."
    )


def _said(row: Mapping[Any, Any]) -> str:
    edge = row.get("borderline") == "yes" and row["verdict"] in ("agrees", "disagrees", "undecided")
    return f"{row['verdict']} (borderline)" if edge else str(row["verdict"])


def _beside(row: Mapping[Any, Any]) -> str:
    """The same effect on these held-out tasks and in plain accuracy, and the accuracies behind it."""
    parts = [here] if (here := on_these(row)) else []
    if np.isfinite(row["in_accuracy"]):
        plain = {name: row[f"in_accuracy{end}"] for name, end in (("effect", ""), ("effect_low", "_low"),
                                                                 ("effect_high", "_high"))}  # fmt: skip
        parts.append(f"in plain accuracy {number(plain)}, {row['verdict_in_accuracy']}")
    if np.isfinite(row["experts_accuracy"]):
        parts.append(f"poorest experts {row['experts_accuracy']:.0%}")
    if np.isfinite(row["held_out_accuracy"]):
        parts.append(f"poorest held-out score {row['held_out_accuracy']:.0%}")
    return f" ({'; '.join(parts)})" if parts else ""


def number(row: Mapping[Any, Any]) -> str:
    """An effect with its interval."""
    if not np.isfinite(row["effect"]):
        return "no value,"
    value = f"{row['effect']:+.3g}"
    if np.isfinite(row["effect_low"]) and np.isfinite(row["effect_high"]):
        return f"{value} [{row['effect_low']:+.3g}, {row['effect_high']:+.3g}]"
    return value
