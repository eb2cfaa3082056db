"""The report of the study: one page with its tables as CSV and its figures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments import plots
from experiments.atomic import write_atomically
from experiments.page import Page, Section, write_page
from experiments.studies.hyperparameters import figures, words
from experiments.studies.hyperparameters.columns import predictions
from experiments.studies.hyperparameters.designs import Drawn, merges_frame
from experiments.studies.hyperparameters.grids import BaseShare, StudyGrid, merges_of
from experiments.studies.hyperparameters.joined import joined
from experiments.studies.hyperparameters.joint_words import HETEROGENEOUS
from experiments.studies.hyperparameters.paper import against_paper
from experiments.studies.hyperparameters.powers import NOTE, exponent_table
from experiments.studies.hyperparameters.spec import StudySpec
from experiments.studies.hyperparameters.tables import Tables, compute
from experiments.studies.hyperparameters.work import read_rows
from theory.errors import MergeboundError

if TYPE_CHECKING:
    from experiments.studies.hyperparameters.run import Place

VERDICTS = {
    "architecture": "Architecture",
    "factor": "Factor",
    "measured": "Measured",
    "measured_exponent": "Exponent",
    "prediction": "Predictor",
    "tier": "Tier",
    "predicted": "Predicted",
    "predicted_exponent": "its exponent",
    "verdict": "Verdict",
    "heterogeneous": "heterogeneous groups",
    "groups": "groups",
    "left_out": "left out",
}
PAPER = {
    "architecture": "Architecture",
    "factor": "Factor",
    "paper": "Paper's theory",
    "measured": "Measured",
    "measured_exponent": "Exponent",
    "measured_exponent_low": "2.5 %",
    "measured_exponent_high": "97.5 %",
    "verdict": "Verdict",
    "why": "Why the paper says so",
}
RANKS = {
    "architecture": "Architecture",
    "groups_of": "Groups",
    "prediction": "Predictor",
    "tier": "Tier",
    "merges": "merges",
    "spearman": "Spearman",
    "ratio": "predicted / measured",
    "ratio_q05": "5 %",
    "ratio_q95": "95 %",
    "above": "share above the measurement",
}
EXPONENTS = {
    "architecture": "Architecture",
    "factor": "Factor",
    "quantity": "Quantity",
    "source": "Source",
    "tier": "Tier",
    "exponent": "Exponent",
    "verdict": "Verdict",
    "note": "Why",
}
ELASTICITIES = {
    "architecture": "Architecture",
    "factor": "Factor",
    "quantity": "Quantity",
    "tier": "Tier",
    "given": "Given",
    "elasticity": "Elasticity",
    "kind": "Sign",
    "verdict": "Verdict",
    "groups": "groups",
}


LARGEST = 100.0
"""Losses (nats) at which the axes of figures end."""


def write_report(
    spec: StudySpec,
    place: Place,
    grids: Sequence[StudyGrid],
    drawn: Sequence[Drawn],
    recipes: pd.DataFrame,
    parts: Sequence[BaseShare],
    *,
    command: str = "",
) -> Path:
    """Tables, figures and page of whatever is finished; returns the page's path.

    Args:
        spec: the study.
        place: where it is kept.
        grids: of the study.
        drawn: groups of what the grids have finished.
        recipes: as :func:`experiments.studies.hyperparameters.run.drawn_groups` gives them.
        parts: how far every grid is for every base.
        command: that was typed.

    Raises:
        MergeboundError: no merge is measured yet.
    """
    from experiments.demo import versions

    merges = merges_frame(spec, drawn, place.stores)
    if not len(merges):
        raise MergeboundError(f"{place.stores}: no merge is measured yet; run the stage `merges` first")
    rows = {name: read_rows(place.rows(spec, name)) for name in ("predictions", "bounds", "constants")}
    table = joined(merges, rows["predictions"], rows["bounds"], spec)
    experts = {str(row["expert"]): row for row in rows["constants"]}
    tables = compute(spec, table, experts, recipes)
    lacking = [part for part in parts if not part.complete]
    of_grid = {grid.name: merges_of(spec, grid) for grid in grids}
    planned = sum(len(one.groups) * len(one.methods) for one in drawn) + sum(of_grid[part.grid] for part in lacking)
    stores = {f"store of {grid.name}": grid.spec.digest() for grid in grids}
    text = spec.model_dump_json()
    meta: dict[str, Any] = {
        "command": command,
        "seed": spec.seed,
        "versions": versions(),
        "hashes": {"specification": hashlib.sha256(text.encode()).hexdigest(), **stores},
        "settings": {
            "study": spec.name,
            "groups": f"{spec.groups} matched draws of {spec.size} experts per level",
            "images": f"{spec.calibration_images} for calibration, {spec.test_images or 'all'} for tests, per task",
            "rule": spec.rule.model_dump_json(),
            "measured": f"{len(table)} of {planned} merges",
        },
    }
    done = words.done(len(table), planned, lacking)
    title = f"Hyperparameters of experts and their merge: {spec.name}"
    first, further = (
        words.lead(tables.verdicts),
        words.lines(spec, table, tables, drawn, f"{done} Seed {spec.seed}."),
    )
    sections = tuple(_sections(spec, table, tables))
    data = {"merges": _shown(table), "levels": tables.levels, "trends": tables.trends}
    page = Page(title, first, tuple(further), sections, _assumptions(spec, experts), meta, data)
    pictures = {name: picture.caption for one in sections for name, picture in one.figures.items()}
    done = words.done(len(table), planned, lacking)
    told = [line for line in further[1:] if not line.startswith(words.AGAINST)]
    said = [first, *told, words.calibrated_note(spec, table)]
    laws = exponent_table(tables.exponents)
    text = words.readme(spec, title, said, command, pictures, done, against_paper(tables.verdicts), laws)
    write_atomically(place.out / "README.md", text.encode())
    return write_page(place.out, page)


def _sections(spec: StudySpec, table: pd.DataFrame, tables: Tables) -> list[Section]:
    networks = sorted(set(table["architecture"]))
    predicted = predictions(spec, table)
    near = [name for column, (name, _) in predicted.items() if column.startswith("pred_")]
    bounds = [name for column, (name, _) in predicted.items() if column.startswith("bound_")]
    drawn: dict[str, dict[str, Callable[[], plots.Picture]]] = {"loss": {}, "accuracy": {}, "bound": {}, "term": {}}
    for network in networks:
        who = plots.pretty(network)
        matched = words.matched_note(spec, tables.levels, network)
        drawn["loss"][f"loss_{network}"] = lambda n=network, w=who, m=matched: figures.curves_figure(
            tables.levels, n, ["loss", *near], f"Test loss of merges by factor, {w}: measured, and predicted on "
            f"calibration images (estimated; calibrated: fitted on the other half of the groups). {m}",
            text="loss (nats)", cut=LARGEST,
        )  # type: ignore[misc]  # fmt: skip
        drawn["accuracy"][f"accuracy_{network}"] = lambda n=network, w=who, m=matched: figures.curves_figure(
            tables.levels, n, ["accuracy", *[f"accuracy, {name}" for name in spec.predictors]],
            f"Test accuracy of merges by factor, {w}: measured and predicted. {m}", log=False, text="accuracy",
        )  # type: ignore[misc]  # fmt: skip
        if bounds:
            drawn["bound"][f"bound_{network}"] = lambda n=network, w=who, m=matched: figures.curves_figure(
                tables.levels, n, ["loss", *bounds], f"The master bound by factor, {w}, beside the measured loss. "
                f"Estimated: constants are measured. {m}", text="loss (nats)",
            )  # type: ignore[misc]  # fmt: skip
            terms = [f"sqrt {name} term" for name in ("training", "dispersion", "instability")]
            drawn["term"][f"terms_{network}"] = lambda n=network, w=who, t=terms, m=matched: figures.curves_figure(
                tables.levels, n, t, f"Square roots of the three terms of the bound from the recipe, {w}. "
                f"Estimated. {m}", text="sqrt(loss)",
            )  # type: ignore[misc]  # fmt: skip
    seed = f"Seed {spec.seed}."
    loss_of = {column: name for column, (name, _) in predicted.items() if column.startswith("pred_")}
    verdict_caption = (
        "Measured trend of the loss (bold) and what each prediction says; colour: the verdict, over the levels that "
        f"the prediction has numbers for. {seed}"
    )
    elasticity_caption = (
        "Slopes of the log of the merged loss over heterogeneous groups, measured and predicted; experts resampled; "
        f"those that the recipes do not determine are left out. {seed}"
    )
    return [
        _section(
            "Verdicts",
            f"{words.rule_note(spec.rule)} {words.left_out_note(spec)}",
            {"verdicts": tables.verdicts},
            {"verdicts": VERDICTS},
            {"verdicts": lambda: figures.verdict_figure(tables.verdicts, verdict_caption)},
        ),
        _section("Against the paper", words.PAPER, {"paper": against_paper(tables.verdicts)}, {"paper": PAPER}, {}),
        _section(
            "Loss of merges by factor",
            "Homogeneous groups. " + words.calibrated_note(spec, table),
            {},
            {},
            drawn["loss"],
        ),
        _section("Accuracy", "Test accuracy, on the same images.", {}, {}, drawn["accuracy"]),
        _section("The bound", words.BOUND, {}, {}, drawn["bound"]),
        _section("Terms of the bound", "Training, dispersion, instability.", {}, {}, drawn["term"]),
        _section(
            "Exponents",
            f"{words.EXPONENTS} {NOTE}",
            {"exponents": tables.exponents},
            {"exponents": EXPONENTS},
            {"exponents": lambda: figures.exponents_figure(tables.exponents, f"{words.EXPONENT_MARKS} {seed}")},
        ),
        _section(
            "Heterogeneous groups",
            HETEROGENEOUS,
            {"heterogeneous": tables.heterogeneous},
            {"heterogeneous": ELASTICITIES},
            {"elasticities": lambda: figures.elasticities_figure(tables.heterogeneous, elasticity_caption)},
        ),
        _section(
            "Predicted against measured",
            "Every merge once; filled marks: heterogeneous groups.",
            {"ranks": tables.ranks},
            {"ranks": RANKS},
            {
                "predicted": lambda: figures.scatter_figure(
                    table, loss_of, f"Predicted against measured test loss of every merge. {seed}", cut=LARGEST
                )
            },
        ),
    ]


def _section(
    title: str,
    note: str,
    tables: Mapping[str, pd.DataFrame],
    columns: Mapping[str, Mapping[str, str]],
    makers: Mapping[str, Callable[[], plots.Picture]],
) -> Section:
    made: dict[str, plots.Picture] = {}
    skipped: dict[str, str] = {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except ValueError as error:
            skipped[name] = str(error)
    return Section(title, note, dict(tables), dict(columns), made, skipped)


def _assumptions(spec: StudySpec, experts: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    shared = {True: ("violated", "tasks share images"), False: ("holds", "tasks have training images of their own"),
              None: ("unknown", "not stated by the specification")}[spec.shared_samples]  # fmt: skip
    found = [("A1 samples of different tasks are independent", *shared)]
    found.append(("A2 recipes, coefficients and stopping do not depend on the samples", "holds", "fixed beforehand"))
    flags = {bool(row["per_sample_loss"]) for row in experts.values()}
    if flags:
        word = "holds" if flags == {True} else "violated" if flags == {False} else "violated for some"
        why = "no BatchNorm on batch statistics" if flags == {True} else "BatchNorm trained on batch statistics"
        found.append(("A3 the loss is a loss per sample", word, why))
    found.append(("A4 smoothness is known", "violated", "networks have none; constants are measured at a few points"))
    return tuple(found)


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """Merges for the CSV: short names of experts' runs, numbers with six digits."""
    kept = table.drop(columns=[name for name in ("key", "base_digest") if name in table.columns]).copy()
    kept["group"] = [str(value)[:12] for value in kept["group"]]
    kept["experts"] = [
        ";".join(f"{name.partition('@')[0][:10]}@{name.partition('@')[2]}" for name in str(text).split(";"))
        for text in kept["experts"]
    ]
    numbers = kept.select_dtypes("number").columns
    kept[numbers] = kept[numbers].map(lambda value: float(f"{value:.6g}") if np.isfinite(value) else value)
    return kept
