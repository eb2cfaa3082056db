"""Theorem 1 (theory section 3): from stability to the risk of the merged model, on average and with high probability.

* :func:`theorem_1`: ``sqrt E F(M) <= sqrt E F_S(M) + sqrt(sum p_i L_i/2 E ||M_i - M_i'||^2)`` (no Lipschitz constant);
* :func:`l1_gap`: ``E[F(M) - F_S(M)] <= sum p_i c_i G_i D_i tau_i/n_i`` (G-Lipschitz losses, any sampling);
* :func:`high_probability`: the same gap plus a deviation that holds with probability ``1 - delta`` over the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from theory.assemble import base_assumptions, measured_run, refuse_broken
from theory.assumptions import Assumption, Tier, tier_of
from theory.checks import amounts, fitting, fitting_experts, summing_to_one
from theory.clocks import Clock, Steps, clock, log_response, write_out
from theory.dispersion import smallest
from theory.errors import AssumptionError, RecipeError
from theory.expert_terms import epsilon_inputs, expert_epsilon
from theory.master import lifted
from theory.operators import operator_assumptions, sensitivity
from theory.operators.of_merge import _lift
from theory.recipe import Expert, Merge, _numbers, per_expert
from theory.stability import largest_gap
from theory.symbolic import FloatArray, Formula, evaluate, times, vacuous
from theory.symbols import symbol


def theorem_1_formula() -> Formula:
    """``(sqrt(R) + sqrt(I))^2`` with ``I = sum p_i L_i/2 E ||M_i - M_i'||^2``."""
    import sympy

    R, instability = symbol("R"), symbol("I")
    return Formula("risk", ("R", "I"), (sympy.sqrt(R) + sympy.sqrt(instability)) ** 2, "Theorem 1")


def l1_formula() -> Formula:
    """One expert's share of the gap: ``p c G D tau / n``."""
    keys = ("p", "c", "G", "D_inf", "tau", "n")
    p, c, G, gap, tau, n = (symbol(key) for key in keys)
    return Formula("gap", keys, p * c * G * gap * tau / n, "Theorem 1, l1 form")


def deviation_formula() -> Formula:
    """McDiarmid's deviation ``sqrt(log(1/delta)/2 * Q)``, Q the sum of squared influences of the samples."""
    import sympy

    Q, delta = symbol("Q"), symbol("delta")
    expression = sympy.sqrt(sympy.log(1 / delta) * Q / 2)
    return Formula("deviation", ("Q", "delta"), expression, "Theorem 1, high probability")


@vacuous
def theorem_1(empirical_risk: ArrayLike, weights: ArrayLike, smoothness: ArrayLike, stability: ArrayLike) -> FloatArray:
    """Theorem 1: bound on E F(M) from E F_S(M) (shape ``(...)``) and the stability of the merged model.

    ``stability`` is ``E ||M_i - M_i'||^2`` per task (param^2, averaged over the exchanged sample), as from
    :func:`task_stability`; ``weights`` p, ``smoothness`` L_i and ``stability`` have shape ``(N, ...)``.  Assumes A1-A4.
    *Tight* as Lemma 1 is; squared, it is Lei-Ying (2020, Theorem 2b) at its optimal parameter.

    >>> float(theorem_1(0.25, [0.5, 0.5], [2.0, 2.0], [0.25, 0.25]))
    1.0
    """
    where = "Theorem 1"
    (risk,) = amounts(where, empirical_risk=empirical_risk)
    p, L, moved = amounts(where, weights=weights, smoothness=smoothness, stability=stability)
    fitting_experts(where, weights=p, smoothness=L, stability=moved)
    p, L, moved = lifted(p, L, moved)
    summing_to_one(where, p)
    fitting(where, empirical_risk=risk, stability=moved[0])
    return evaluate(theorem_1_formula, risk, times(p * L / 2, moved).sum(axis=0))


@dataclass(frozen=True, eq=False)
class GapBound:
    """A bound on ``E[F(M) - F_S(M)]`` (loss): ``value`` (shape ``(...)``), what each expert adds, and by which form.

    ``displacement`` (shape ``(N, ...)``, param) bounds the mean distance of an expert's twins.
    """

    value: FloatArray
    contributions: FloatArray
    displacement: FloatArray
    forms: tuple[str, ...]
    tier: Tier
    assumptions: tuple[Assumption, ...]
    measured: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ConfidentRisk:
    """``F(M) <= value`` with probability at least ``1 - delta``: ``value = empirical_risk + shift + deviation`` (loss).

    ``reach`` (shape ``(N, ...)``, param) is the distance s_i that twins never exceed, ``joint_reach`` S_i bounds the
    root of the sum of their squares over all samples (``S_i <= sqrt(n_i) s_i``).
    """

    value: FloatArray
    shift: FloatArray
    deviation: FloatArray
    reach: FloatArray
    joint_reach: FloatArray
    delta: FloatArray
    tier: Tier
    assumptions: tuple[Assumption, ...]
    measured: tuple[str, ...]


@np.errstate(all="ignore")
def mean_displacement(expert: Expert, timing: Clock | None = None) -> tuple[FloatArray, str]:
    """Bound on ``(1/n) sum_j E ||x - x^(j)||`` of one expert (shape ``(...)``, param), and its form.

    ``D tau/n`` for any sampling with the largest gap (``D_inf`` or 2G) or an envelope, for independent batches also
    with ``D_2`` (the multiplicity is independent of the gap); never more than the L2 stability (Jensen).
    """
    found: dict[str, FloatArray] = {}
    try:
        timing = clock(expert) if timing is None else timing
    except RecipeError:
        timing = None
    if timing is not None:
        gaps = {"D_inf tau/n": expert.D_inf, "D_envelope tau/n": expert.D_envelope}
        if expert.G is not None:
            gaps["2 G tau/n"] = 2 * np.asarray(expert.G, dtype=np.float64)
        if expert.sampling != "reshuffle":
            gaps["D_2 tau/n"] = expert.D_2
        n = np.asarray(expert.n, dtype=np.float64)
        found = {form: times(gap, timing.tau / n) for form, gap in gaps.items() if gap is not None}
    try:
        value, form = expert_epsilon(expert, timing)
        found[" or ".join(f"L2 {name}" for name in form.split(" or "))] = value
    except RecipeError:
        if not found:
            raise
    return smallest(found)


@np.errstate(all="ignore")
def l1_gap(merge: Merge) -> GapBound:
    """The l1 form of Theorem 1: ``E[F(M) - F_S(M)] <= sum_i p_i G_i c_i (mean twin distance of expert i)``.

    Needs ``G`` of every expert (Lipschitz constant of its losses in everything that is trained).  Any sampling with
    marginal rate b/n.  Trained heads: ``max(1, c_i)`` takes the place of c_i.  ``shared_samples``: all copies of a
    sample are exchanged at once, and expert l adds ``c_l n_l/n_i`` times its distance to task i.  *Upper* (linear
    growth of the twins along the direction of the loss).  Raises :class:`RecipeError` if G is missing,
    :class:`AssumptionError` for broken A2 or A3 and for uncovered optimizers without a measured stability.

    >>> run = dict(n=100, batch_size=10, learning_rate=0.1, steps=50, curvature="convex", L=1.0, G=1.0)
    >>> gap = l1_gap(Merge((Expert("a", **run), Expert("b", **run))))
    >>> round(float(gap.value), 6), gap.forms[0]  # 2 G^2 tau / (N n): Hardt, Recht and Singer, divided by N
    (0.05, '2 G tau/n')
    """
    refuse_broken(merge)
    rows = [mean_displacement(expert) for expert in merge.experts]
    c, moved, n, p, G, trained = lifted(
        sensitivity(merge),
        _stack([row[0] for row in rows]),
        _stack([_field(expert, "n") for expert in merge.experts]),
        per_expert(merge, "weights"),
        _stack([_lipschitz(expert) for expert in merge.experts]),
        [float(expert.head == "trained") for expert in merge.experts],
    )
    own = times(np.where(trained > 0, np.maximum(c, 1.0), c), moved)
    if merge.shared_samples:
        others = times(c, moved) * n
        total = np.stack([np.delete(others, i, axis=0).sum(axis=0) for i in range(merge.size)])
        own = own + total / n
    parts = times(p * G, own)
    assumptions, measured = _audit(merge, [row[1] for row in rows])
    return GapBound(
        value=np.asarray(parts.sum(axis=0)),
        contributions=parts,
        displacement=moved,
        forms=tuple(row[1] for row in rows),
        tier=tier_of(assumptions, measured),
        assumptions=tuple(assumptions),
        measured=tuple(measured),
    )


@vacuous
def twin_reach(expert: Expert, timing: Clock | None = None) -> FloatArray:
    """Distance s that twins of one expert never exceed, whatever the seeds (param, shape ``(...)``).

    Reshuffling: ``D sum over epochs of max_{k in epoch} w_k/b_k`` with actual batch sizes, because a sample is drawn
    at most once per epoch.  Batches without replacement: ``D sum w_k/b_k``; with replacement: ``D sum w_k`` (the
    sample may fill a batch).  D is ``D_inf``, or 2G.
    """
    D = largest_gap(expert)
    timing = clock(expert) if timing is None else timing
    log_w = log_response(expert) if timing.log_w is None else timing.log_w
    return times(D, sure_response(log_w, write_out(expert), expert.sampling))


@vacuous
def joint_reach(expert: Expert, timing: Clock | None = None) -> FloatArray:
    """Bound S on ``sqrt(sum_j s_j^2)``, s_j the distance of the twins of sample j, whatever the seeds (param, (...)).

    *Statement:* given the seeds ``s_j <= D sum_k (w_k/b_k) I_kj``.  Reshuffling: ``S = D sum over epochs of sqrt(sum_{k
    in epoch} w_k^2/b_k)``; batches without replacement: ``D sum w_k/sqrt(b_k)``; with replacement: ``D sum w_k``.
    *Proof:* Minkowski over epochs (or steps); the 2-norm of I_k over samples is ``sqrt(b_k)`` for distinct samples and
    at most b_k otherwise.  Never more than ``sqrt(n)`` times :func:`twin_reach`, and less by ``sqrt(b/n)`` without
    replacement, by ``1/sqrt(n)`` with, and under reshuffling where w_k changes in an epoch.

    >>> run = Expert("a", n=100, batch_size=4, learning_rate=0.1, steps=3, curvature="convex", L=1.0, D_inf=1.0)
    >>> float(joint_reach(run)), 10 * float(twin_reach(run))  # 3 * 0.1/2, and 10 * 3 * 0.1/4
    (0.15000000000000002, 0.7500000000000001)
    """
    D = largest_gap(expert)
    timing = clock(expert) if timing is None else timing
    log_w = log_response(expert) if timing.log_w is None else timing.log_w
    return times(D, sure_norm(log_w, write_out(expert), expert.sampling))


@vacuous
def sure_norm(log_w: FloatArray, steps: Steps, sampling: str) -> FloatArray:
    """Bound on the 2-norm over samples of ``sum_k (w_k/b_k) I_k`` for every outcome of a sampling; as above."""
    w = np.where(steps.present, np.exp(log_w), 0.0)
    if sampling == "with_replacement":
        return np.asarray(w.sum(axis=-1))
    if sampling == "without_replacement":
        return np.asarray((w / np.sqrt(steps.batch_size)).sum(axis=-1))
    squares = w**2 / steps.batch_size
    total, epoch = np.zeros(w.shape[:-1]), np.zeros(w.shape[:-1])
    for k in range(w.shape[-1]):
        starts = steps.position[..., k] == 0
        total = np.where(starts, total + np.sqrt(epoch), total)
        epoch = np.where(starts, 0.0, epoch) + squares[..., k]
    return np.asarray(total + np.sqrt(epoch))


@vacuous
def sure_response(log_w: FloatArray, steps: Steps, sampling: str) -> FloatArray:
    """The largest possible ``sum_k (w_k/b_k) I_k`` over all outcomes of a sampling; ``log_w`` of shape ``(..., K)``."""
    w = np.exp(log_w)
    if sampling == "with_replacement":
        return np.asarray(w.sum(axis=-1))
    pushes = np.where(steps.present, w / steps.batch_size, 0.0)
    if sampling == "without_replacement":
        return np.asarray(pushes.sum(axis=-1))
    total, highest = np.zeros(pushes.shape[:-1]), np.zeros(pushes.shape[:-1])
    for k in range(pushes.shape[-1]):
        starts = steps.position[..., k] == 0
        total = np.where(starts, total + highest, total)
        highest = np.maximum(np.where(starts, 0.0, highest), pushes[..., k])
    return np.asarray(total + highest)


@np.errstate(all="ignore")
def high_probability(
    merge: Merge, empirical_risk: ArrayLike, delta: ArrayLike, *, surely: ArrayLike | None = None
) -> ConfidentRisk:
    """Theorem 1 with high probability: ``F(M) <= F_S(M) + shift + deviation`` with probability at least ``1 - delta``.

    ``shift = sum p_i G_i c_i D_i tau_i/n_i``; ``deviation = sqrt(log(1/delta)/2 sum_i (2 G c_i S_i + p_i
    B_i/sqrt(n_i))^2)`` with ``G = sum p_t G_t`` and S_i of :func:`joint_reach`.  *Proof:* McDiarmid's inequality given
    the seeds; sample ij moves ``F(M) - F_S(M)`` by at most ``2 G c_i s_ij + p_i B_i/n_i``, and the 2-norm over j obeys
    Minkowski; the shift holds given the seeds because every batch holds b_k samples.  ``S_i <= sqrt(n_i) s_i`` gives
    theory section 3's form.  ``empirical_risk`` is F_S(M) of the merge at hand (loss), ``delta`` in (0, 1); both
    broadcast.

    Assumes, on all reachable x and for every sample set: losses in [0, B_i], G_i-Lipschitz, gaps at most D_i (2G);
    step factors known (L, no measured kappa); no momentum; heads not trained; independent samples.  c_i must hold for
    every seed: DARE's is ``lambda/(1-drop)``, not its root mean square; ``surely`` (shape ``(N, ...)``) gives it for
    DELLA, ``operator("della").effect(...).surely``, whose ``sensitivity`` is a mean square.  Reshuffling is the case of
    interest; under independent batches S_i covers seeds that draw one batch again and again.  Raises
    :class:`RecipeError` or :class:`AssumptionError` naming what is missing.

    >>> run = dict(n=1000, batch_size=10, learning_rate=0.01, steps=200, curvature="convex", L=1.0, G=1.0, B=1.0)
    >>> pair = Merge((Expert("a", sampling="reshuffle", **run), Expert("b", sampling="reshuffle", **run)))
    >>> found = high_probability(pair, empirical_risk=0.1, delta=0.05)
    >>> round(float(found.shift), 6), round(float(found.deviation), 4)
    (0.002, 0.2463)
    """
    refuse_broken(merge)
    if merge.shared_samples:
        raise AssumptionError(
            "high probability: shared_samples is true, but McDiarmid's inequality needs independent samples; use l1_gap"
        )
    level = _numbers("high probability", "delta", delta)
    risk = _numbers("high probability", "empirical_risk", empirical_risk)
    if not np.all((level > 0) & (level < 1)):
        raise RecipeError(
            "high probability: delta is outside (0, 1); give the probability of failure, for example 0.05"
        )
    if not np.all(risk >= 0):
        raise RecipeError("high probability: empirical_risk is negative or no number; give F_S(M), at least 0")
    for expert in merge.experts:
        _refuse_uncertain(expert)
    timings = [clock(expert) for expert in merge.experts]
    pairs = list(zip(merge.experts, timings, strict=True))
    reach = _stack([twin_reach(expert, timing) for expert, timing in pairs])
    joint = _stack([joint_reach(expert, timing) for expert, timing in pairs])
    mean = _stack(
        [times(largest_gap(expert), timing.tau / np.asarray(expert.n, dtype=np.float64)) for expert, timing in pairs]
    )
    fields = [_stack([_field(expert, name) for expert in merge.experts]) for name in ("n", "G", "B")]
    p, c = per_expert(merge, "weights"), _surely_sensitive(merge, surely)
    p, c, n, G, B, s, S, mean = lifted(p, c, *fields, reach, joint, mean)
    shift = times(p * c * G, mean).sum(axis=0)
    influence = times(times(2 * times(p, G).sum(axis=0), c), S) + p * B / np.sqrt(n)  # 2-norm over the samples
    spread = (influence**2).sum(axis=0)
    deviation = np.where(spread == 0, 0.0, evaluate(deviation_formula, spread, level))
    assumptions, measured = _audit(merge, ["D_inf tau/n"] * merge.size)
    measured += [
        f"{expert.name}: {name}"
        for expert in merge.experts
        for name in expert.is_measured("B", *(("D_inf",) if expert.D_inf is not None else ()))
    ]
    return ConfidentRisk(
        value=risk + shift + deviation,
        shift=shift,
        deviation=deviation,
        reach=s,
        joint_reach=S,
        delta=level,
        tier=tier_of(assumptions, measured),
        assumptions=tuple(assumptions),
        measured=tuple(dict.fromkeys(measured)),
    )


def _lipschitz(expert: Expert) -> FloatArray:
    if expert.G is None:
        raise RecipeError(
            f"expert {expert.name!r}: G is missing; the l1 form needs the Lipschitz constant of the losses (Theorem 1 "
            "itself, in master_bound, does not)"
        )
    return np.asarray(expert.G, dtype=np.float64)


def _field(expert: Expert, name: str) -> FloatArray:
    if name == "G":
        return _lipschitz(expert)
    value = getattr(expert, name)
    if value is None:
        raise RecipeError(
            f"expert {expert.name!r}: {name} is missing; the high-probability form needs losses in [0, B]"
        )
    return np.asarray(value, dtype=np.float64)


def _refuse_uncertain(expert: Expert) -> None:
    if np.any(np.asarray(expert.momentum) != 0):
        raise AssumptionError(f"expert {expert.name!r}: momentum is not 0, which the high-probability form needs")
    if expert.kappa is not None:
        raise AssumptionError(
            f"expert {expert.name!r}: kappa is measured, but the high-probability form needs step factors that hold "
            "for every sample set; give L and the curvature class instead"
        )
    if expert.head == "trained":
        raise AssumptionError(
            f"expert {expert.name!r}: head is 'trained', but the high-probability form needs frozen heads; use l1_gap"
        )


def _surely_sensitive(merge: Merge, surely: ArrayLike | None) -> FloatArray:
    """c_i for every fixed seed: DARE multiplies by at most ``1/(1-drop)`` (rescaled) or 1, whatever c was given."""
    if surely is not None:
        c = _numbers("high probability", "surely", surely)
        if c.ndim == 0 or c.shape[0] != merge.size or not np.all(np.isfinite(c) & (c >= 0)):
            raise RecipeError(
                f"high probability: surely has shape {c.shape} or holds numbers below 0; give one finite sensitivity "
                f"of at least 0 for each of the {merge.size} experts, valid for every seed"
            )
        return c
    if merge.method == "della":
        raise AssumptionError(
            "high probability: the sensitivity of 'della' may be a root mean square over its random masks, but this "
            "form needs one that holds for every seed; give surely, from operator('della').effect(...).surely"
        )
    if merge.method != "dare":
        return sensitivity(merge)
    drop = np.asarray(merge.drop_rate, dtype=np.float64)[None]
    alpha, keep = _lift(np.abs(per_expert(merge, "coefficients")), 1 - drop)
    every_seed = np.asarray(alpha / keep if merge.rescale else alpha)
    if merge.sensitivity is None:
        return every_seed
    return np.maximum(*_lift(sensitivity(merge), every_seed))


_FIELDS = {
    "D_inf tau/n": ("D_inf",),
    "D_envelope tau/n": ("D_envelope",),
    "2 G tau/n": ("G",),
    "D_2 tau/n": ("D_2",),
}


def _audit(merge: Merge, forms: Sequence[str]) -> tuple[list[Assumption], list[str]]:
    measured: list[str] = []
    for expert, form in zip(merge.experts, forms, strict=True):
        names: tuple[str, ...] = ("G",)
        for alternative in form.split(" or "):
            names += _FIELDS.get(alternative) or epsilon_inputs(expert, alternative.removeprefix("L2 "))
        if expert.L is not None or expert.kappa is not None:
            names += ("kappa",) if expert.kappa is not None else ("L", "mu")
        given = [name for name in dict.fromkeys(names) if getattr(expert, name) is not None]
        measured += [f"{expert.name}: {name}" for name in expert.is_measured(*given)]
    if merge.sensitivity is not None and "sensitivity" in merge.measured:
        measured.append("merge: sensitivity")
    measured += measured_run(merge)
    assumptions = base_assumptions(
        shared=merge.shared_samples,
        choices=merge.data_independent_choices,
        per_sample=merge.per_sample_loss,
        measured_smoothness=any("L" in expert.measured for expert in merge.experts),
        held_out=False,
    )
    assumptions.append(
        Assumption(
            "G",
            "losses are G-Lipschitz where twins of the merged model can be",
            "unknown" if any("G" in expert.measured for expert in merge.experts) else "holds",
            "G is stated"
            if not any("G" in expert.measured for expert in merge.experts)
            else "G was measured at points",
        )
    )
    assumptions.extend(operator_assumptions(merge))
    return assumptions, list(dict.fromkeys(measured))


def _stack(values: Sequence[FloatArray]) -> FloatArray:
    arrays = [np.asarray(value, dtype=np.float64) for value in values]
    return np.stack(np.broadcast_arrays(*arrays))
