"""What the report says in words: its first sentences, and the notes of its sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.plots import pretty
from experiments.studies.hyperparameters.designs import Drawn
from experiments.studies.hyperparameters.figures import label
from experiments.studies.hyperparameters.grids import BaseShare
from experiments.studies.hyperparameters.joined import shared_between_halves
from experiments.studies.hyperparameters.joint_words import joint_lines
from experiments.studies.hyperparameters.paper import against_paper
from experiments.studies.hyperparameters.powers import NOTE, exponent_lines
from experiments.studies.hyperparameters.spec import Rule, StudySpec
from experiments.studies.hyperparameters.tables import Tables

EXPONENTS = (
    "The law is section 11 of the theory (constants fixed, before saturation). Formulas: Theorems 3, 4 and 2, with "
    "the centre's constants at every level (the elasticity of the formula), and with constants measured at each level "
    "(what the bound used). Measured: lengths and dispersion of task vectors. Stability is not measured here: that "
    "takes twins (`mergebound measure twins`)."
)
EXPONENT_MARKS = (
    "Exponents with intervals; hollow marks disagree with the law. Formulas that grow exponentially over a factor have "
    "no exponent and no mark."
)
BOUND = (
    "From the recipe: clock, Theorems 2 and 3 with measured constants. Measured drift: no clock, stability by the cap "
    "sqrt(2) d, measured dispersion; any optimizer."
)
PAPER = (
    "Directions of arXiv 2601.21690's statements (abstract, Theorem 2), not of its plots. 'one side': a minimum is "
    "claimed, and the levels here lie on one side of it, which neither shows nor refutes it."
)
AGAINST = "Against the paper's theory"


def lead(verdicts: pd.DataFrame) -> str:
    """The main result in one sentence, by prediction."""
    if verdicts.empty:
        return "No factor has two measured levels yet."
    parts = []
    for name, part in verdicts.groupby("prediction", sort=False):
        agrees, disagrees = (int((part["verdict"] == word).sum()) for word in ("agrees", "disagrees"))
        rest = len(part) - agrees - disagrees
        parts.append(f"{pretty(name)}: {agrees} agree, {disagrees} disagree, {rest} undecided")
    trends = len(verdicts.drop_duplicates(["architecture", "factor"]))
    return (
        f"{trends} trends of the merged loss (factor and network), against each prediction: " + "; ".join(parts) + "."
    )


def lines(spec: StudySpec, table: pd.DataFrame, tables: Tables, drawn: Sequence[Drawn], first: str) -> list[str]:
    """Further results, a sentence each, after a first one."""
    found = [first]
    verdicts = tables.verdicts
    if len(verdicts):
        for network, part in verdicts.drop_duplicates(["architecture", "factor"]).groupby("architecture", sort=True):
            words = [_trend(row) for row in part.to_dict("records")]
            found.append(f"Measured loss of merges, {pretty(network)}: " + "; ".join(words) + ".")
        for network, part in against_paper(verdicts).groupby("architecture", sort=True):
            claims = part[part["paper"] != ""].to_dict("records")
            told = [f"{label(row['factor'])} {row['verdict']} (claimed: {row['paper']})" for row in claims]
            found.append(f"{AGAINST}, {pretty(network)}: " + "; ".join(told) + ".")
        found += _disagreements(verdicts)
    found += _without_number(table)
    found += exponent_lines(tables.exponents)
    found += joint_lines(spec, tables.heterogeneous)
    if len(tables.ranks):
        own = tables.ranks[tables.ranks["groups_of"] == "heterogeneous"]
        for network, part in own.groupby("architecture", sort=True):
            told = [
                f"{pretty(row['prediction'])} {row['spearman']:.2f} ({row['spearman_low']:.2f} to "
                f"{row['spearman_high']:.2f}), {row['ratio']:.3g}"
                for row in part.to_dict("records")
            ]
            found.append(
                f"Heterogeneous groups, {pretty(network)}, Spearman (interval) and predicted over measured: "
                f"{'; '.join(told)}."
            )
    lost = sorted({text for one in drawn for text in one.left_out})
    if lost:
        found.append(f"Left out at every level, since some level lacks them: {'; '.join(lost)}.")
    return found


def done(measured: int, planned: int, lacking: Sequence[BaseShare]) -> str:
    """The share of the study that was run: merges, and bases of grids that are not finished and so left out."""
    said = f"{measured} of {planned} merges are measured."
    if not lacking:
        return said
    parts = [
        f"{pretty(part.architecture)} in the grid {part.grid} ({len(part.finished)} of {part.runs} runs are done)"
        for part in lacking
    ]
    return f"{said} Not finished and left out: {'; '.join(parts)}."


def _no_exponent(row: Mapping[Any, Any]) -> bool:
    """Whether a slope would say nothing: rankings, and factors that have a best value."""
    return row["factor"] in ("sampling", "coefficient") or not bool(np.isfinite(row["measured_exponent"]))


def _claims(paper: pd.DataFrame) -> pd.DataFrame:
    """The table of the paper's directions as a page shows it."""
    rows = []
    for row in paper.to_dict("records"):
        value, low, high = (row[f"measured_exponent{end}"] for end in ("", "_low", "_high"))
        rows.append(
            {
                "Network": pretty(row["architecture"]),
                "Factor": label(row["factor"]),
                "Paper's theory": row["paper"] or "no claim",
                "Measured": row["measured"],
                "Exponent": "–" if _no_exponent(row) else f"{value:.2f} [{low:.2f}, {high:.2f}]",
                "Verdict": "–" if row["verdict"] == "no claim" else row["verdict"],
                "Groups": row["groups"],
                "Tier": row["tier"],
            }
        )
    return pd.DataFrame(rows)


def _without_number(table: pd.DataFrame) -> list[str]:
    """A line for each network with merges that no predictor has a number for."""
    columns = [name for name in table.columns if name.startswith("pred_") and not name.endswith(("_low", "_high"))]
    found = []
    for network, part in table.groupby("architecture", sort=True):
        lacking = part[part[columns].isna().all(axis=1) & part["loss"].notna()]
        if not columns or lacking.empty or len(lacking) == len(part):
            continue
        where = "; ".join(
            f"{label(str(factor))} {', '.join(str(level) for level in sorted(set(own['level'])))}"
            for factor, own in lacking.groupby("factor", sort=False)
        )
        found.append(
            f"No prediction has a number for {len(lacking)} of {len(part)} merges of {pretty(str(network))} ({where}): "
            f"their median loss is {lacking['loss'].median():.3g} nats. Predictions decline where merged running "
            "variances are negative, and are judged on the other levels."
        )
    return found


def _disagreements(verdicts: pd.DataFrame) -> list[str]:
    """A line for each network and prediction that disagrees somewhere."""
    found = []
    wrong = verdicts[verdicts["verdict"] == "disagrees"]
    for (network, name), part in wrong.groupby(["architecture", "prediction"], sort=False):
        told = [
            f"{label(row['factor'])} {row['measured_there']}, not {row['predicted']}" for row in part.to_dict("records")
        ]
        found.append(f"Disagreement, {pretty(network)}, {pretty(name)}: {'; '.join(told)}.")
    return found


def _trend(row: Mapping[Any, Any]) -> str:
    said = f"{label(row['factor'])} {row['measured']}"
    if _no_exponent(row):
        return said
    low, high = row["measured_exponent_low"], row["measured_exponent_high"]
    return f"{said} (exponent {row['measured_exponent']:.2f}, {low:.2f} to {high:.2f})"


def rule_note(rule: Rule) -> str:
    """The rule of the verdicts."""
    return (
        "Rule, fixed beforehand: a curve has a minimum or maximum where an inner level lies beyond both ends (paired "
        f"differences with intervals, and {rule.least:g} or more in log); else it rises or falls where the "
        f"{rule.level:.0%} interval of its log-log slope leaves out 0 and its ends differ by {rule.least:g} or more in "
        "log; else it is undecided. A prediction agrees where both curves do the same; the verdict is undecided where "
        "one of them is. Heterogeneous groups: the sign of the regression's slope. Momentum is read as 1/(1 - beta); "
        "over sampling a slope is a ranking in the order in which Gamma (Theorem 2) grows. Added after results of "
        "size tiny had been looked at: draws that drew the same group count as one group; a number of experts at which "
        "there is only one group has no interval and is left out of trends and exponents; over the number of experts "
        "intervals resample groups alone, widened for their small number. Added later, after results of size tiny had "
        "been looked at: other intervals leave out one task at a time, with the quantile of t for their number, "
        "where they resampled tasks with normal quantiles and covered 86 % (8 tasks) or 73 % (7) of planted effects of "
        "tasks in simulations; now they cover 93 to 97 %. They are conservative where groups differ by noise alone: "
        "about six times too wide, covering nearly all. With them: verdicts on exponents, rows for heterogeneity; "
        "elasticities that the recipes do not determine are left empty."
    )


def left_out_note(spec: StudySpec) -> str:
    """Which chance the intervals leave out."""
    images = f"the {spec.test_images}" if spec.test_images else "all"
    return (
        "Intervals hold the chance of tasks, experts and groups, and no other: every expert was fine-tuned once (one "
        f"seed, no second run of a recipe on a task), and {images} test images of a task are not resampled. They are "
        "intervals for other tasks and groups, given these seeds and images."
    )


def matched_note(spec: StudySpec, levels: pd.DataFrame, network: str) -> str:
    """What means and bands of a figure over levels are of: draws and different groups, over the number of experts
    apart."""
    own = levels[(levels["architecture"] == network) & (levels["quantity"] == "loss")]
    sizes, others = own[own["factor"] == "experts"], own[own["factor"] != "experts"]
    parts = []
    if len(others):
        counts = sorted({int(n) for n in others["groups"]})
        different = f"{counts[0]} of them different" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} different"
        parts.append(
            f"Means over {spec.groups} matched draws of {spec.size} tasks, the same at every level ({different})"
        )
    if len(sizes):
        many = [f"{int(row['groups'])} of {int(row['level'])}" for row in sizes.to_dict("records")]
        alone = [str(int(row["level"])) for row in sizes.to_dict("records") if int(row["groups"]) < 2]
        lone = f"; of {' and '.join(alone)} one, without interval" if alone else ""
        parts.append(
            f"{'o' if parts else 'O'}ver the number of experts, groups that are parts of each other (different ones: "
            f"{', '.join(many)} tasks{lone})"
        )
    parts.append(f"bands are {spec.rule.level:.0%} intervals, the hull of leaving out tasks and of resampling groups")
    return f"{'; '.join(parts)}. Seed {spec.seed}."


def calibrated_note(spec: StudySpec, table: pd.DataFrame) -> str:
    """What is calibrated, on what, and what both halves share."""
    shared = [
        f"{row['experts']} of {row['experts_all']} experts of {pretty(str(row['architecture']))} are in groups of both "
        f"halves ({row['merges']} of {row['merges_all']} merges too: never fitted on)"
        for row in shared_between_halves(table).to_dict("records")
    ]
    return (
        f"Calibrated: between {' and '.join(pretty(n) for n in spec.calibrated)} in log, with a constant factor, "
        "fitted on groups of one parity of seeds and judged on the other. Halves of the groups, not of the experts: "
        f"{'; '.join(shared)}."
    )


def readme(
    spec: StudySpec,
    title: str,
    said: Sequence[str],
    command: str,
    pictures: Mapping[str, str],
    done: str,
    paper: pd.DataFrame,
    laws: pd.DataFrame,
) -> str:
    """A page in Markdown beside the report, for folders of results: command, share that was run, seeds, findings.

    Args:
        spec: the study.
        title: of the page.
        said: main sentence and further ones.
        command: that made it.
        pictures: captions by name of figure.
        done: what was measured of what was planned.
        paper: rows of :func:`experiments.studies.hyperparameters.paper.against_paper`.
        laws: rows of :func:`experiments.studies.hyperparameters.powers.exponent_table`.
    """
    from experiments.validation import to_markdown

    parts = [
        f"# {title}",
        f"`{command or 'mergebound study hyperparameters'}`",
        f"{done} Specification `{spec.name}` ({spec.digest()}), seed {spec.seed}; groups have the seeds {spec.seed} to "
        f"{spec.seed + spec.groups - 1}. Tables: `verdicts.csv`, `levels.csv` (every curve), `trends.csv`, "
        "`exponents.csv`, `heterogeneous.csv`, `ranks.csv`, `merges.csv` (one row per merge and factor). Tiers: "
        "measured, estimated (constants or calibration images), calibrated (fitted on the other half of the "
        "groups; experts are in both).",
        "\n".join(f"* {line}" for line in said),
        *(["## Against the paper", PAPER, to_markdown(_claims(paper))] if len(paper) else []),
        *(["## Exponents against the law", NOTE, to_markdown(laws)] if len(laws) else []),
        "## Figures",
        *(f"![{name}](figures/{name}.png)\n\n{caption}" for name, caption in pictures.items()),
        "## The rule, and what intervals leave out",
        rule_note(spec.rule),
        left_out_note(spec),
    ]
    return "\n\n".join(parts) + "\n"
