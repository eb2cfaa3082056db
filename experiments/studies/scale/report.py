"""The report of a study of scale: tables, figures, verdicts and how to reproduce, as one page with CSV beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from experiments.atomic import write_atomically
from experiments.page import Page, Section, write_page
from experiments.plots import Picture
from experiments.studies.scale import figures
from experiments.studies.scale.account import account_table, along_table
from experiments.studies.scale.checks import CHECKS, open_checks
from experiments.studies.scale.effects import RESAMPLES, Table, table_of
from experiments.studies.scale.findings import Chance, findings_table
from experiments.studies.scale.laws import compared, curves, fits, identified, judged
from experiments.studies.scale.over_tasks import against_base, summary
from experiments.studies.scale.runner import Measured
from experiments.studies.scale.saying import law_words, say
from experiments.studies.scale.scores_table import images_table, score_points, scores_table
from experiments.studies.scale.spec import ScaleSpec
from experiments.studies.scale.theory_says import moving_words, says_table, theory_lines
from experiments.studies.scale.training_table import choices, with_stops
from experiments.studies.scale.verdicts import classes_named, mean_chance
from experiments.validation import to_markdown


@dataclass(frozen=True, eq=False)
class Tables:
    """All tables of a report, by name, and the summaries that the figures are drawn from."""

    frames: Mapping[str, pd.DataFrame]
    by_base: pd.DataFrame
    by_number: pd.DataFrame
    by_method: pd.DataFrame
    table: Table


def make_tables(spec: ScaleSpec, measured: Measured, resamples: int = RESAMPLES) -> Tables:
    """Every table of a study.

    Args:
        spec: the study.
        measured: what is finished of it.
        resamples: of the test images.
    """
    table = table_of(measured, resamples, spec.seed)
    merges = table.where(kind="merge")
    main = ["held_in", "held_in_accuracy", *(f"held_out/{t}" for t in spec.transfers)]
    cell = ["family", "architecture", "parameters", "base"]
    found = curves(table, spec)
    held = judged(found, spec)
    outside = {task: classes_named(task) for task in spec.held_out}
    chance = Chance(mean_chance(measured.classes, spec.held_in), mean_chance(outside, spec.held_out))
    findings = findings_table(table, spec, chance)
    by_base = summary(merges, cell, main, seed=spec.seed)
    by_number = summary(merges, [*cell, "experts", "method"], main, seed=spec.seed)
    training = with_stops(measured.multitask, spec)
    account = account_table(measured.terms, spec)
    frames = {
        "findings": findings,
        "open_checks": open_checks(findings, measured.shape, spec),
        "account": account,
        "theory_says": says_table(account, findings, spec),
        "terms_and_loss": along_table(measured.terms, table, spec),
        "laws": compared(held, found, spec),
        "law_fits": fits(found, spec) if len(found) else pd.DataFrame(),
        "law_predictions": held,
        "law_losses": found,
        "means": by_number,
        "held_out_against_base": against_base(by_base),
        "baselines": summary(
            table.where(kind=["base", "expert", "multitask_fixed", "multitask_optimised"]), [*cell, "kind"],
            ["held_in", "held_in_accuracy", *(f"held_out_accuracy/{t}" for t in spec.transfers),
             *(f"held_out/{t}" for t in spec.transfers)], seed=spec.seed,
        ),
        "multitask_choices": choices(training, spec),
        "multitask_training": training,
        "shape": measured.shape,
        "terms": measured.terms,
        "cells": measured.about,
        "points": table.rows,
        "score_points": score_points(measured),
        "scores": scores_table(measured),
        "test_images": images_table(measured),
    }  # fmt: skip
    return Tables(
        frames,
        by_base,
        by_number,
        summary(merges, [*cell, "method"], main, seed=spec.seed),
        table,
    )


def write_report(
    spec: ScaleSpec,
    measured: Measured,
    out: Path,
    *,
    command: str = "",
    versions: Mapping[str, str] | None = None,
    resamples: int = RESAMPLES,
) -> Tables:
    """Write ``report.html``, ``README.md``, a CSV for every table, and the figures; returns the tables."""
    tables = make_tables(spec, measured, resamples)
    page = make_page(spec, measured, tables, command, versions or {})
    write_page(out, page)
    pictures = {name: picture.caption for section in page.sections for name, picture in section.figures.items()}
    write_atomically(out / "README.md", readme(spec, measured, tables, command, pictures).encode())
    return tables


def readme(
    spec: ScaleSpec, measured: Measured, tables: Tables, command: str = "", pictures: Mapping[str, str] | None = None
) -> str:
    """The verdicts as Markdown: what the documentation shows of a run; ``pictures``: captions by name of the figure."""
    frames = tables.frames
    lead, lines = say(spec, measured, frames)
    own = frames["findings"][frames["findings"]["papers_own"].isin(["yes", "other family"])]
    verdicts = to_markdown(own, {**_FINDING, "interval_over": "Interval over"})
    parts = [
        f"# Study of scale: {spec.name}",
        lead,
        "\n".join(f"* {line}" for line in lines),
        "## Verdicts",
        _VERDICTS,
        verdicts,
    ]
    if len(frames["open_checks"]):
        parts += ["## Open checks", "\n".join(f"* {name}: {what}" for name, what in CHECKS.items())]
        parts.append(to_markdown(frames["open_checks"], _CHECK))
    if len(frames["multitask_choices"]):
        parts += ["## The optimised multitask models", to_markdown(frames["multitask_choices"])]
    if len(frames["account"]):
        ends = tuple(f"{family.name}: {spec.bases_of(family)[-1]} " for family in spec.families)
        strongest = frames["account"][frames["account"]["scope"].str.startswith(ends)]
        clear = strongest[strongest["moves"] != "undecided"]
        parts += ["## The theory's account", _JUDGED, "\n".join(f"* {x}" for x in theory_lines(frames["theory_says"]))]
        parts += [f"{_SAID} {moving_words(frames['account'], spec)}", to_markdown(clear, _ACCOUNT)]
    if len(frames["laws"]):
        words = law_words(frames["laws"], frames["law_fits"])
        parts += ["## Laws in the number of experts", _LAWS, words, to_markdown(frames["laws"])]
    if pictures:
        shown = [f"![{name.replace('_', ' ')}](figures/{name}.png)\n\n{text}" for name, text in pictures.items()]
        parts += ["## Figures", *shown]
    parts += ["## How to reproduce", f"`{command}`, seed {spec.seed}, specification {spec.digest()}."]
    return "\n\n".join(part for part in parts if part) + "\n"


def make_page(
    spec: ScaleSpec, measured: Measured, tables: Tables, command: str = "", versions: Mapping[str, str] | None = None
) -> Page:
    """The page of a study."""
    frames = tables.frames
    own = frames["findings"][frames["findings"]["papers_own"].isin(["yes", "other family"])]
    first = f"held_out/{spec.transfers[0]}"
    scaled: list[tuple[str, Callable[[], Picture]]] = [
        (
            "held_in_against_size",
            lambda: figures.against_size(tables.by_base, spec, "held_in", "held-in: merged / expert"),
        ),
        ("held_out_against_size", lambda: figures.against_size(tables.by_base, spec, first, "held-out: merged / base")),
    ]
    numbers: list[tuple[str, Callable[[], Picture]]] = [
        (
            "held_out_against_number",
            lambda: figures.against_number(tables.by_number, spec, first, "held-out: merged / base"),
        ),
        (
            "held_in_against_number",
            lambda: figures.against_number(tables.by_number, spec, "held_in", "held-in: merged / expert"),
        ),
    ]
    sections = (
        _section(
            "Verdicts", f"Each finding of the paper with its effect here. {_VERDICTS}",
            {"verdicts": own}, [("effects", lambda: figures.effects_figure(frames["findings"], spec))], _FINDING,
        ),
        _section(
            "Size and base", "Held-in: merged / expert. Held-out: frozen features, merged / base; below 1 merging "
            "loses to the untouched base.", {"held_out_against_base": frames["held_out_against_base"]}, scaled,
        ),
        _section("Number of experts", "", {}, numbers),
        _section("Methods", "", {}, [("methods_against_size", lambda: figures.methods_figure(tables.by_method, spec))]),
        _section(
            "Baselines", "Experts on their own tasks and with frozen features; base with the experts' heads; the "
            "multitask model trained for as many steps as all experts, and with an optimised budget.",
            {"multitask_choices": frames["multitask_choices"], "baselines": frames["baselines"],
             "multitask_training": frames["multitask_training"]}, [],
        ),
        _section(
            "Open checks", "; ".join(f"{k}: {v}" for k, v in CHECKS.items()), {"open_checks": frames["open_checks"]},
            [("shape", lambda: figures.shape_figure(measured.shape, spec))], _CHECK,
        ),
        replace(_section(
            "The theory's account", f"{_JUDGED} Then which term moves with size, base and number of experts (change of "
            "log10 of the term; 95 % over tasks), and how it ranks the measured loss of averages. "
            f"{moving_words(frames['account'], spec)}",
            {"theory_says": frames["theory_says"], "account": frames["account"],
             "terms_and_loss": frames["terms_and_loss"]},
            [("terms", lambda: figures.terms_figure(measured.terms, spec))],
        ), columns={"theory_says": _SAYS}),
        _section(
            "Laws in the number of experts", "Errors are |log(predicted / measured)| on a number of experts that the "
            "fit did not see; differences are to the empirical law, paired over cells. "
            f"{law_words(frames['laws'], frames['law_fits'])} In the table of fits '–' is a parameter that is not "
            "identified; all numbers are in law_fits.csv.",
            {"laws": frames["laws"], "law_parameters": identified(frames["law_fits"])},
            [("laws", lambda: figures.laws_figure(frames["law_losses"], spec))],
        ),
        _section("All effects", "Other bases, scores and baselines: for the shape of the result, not for the verdict.",
                 {"findings": frames["findings"]}, [], _FINDING),
    )  # fmt: skip
    lead, lines = say(spec, measured, frames)
    printed = {name for one in sections for name in one.tables}
    return Page(
        f"Study of scale: {spec.name}",
        lead,
        lines,
        sections,
        meta={
            "command": command,
            "seed": spec.seed,
            "versions": dict(versions or {}),
            "hashes": {
                "specification": spec.digest(),
                **{
                    f"base of {row['architecture']}, {row['base']}": row["base_tensors"]
                    for row in measured.about.to_dict("records")
                },
            },
        },
        data={name: frame for name, frame in frames.items() if name not in printed and len(frame)},
    )


_SAID = "Terms that move beyond their interval (over tasks) with size, base or number of experts; change of log10."
_JUDGED = (
    "What the theory says of each finding, and the terms that it names: 'supported' where one moved as it says, "
    "'contradicted' where one moved against it, 'mixed' where both, 'undecided' where none moved beyond its interval. "
    "Changes of log10 with 95 % intervals over tasks."
)
_SAYS = {"finding": "Finding", "scope": "Scope", "verdict": "Verdict", "theory": "Theory", "measured": "Why"}
_LAWS = "Mean |log(predicted / measured)| on a number of experts that was held out; differences to the empirical law."
_ACCOUNT = {
    "factor": "Factor",
    "scope": "Scope",
    "term": "Term",
    "change": "Change",
    "unit": "Unit",
    "moves": "Moves",
    "tier": "Tier",
}
_VERDICTS = (
    "'agrees' and 'disagrees' compare directions only, where the 95 % interval leaves zero out. It is over merged "
    "tasks and test images and, for held-out measures, over held-out tasks as units (t interval; the hull of both), "
    "never over training seeds. On these tasks: interval and verdict with the held-out tasks as they are. Experts: the "
    "accuracy of the poorest side's experts on their own tasks. Held-out score: the lowest accuracy that is compared "
    "on held-out tasks. In accuracy: the same effect without dividing by experts or base, with the verdict it would "
    "have. Tier: measured."
)
_FINDING = {
    "finding": "Finding", "scope": "Scope", "verdict": "Verdict", "borderline": "Borderline", "effect": "Effect",
    "on_these_tasks": "On these tasks", "verdict_on_these_tasks": "Verdict on these tasks",
    "experts_accuracy": "Experts", "held_out_accuracy": "Held-out score", "in_accuracy": "In accuracy",
    "verdict_in_accuracy": "Verdict in accuracy",
    "unit": "Unit", "paper": "Paper", "measure": "Measure", "comparisons": "Comparisons", "tier": "Tier",
}  # fmt: skip
_CHECK = {"check": "Check", **_FINDING, "mean": "Mean"}


def _section(
    title: str, note: str, tables: Mapping[str, pd.DataFrame], drawn: list[tuple[str, Callable[[], Picture]]],
    columns: Mapping[str, str] | None = None,
) -> Section:  # fmt: skip
    pictures, skipped = {}, {}
    for name, make in drawn:
        try:
            pictures[name] = make()
        except ValueError as error:
            skipped[name] = str(error)
    kept = {name: frame for name, frame in tables.items() if len(frame)}
    named = {name: columns for name in kept} if columns else {}
    return Section(title, note, kept, named, pictures, skipped)
