"""Sentences about held-out measures: these tasks and tasks in general, the rules, and merging against the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.studies.scale.findings import seeds_words
from experiments.studies.scale.spec import ScaleSpec
from experiments.studies.scale.verdicts import ADDED


def between(low: float, high: float, form: str = "+.3g") -> str:
    """An interval; a word where it has no limits."""
    return f"[{low:{form}}, {high:{form}}]" if np.isfinite(low) and np.isfinite(high) else "no interval"


def on_these(row: Mapping[Any, Any]) -> str:
    """What a row of the findings says of the held-out tasks as they are; empty where it is not about held-out tasks."""
    tasks = int(row.get("held_out_tasks") or 0)
    if not tasks or not np.isfinite(row["on_these_tasks"]):
        return ""
    named = "this held-out task as it is" if tasks == 1 else f"these {tasks} held-out tasks as they are"
    said = f"{between(row['on_these_tasks_low'], row['on_these_tasks_high'])}, {row['verdict_on_these_tasks']}"
    return f"on {named} {said}"


def changed(row: Mapping[Any, Any]) -> str:
    """The verdict on these held-out tasks where it is another one, in brackets."""
    said = str(row.get("verdict_on_these_tasks") or "")
    return f" ({said} on these held-out tasks)" if said and said != row["verdict"] else ""


def interval_words(spec: ScaleSpec) -> str:
    """What the intervals of a report are over."""
    tasks = len(spec.held_out)
    general = (
        "with one held-out task nothing is said of others, and such an effect is undecided"
        if tasks == 1
        else f"the interval of what is measured on held-out tasks is the hull of that one, in which the {tasks} tasks "
        f"stay as they are, and the t interval with the {tasks} tasks as units ({tasks - 1} "
        f"{'degree' if tasks == 2 else 'degrees'} of freedom): its verdict is for held-out tasks in general"
    )
    return f"Intervals: 95 %, over merged tasks and test images, {seeds_words(spec)}; {general}."


def rule_words(spec: ScaleSpec, findings: pd.DataFrame) -> str:
    """The rule of the verdicts, as far as it could be applied, and when its parts were added."""
    chance, outside = findings["chance"].dropna(), findings["held_out_chance"].dropna()
    times = spec.rule.chance_times
    parts = []
    if len(chance):
        parts.append(
            f"where the 95 % interval of the experts' own accuracy does not lie above {times:g} times chance "
            f"({chance.iloc[0]:.3g}) on every side of a comparison"
        )
    if len(outside):
        parts.append(
            f"where, for a held-out measure, that of the held-out accuracy of what is compared (base and merges, or "
            f"merges and multitask model; the held-out tasks as they are) does not lie above {times:g} times chance "
            f"({outside.iloc[0]:.3g})"
        )
    tested = "'not testable' " + ", or ".join(parts) if parts else ""
    if not len(chance):
        unknown = "chance on held-in tasks is not known here (the experts' stores are missing), so that no experts are"
        tested = f"{unknown} called too near to it{'; ' if tested else ''}{tested}"
    return (
        f"Rule: {tested}; 'borderline' where an end of the interval is closer to zero than "
        f"{spec.rule.borderline:.0%} of its width. {ADDED}"
    )


def base_words(against: pd.DataFrame, spec: ScaleSpec) -> str:
    """Merged models of every family's strongest base and largest network against that base on held-out tasks."""
    if against.empty:
        return ""
    parts = []
    for family in spec.families:
        base = spec.bases_of(family)[-1]
        own = against[
            (against["family"] == family.name) & (against["base"] == base)
            & (against["measure"] == f"held_out/{spec.transfers[0]}")
        ]  # fmt: skip
        if own.empty:
            continue
        row = own.sort_values("parameters").iloc[-1]
        here = between(row["on_these_tasks_low"], row["on_these_tasks_high"], ".3g")
        general = between(row["value_low"], row["value_high"], ".3g")
        verdict = {"below the base": "merging loses to the untouched base", "above the base":
                   "merging beats the untouched base"}  # fmt: skip
        said = verdict.get(row["merging_on_these_tasks"], "undecided")
        wide = verdict.get(row["merging"], "undecided")
        parts.append(
            f"{row['architecture']} ({base} base) {row['value']:.3g}, on these {int(row['held_out_tasks'])} held-out "
            f"tasks as they are {here}: {said}; for held-out tasks in general {general}: {wide}"
        )
    return (
        "Merging against no training at all (held-out accuracy of merged models over that of their base, mean over all "
        f"groups and methods, largest network of each family): {'. '.join(parts)}."
        if parts
        else ""
    )
