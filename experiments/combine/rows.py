"""Rows that merges leave in a store: what an expert and the base can do, what a merge does, what it was drawn for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.combine.groups import Group, Member
from experiments.combine.recipe import Evaluate, MergeMethod, merge_key, reference_key
from experiments.evaluate.results import METRICS, Evaluation, JointEvaluation

Row = dict[str, Any]
REFERENCE, MERGE, DRAWN = "reference", "merge", "drawn"
"""Kinds of rows: an expert on its own task, a measured merge, a group with what it was drawn for."""

CLAMPED = "clamped"
"""Column of merges: see :func:`merging.variances.zero_share`; rows of older versions do not have it."""


def reference_row(member: Member, base: str, spec: Evaluate, own: Evaluation, start: Evaluation) -> Row:
    """An expert on its task's test images, and the base through the same head."""
    row: Row = {"key": reference_key(member, base, spec), "kind": REFERENCE, "experts": member.name}
    row |= {"tasks": member.task, "base_digest": base, "evaluation": spec.text, "tier": "measured", "n": own.metrics.n}
    row |= {f"expert_{name}": getattr(own.metrics, name) for name in METRICS}
    row |= {f"base_{name}": getattr(start.metrics, name) for name in METRICS}
    return row | {"path": own.path, "split_digest": own.digest}


def merge_row(
    group: Group,
    method: MergeMethod,
    spec: Evaluate,
    joint: JointEvaluation,
    references: Mapping[str, Row],
    architecture: str,
    seconds: tuple[float, float],
    clamped: float,
) -> Row:
    """A measured merge, with what its experts and the base do on the same images.

    ``normalised`` is the mean over tasks of accuracy / the expert's accuracy (the study's definition), tasks whose
    expert has none right left out; ``normalised_of_means`` is the ratio of the means; ``gain`` is the mean of accuracy
    minus the base's.

    Args:
        references: :func:`reference_row` by the experts' names.
        seconds: of merging and of evaluating.
        clamped: share of BatchNorm's running variances that merging made negative and set to 0.
    """
    row: Row = {"key": merge_key(group, method, spec), "kind": MERGE, "group": group.digest, "size": len(group.members)}
    row |= {"experts": ";".join(member.name for member in group.members), "tasks": ";".join(group.tasks)}
    row |= {"base_digest": group.base, "architecture": architecture, "method": method.name, "label": method.label}
    row |= {"settings": json.dumps(method.filled, sort_keys=True, default=str), "merge_seed": method.used_seed}
    row |= {"coefficients": method.for_size(len(group.members)), "evaluation": spec.text, "batchnorm": spec.batchnorm}
    row |= {CLAMPED: clamped, "tier": "measured", "n": sum(one.metrics.n for one in joint.tasks), "path": joint.path}
    row |= {name: joint.joint[name].value for name in METRICS}
    for name in ("accuracy", "loss"):
        row |= {f"{name}/{one.task}": getattr(one.metrics, name) for one in joint.tasks}
    own = [references[member.name] for member in group.members]
    for name in ("accuracy", "loss"):
        for who in ("expert", "base"):
            row[f"{who}_{name}"] = float(np.mean([one[f"{who}_{name}"] for one in own]))
    measured = np.array([one.metrics.accuracy for one in joint.tasks])
    experts = np.array([one["expert_accuracy"] for one in own])
    good = experts > 0
    row["normalised"] = float(np.mean(measured[good] / experts[good])) if good.any() else float("nan")
    row["normalised_of_means"] = float(measured.mean() / experts.mean()) if experts.mean() > 0 else float("nan")
    row["gain"] = row["accuracy"] - row["base_accuracy"]
    return row | {
        "merging_cost": row["loss"] - row["expert_loss"],
        "seconds_merge": seconds[0],
        "seconds": sum(seconds),
    }


def drawn_row(group: Group, spec: Evaluate) -> Row:
    """A group with what it was drawn for."""
    return {"key": group.key, "kind": DRAWN, **group.to_row()}


def results(merges: pd.DataFrame) -> pd.DataFrame:
    """All measured merges of a store, one row for every group that was drawn, method and evaluation.

    Args:
        merges: of ``Store.merges()``.
    """
    if not len(merges) or "kind" not in merges.columns:
        return pd.DataFrame()
    drawn = merges[merges["kind"] == DRAWN].dropna(axis=1, how="all").drop(columns=["kind"])
    measured = merges[merges["kind"] == MERGE].dropna(axis=1, how="all").drop(columns=["kind"])
    if not len(measured):
        return pd.DataFrame()
    if not len(drawn):
        return measured.reset_index(drop=True)
    only = [name for name in drawn.columns if name not in measured.columns or name in ("group", "key")]
    joined = drawn[only].rename(columns={"key": "drawn_key"}).merge(measured, on="group", how="inner", validate="m:m")
    return joined.reset_index(drop=True)


def table_of(
    groups: Sequence[Group], methods: Sequence[MergeMethod], spec: Evaluate, merges: pd.DataFrame
) -> pd.DataFrame:
    """The rows of one design, in its order, methods fastest; groups that were not measured are left out."""
    measured = merges[merges["kind"] == MERGE] if len(merges) else merges
    records = {str(row["key"]): row for row in measured.to_dict("records")} if len(measured) else {}
    found = []
    for group in groups:
        for method in methods:
            row = records.get(merge_key(group, method, spec))
            if row is not None:
                found.append({**{str(name): value for name, value in row.items()}, **group.to_row()})
    return pd.DataFrame(found).dropna(axis=1, how="all") if found else pd.DataFrame()
