"""The master bound (theory section 8): training risk, dispersion, instability, and the risk of the merged model.

``sqrt(E F(M)) <= sqrt(sum p_j E F_Sj(x_j)) + sqrt(L/2 E V) + sqrt(sum p_i L_i/2 (c_i^2 eps_i^2 + eps_i,private^2))``
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from theory.assumptions import Assumption, Tier, judge, tier_of
from theory.clock import Clock, clock, require_sgd, smoothness
from theory.dispersion import smallest, smallest_bound
from theory.drift import drift_base, drift_energy, drift_log, drift_losses, drift_noise
from theory.errors import AssumptionError, MergeboundError, RecipeError
from theory.operators import added_dispersion, coefficients, sensitivity
from theory.recipe import Expert, Merge, Method, Values, per_expert
from theory.stability import epsilon_cap, epsilon_from_losses, epsilon_rms, epsilon_sup, gamma
from theory.symbolic import FloatArray, Formula, evaluate, times, vacuous
from theory.symbols import symbol
from theory.training import pl_training_risk

TERM_NAMES = ("training", "dispersion", "instability")


def master_formula() -> Formula:
    """``(sqrt(R) + sqrt(L V/2) + sqrt(I))^2`` with ``I = sum p_i L_i/2 (c_i^2 eps_i^2 + eps_i,private^2)``."""
    import sympy

    R, L, V, instability = symbol("R"), symbol("L"), symbol("V"), symbol("I")
    expression = (sympy.sqrt(R) + sympy.sqrt(L * V / 2) + sympy.sqrt(instability)) ** 2
    return Formula("risk", ("R", "L", "V", "I"), expression, "section 8, master bound")


@dataclass(frozen=True, eq=False)
class MasterTerms:
    """The master bound in numbers: square-root terms (unit sqrt(loss)) and ``value`` (loss), shape ``(...)``."""

    training: FloatArray
    dispersion: FloatArray
    instability: FloatArray
    value: FloatArray


@dataclass(frozen=True, eq=False)
class Term:
    """One named term: ``value`` (square root, unit sqrt(loss)), ``share`` of the sum of terms, formula and sources."""

    name: str
    value: FloatArray
    share: FloatArray
    formula: str
    source: str


@dataclass(frozen=True, eq=False)
class ExpertTerms:
    """What the bound used of one expert: training risk, drift d, stability, sensitivity c, and by which form."""

    name: str
    risk: FloatArray
    risk_form: str
    drift: FloatArray | None
    drift_form: str
    epsilon: FloatArray
    epsilon_form: str
    sensitivity: FloatArray


@dataclass(frozen=True, eq=False)
class Bound:
    """An upper bound on the joint risk of a merged model, with everything needed to check and to read it.

    ``value`` (loss, shape ``(...)``, ``inf`` where vacuous) comes with its ``tier``; ``terms`` are training, dispersion
    and instability; ``measured`` lists the measured constants that were used; ``V`` is the dispersion behind the second
    term and ``V_form`` the inequality that gave it.
    """

    value: FloatArray
    terms: tuple[Term, ...]
    tier: Tier
    assumptions: tuple[Assumption, ...]
    measured: tuple[str, ...]
    experts: tuple[ExpertTerms, ...]
    V: FloatArray
    V_form: str
    merge: Merge | None = field(default=None, repr=False)

    @property
    def symbolic(self) -> Any:
        """The bound as a sympy expression in the glossary's symbols."""
        return master_formula().expression

    def latex(self) -> str:
        """The inequality, and the three terms, in LaTeX."""
        return r"\mathbb E F(M) \le " + master_formula().latex()

    def excess(self, minimal_risk: ArrayLike) -> FloatArray:
        """Bound on the excess risk: ``value - min F``."""
        return np.asarray(self.value - np.asarray(minimal_risk, dtype=np.float64))

    @property
    def vacuous(self) -> np.ndarray:
        """Where the bound is infinite and says nothing."""
        return np.isinf(self.value)

    def elasticity(self, name: str, expert: str | None = None) -> float:
        """``d log(value) / d log(field)`` for one expert or for all together, by symbolic differentiation.

        Available for one configuration of plain SGD at constant learning rates; raises :class:`MergeboundError` with
        the reason elsewhere.
        """
        from theory.elasticity import elasticity

        return elasticity(self, name, expert)

    def explain(self) -> str:
        """Readable table: terms with value, share and formula, experts with sources, assumptions with verdicts."""
        return _explain(self)


@np.errstate(all="ignore")
def assemble_master(
    expert_risks: ArrayLike,
    weights: ArrayLike,
    smoothness: ArrayLike,
    dispersion: ArrayLike,
    sensitivity: ArrayLike,
    epsilon_shared: ArrayLike,
    epsilon_private: ArrayLike = 0.0,
) -> MasterTerms:
    """The master bound from its ingredients, broadcasting over configurations.

    ``expert_risks``, ``weights``, ``sensitivity``, ``epsilon_shared``, ``epsilon_private`` and (unless one number)
    ``smoothness`` have shape ``(N, ...)``; ``dispersion`` V has shape ``(...)``.  Numbers apply to every expert.  The
    dispersion is multiplied by the largest smoothness, the instability uses each task's own.
    """
    risks, p, L, c, shared, private = _lifted(
        expert_risks, weights, smoothness, sensitivity, epsilon_shared, epsilon_private
    )
    R = times(p, risks).sum(axis=0)
    with np.errstate(over="ignore"):
        stability = times(c, shared) ** 2 + private**2
    instability = times(p * L / 2, stability).sum(axis=0)
    largest = L.max(axis=0)
    V = np.asarray(dispersion, dtype=np.float64)
    second = times(largest / 2, V)
    value = evaluate(master_formula, R, 2.0, second, instability)
    return MasterTerms(np.sqrt(R), np.sqrt(second), np.sqrt(instability), value)


def _lifted(*values: ArrayLike) -> list[FloatArray]:
    """Arrays with experts on axis 0, brought to the same depth by axes of length one at the end, and broadcast."""
    arrays = [np.asarray(value, dtype=np.float64) for value in values]
    depth = max(array.ndim for array in arrays)
    lifted = [array.reshape(array.shape + (1,) * (depth - array.ndim)) if array.ndim else array for array in arrays]
    return list(np.broadcast_arrays(*lifted)) if depth else [np.atleast_1d(array) for array in lifted]


# --- one expert -------------------------------------------------------------------------------------------------------

_DRIFT_FIELDS: dict[str, tuple[str, ...]] = {
    "6(a)": ("clock", "initial_gradient_norm", "sigma"),
    "6(b)": ("clock", "initial_gradient_norm", "sigma0"),
    "6(c)": ("initial_risk", "training_risk", "sigma", "L", "base_norm"),
    "6(d), gradient log": ("batch_gradient_norms",),
    "6(d), loss log": ("batch_losses", "L"),
    "measured": ("drift",),
}
_EPSILON_FIELDS: dict[str, tuple[str, ...]] = {
    "Theorem 2 (sup)": ("clock", "D_inf"),
    "Theorem 2 (envelope)": ("clock", "D_envelope"),
    "Theorem 2 (rms)": ("clock", "D_2"),
    "Theorem 2, gap from the loss log": ("clock", "batch_losses", "L"),
    "cap sqrt(2) d": (),
    "measured": ("epsilon",),
}


def _attempt(
    candidates: dict[str, Callable[[], FloatArray]],
) -> tuple[dict[str, FloatArray], list[str]]:
    found: dict[str, FloatArray] = {}
    refused: list[str] = []
    for name, compute in candidates.items():
        try:
            found[name] = compute()
        except AssumptionError as error:
            refused.append(str(error))
        except RecipeError:
            continue
    return found, refused


def _clock_or_none(expert: Expert) -> Clock | None:
    covered = expert.optimizer.lower() == "sgd" and not expert.gradient_clipping
    if not covered or (expert.L is None and expert.kappa is None):
        return None
    return clock(expert)


@np.errstate(all="ignore")
def expert_drift(expert: Expert, timing: Clock | None = None) -> tuple[FloatArray, str]:
    """The smallest drift bound that applies to an expert (Theorem 3 or measured) and its form; shape ``(...)``.

    Raises :class:`AssumptionError` for optimizers that are not covered and have no measured drift, and
    :class:`RecipeError` with the remedy if no form has what it needs.
    """
    timing = _clock_or_none(expert) if timing is None else timing
    candidates: dict[str, Callable[[], FloatArray]] = {}
    if timing is not None:
        known = timing
        candidates["6(a)"] = lambda: drift_noise(expert, known)
        candidates["6(b)"] = lambda: drift_base(expert, known)
    candidates["6(c)"] = lambda: drift_energy(expert)
    candidates["6(d), gradient log"] = lambda: drift_log(expert)
    candidates["6(d), loss log"] = lambda: drift_losses(expert)
    if expert.drift is not None:
        candidates["measured"] = lambda: np.asarray(expert.drift, dtype=np.float64)
    found, refused = _attempt(candidates)
    if not found:
        require_sgd(expert)
        reason = f" ({refused[0]})" if refused else ""
        raise RecipeError(
            f"expert {expert.name!r}: no bound on the drift applies; give initial_gradient_norm with sigma0 (any "
            f"sampling) or sigma, batch_gradient_norms from the training log, or the measured drift{reason}"
        )
    return smallest(found)


@np.errstate(all="ignore")
def expert_epsilon(
    expert: Expert, timing: Clock | None = None, total_drift: FloatArray | None = None
) -> tuple[FloatArray, str]:
    """The smallest stability bound that applies (Theorem 2, cap, or measured) and its form; shape ``(...)``."""
    timing = _clock_or_none(expert) if timing is None else timing
    candidates: dict[str, Callable[[], FloatArray]] = {}
    if timing is not None:
        known = timing
        variance = gamma(expert, known)
        for form, gap in (("sup", expert.D_inf), ("envelope", expert.D_envelope)):
            if gap is not None:
                value = epsilon_sup(gap, known.tau, expert.n, variance)
                candidates[f"Theorem 2 ({form})"] = lambda value=value: value  # type: ignore[misc]
        if expert.D_2 is not None and expert.sampling != "reshuffle":
            rms = epsilon_rms(expert.D_2, known.tau, expert.n, variance)
            candidates["Theorem 2 (rms)"] = lambda: rms
        if expert.batch_losses is not None and known.log_w is not None:
            log_w = known.log_w
            candidates["Theorem 2, gap from the loss log"] = lambda: epsilon_from_losses(expert, known, log_w)
    if total_drift is not None:
        candidates["cap sqrt(2) d"] = lambda: epsilon_cap(total_drift)
    if expert.epsilon is not None:
        candidates["measured"] = lambda: np.asarray(expert.epsilon, dtype=np.float64)
    found, _ = _attempt(candidates)
    if not found:
        require_sgd(expert)
        raise RecipeError(
            f"expert {expert.name!r}: no bound on the stability applies; give D_inf, D_2 (not under reshuffling) or "
            "D_envelope, the measured epsilon, or what a drift bound needs"
        )
    return smallest(found)


def _used(expert: Expert, timing: Clock | None, forms: Sequence[tuple[str, dict[str, tuple[str, ...]]]]) -> list[str]:
    """The measured fields behind the chosen forms."""
    names: list[str] = []
    for chosen, table in forms:
        for form, needs in table.items():
            if form in chosen.split(" or "):
                names.extend(needs)
    if "clock" in names and timing is not None:
        names.extend(("kappa",) if expert.kappa is not None else ("L", "mu"))
    given = [name for name in dict.fromkeys(names) if name != "clock" and getattr(expert, name) is not None]
    return [f"{expert.name}: {name}" for name in expert.is_measured(*given)]


# --- assembling -------------------------------------------------------------------------------------------------------


def _assumptions(
    *,
    shared: bool | None,
    choices: bool | None,
    per_sample: bool | None,
    measured_smoothness: bool,
    held_out: bool,
) -> list[Assumption]:
    independence = judge(
        "A1",
        "samples of different tasks are independent",
        None if shared is None else not shared,
        holds="stated in the recipe",
        violated="tasks share samples; all copies are exchanged at once (sensitivities add up)",
        unknown="not stated; set shared_samples",
    )
    if shared:
        independence = Assumption(independence.name, independence.statement, "violated", independence.why, covered=True)
    smooth = Assumption(
        "A4",
        "per-sample losses are nonnegative and L-smooth",
        "unknown" if measured_smoothness else "holds",
        "L was measured at points, not everywhere" if measured_smoothness else "L is stated as known",
    )
    items = [
        independence,
        judge(
            "A2",
            "base, hyperparameters, checkpoints, coefficients, seeds do not depend on the training samples",
            choices,
            holds="stated in the recipe",
            violated="they do; the bound does not account for it",
            unknown="not stated; set data_independent_choices",
        ),
        judge(
            "A3",
            "the loss is a per-sample loss (no BatchNorm in train mode)",
            per_sample,
            holds="stated in the recipe",
            violated="it is not; the stability and drift theorems do not cover it",
            unknown="not stated; set per_sample_loss",
        ),
        smooth,
    ]
    if not held_out:
        return items
    fresh = judge(
        "held-out",
        "the held-out data served neither training nor any choice",
        choices,
        holds="stated (data_independent_choices)",
        violated="it did; the expert risks are optimistic",
        unknown="not stated; set data_independent_choices",
    )
    return [fresh, smooth]


@dataclass(frozen=True, eq=False)
class _Ingredients:
    """Everything the assembly needs; per-expert arrays have shape ``(N, ...)``."""

    names: tuple[str, ...]
    risks: FloatArray
    weights: FloatArray
    smoothness: FloatArray
    sensitivity: FloatArray
    epsilon: FloatArray
    split: tuple[FloatArray, FloatArray] | None
    trained: np.ndarray
    samples: FloatArray | None
    shared: bool
    held_out: bool


@vacuous
def task_stability(
    sensitivity: ArrayLike,
    epsilon: ArrayLike,
    *,
    trained: ArrayLike = False,
    split: tuple[ArrayLike, ArrayLike] | None = None,
    shared_samples: bool = False,
    samples: ArrayLike | None = None,
) -> FloatArray:
    """``E ||M_i - M_i'||^2`` per task, shape ``(N, ...)``: private heads and shared samples (theory section 1).

    ``epsilon`` is the stability of everything an expert trains.  With trained heads only
    ``max(1, c^2) eps^2`` follows from it; ``split`` = (shared part, private part) separates the two and the smaller is
    taken.  ``shared_samples``: all copies of a sample are exchanged at once and experts add up, expert l weighing
    ``sqrt(n_l/n_i)`` in task i (1 for equal ``samples``).
    """
    c, eps, head = np.broadcast_arrays(*_lifted(sensitivity, epsilon, np.asarray(trained, dtype=np.float64)))
    own, private, outward = times(np.where(head > 0, np.maximum(1.0, c), c), eps), np.zeros_like(eps), eps
    if split is not None:
        inner, outer = (np.broadcast_to(part, c.shape) for part in _lifted(split[0], split[1], c)[:2])
        with np.errstate(over="ignore"):
            better = (times(c, inner) ** 2 + outer**2 < own**2) & (head > 0)
        own, private = np.where(better, times(c, inner), own), np.where(better, outer, private)
        outward = np.where(head > 0, np.minimum(outward, inner), outward)
    if shared_samples:
        n = np.broadcast_to(1.0, c.shape) if samples is None else _lifted(samples, c)[0]
        others = times(c, outward)
        added = [
            sum((others[k] * np.sqrt(n[k] / n[i]) for k in range(len(c)) if k != i), np.zeros(c.shape[1:]))
            for i in range(len(c))
        ]
        own = own + np.stack(added)
    with np.errstate(over="ignore"):
        return np.asarray(own**2 + private**2)


@np.errstate(all="ignore")
def _dispersion_effective(
    drift: FloatArray, alpha: FloatArray, p: FloatArray, L: FloatArray, extra: FloatArray, orthogonal: bool
) -> tuple[FloatArray, str]:
    """V such that ``max(L)/2 V`` bounds the term: the smaller of the p-weighted and the pL-weighted inequality."""
    d, a, w, stiff = _lifted(drift, alpha, p, L)
    plain, form = smallest_bound(d, a, w, orthogonal=orthogonal)
    if np.all(stiff == stiff[:1]):
        return plain + extra, form
    mean, largest = (w * stiff).sum(axis=0), stiff.max(axis=0)
    weighted, other = smallest_bound(d, a, w * stiff / mean, orthogonal=orthogonal)
    value, which = smallest({"p": plain + extra, "pL": times(mean / largest, weighted + extra)})
    names = {"p": form, "pL": f"{other} (weights p L)"}
    return value, " or ".join(names[name] for name in which.split(" or "))


def _bound(
    parts: _Ingredients,
    V: FloatArray,
    V_form: str,
    experts: tuple[ExpertTerms, ...],
    assumptions: list[Assumption],
    measured: list[str],
    merge: Merge | None,
) -> Bound:
    stability = task_stability(
        parts.sensitivity,
        parts.epsilon,
        trained=parts.trained,
        split=parts.split,
        shared_samples=parts.shared,
        samples=parts.samples,
    )
    root = np.zeros(1) if parts.held_out else np.sqrt(stability)
    terms = assemble_master(parts.risks, parts.weights, parts.smoothness, V, 1.0, root)
    values = dict(
        zip(TERM_NAMES, np.broadcast_arrays(terms.training, terms.dispersion, terms.instability), strict=True)
    )
    total = sum(values.values(), np.zeros(()))
    with np.errstate(all="ignore"):
        infinite = np.isinf(total)
        shares = {
            name: np.where(infinite, np.isinf(value) * 1.0, value / np.where((total == 0) | infinite, 1.0, total))
            for name, value in values.items()
        }
        crowd = sum(shares.values(), np.zeros(()))
        shares = {name: share / np.where(crowd == 0, 1.0, crowd) for name, share in shares.items()}
    risk = "held-out" if parts.held_out else "training"
    stability_formula = (
        "sqrt(sum p_i L_i/2 (sum_l c_l eps_l)^2)" if parts.shared else "sqrt(sum p_i L_i/2 c_i^2 eps_i^2)"
    )
    if np.any(parts.trained):
        stability_formula = stability_formula.replace("c_i^2 eps_i^2", "(c_i^2 eps_i^2 + eps_private,i^2)")
    formulas = {
        "training": f"sqrt(sum p_j F_j(x_j)), {risk} risks",
        "dispersion": f"sqrt(L/2 V), V {V_form}",
        "instability": "not needed: held-out risks" if parts.held_out else stability_formula,
    }
    sources = {"training": "Theorem 4", "dispersion": "Theorem 4", "instability": "Theorems 1 and 2"}
    return Bound(
        value=np.asarray(terms.value),
        terms=tuple(Term(name, values[name], shares[name], formulas[name], sources[name]) for name in TERM_NAMES),
        tier=tier_of(assumptions, measured),
        assumptions=tuple(assumptions),
        measured=tuple(dict.fromkeys(measured)),
        experts=experts,
        V=V,
        V_form=V_form,
        merge=merge,
    )


@np.errstate(all="ignore")
def master_bound(merge: Merge) -> Bound:
    """The master bound of a merge from its recipe (theory section 8): the smallest inequality that applies everywhere.

    Per expert: training risk as given or by the PL bound; drift by Theorem 3 (a)-(d) or measured; stability by
    Theorem 2, the cap, or measured.  V from the drifts, or measured.  Raises :class:`AssumptionError` for what is not
    covered (AdamW or clipping without a measured drift, TIES without V and sensitivity, A2 or A3 stated as broken) and
    :class:`RecipeError` for what is missing.
    """
    _refuse_broken(merge)
    c = sensitivity(merge)
    measured: list[str] = []
    rows: list[ExpertTerms] = []
    splits: list[tuple[FloatArray, FloatArray]] = []
    for index, expert in enumerate(merge.experts):
        row, split, used = _expert_terms(expert, c[index], needs_drift=merge.dispersion is None)
        rows.append(row)
        splits.append(split)
        measured.extend(used)
    alpha = None if merge.dispersion is not None else coefficients(merge)
    p = per_expert(merge, "weights")
    L = _stack([smoothness(expert) for expert in merge.experts])
    orthogonal = bool(merge.orthogonal_task_vectors)
    if merge.dispersion is not None:
        V, V_form = np.asarray(merge.dispersion, dtype=np.float64), "given (checkpoints)"
    else:
        assert alpha is not None
        d = _stack([row.drift for row in rows if row.drift is not None])
        V, V_form = _dispersion_effective(d, alpha, p, L, added_dispersion(merge, d), orthogonal)
    if merge.dispersion is not None and "dispersion" in merge.measured:
        measured.append("merge: dispersion")
    if merge.sensitivity is not None and "sensitivity" in merge.measured:
        measured.append("merge: sensitivity")
    assumptions = _assumptions(
        shared=merge.shared_samples,
        choices=merge.data_independent_choices,
        per_sample=merge.per_sample_loss,
        measured_smoothness=any("L" in expert.measured for expert in merge.experts),
        held_out=False,
    )
    assumptions.extend(_expert_assumptions(merge, V_form))
    split_arrays = (_stack([inner for inner, _ in splits]), _stack([outer for _, outer in splits]))
    parts = _Ingredients(
        names=tuple(expert.name for expert in merge.experts),
        risks=_stack([row.risk for row in rows]),
        weights=p,
        smoothness=L,
        sensitivity=c,
        epsilon=_stack([row.epsilon for row in rows]),
        split=split_arrays,
        trained=np.array([expert.head == "trained" for expert in merge.experts]),
        samples=_stack([np.asarray(expert.n, dtype=np.float64) for expert in merge.experts]),
        shared=bool(merge.shared_samples),
        held_out=False,
    )
    return _bound(parts, V, V_form, tuple(rows), assumptions, measured, merge)


def _refuse_broken(merge: Merge) -> None:
    if merge.per_sample_loss is False:
        raise AssumptionError(
            "merge: per_sample_loss is false (A3: the loss of one sample depends on others, as with BatchNorm in train "
            "mode), which the stability and drift theorems do not cover; give measured quantities to network_bound, or "
            "use held-out risks"
        )
    if merge.data_independent_choices is False:
        raise AssumptionError(
            "merge: data_independent_choices is false (A2: coefficients, checkpoints or hyperparameters were chosen on "
            "the training samples), which the bound does not cover; choose them on other data, or use held-out risks"
        )


def _expert_terms(
    expert: Expert, c: FloatArray, *, needs_drift: bool
) -> tuple[ExpertTerms, tuple[FloatArray, FloatArray], list[str]]:
    timing = _clock_or_none(expert)
    try:
        drift, drift_form = expert_drift(expert, timing)
    except RecipeError:
        if needs_drift:
            raise
        drift, drift_form = None, "not needed"
    total = drift
    if drift is not None and expert.private_drift is not None and "measured" in drift_form:
        total = np.hypot(drift, np.asarray(expert.private_drift, dtype=np.float64))
    epsilon, epsilon_form = expert_epsilon(expert, timing, total)
    split = (np.asarray(np.inf), np.asarray(np.inf))
    if expert.head == "trained" and expert.private_drift is not None:
        split = (epsilon_cap(np.asarray(expert.drift, dtype=np.float64)), epsilon_cap(expert.private_drift))
    forms = [(drift_form, _DRIFT_FIELDS), (epsilon_form, _EPSILON_FIELDS)]
    if expert.private_drift is not None:
        forms.append(("split", {"split": ("drift", "private_drift")}))
    used = _used(expert, timing, forms)
    if expert.training_risk is not None:
        risk, risk_form = np.asarray(expert.training_risk, dtype=np.float64), "given"
        used += [f"{expert.name}: {name}" for name in expert.is_measured("training_risk")]
    else:
        risk, risk_form = pl_training_risk(expert), "PL bound"
        needs = ("initial_risk", "sigma", "minimal_risk", "pl_constant", "mu", "base_norm")
        used += [f"{expert.name}: {name}" for name in expert.is_measured(*needs)]
    used += [f"{expert.name}: {name}" for name in expert.is_measured("L")]
    row = ExpertTerms(expert.name, risk, risk_form, drift, drift_form, epsilon, epsilon_form, c)
    return row, split, used


def _expert_assumptions(merge: Merge, V_form: str) -> list[Assumption]:
    found = []
    if "orthogonal" in V_form:
        found.append(
            Assumption(
                "7", "task vectors are orthogonal in expectation", "holds", "stated in the recipe, and used for V"
            )
        )
    if merge.method == "ties":
        why = "TIES is discontinuous: the sensitivity given is local, at fixed support and signs"
        found.append(Assumption("10", "the operator has the stated sensitivity everywhere", "unknown", why))
    for expert in merge.experts:
        if expert.optimizer.lower() != "sgd" or expert.gradient_clipping:
            what = expert.optimizer if expert.optimizer.lower() != "sgd" else "gradient clipping"
            why = f"expert {expert.name!r} used {what}; its measured drift and the cap hold for any optimizer"
            found.append(
                Assumption("4-6", "experts are trained by SGD without clipping", "violated", why, covered=True)
            )
    return found


def _stack(values: Sequence[FloatArray]) -> FloatArray:
    return np.stack(np.broadcast_arrays(*values))


@np.errstate(all="ignore")
def network_bound(
    expert_risks: ArrayLike,
    smoothness: ArrayLike,
    drift: ArrayLike,
    *,
    method: Method = "average",
    weights: Values | Sequence[Values] | None = None,
    coefficients: Values | Sequence[Values] | None = None,
    drop_rate: Values = 0.0,
    rescale: bool = True,
    independent_masks: bool = True,
    names: Sequence[str] | None = None,
    dispersion: Values | None = None,
    sensitivity: Values | Sequence[Values] | None = None,
    epsilon: ArrayLike | None = None,
    trained_heads: bool = False,
    private_drift: ArrayLike | None = None,
    held_out: bool = False,
    shared_samples: bool | None = None,
    samples: ArrayLike | None = None,
    data_independent_choices: bool | None = None,
    per_sample_loss: bool | None = None,
) -> Bound:
    """The master bound for networks, from measured constants; tier *estimated* (theory section 8).

    ``expert_risks`` (loss, training risks, or held-out ones with ``held_out``), ``drift`` (rms norm of the shared task
    vector, measured or by 6(c)/6(d)) and the optional ``epsilon``, ``private_drift`` and ``samples`` have shape
    ``(N, ...)``; ``smoothness`` is a measured L, one number or ``(N, ...)``.  Stability comes from the cap
    ``sqrt(2) d`` unless ``epsilon`` is measured, so no exponential enters and any optimizer is allowed.  ``dispersion``
    V is measured on the checkpoints or bounded from the drifts; TIES needs it, and ``sensitivity`` unless ``held_out``.
    With held-out risks the instability is not needed.  Broken A2 or A3 are reported, not refused.
    """
    risks = np.atleast_1d(np.asarray(expert_risks, dtype=np.float64))
    d, L = np.asarray(drift, dtype=np.float64), np.asarray(smoothness, dtype=np.float64)
    size = risks.shape[0]
    given = {"expert_risks": risks, "smoothness": L, "drift": d}
    optional = {"epsilon": epsilon, "private_drift": private_drift, "samples": samples}
    given |= {name: np.asarray(value, dtype=np.float64) for name, value in optional.items() if value is not None}
    for name, array in given.items():
        if not np.all(np.isfinite(array) & (array >= 0)):
            raise RecipeError(f"network bound: {name} holds a negative or non-finite number; measure it again")
        if (name != "smoothness" or array.ndim) and (array.ndim == 0 or array.shape[0] != size):
            raise RecipeError(
                f"network bound: {name} has shape {array.shape}; give one value per expert ({size}) on axis 0"
            )
    labels = tuple(names) if names is not None else tuple(f"expert {index}" for index in range(size))
    if len(labels) != size:
        raise RecipeError(f"network bound: names has {len(labels)} entries for {size} experts; give one per expert")
    experts = tuple(Expert(label, n=1, batch_size=1, learning_rate=1.0, steps=1, optimizer="any") for label in labels)
    merge = Merge(
        experts,
        method=method,
        weights=weights,
        coefficients=coefficients,
        drop_rate=drop_rate,
        rescale=rescale,
        independent_masks=independent_masks,
        shared_samples=shared_samples,
        dispersion=dispersion,
        sensitivity=sensitivity if not (held_out and method == "ties") else 0.0,
    )
    c, p = _operator_sensitivity(merge), per_expert(merge, "weights")
    stiff = np.broadcast_to(L, (size,)) if L.ndim == 0 else L
    if dispersion is not None:
        V, V_form = np.asarray(dispersion, dtype=np.float64), "given (checkpoints)"
    else:
        alpha = _operator_coefficients(merge)
        V, V_form = _dispersion_effective(d, alpha, p, stiff, added_dispersion(merge, d), False)
    trained = np.full(size, trained_heads)
    private = None if private_drift is None else np.asarray(private_drift, dtype=np.float64)
    total = d if private is None else np.hypot(d, private)
    eps = epsilon_cap(total) if epsilon is None else np.asarray(epsilon, dtype=np.float64)
    eps_form = "cap sqrt(2) d" if epsilon is None else "measured"
    if trained_heads and private is None and epsilon is None and not held_out:
        raise RecipeError(
            "network bound: private_drift is missing; with trained heads give the rms distance of the head from its "
            "start (or epsilon, measured on everything that was trained)"
        )
    parts = _Ingredients(
        names=labels,
        risks=risks,
        weights=p,
        smoothness=stiff,
        sensitivity=c,
        epsilon=eps,
        split=None if private is None else (epsilon_cap(d), epsilon_cap(private)),
        trained=trained,
        samples=None if samples is None else np.asarray(samples, dtype=np.float64),
        shared=bool(shared_samples),
        held_out=held_out,
    )
    assumptions = _assumptions(
        shared=shared_samples,
        choices=data_independent_choices,
        per_sample=per_sample_loss,
        measured_smoothness=True,
        held_out=held_out,
    )
    rows = tuple(
        ExpertTerms(
            labels[i],
            risks[i],
            "held-out" if held_out else "training",
            d[i],
            "measured",
            eps[i],
            "not needed" if held_out else eps_form,
            np.asarray(c[i]),
        )
        for i in range(size)
    )
    measured = ["L", "expert risks", *(["V"] if dispersion is not None else ["drift"])]
    return _bound(parts, V, V_form, rows, assumptions, measured, None)


_operator_sensitivity: Callable[[Merge], FloatArray] = sensitivity
_operator_coefficients: Callable[[Merge], FloatArray] = coefficients


# --- text -------------------------------------------------------------------------------------------------------------


def _number(value: FloatArray | None) -> str:
    if value is None:
        return "-"
    array = np.asarray(value)
    if array.ndim == 0 or array.size == 1:
        return f"{float(array.reshape(-1)[0]):.4g}"
    return f"{array.min():.3g} to {array.max():.3g}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _explain(bound: Bound) -> str:
    lines = [f"E F(M) <= {_number(bound.value)}   (tier: {bound.tier})", ""]
    if np.any(bound.vacuous):
        lines[0] += "   vacuous where infinite: the clock overflows (too many steps at an expanding rate)"
    lines += _table(
        [("term", "square root", "share", "formula", "source")]
        + [
            (
                term.name,
                _number(term.value),
                f"{100 * float(np.mean(term.share)):.0f} %",
                term.formula,
                term.source,
            )
            for term in bound.terms
        ]
    )
    lines.append("")
    lines += _table(
        [("expert", "risk", "drift d", "by", "stability eps", "by", "sensitivity c")]
        + [
            (
                row.name,
                f"{_number(row.risk)} ({row.risk_form})",
                _number(row.drift),
                row.drift_form,
                _number(row.epsilon),
                row.epsilon_form,
                _number(row.sensitivity),
            )
            for row in bound.experts
        ]
    )
    lines.append("")
    lines += _table(
        [("assumption", "verdict", "statement", "why")]
        + [
            (item.name, item.verdict + (" (covered)" if item.covered else ""), item.statement, item.why)
            for item in bound.assumptions
        ]
    )
    if bound.measured:
        lines += ["", "measured, therefore estimated: " + ", ".join(bound.measured)]
    return "\n".join(lines)


__all__ = [
    "Bound",
    "ExpertTerms",
    "MasterTerms",
    "MergeboundError",
    "Term",
    "assemble_master",
    "expert_drift",
    "expert_epsilon",
    "master_bound",
    "master_formula",
    "network_bound",
    "task_stability",
]
