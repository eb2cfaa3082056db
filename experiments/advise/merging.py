"""Advice on experts that exist: by which method and coefficients to merge them, and which to leave out."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from experiments.advise.account import Chosen, account, changes
from experiments.advise.candidates import Candidate, candidates, judge_of, subsets_table
from experiments.advise.collecting import MergeBudget, Progress, collect_within, enough_images, halves
from experiments.advise.domain import domain_of
from experiments.advise.merge_advice import MergeAdvice
from experiments.advise.numbers import Z95, Number, around, simultaneous
from experiments.measure.predictors.merges import form, merged_vector
from experiments.measure.predictors.predict import predict_merge
from experiments.measure.predictors.statistics import FieldStatistics
from experiments.measure.predictors.zoo import ZOO
from experiments.measure.subject import Subject
from theory.errors import MergeboundError
from theory.function_space import Array, cross_entropy, joint_standard_error

VERIFY = 4
"""Merges that are evaluated by default, the average among them."""
_PRICED = ("secant", "tangent_base", "secant_tangent", "pairs", "pairs_tangent")
_LEVEL = 0.95


def advise_merge(
    subject: Subject,
    *,
    budget: MergeBudget = MergeBudget(),
    kinds: Sequence[str] | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    verify: int = VERIFY,
    nonlinear: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> MergeAdvice:
    """Choose method, coefficients and experts on one half of the calibration images, and judge on the other.

    Every candidate is priced by every predictor that the budget could collect; the ``verify`` merges that the judge
    prices lowest on the first half (the average always among them) are then formed and evaluated on the second half,
    and the one with the smallest measured joint risk is recommended.  With ``verify = 0`` nothing is evaluated, and
    the judge's price decides.

    Args:
        subject: base, experts and calibration images, at least 16 per task; at least two experts.
        budget: samples or minutes; see :class:`experiments.advise.collecting.MergeBudget`.
        kinds: what is collected, in place of a budget.
        bounds: of every coefficient; networks with BatchNorm stay in the hull of base and experts besides.
        verify: merges that are evaluated.
        nonlinear: consider TIES and DARE (they are priced only where tangents are collected).
        seed: names the power iteration and methods that draw numbers.
        progress: called with stage, done, total.

    Raises:
        MergeboundError: fewer than two experts, too few images, a negative ``verify``, or what collecting refuses.

    Source: theory.md sections 7 and 8.
    """
    started = time.perf_counter()
    if subject.size < 2:
        raise MergeboundError(f"{subject.size} expert leaves nothing to merge: give two or more")
    if verify < 0:
        raise MergeboundError(f"verify = {verify}: give 0 or more merges to evaluate")
    enough_images(subject)
    domain = domain_of(subject, bounds)
    made = collect_within(subject, budget, kinds=kinds, seed=seed, verify=verify, progress=progress)
    (chooser, choosing), (jury, judging) = halves(subject, made.statistics)
    found = candidates(choosing, domain, nonlinear=nonlinear and "tangent_base" in choosing.kinds)
    judge = judge_of(choosing)
    merges = [one.merge for one in found]
    names = [name for name in _PRICED if ZOO[name].available(choosing)]
    first = predict_merge(chooser, merges, choosing, names=names, seed=seed)
    second = predict_merge(jury, merges, judging, names=names, seed=seed)
    table = _table(found, first, second, judge, seed)
    samples = made.samples
    losses: dict[int, list[Array]] = {}
    if verify:
        chosen = _to_verify(table, verify, made.left, sum(judging.images))
        measured = _evaluate(jury, judging, [found[k] for k in chosen], seed, progress)
        samples += len(chosen) * sum(judging.images)
        for k, (numbers, own_losses) in zip(chosen, measured, strict=True):
            table.loc[k, ["measured", "measured_error", "measured_accuracy"]] = numbers
            losses[k] = own_losses
    best = _best(table)
    row, winner = table.iloc[best], found[best]
    alpha = _coefficients(jury, winner, judging, seed)
    checked = int(table["measured"].notna().sum())
    real = None
    if checked and np.isfinite(row["measured"]):
        real = around(
            float(row["measured"]), float(row["measured_error"]), "measured", seed,
            f"images; holds for all {checked} evaluated merges at once", simultaneous(checked, _LEVEL),
        )  # fmt: skip
    predicted = Number(
        float(row["predicted"]), float(row["low"]), float(row["high"]), "estimated", seed,
        f"hull of {', '.join(names)}, each with 95 % over images",
    )  # fmt: skip
    own, base = _alone(judging, seed), _of_base(judging, seed)
    account_found = account(jury, judging, alpha, (real or predicted).value, seed=seed)
    usual = next(k for k, one in enumerate(found) if one.label == "average")
    average = table.iloc[usual]
    average_number = Number(
        float(average["predicted"]), float(average["low"]), float(average["high"]), "estimated", seed
    )  # fmt: skip
    if np.isfinite(average["measured"]):
        average_number = around(
            float(average["measured"]), float(average["measured_error"]), "measured", seed, "images",
            simultaneous(checked, _LEVEL),
        )  # fmt: skip
    risk = real or predicted
    if real is None:
        losses = {k: _priced(judging, found[k], judge) for k in (best, usual)}
    mine = losses.get(best, [])
    chosen_merge = Chosen(
        winner.label, risk.value, risk.tier,
        (average_number.value - risk.value, _paired_error(losses.get(usual, []), mine, judging)),
        (base.value - risk.value, _paired_error(_losses(judging, _base_logits(judging)), mine, judging)),
        Z95 if real is None else simultaneous(checked, _LEVEL),
    )  # fmt: skip
    todo = changes(judging, account_found, chosen_merge)
    order = ["measured", "predicted"] if checked else ["predicted"]
    kept = tuple(n for n, a in zip(subject.names, alpha, strict=True) if abs(a) > 1e-3)
    return MergeAdvice(
        label=winner.label,
        method=winner.method,
        settings=dict(winner.settings),
        alpha=tuple(float(a) for a in alpha),
        experts=subject.names,
        kept=kept,
        left_out=tuple(n for n in subject.names if n not in kept),
        predicted=predicted,
        measured=real,
        accuracy=float(row["measured_accuracy"] if real is not None else row["accuracy"]),
        average=average_number,
        base=base,
        own=own,
        judge=judge,
        account=account_found,
        changes=todo,
        candidates=table.sort_values(order, na_position="last").reset_index(drop=True),
        subsets=subsets_table(choosing, domain),
        domain=domain,
        samples=samples,
        seconds=time.perf_counter() - started,
        skipped=made.skipped,
        notes=_notes(subject, judging, row, base, real, predicted),
        seed=seed,
    )


def _table(
    found: Sequence[Candidate], first: pd.DataFrame, second: pd.DataFrame, judge: str, seed: int
) -> pd.DataFrame:
    """One row per candidate: the judge's price on both halves, and the interval over all predictors on the second."""
    rows = []
    for one in found:
        mine, other = first[first["merge"] == one.label], second[second["merge"] == one.label]
        price = other[other["predictor"] == judge].iloc[0]
        rows.append(
            {
                "label": one.label,
                "method": one.method,
                "origin": one.origin,
                "coefficients": "" if one.alpha is None else ";".join(f"{a:.4f}" for a in one.alpha),
                "chosen_on": float(mine.loc[mine["predictor"] == judge, "risk"].iloc[0]),
                "predicted": float(price["risk"]),
                "low": float(other["low"].min()),
                "high": float(other["high"].max()),
                "accuracy": float(price["accuracy"]),
                "certificate": float(price["certificate_remainder"]),
                "flag": bool(price["flag"]),
                "gap": one.gap,
                "measured": np.nan,
                "measured_error": np.nan,
                "measured_accuracy": np.nan,
                "predictor": judge,
                "tier": "estimated",
                "seed": seed,
            }
        )
    return pd.DataFrame(rows)


def _to_verify(table: pd.DataFrame, verify: int, left: float | None, images: int) -> list[int]:
    """Rows to evaluate: the average, then by price on the choosing half, as far as a budget goes."""
    most = verify if left is None else min(verify, int(left // max(images, 1)))
    order = [int(k) for k in table.sort_values("chosen_on", kind="stable").index]
    average = [int(k) for k in table.index[table["label"] == "average"]]
    return list(dict.fromkeys([*average, *order]))[: max(most, 0)]


def _evaluate(
    subject: Subject,
    statistics: FieldStatistics,
    found: Sequence[Candidate],
    seed: int,
    progress: Progress | None,
) -> list[tuple[tuple[float, float, float], list[Array]]]:
    """Joint risk (nats), its standard error, and accuracy of merges on the subject's calibration images; with the
    losses of the images by task."""
    tell = progress or (lambda stage, done, total: None)
    rows = []
    for number, one in enumerate(found):
        tell("evaluating", number, len(found))
        vector = merged_vector(subject, one.merge, seed)
        losses, hits = [], []
        for j, network in enumerate(subject.networks):
            parts = [network.features(vector, part) for part in torch.split(subject.calibration[j].images, 256)]
            logits = np.asarray(torch.cat(parts).double().numpy())
            losses.append(np.minimum(cross_entropy(logits, statistics.labels[j]), 1e12))
            hits.append(float((logits.argmax(axis=-1) == statistics.labels[j]).mean()))
        error = joint_standard_error(losses, statistics.image_names())
        rows.append(((float(np.mean([v.mean() for v in losses])), error, float(np.mean(hits))), losses))
    tell("evaluating", len(found), len(found))
    return rows


def _best(table: pd.DataFrame) -> int:
    column = "measured" if table["measured"].notna().any() else "chosen_on"
    return int(np.nanargmin(table[column].to_numpy(dtype=float)))


def _coefficients(subject: Subject, one: Candidate, statistics: FieldStatistics, seed: int) -> Array:
    if one.alpha is not None:
        return np.asarray(np.round(one.alpha, 6))
    return form(subject, one.merge, statistics.groups, seed).alpha(statistics.shares())


def _priced(statistics: FieldStatistics, one: Candidate, judge: str) -> list[Array]:
    """Losses of the images by task as the judge predicts them; none for methods that are not linear."""
    if one.alpha is None:
        return []
    return _losses(statistics, [field.at(one.alpha) for field in ZOO[judge].fields(statistics)])


def _paired_error(first: Sequence[Array], second: Sequence[Array], statistics: FieldStatistics) -> float:
    """Standard error of the difference of two joint risks on the same images; NaN where one is not known by image."""
    if not first or not second:
        return float("nan")
    return joint_standard_error([a - b for a, b in zip(first, second, strict=True)], statistics.image_names())


def _alone(statistics: FieldStatistics, seed: int) -> Number:
    return _of_logits(statistics, [statistics.own_logits(j) for j in range(statistics.size)], seed)


def _of_base(statistics: FieldStatistics, seed: int) -> Number:
    return _of_logits(statistics, _base_logits(statistics), seed)


def _base_logits(statistics: FieldStatistics) -> list[Array]:
    return [statistics.base_logits(j) for j in range(statistics.size)]


def _losses(statistics: FieldStatistics, logits: Sequence[Array]) -> list[Array]:
    return [cross_entropy(h, y) for h, y in zip(logits, statistics.labels, strict=True)]


def _of_logits(statistics: FieldStatistics, logits: Sequence[Array], seed: int) -> Number:
    losses = _losses(statistics, logits)
    error = joint_standard_error(losses, statistics.image_names())
    return around(float(np.mean([v.mean() for v in losses])), error, "measured", seed, "images")


def _notes(
    subject: Subject,
    statistics: FieldStatistics,
    row: pd.Series,
    base: Number,
    real: Number | None,
    predicted: Number,
) -> tuple[str, ...]:
    notes = [
        "coefficients were chosen on one half of the calibration images and judged on the other "
        f"({min(statistics.images)} images a task); judge the final merge on images that neither half holds"
    ]
    if bool(row["flag"]):
        notes.append("predictors disagree on this merge: it may collapse, evaluate it before use")
    if real is not None and not predicted.low <= real.value <= predicted.high:
        notes.append(
            f"measured risk {real.value:.3g} lies outside the predicted interval {predicted.low:.3g} to "
            f"{predicted.high:.3g}: trust the measurement"
        )
    if (real or predicted).value >= base.value:
        notes.append("no merge that was considered is better than the base: do not merge these experts")
    if len(set(subject.tasks)) < subject.size:
        notes.append("several experts belong to the same task: each counts as a task of its own in the joint risk")
    return tuple(notes)
