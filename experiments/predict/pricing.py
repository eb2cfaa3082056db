"""The price of a planned merge: risks with standard errors, the bracket's verdict, the master bound."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.measure.function_space import GroupStatistics, predicted_logits
from experiments.predict.plans import Plan
from experiments.predict.report import KINDS, OBJECTIVES, Estimate, MasterBound, MethodPrediction, Objective, TaskRisk
from experiments.predict_group import Group
from merging.registry import get
from theory.function_space import Array, cross_entropy, uniform_weights
from theory.risk import network_bound

NARROW, WIDE = 1.25, 2.0
"""Largest over smallest of secant, tangent and middle: up to NARROW it is trusted, from WIDE on it warns."""


def priced(
    group: Group,
    stats: GroupStatistics,
    plan: Plan,
    own: Sequence[Array],
    base_risk: float,
    stiffness: Array | None,
    seed: int,
) -> MethodPrediction:
    kinds = {name: kind for name, kind in KINDS.items() if kind == "secant" or stats.base_products}
    logits = {name: predicted_logits(stats, plan.point, kind) for name, kind in kinds.items()}
    losses = {
        name: [cross_entropy(h, y) for h, y in zip(found, stats.labels, strict=True)] for name, found in logits.items()
    }
    if plan.clamped > 0.0:
        losses = {name: [np.full_like(values, np.nan) for values in found] for name, found in losses.items()}
    joint = {name: joint_estimate(group, values) for name, values in losses.items()}
    headline: Objective = "middle" if "middle" in joint else "secant"
    cost = joint_estimate(group, [a - b for a, b in zip(losses[headline], own, strict=True)])
    hits = [(h.argmax(axis=1) == y).astype(np.float64) for h, y in zip(logits[headline], stats.labels, strict=True)]
    accuracy = joint_estimate(group, hits) if plan.clamped == 0.0 else Estimate(float("nan"), float("nan"))
    width, verdict, advice = _verdict(joint, base_risk, plan.clamped)
    return MethodPrediction(
        label=plan.label,
        method=plan.method,
        settings=plan.settings,
        coefficients=tuple(float(v) for v in plan.point.alpha),
        linear=plan.linear,
        risk=joint[headline],
        secant=joint["secant"],
        tangent=joint.get("tangent"),
        cost=cost,
        accuracy=accuracy,
        width=width,
        verdict=verdict,
        advice=advice,
        tasks=tuple(
            TaskRisk(name, *(task_estimate(losses[kind][j]) if kind in losses else None for kind in OBJECTIVES))
            for j, name in enumerate(group.names)
        ),
        dispersion=plan.point.dispersion,
        optimality_gap=plan.gap,
        clamped=plan.clamped,
        bound=None if stiffness is None else _bound(group, plan, own, stiffness, stats.gram),
        command=_command(group, plan, seed),
    )


def joint_estimate(group: Group, losses: Sequence[Array]) -> Estimate:
    """Mean over tasks of the mean loss; tasks on the same images are added image by image before the error is taken.

    The error is NaN where a source has one image: its spread is not known.
    """
    p = uniform_weights(group.size)
    by_source: dict[int, Array] = {}
    for j, source in enumerate(group.sources):
        by_source[source] = by_source.get(source, 0.0) + p[j] * losses[j]
    value = sum(float(values.mean()) for values in by_source.values())
    variance = sum(_squared_error(values) for values in by_source.values())
    return Estimate(value, float(np.sqrt(variance)))


def task_estimate(losses: Array) -> Estimate:
    """Mean loss with its standard error (NaN for one image)."""
    return Estimate(float(losses.mean()), float(np.sqrt(_squared_error(losses))))


def _squared_error(losses: Array) -> float:
    return float(losses.var()) / (len(losses) - 1) if len(losses) > 1 else float("nan")


def _verdict(joint: Mapping[Objective, Estimate], base_risk: float, clamped: float) -> tuple[float | None, str, str]:
    if clamped > 0.0:
        return (
            None,
            "wide",
            f"{clamped:.1%} of BatchNorm's running variances become negative and are clamped at 0, which no prediction "
            "sees: expect collapse; keep coefficients nonnegative with sum at most 1, or re-estimate the statistics",
        )
    if "tangent" not in joint:
        return None, "unknown", "secant only: no bracket; --tangent adds it"
    values = [joint[name].value for name in OBJECTIVES]
    low, high = min(values), max(values)
    error = float(np.maximum(joint["secant"].standard_error, joint["tangent"].standard_error))  # NaN wins
    width = high - low
    if not np.isfinite(error):
        return width, "unknown", "one image of a task tells no sampling error: give more images"
    if low > base_risk + 2.0 * error:
        return width, "wide", "worse than the base by every prediction: collapse; do not merge like this"
    if width <= max((NARROW - 1.0) * low, error):
        return width, "narrow", "trust the prediction"
    if high >= WIDE * low and high > base_risk:
        return width, "wide", "collapse is possible and the value uncertain: do not merge like this without evaluating"
    return width, "medium", "merging hurts: read it as a ranking and evaluate the merge before use"


def _bound(group: Group, plan: Plan, own: Sequence[Array], stiffness: Array, gram: Array) -> MasterBound:
    """Three terms from measured V and L and held-out risks; the operator matters through V alone."""
    bound = network_bound(
        np.array([float(losses.mean()) for losses in own]),
        stiffness,
        np.sqrt(np.diag(gram)),
        names=group.names,
        dispersion=plan.point.dispersion,
        trained_heads=bool(group.patterns),
        held_out=True,
    )
    return MasterBound(
        float(bound.value),
        bound.tier,
        {term.name: float(term.value) for term in bound.terms},
        {term.name: float(term.share) for term in bound.terms},
        bool(float(bound.value) >= float(np.mean(np.log(group.classes)))),
        bound.assumptions,
    )


def _command(group: Group, plan: Plan, seed: int) -> str:
    parts = ["mergebound", "merge", "--method", plan.method, "--base", str(group.base_path)]
    if plan.alpha is not None:
        parts.append("--alpha=" + ",".join(repr(value) for value in plan.alpha))
    for name, value in plan.settings.items():
        parts += ["--set", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    if not get(plan.method).deterministic:
        parts += ["--seed", str(seed)]
    for pattern in group.patterns or ("",):
        parts += ["--private", pattern]
    return shlex.join([*parts, "--out", "merged.safetensors", *map(str, group.expert_paths)])
