"""A4 and what needs it: smoothness, convexity and step sizes (theory.md sections 1, 4, 6).

Eigenvalues found by iteration are Rayleigh quotients: the true L is at least as large.  They can therefore refute a
step size, a stated L or convexity, and never prove one: what holds everywhere comes from a theorem
(:func:`experiments.measure.curvature.global_smoothness.global_smoothness`) or is stated, and then held against all
numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.func import grad

from experiments.grid.run_spec import RunSpec
from experiments.measure.noise.objective import Objective
from experiments.measure.noise.recipe import learning_rates
from experiments.measure.verdicts.finding import Evidence, Finding, Leaning, finding

_WITHOUT = "statements without L: 6(d) gradient log, cap, output certificate"
SLACK = 1e-4
"""Relative rounding of curvatures and gradients in float32."""


def secant_smoothness(points: Sequence[Objective], inputs: Tensor, labels: Tensor, *, pieces: int = 4) -> Evidence:
    """Largest ``|grad F(a) - grad F(b)| / |a - b|`` of neighbours on the polygon through some points.

    Args:
        points: one objective at each point of the path, in order; of the same coordinates.
        inputs, labels: samples that make F.
        pieces: equal parts of every edge.

    Returns:
        A lower estimate of L of F that also sees what lies between the points (kinks, too); NaN where nothing moved.
    """
    slope = grad(points[0].mean)
    largest = float("nan")
    with torch.no_grad():
        for first, second in pairwise(points):
            line = [torch.lerp(first.theta, second.theta, k / pieces) for k in range(pieces + 1)]
            slopes = [slope(theta, inputs, labels) for theta in line]
            largest = float(np.fmax(largest, steepest(line, slopes)))
    covers = f"{len(labels)} samples, {pieces} pieces of each of {len(points) - 1} edges: errs low"
    return Evidence("largest change of the gradient per length on the path", largest, largest, float("inf"), covers)


def steepest(line: Sequence[Tensor], slopes: Sequence[Tensor]) -> float:
    """Largest ``|g_b - g_a| / |b - a|`` of neighbours; NaN where no two neighbours differ."""
    largest = float("nan")
    for (a, at_a), (b, at_b) in pairwise(zip(line, slopes, strict=True)):
        length = float((b - a).double().norm())
        if length > 0.0:
            largest = float(np.fmax(largest, float((at_b - at_a).double().norm()) / length))
    return largest


def judge_smooth(
    about: str,
    *,
    key: str = "smooth",
    curvature: Evidence | None = None,
    secant: Evidence | None = None,
    certified: float | None = None,
    reason: str = "",
    kinks: Sequence[str] = (),
    stated: float | None = None,
) -> Finding:
    """A4.

    Args:
        about: expert, or ``merge``.
        key: ``smooth`` or ``smooth_merged``.
        curvature: largest absolute eigenvalue seen at points; ``high`` is a probable limit there (or infinite).
        secant: of :func:`secant_smoothness`.
        certified: L that a theorem gives for every point, and ``reason``.
        kinks: operations whose derivative jumps.
        stated: L that is claimed.
    """
    evidence = tuple(e for e in (curvature, secant) if e is not None and not np.isnan(e.value))
    seen_largest = max((e.value for e in evidence), default=float("nan"))
    if stated is not None:
        claim = Evidence.exact("stated L", stated, "claimed")
        if seen_largest > stated * (1 + SLACK):
            why = f"L = {stated:.4g} is stated, but {seen_largest:.4g} was measured"
            remedy = f"state L of {seen_largest:.3g} or more"
            return finding(key, about, "violated", why, claim, *evidence, remedy=remedy)
        why = f"L = {stated:.4g} is stated, and nothing measured exceeds it"
        return finding(key, about, "holds", why, claim, *evidence)
    if certified is not None:
        bound = Evidence.exact("L", certified, "theorem, given the images")
        return finding(key, about, "holds", reason or "a theorem gives L", bound, *evidence)
    if kinks:
        count = Evidence.exact("operations whose derivative jumps", len(kinks), "recorded graph")
        why = f"the gradient jumps where {', '.join(sorted(set(kinks)))} switch; L at points says nothing about that"
        remedy = f"use smooth units (GELU, SiLU, tanh), or {_WITHOUT}"
        return finding(key, about, "violated", why, count, *evidence, remedy=remedy)
    leaning: Leaning = "for" if evidence else "nothing"
    why = "no global L is known; measured at points only" if evidence else reason or "nothing was measured"
    if curvature is not None and secant is not None and secant.value > curvature.value * (1 + SLACK):
        leaning = "against"
        why = "between the points the gradient changes faster than the curvature at the points allows"
    remedy = f"take more points, or {_WITHOUT}"
    return finding(key, about, "unknown", why, *evidence, seen=leaning, remedy=remedy)


def judge_convex(
    name: str, lowest: Evidence | None, highest: Evidence | None, *, linear: bool = False, stated: bool = False
) -> Finding:
    """Convexity: a linear classifier's cross-entropy is convex; a negative Rayleigh quotient refutes it.

    Args:
        name: of the expert.
        lowest, highest: ends of the spectrum seen; ``lowest`` is a Rayleigh quotient (the true end is at or below).
        linear: the loss is a convex function of a linear map of what was trained.
        stated: convexity is claimed.
    """
    evidence = tuple(e for e in (lowest, highest) if e is not None)
    if lowest is not None:
        scale = max(abs(lowest.value), 0.0 if highest is None else abs(highest.value))
        if lowest.value < -SLACK * scale and lowest.value < 0:
            why = f"curvature {lowest.value:.3g} was seen: the loss is not convex"
            remedy = "take curvature = 'smooth' in the recipe, or a measured kappa"
            return finding("convex", name, "violated", why, *evidence, remedy=remedy)
    if linear or stated:
        why = "a linear classifier with the cross-entropy" if linear else "stated, and no negative curvature was seen"
        return finding("convex", name, "holds", why, *evidence)
    seen: Leaning = "for" if lowest is not None else "nothing"
    return finding("convex", name, "unknown", "no negative curvature was seen at the points", *evidence, seen=seen)


def momentum_limit(momentum: float, *, nesterov: bool = False) -> float:
    """Largest ``eta (L + omega)`` of the certified convex momentum response at constant eta (theory.md section 4).

    ``2 (1 - beta)^2/(1 + beta)`` for heavy ball, ``2 (1 - beta)^2/(1 - beta + 2 beta^2)`` for Nesterov's form.
    """
    below = 1.0 - momentum + 2.0 * momentum**2 if nesterov else 1.0 + momentum
    return 2.0 * (1.0 - momentum) ** 2 / below


def judge_steps(
    name: str,
    run: RunSpec | None,
    curvature: Evidence | None,
    *,
    certified: float | None = None,
    learning_rate: float | None = None,
) -> tuple[Finding, Finding, Finding]:
    """The three step-size conditions: descent lemma, steps that do not expand, momentum.

    Args:
        name: of the expert.
        run: its recipe; of it the largest eta_k, beta, omega.
        curvature: L: ``value`` the largest eigenvalue of a batch seen (the truth is at least that), ``high`` a limit.
        certified: L that holds everywhere (from a theorem, or stated).
        learning_rate: in place of a recipe (plain SGD, no decay).
    """
    if run is None and learning_rate is None:
        why, remedy = "the learning rate is not known", "open the grid's store, or give --learning-rate"
        return tuple(finding(k, name, "unknown", why, remedy=remedy) for k in _STEPS)  # type: ignore[return-value]
    rate = learning_rate if run is None else float(learning_rates(run).max())
    assert rate is not None
    omega = 0.0 if run is None or run.optimizer == "adamw" else run.weight_decay
    beta = 0.0 if run is None else run.momentum
    nesterov = run is not None and run.nesterov
    constant = run is None or (run.schedule == "constant" and run.warm_up == 0)
    limits = {
        "step_descent": (1.0, True),
        "step_nonexpansive": (2.0, True),
        "step_momentum": (momentum_limit(beta, nesterov=nesterov), constant),
    }
    return tuple(  # type: ignore[return-value]
        _step(key, name, rate, omega, curvature, certified, limit, provable)
        for key, (limit, provable) in limits.items()
    )


_STEPS = ("step_descent", "step_nonexpansive", "step_momentum")


def _step(
    key: str,
    name: str,
    rate: float,
    omega: float,
    curvature: Evidence | None,
    certified: float | None,
    limit: float,
    provable: bool,
) -> Finding:
    eta = Evidence.exact("largest eta", rate, "recipe")
    most = Evidence.exact("limit of eta (L + omega)", limit, "theorem")
    evidence = [eta, most]
    value = low = high = float("nan")
    if curvature is not None:
        value, low, high = (rate * (v + omega) for v in (curvature.value, curvature.low, curvature.high))
        covers = f"{curvature.covers}; L errs low"
        evidence.insert(0, Evidence("eta (L + omega) seen", value, low, high, covers, curvature.seed))
    if value > limit * (1 + SLACK):
        why = f"eta (L + omega) is {value:.3g} or more, above {limit:.3g}"
        eta_most = limit / (curvature.value + omega) if curvature is not None else float("nan")
        remedy = f"eta of {eta_most:.2g} at most, or forms for any step size: 6(d), measured kappa"
        return finding(key, name, "violated", why, *evidence, remedy=remedy)
    if certified is not None and provable:
        sure = rate * (certified + omega)
        evidence.insert(0, Evidence.exact("eta (L + omega), L certified or stated", sure, "theorem"))
        if sure <= limit:
            return finding(key, name, "holds", f"eta (L + omega) <= {sure:.3g} everywhere", *evidence)
        why = f"{sure:.3g} by the certified L, above {limit:.3g}; measured curvature does not decide"
        return finding(key, name, "unknown", why, *evidence)
    if curvature is None:
        return finding(key, name, "unknown", "no curvature was measured", *evidence)
    why = "no batch or point that was looked at breaks it"
    if not provable:
        why += "; the limit is that of a constant learning rate, and the run has a schedule"
    return finding(key, name, "unknown", why, *evidence, seen="for" if value <= limit else "nothing")
