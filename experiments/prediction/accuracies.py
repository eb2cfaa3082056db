"""Predicted accuracies of merges, which tell usable merges from collapsed ones.

The logits that predict a merge's risk predict its accuracy too.  *Added after the study's results had been looked at*:
the flag that the specification asks for, the bracket's width, tells little (see the page).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments import statistics as st
from experiments.measure.predictors.statistics import FieldStatistics
from experiments.measure.predictors.zoo import predictors
from experiments.prediction.bank import Bank
from experiments.prediction.draws import Pool, StudyGroup
from experiments.prediction.judged import COLLAPSED, directions
from experiments.prediction.measuring import form
from experiments.prediction.rows import SELF, merge_point
from experiments.prediction.spec import StudySpec, label
from experiments.validation import cells
from theory.function_space import Array, Labels

Row = dict[str, Any]


def accuracy_rows(spec: StudySpec, pool: Pool, bank: Bank, group: StudyGroup) -> list[Row]:
    """``acc_<predictor>`` of every merge of a group: mean over tasks of the share of calibration images that the
    predicted logits classify rightly; and ``expert_accuracy_calibration`` of the experts on the same images."""
    members = list(group.members)
    stats = bank.fields(members)
    chosen = [p for p in predictors(None, stats) if p.name not in SELF]
    rows: list[Row] = []
    for method in spec.methods:
        if not method.merges(len(members)):
            continue
        formed = form(bank.material, members, method, spec.seed)
        point, products = merge_point(bank, members, formed)
        row: Row = {
            "group": f"{pool.key.folder}-{group.number}",
            "settings": label(method),
            "expert_accuracy_calibration": own_accuracy(stats),
            "tier": "estimated",
        }
        for predictor in chosen:
            logits = [field.at(point.alpha) for field in predictor.fields(stats)]
            if products is not None and predictor.residual == "base":
                logits = [h + r for h, r in zip(logits, products, strict=True)]
            row[f"acc_{predictor.name}"] = accuracy(logits, stats.labels)
        rows.append(row)
    return rows


def accuracy(logits: list[Array], labels: tuple[Labels, ...]) -> float:
    """Mean over tasks of the share of images, (n, C) logits against (n,) classes, that are right."""
    return float(np.mean([(h.argmax(axis=1) == y).mean() for h, y in zip(logits, labels, strict=True)]))


def own_accuracy(stats: FieldStatistics) -> float:
    """Mean accuracy of the experts on their own calibration images."""
    return accuracy([stats.own_logits(j) for j in range(stats.size)], stats.labels)


def with_accuracies(merges: pd.DataFrame) -> pd.DataFrame:
    """``acc_best``, of the predictor whose accuracies were closest on the other half, and ``lost``, the share of the
    experts' accuracy that it says is lost.

    Args:
        merges: rows of :func:`experiments.prediction.judged.honest` with the columns of :func:`accuracy_rows`; without
            these they come back as they are.
    """
    names = [c for c in merges.columns if c.startswith("acc_")]
    if not names:
        return merges
    out = merges.copy()
    out["acc_best"], out["chosen_acc_best"] = np.nan, ""
    for _, part in cells(merges):
        for fit, judged in directions(part):
            off = {name: float((fit[name] - fit["measured_accuracy_even"]).abs().mean()) for name in names}
            order = sorted((name for name in names if np.isfinite(off[name])), key=lambda name: off[name])
            if not order:
                continue
            values = judged[order].to_numpy(dtype=float)
            first = np.isfinite(values).argmax(axis=1)
            out.loc[judged.index, "acc_best"] = values[np.arange(len(values)), first]
            out.loc[judged.index, "chosen_acc_best"] = order[0].removeprefix("acc_")
    out["lost"] = 1.0 - out["acc_best"] / out["expert_accuracy_calibration"]
    return out


def accuracy_table(merges: pd.DataFrame) -> pd.DataFrame:
    """How good predicted accuracies are: by network and state, of every predictor and of the chosen one (``best``).

    Columns: ``error`` (mean absolute difference from the accuracy on test images), ``off`` (mean difference),
    ``spearman``; for states together also ``told``, the share of merges that "more than half of the experts' accuracy
    is lost" sorts rightly into usable and collapsed.
    """
    names = [c for c in merges.columns if c.startswith("acc_")]
    rows: list[Row] = []
    for key, part in [*cells(merges, ("architecture",)), *cells(merges, ("architecture", "state"))]:
        state = key[1] if len(key) > 1 else "all"
        for name in names:
            known = part[np.isfinite(part[name].to_numpy(dtype=float))]
            if len(known) < 3:
                continue
            off = known[name] - known["measured_accuracy"]
            raised = known[name] <= 0.5 * known["expert_accuracy_calibration"]
            told = float((raised == (known["state"] == COLLAPSED)).mean())
            rows.append(
                {
                    "architecture": key[0], "state": state, "predictor": name.removeprefix("acc_"),
                    "merges": len(known), "error": float(off.abs().mean()), "off": float(off.mean()),
                    "spearman": float(st.spearman(known[name], known["measured_accuracy"])[0]), "told": told,
                    "tier": "calibrated" if name == "acc_best" else "estimated",
                }
            )  # fmt: skip
    return pd.DataFrame(rows)
