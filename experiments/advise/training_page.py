"""The page of advice before fine-tuning, its figures and its words."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.page import Page, Section, write_page

if TYPE_CHECKING:
    from experiments import plots
    from experiments.advise.training import TrainingAdvice


def finetune_command(advice: TrainingAdvice, base: str = "") -> str:
    """The command that trains the recommended experts."""
    recipe = advice.recipe
    words = ["mergebound", "finetune", *map(_short, advice.pilot.tasks), "--model", advice.pilot.base.architecture]
    words += ["--base", base] if base else []
    for name in ("learning_rate", "batch_size", "steps", "momentum", "weight_decay"):
        words += [f"--{name.replace('_', '-')}", f"{recipe[name]:g}"]
    return shlex.join([*words, "--schedule", "constant", "--augment", "none", "--out", "experts"])


def _short(task: str) -> str:
    return Path(task).name if Path(task).is_absolute() else task


def summary(advice: TrainingAdvice) -> tuple[str, list[str]]:
    """The main sentence, and further ones."""
    recipe = advice.recipe
    shown = (
        f"learning rate {recipe['learning_rate']:g}, batch size {recipe['batch_size']:g}, {recipe['steps']:g} steps, "
        f"momentum {recipe['momentum']:g}, weight decay {recipe['weight_decay']:g}, all training images"
    )
    how = "averaging" if advice.method == "average" else f"task arithmetic with coefficient {advice.coefficient:.3g}"
    size = len(advice.pilot.tasks)
    first = f"Fine-tune with {shown}; merge by {how}: joint risk {advice.predicted} nats for {size} tasks."
    quality = advice.quality
    lines = [
        f"How many experts in one merge: {advice.experts} of {size} (the most that are predicted to keep "
        f"{advice.numbers['wanted'].iloc[0]:.0%} of the experts' accuracy).",
        f"Experts alone: {advice.own} nats; the base: {advice.base} nats; accuracy of the average: {advice.accuracy}.",
        f"Active term: {advice.active} (training {advice.parts['training']:.3g}, generalization "
        f"{advice.parts['instability']:.3g}, merging {advice.parts['dispersion']:.3g} nats; {advice.predicted.tier}).",
        f"Source: {advice.source}. Left-out pilot recipes: Spearman {quality.spearman:.2f}, median error "
        f"{quality.median_error:.0%}, {quality.rows} merges of {quality.recipes} recipes.",
        f"Theory: {advice.theory.verdict}; {advice.theory.words}"
        + (f"; active term of the bound: {advice.theory.active}." if advice.theory.active else "."),
    ]
    singles = advice.changes[advice.changes["what"] != "everything as recommended"]
    if advice.source == "response" and len(singles) and float(singles.iloc[0]["gain"]) > 0.0:
        best = singles.iloc[0]
        lines.append(
            f"First change to `mergebound finetune`'s defaults: {best['what']} (predicted gain {best['gain']:.3g} "
            f"nats, {best['tier']}{'' if best['inside'] else ', outside the pilot'})."
        )
    used = advice.samples
    lines += [f"Note: {text}." for text in advice.notes]
    lines.append(
        f"Samples per expert: {used['pilot']:,.0f} for the pilot, {used['training']:,.0f} of {used['left']:,.0f} that "
        f"are left for training; seed {advice.seed}."
    )
    return first, lines


def response_figure(advice: TrainingAdvice) -> plots.Picture:
    """Measured merges of the pilot against training time, and the recommended point with its interval."""
    from matplotlib.figure import Figure

    from experiments.plots import Picture
    from experiments.plots.style import FAINT, GREEN, INK, RED, SERIES

    rows = advice.pilot.rows
    rows = rows[(rows["experts"] == len(advice.pilot.tasks)) & (rows["scale"] == 1.0)]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    ax = figure.add_subplot()
    for k, (_, part) in enumerate(rows.groupby("recipe")):
        colour, marker = SERIES[k % len(SERIES)]
        first = part.iloc[0]
        name = f"b {first['batch_size']:g}, beta {first['momentum']:g}, eta {first['learning_rate']:.2g}"
        ax.plot(part["time"], part["risk"], color=colour, marker=marker, markersize=4, linewidth=1.1, label=name)
    time = advice.recipe["learning_rate"] / (1.0 - advice.recipe["momentum"]) * advice.recipe["steps"]
    found = advice.predicted
    ax.errorbar(
        [time], [found.value], [[found.value - found.low], [found.high - found.value]], fmt="*", color=RED,
        markersize=11, capsize=3, label="recommended: predicted",
    )  # fmt: skip
    ax.axhline(
        advice.own.value, color=GREEN, linestyle=":", linewidth=1.1, label="experts alone at the recommended recipe"
    )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("training time eta K / (1 - beta)", fontsize=8, color=INK)
    ax.set_ylabel("joint validation risk of the average (nats)", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.grid(color=FAINT, linewidth=0.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=6.5, frameon=False, ncols=2)
    caption = (
        f"Averages of the pilot's experts (measured) and the recommended merge ({advice.predicted.tier}; "
        f"{'95' if advice.predicted.tier == 'measured' else '90'} %). Seed {advice.seed}."
    )
    return Picture(figure, caption)


def training_page(advice: TrainingAdvice, meta: Mapping[str, Any] | None = None) -> Page:
    """The report of advice before fine-tuning."""
    first, lines = summary(advice)
    theory = advice.theory
    sections = (
        Section(
            "The pilot",
            "Every line is one recipe, every point a checkpoint at which the experts of all tasks were averaged.",
            figures={"response": response_figure(advice)},
        ),
        Section(
            "What to change first",
            "Starting from the defaults of `mergebound finetune` with all samples and averaging: predicted risk after "
            "one change at a time. `inside`: the pilot covers both recipes; elsewhere the response is extrapolated. "
            "Where the source is `best of the pilot`, the response is not trusted, nor are these gains.",
            {"changes": advice.changes},
        ),
        Section(
            "Elasticities at the recommended recipe",
            "d log(risk) / d log(hyperparameter), 90 % by leaving out recipes. Momentum acts as 1 / (1 - beta) on the "
            "learning rate.",
            {"elasticities": advice.elasticities},
        ),
        Section("How many experts", "Averages of N experts.", {"numbers": advice.numbers}),
        Section("Recipes that were considered", "By cautious prediction.", {"considered": advice.candidates}),
        Section(
            "Theory",
            f"{theory.verdict}: {theory.words}. Choices of the bound: "
            f"{', '.join(f'{k} = {v:.3g}' for k, v in theory.choices.items()) or 'none'}; largest |cosine| of task "
            f"vectors {theory.cosine:.2f}. Constants are measured on the pilot's experts.",
            {"bound_elasticities": _bound_elasticities(advice), "constants": theory.constants},
        ),
    )
    return Page(
        "How to fine-tune experts that shall be merged", first, tuple(lines), sections, (), dict(meta or {}),
        {"pilot": advice.pilot.rows},
    )  # fmt: skip


def _bound_elasticities(advice: TrainingAdvice) -> pd.DataFrame:
    rows = [
        {"field": name, "elasticity of the bound": value, "tier": advice.theory.tier, "seed": advice.seed}
        for name, value in sorted(advice.theory.elasticities.items(), key=lambda item: -abs(item[1]))
    ]
    return pd.DataFrame(rows, columns=["field", "elasticity of the bound", "tier", "seed"])


def write_training_advice(out: Path, advice: TrainingAdvice, *, command: str = "", finetune: str = "") -> Path:
    """Page, tables, figure and ``advice.json`` below ``out``; returns the page's path."""
    from experiments.atomic import write_atomically
    from experiments.demo import versions

    settings = {"pilot": advice.pilot.spec.model_dump_json(), "experts": finetune}
    meta = {
        "command": command,
        "seed": advice.seed,
        "versions": versions(),
        "hashes": {"pilot": advice.pilot.spec.digest()},
        "settings": settings,
    }
    write_atomically(out / "advice.json", (json.dumps(plain(advice, finetune), indent=2) + "\n").encode())
    return write_page(out, training_page(advice, meta))


def plain(advice: TrainingAdvice, finetune: str = "") -> dict[str, Any]:
    """The advice as JSON data (without seconds, which differ from run to run)."""
    from dataclasses import asdict

    from experiments.advise.merge_page import clean

    found: dict[str, Any] = {}
    for name in (
        "recipe", "method", "coefficient", "experts", "source", "active", "parts", "samples", "notes", "seed",
        "changes", "elasticities", "numbers",
    ):  # fmt: skip
        found[name] = clean(getattr(advice, name))
    for name in ("predicted", "own", "base", "accuracy", "quality"):
        found[name] = clean(asdict(getattr(advice, name)))
    theory = asdict(advice.theory)
    del theory["constants"]
    found["theory"] = clean(theory)
    found["tasks"] = [_short(task) for task in advice.pilot.tasks]
    if finetune:
        found["finetune"] = finetune
    return found


def rounded(values: pd.DataFrame) -> pd.DataFrame:
    """Numbers with six digits."""
    kept = values.copy()
    numbers = kept.select_dtypes("number").columns
    kept[numbers] = kept[numbers].map(lambda value: float(f"{value:.6g}") if np.isfinite(value) else value)
    return kept
