"""The master bound (theory section 8): training risk, dispersion, instability, and the risk of the merged model.

``sqrt(E F(M)) <= sqrt(sum p_j E F_Sj(x_j)) + sqrt(L/2 E V) + sqrt(sum p_i L_i/2 (c_i^2 eps_i^2 + eps_i,private^2))``
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from theory.assemble import Ingredients, assemble_bound, base_assumptions, measured_run, refuse_broken
from theory.assumptions import Assumption, run_as_stated
from theory.bound import Bound, ExpertTerms, Term
from theory.chunks import configurations, in_pieces
from theory.clocks import smoothness, step_count
from theory.expert_terms import expert_drift, expert_epsilon, expert_terms
from theory.master import MasterTerms, assemble_master, master_formula, optimization_side, task_stability
from theory.network import network_bound
from theory.operators import added_dispersion, coefficients, operator_assumptions, sensitivity
from theory.recipe import Merge, per_expert
from theory.symbolic import FloatArray

LARGEST_RECURSION = 20_000_000


def master_bound(merge: Merge, *, recursion: bool | None = None) -> Bound:
    """The master bound of a merge from its recipe (theory section 8): the smallest inequality that applies everywhere.

    Per expert: training risk as given or by the PL bound; drift by Theorem 3 (a)-(d) or measured; stability by
    Theorem 2, the cap, or measured.  V from the drifts, or measured.  Raises :class:`AssumptionError` for what is not
    covered (AdamW or clipping without a measured drift, TIES without V and sensitivity, A2 or A3 stated as broken) and
    :class:`RecipeError` for what is missing.

    ``recursion``: also try the sharper recursions of section 5, where ``D_2`` or ``batch_losses`` are given; they pass
    over every step, and by default are left out beyond 2e7 steps times configurations (``epsilon_form`` says which
    form was used).  Many configurations are treated in pieces that fit the cache.

    >>> from theory import Expert, Merge
    >>> run = dict(n=1000, batch_size=10, learning_rate=0.1, steps=50, curvature="convex", L=1.0, D_inf=2.0,
    ...            initial_gradient_norm=0.5, sigma=1.0, training_risk=0.05)
    >>> bound = master_bound(Merge((Expert("a", **run), Expert("b", **run))))
    >>> round(float(bound.value), 4), bound.dispersion_form, bound.tier  # estimated: A1 to A3 are not stated
    (4.6435, 'triangle', 'estimated')
    """
    refuse_broken(merge)
    if recursion is None:
        recursion = _recursion_is_cheap(merge)
    return in_pieces(merge, lambda piece: _bound_at_once(piece, recursion))


def _recursion_is_cheap(merge: Merge) -> bool:
    try:
        shape = configurations(merge)
    except ValueError:
        return True
    longest = max(int(step_count(expert).max()) for expert in merge.experts)
    return float(np.prod(shape, dtype=np.float64)) * longest <= LARGEST_RECURSION


@np.errstate(all="ignore")
def _bound_at_once(merge: Merge, recursion: bool) -> Bound:
    c = sensitivity(merge)
    measured: list[str] = []
    rows: list[ExpertTerms] = []
    splits: list[tuple[FloatArray, FloatArray]] = []
    for index, expert in enumerate(merge.experts):
        row, split, used = expert_terms(expert, c[index], needs_drift=merge.dispersion is None, recursion=recursion)
        rows.append(row)
        splits.append(split)
        measured.extend(used)
    alpha = None if merge.dispersion is not None else coefficients(merge)
    p = per_expert(merge, "weights")
    L = _stack([smoothness(expert) for expert in merge.experts])
    orthogonal = bool(merge.orthogonal_task_vectors)
    risks = _stack([row.risk for row in rows])
    side = None
    if merge.dispersion is not None:
        V, dispersion_form = np.asarray(merge.dispersion, dtype=np.float64), "given (checkpoints)"
        effective_V = V
    else:
        assert alpha is not None
        d = _stack([row.drift for row in rows if row.drift is not None])
        base = _base_risks(merge)
        side = optimization_side(risks, p, L, d, alpha, added_dispersion(merge, d), orthogonal, base)
        V, effective_V, dispersion_form = side.V, side.effective_V, side.form
        for used, expert in zip(side.from_base, merge.experts, strict=True):
            if np.any(used):
                measured.extend(f"{expert.name}: {name}" for name in expert.is_measured("initial_risk"))
    if merge.dispersion is not None and "dispersion" in merge.measured:
        measured.append("merge: dispersion")
    if merge.sensitivity is not None and "sensitivity" in merge.measured:
        measured.append("merge: sensitivity")
    run = measured_run(merge)
    measured.extend(run)
    assumptions = base_assumptions(
        shared=merge.shared_samples,
        choices=merge.data_independent_choices,
        per_sample=merge.per_sample_loss,
        measured_smoothness=any("L" in expert.measured for expert in merge.experts),
        held_out=False,
    )
    assumptions.extend(run_as_stated(run))
    assumptions.extend(_merge_assumptions(merge))
    split_arrays = (_stack([inner for inner, _ in splits]), _stack([outer for _, outer in splits]))
    parts = Ingredients(
        names=tuple(expert.name for expert in merge.experts),
        risks=risks,
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
    return assemble_bound(parts, V, effective_V, dispersion_form, tuple(rows), assumptions, measured, merge, side)


def _base_risks(merge: Merge) -> FloatArray | None:
    """F_j(x_0) with the final heads, ``inf`` where unknown: the base has no trained head; None if none is known."""
    found = [
        np.asarray(np.inf if expert.initial_risk is None or expert.head == "trained" else expert.initial_risk)
        for expert in merge.experts
    ]
    if all(value.ndim == 0 and np.isinf(value) for value in found):
        return None
    return _stack([value.astype(np.float64) for value in found])


def _merge_assumptions(merge: Merge) -> list[Assumption]:
    found = []
    if merge.orthogonal_task_vectors and merge.dispersion is None:
        found.append(
            Assumption(
                "7", "task vectors are orthogonal in expectation", "holds", "stated in the recipe, and used for V"
            )
        )
    found.extend(operator_assumptions(merge))
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


__all__ = [
    "Bound",
    "ExpertTerms",
    "MasterTerms",
    "Term",
    "assemble_master",
    "expert_drift",
    "expert_epsilon",
    "master_bound",
    "master_formula",
    "network_bound",
    "task_stability",
]
