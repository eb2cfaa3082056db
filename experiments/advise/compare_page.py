"""The report of the comparison: differences with intervals, coverage of predicted intervals, what was advised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.advise.compare_spec import CompareSpec
from experiments.advise.compare_words import words
from experiments.atomic import write_atomically
from experiments.page import Page, Section, write_page
from experiments.statistics import mean_interval, membership

if TYPE_CHECKING:
    from experiments import plots

COLLAPSED = 10.0
"""Losses are cut there (nats) before differences are averaged, so that one collapse does not decide alone."""


def training_differences(rows: pd.DataFrame, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Advice minus every customary recipe and method, paired by split, on the judged tasks.

    Args:
        rows: table ``training`` of :func:`experiments.advise.compare.run_comparison`.
        resamples, seed: of the bootstrap over judged tasks.

    Returns:
        One row per network (and all), budget (and all), recipe and method: mean losses (cut at :data:`COLLAPSED`),
        ``difference`` (negative: advice is better) and ``difference_accuracy`` with 95 % intervals, ``wins``.
    """
    keys = ["network", "samples", "split"]
    mine = _advised(rows[(rows["recipe"] == "advice") & (rows["method"] == "advised")], keys)
    found = []
    others = rows[(rows["recipe"] != "advice") | (rows["method"] != "advised")]
    for (recipe, method), part in others.groupby(["recipe", "method"], sort=False):
        joined = part.set_index(keys).join(mine).reset_index()
        for network, samples, some in _parts(joined, ("network", "samples")):
            found.append(
                {"network": network, "samples": samples, "recipe": recipe, "method": method}
                | _paired(some, [str(v).split(";") for v in some["judged"]], resamples, seed)
            )
    return pd.DataFrame(found)


def merging_differences(rows: pd.DataFrame, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """`advise merge` minus every usual method, paired by group of experts."""
    if rows.empty:
        return rows
    keys = ["network", "samples", "group"]
    mine = _advised(rows[rows["method"] == "advised"], keys)
    found = []
    for method, part in rows[rows["method"] != "advised"].groupby("method", sort=False):
        joined = part.set_index(keys).join(mine).reset_index()
        for network, samples, some in _parts(joined, ("network", "samples")):
            groups = [[f"{row['samples']} {name}" for name in str(row["experts"]).split(";")]
                      for row in some.to_dict("records")]  # fmt: skip
            found.append(
                {"network": network, "samples": samples, "method": method} | _paired(some, groups, resamples, seed)
            )
    return pd.DataFrame(found)


def _advised(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    return rows.set_index(keys)[["loss", "accuracy"]].add_suffix("_advice")


def _parts(rows: pd.DataFrame, names: tuple[str, str]) -> list[tuple[Any, Any, pd.DataFrame]]:
    first, second = names
    parts: list[tuple[Any, Any, pd.DataFrame]] = [("all", "all", rows)]
    parts += [(a, b, part) for (a, b), part in rows.groupby([first, second], sort=False)]
    return parts


def _paired(some: pd.DataFrame, groups: list[list[str]], resamples: int, seed: int) -> dict[str, Any]:
    def cut(name: str) -> np.ndarray:
        values = some[name].to_numpy(dtype=float)
        return np.minimum(np.where(np.isfinite(values), values, COLLAPSED), COLLAPSED)

    other, mine = cut("loss"), cut("loss_advice")
    members = membership(groups)
    loss = mean_interval(mine - other, members, resamples, seed)
    gained = (some["accuracy_advice"] - some["accuracy"]).to_numpy(dtype=float)
    accuracy = mean_interval(gained, members, resamples, seed)
    return {
        "pairs": len(some),
        "loss_advice": float(mine.mean()),
        "loss": float(other.mean()),
        "difference": loss.value,
        "difference_low": loss.low,
        "difference_high": loss.high,
        "difference_accuracy": accuracy.value,
        "difference_accuracy_low": accuracy.low,
        "difference_accuracy_high": accuracy.high,
        "wins": float((mine < other).mean()),
        "tier": "measured",
        "seed": seed,
    }


def coverage(training: pd.DataFrame, advice: pd.DataFrame, merging: pd.DataFrame, seed: int) -> pd.DataFrame:
    """How often measured test losses lie in the predicted intervals, on judged tasks and on groups of experts.

    The interval of `advise training` is for the tasks that it saw, with fresh experts. That is not measured here: the
    rows say how far it carries over to other tasks.
    """
    rows = []
    if len(training) and len(advice):
        keys = ["network", "samples", "split"]
        mine = training[(training["recipe"] == "advice") & (training["method"] == "advised")].set_index(keys)
        both = mine.join(advice.set_index(keys)[["predicted", "low", "high", "source"]])
        unseen = "advise training, on tasks that it did not see"
        rows.append({"what": unseen} | _inside(both, "predicted", "low", "high"))
        for source, part in both.groupby("source", sort=True):
            rows.append({"what": f"{unseen}, source: {source}"} | _inside(part, "predicted", "low", "high"))
    if len(merging):
        mine = merging[merging["method"] == "advised"]
        rows.append(
            {"what": "advise merge, predicted interval, on test images"} | _inside(mine, "predicted", "low", "high")
        )
        rows.append(
            {"what": "advise merge, measured interval, on test images"}
            | _inside(mine, "checked", "checked_low", "checked_high")
        )
    return pd.DataFrame([row | {"tier": "measured", "seed": seed} for row in rows])


def _inside(rows: pd.DataFrame, value: str, low: str, high: str) -> dict[str, Any]:
    loss = rows["loss"].to_numpy(dtype=float)
    return {
        "merges": len(rows),
        "inside": float(((rows[low] <= loss) & (loss <= rows[high])).mean()),
        "below": float((loss < rows[low]).mean()),
        "above": float((loss > rows[high]).mean()),
        "median_ratio": float(np.median(rows[value] / loss)),
    }


def differences_figure(table: pd.DataFrame, what: str, seed: int) -> plots.Picture:
    """Differences with intervals, one line per comparison; left of zero the advice is better.

    Raises:
        ValueError: nothing to draw.
    """
    from matplotlib.figure import Figure

    from experiments.plots import Picture, pretty
    from experiments.plots.style import FAINT, GREY, SERIES

    if table.empty:
        raise ValueError(f"{what}: nothing was measured")
    names = [n for n in ("recipe", "method") if n in table]
    labels = list(dict.fromkeys(", ".join(pretty(row[n]) for n in names) for row in table.to_dict("records")))
    cells = list(dict.fromkeys((row["network"], row["samples"]) for row in table.to_dict("records")))
    figure = Figure(figsize=(8.4, 0.2 * len(labels) * len(cells) + 1.2), layout="constrained")
    ax = figure.add_subplot()
    for k, cell in enumerate(cells):
        part = table[(table["network"] == cell[0]) & (table["samples"] == cell[1])]
        y = [labels.index(", ".join(pretty(row[n]) for n in names)) + 0.16 * (k - (len(cells) - 1) / 2)
             for row in part.to_dict("records")]  # fmt: skip
        colour, marker = SERIES[k % len(SERIES)]
        ax.hlines(y, part["difference_low"], part["difference_high"], color=colour, linewidth=1.4)
        shown = "all" if cell[0] == "all" else f"{pretty(cell[0])}, {cell[1]:,} samples"
        ax.plot(part["difference"], y, marker, color=colour, markersize=4.5, label=shown)
    ax.axvline(0.0, color=GREY, linewidth=0.9)
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.set_xlabel("test loss of the advised merge minus this one (nats; negative: advice is better)", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.grid(axis="x", color=FAINT, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=7, frameon=False, loc="outside lower center", ncols=5)
    caption = (
        f"{what} Paired differences of joint test loss with 95 % intervals (judged tasks or experts resampled; losses "
        f"cut at {COLLAPSED:g} nats). Tier: measured; seed {seed}."
    )
    return Picture(figure, caption)


def write_comparison(
    spec: CompareSpec,
    tables: Mapping[str, pd.DataFrame],
    out: Path,
    *,
    command: str = "",
    planned: int = 0,
    done: int = 0,
) -> Path:
    """Page, CSV, figures and a README.md below ``out``; returns the page's path."""
    from experiments.advise.training_page import rounded
    from experiments.demo import versions

    training, merging, advice = tables["training"], tables["merging"], tables["advice"]
    differences = training_differences(training, seed=spec.seed)
    groups = merging_differences(merging, seed=spec.seed)
    covered = coverage(training, advice, merging, spec.seed)
    first, lines = words(training, differences, groups, covered, advice)
    share = f"{done} of {planned} units (network and budget) are measured."
    figures: dict[str, plots.Picture] = {}
    title = "Experts by `advise training` against customary recipes, on tasks that the advice did not see."
    figures["training_differences"] = differences_figure(differences, title, spec.seed)
    if len(groups):
        figures["merging_differences"] = differences_figure(
            groups, "`advise merge` against usual methods on the same experts.", spec.seed
        )
    sections = [
        Section(
            "Recipes", "Advice pays its pilot from the same budget.", {"differences": rounded(differences)},
            figures={"training_differences": figures["training_differences"]},
        ),
        Section(
            "Merging", "Groups of experts with recipes of their own.", {"merging_differences": rounded(groups)},
            figures={k: v for k, v in figures.items() if k == "merging_differences"},
        ),
        Section("Predicted intervals", "", {"coverage": rounded(covered)}),
        Section("What was advised", "", {"advice": rounded(advice)}),
    ]  # fmt: skip
    meta = {
        "command": command,
        "seed": spec.seed,
        "versions": versions(),
        "hashes": {"specification": spec.digest()},
        "settings": {"specification": spec.model_dump_json(), "measured": share},
    }
    data = {"training": rounded(training), "merging": rounded(merging)}
    page = Page(
        f"Advice against customary recipes: {spec.name}", first, (share, *lines), tuple(sections), (), meta, data
    )
    text = _readme(spec, first, [share, *lines], command, {k: v.caption for k, v in figures.items()})
    write_atomically(out / "README.md", text.encode())
    return write_page(out, page)


def _readme(spec: CompareSpec, first: str, lines: list[str], command: str, pictures: Mapping[str, str]) -> str:
    parts = [
        f"# Advice against customary recipes: {spec.name}",
        f"`{command or 'mergebound advise compare'}`",
        first,
        "\n".join(f"* {line}" for line in lines),
        f"Specification `{spec.name}` ({spec.digest()}), seed {spec.seed}, fixed before any result. `training.csv`: "
        "every merge of judged tasks; `differences.csv`: paired; `merging.csv` and `merging_differences.csv`: "
        "groups of experts with recipes of their own; `coverage.csv`; `advice.csv`: what was advised. Losses and "
        "accuracies: measured on test images; predictions: calibrated (pilot) or estimated (calibration images). "
        "Customary recipes: "
        + "; ".join(f"{n} ({', '.join(f'{k} {v}' for k, v in fields.items())})" for n, fields in spec.recipes.items())
        + ".",
        *(f"![{name}](figures/{name}.png)\n\n{caption}" for name, caption in pictures.items()),
    ]
    return "\n\n".join(parts) + "\n"
