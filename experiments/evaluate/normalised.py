"""Normalised performance of a merge (Yadav et al. 2024, What Matters for Model Merging at Scale?).

    held-in task:   merged / the task's own expert        held-out task:   merged / base

Both ratios and both differences are given for every task where expert and base are known.  The intervals resample test
images, jointly for the merge and what it is compared with, because both are scored on the same images (paired).

Two means over tasks are named apart: ``mean_of_ratios`` (the study's) and ``ratio_of_means``.  A ratio with a zero
denominator is NaN and said to be undefined; such tasks are left out of ``mean_of_ratios`` and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from experiments.evaluate.bootstrap import RESAMPLES, Floats, bootstrap_means, percentile
from experiments.evaluate.results import Evaluation, JointEvaluation
from experiments.evaluate.transfer import Transfer
from experiments.statistics import Estimate
from theory.errors import MergeboundError

Against = Literal["expert", "base"]
Scored = Evaluation | Transfer
"""What has a task's name, the accuracy of every test image, and the split's digest."""

MOST_UNDEFINED = 0.05
"""A ratio has no interval where a larger share of the resamples has a zero denominator."""


@dataclass(frozen=True)
class Comparison:
    """Accuracy of a merge on one task, or on a mean over tasks, against a reference.

    Attributes:
        task: its name, ``mean_of_ratios`` or ``ratio_of_means``.
        group: ``held_in`` or ``held_out``.
        against: what it is compared with: ``expert`` or ``base``.
        merged, reference: accuracies.
        ratio: merged / reference, NaN where the reference is zero.
        difference: merged - reference, in accuracy.
        undefined: share of the resamples where the reference is zero.
        n: test images.
        tasks: how many tasks it covers, and ``left_out`` how many had a zero reference.
        digest: of the split.
        protocol: whether this is the ratio that the study reports for the group.
    """

    task: str
    group: str
    against: Against
    merged: Estimate
    reference: Estimate
    ratio: Estimate
    difference: Estimate
    undefined: float
    n: int
    tasks: int = 1
    left_out: int = 0
    digest: str = ""
    seed: int = 0
    tier: Literal["measured"] = "measured"

    @property
    def protocol(self) -> bool:
        """Held-in against expert, held-out against base."""
        return (self.group, self.against) in (("held_in", "expert"), ("held_out", "base"))

    def to_row(self) -> dict[str, Any]:
        """One row of a data frame."""
        row: dict[str, Any] = {"task": self.task, "group": self.group, "against": self.against, "tier": self.tier}
        for name in ("merged", "reference", "ratio", "difference"):
            estimate = getattr(self, name)
            row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        row |= {"undefined": self.undefined, "n": self.n, "tasks": self.tasks, "left_out": self.left_out}
        return row | {"protocol": self.protocol, "split_digest": self.digest, "bootstrap_seed": self.seed}


def normalised(
    merged: Sequence[Scored] | JointEvaluation,
    *,
    experts: Mapping[str, Scored] | None = None,
    base: Mapping[str, Scored] | None = None,
    held_out: Sequence[str] = (),
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> list[Comparison]:
    """Normalised performance of a merge.

    Args:
        merged: the merge on every task.
        experts: by task, that task's own expert on it; where given.
        base: by task, the base on it; where given.
        held_out: names of the tasks that no expert was fine-tuned on; the others are held in.
        resamples, level, seed: of the paired bootstrap over test images.

    Returns:
        For each group and reference: one row for each task, then ``mean_of_ratios`` and ``ratio_of_means``.

    Raises:
        MergeboundError: an unknown held-out task, no reference for what the study reports, or evaluations on different
            test images.
    """
    scored = list(merged.tasks if isinstance(merged, JointEvaluation) else merged)
    names = [one.task for one in scored]
    for name in held_out:
        if name not in names:
            raise MergeboundError(f"held_out: {name!r} was not evaluated; there are {', '.join(names)}")
    given: dict[Against, Mapping[str, Scored]] = {"expert": experts or {}, "base": base or {}}
    out: list[Comparison] = []
    for group in ("held_in", "held_out"):
        members = [one for one in scored if (one.task in held_out) == (group == "held_out")]
        usual: Against = "expert" if group == "held_in" else "base"
        for against, references in given.items():
            pairs = [(one, references[one.task]) for one in members if one.task in references]
            if against == usual and len(pairs) < len(members):
                lacking = next(one.task for one in members if one.task not in references)
                other = ", or name it in held_out" if group == "held_in" else ""
                raise MergeboundError(
                    f"{group.replace('_', '-')} task {lacking!r} has no {against} to compare with; evaluate the "
                    f"{against} on it{other}"
                )
            if pairs:
                out += _compare(pairs, group, against, resamples, level, seed)
    return out


def _compare(
    pairs: Sequence[tuple[Scored, Scored]], group: str, against: Against, resamples: int, level: float, seed: int
) -> list[Comparison]:
    columns = [_paired(one, other) for one, other in pairs]
    sources = [one.source if isinstance(one, Evaluation) else None for one, _ in pairs]
    draws = np.stack(bootstrap_means(columns, sources=sources, resamples=resamples, seed=seed))  # (tasks, R, 2)
    values = np.array([block.mean(axis=0) for block in columns])  # (tasks, 2)
    rows = []
    for j, (one, _) in enumerate(pairs):
        row = _row(one.task, group, against, values[j], draws[j], level, seed)
        rows.append(replace(row, n=len(columns[j]), digest=one.digest))
    total = sum(len(block) for block in columns)
    pooled = _row("ratio_of_means", group, against, values.mean(axis=0), draws.mean(axis=0), level, seed)
    good = values[:, 1] > 0
    ratios = _divide(draws[good, :, 0], draws[good, :, 1])
    with np.errstate(invalid="ignore"):
        mean = float(_divide(values[good, 0], values[good, 1]).mean()) if good.any() else float("nan")
        drawn = ratios.mean(axis=0) if good.any() else np.full(draws.shape[1], np.nan)
    undefined = float(np.isnan(drawn).mean()) if len(drawn) else 0.0
    ratio = _interval(mean, drawn, undefined, level)
    averaged = replace(pooled, task="mean_of_ratios", ratio=ratio, undefined=undefined)
    averaged = replace(averaged, left_out=int((~good).sum()), n=total, tasks=len(pairs))
    return [*rows, averaged, replace(pooled, n=total, tasks=len(pairs))]


def _row(task: str, group: str, against: Against, values: Floats, draws: Floats, level: float, seed: int) -> Comparison:
    """A comparison of means (2,) with their draws (R, 2)."""
    ratio = float(_divide(values[0], values[1]))
    drawn = _divide(draws[:, 0], draws[:, 1])
    undefined = float(np.isnan(drawn).mean()) if len(drawn) else 0.0
    return Comparison(
        task,
        group,
        against,
        percentile(float(values[0]), draws[:, 0], level),
        percentile(float(values[1]), draws[:, 1], level),
        _interval(ratio, drawn, undefined, level),
        percentile(float(values[0] - values[1]), draws[:, 0] - draws[:, 1], level),
        undefined,
        0,
        seed=seed,
    )


def _interval(value: float, draws: Floats, undefined: float, level: float) -> Estimate:
    if undefined > MOST_UNDEFINED:
        return Estimate(value, float("nan"), float("nan"))
    return percentile(value, draws, level)


def _divide(top: Floats, bottom: Floats) -> Floats:
    """top / bottom, NaN where the denominator is not positive."""
    shape = np.broadcast(top, bottom).shape
    found: Floats = np.divide(top, bottom, out=np.full(shape, np.nan), where=np.asarray(bottom) > 0)
    return found


def _paired(one: Scored, other: Scored) -> Floats:
    """Correctness of two models on the same images, (n, 2).

    Raises:
        MergeboundError: the images differ.
    """
    a, b = _correct(one), _correct(other)
    same = len(a) == len(b) and one.digest == other.digest
    if same and isinstance(one, Evaluation) and isinstance(other, Evaluation):
        same = bool((one.scores.labels == other.scores.labels).all())
    if not same:
        raise MergeboundError(
            f"task {one.task!r}: the two models were scored on different test images ({len(a)} and {len(b)}, splits "
            f"{one.digest[:12] or 'unnamed'} and {other.digest[:12] or 'unnamed'}); evaluate both on the same"
        )
    return np.column_stack([a, b]).astype(float)


def _correct(scored: Scored) -> np.ndarray:
    return scored.correct if isinstance(scored, Transfer) else scored.scores.correct
