"""The master bound for networks, from measured constants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from theory import operators
from theory.assemble import Ingredients, assemble_bound, base_assumptions
from theory.bound import Bound, ExpertTerms
from theory.errors import RecipeError
from theory.master import lifted, optimization_side
from theory.recipe import Expert, Merge, Method, Values, _numbers, per_expert
from theory.stability import epsilon_cap


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
    base_risks: ArrayLike | None = None,
) -> Bound:
    """The master bound for networks, from measured constants; tier *estimated* (theory section 8).

    ``expert_risks`` (loss, training risks, or held-out ones with ``held_out``), ``drift`` (rms norm of the shared task
    vector, measured or by 6(c)/6(d)) and the optional ``epsilon``, ``private_drift`` and ``samples`` have shape ``(N,
    ...)``; ``smoothness`` is a measured L, one number or ``(N, ...)``.  Stability comes from the cap ``sqrt(2) d``
    unless ``epsilon`` is measured, so no exponential enters and any optimizer is allowed.  ``dispersion`` V is
    measured on the checkpoints or bounded from the drifts; TIES needs it, and ``sensitivity`` unless ``held_out``.
    With held-out risks the instability is not needed.  ``base_risks`` F_j(x_0) with the final heads (shape ``(N,
    ...)``, same kind of risk as ``expert_risks``) allow the base as an anchor where it is nearer (section 7, base
    side; not with ``dispersion``).  Broken A2 or A3 are reported, not refused.

    >>> bound = network_bound([0.1, 0.2], 5.0, [0.3, 0.4], held_out=True)
    >>> round(float(bound.value), 4), bound.tier
    (0.8787, 'estimated')
    """
    where = "network bound"
    risks = np.atleast_1d(_numbers(where, "expert_risks", expert_risks))
    d, L = _numbers(where, "drift", drift), _numbers(where, "smoothness", smoothness)
    size = risks.shape[0]
    given = {"expert_risks": risks, "smoothness": L, "drift": d}
    optional = {"epsilon": epsilon, "private_drift": private_drift, "samples": samples, "base_risks": base_risks}
    given |= {name: _numbers(where, name, value) for name, value in optional.items() if value is not None}
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
        sensitivity=0.0 if held_out and sensitivity is None and not operators.from_recipe(method) else sensitivity,
    )
    c, p = operators.sensitivity(merge), per_expert(merge, "weights")
    stiff = np.broadcast_to(L, (size,)) if L.ndim == 0 else L
    side = None
    if dispersion is not None:
        V, dispersion_form = np.asarray(dispersion, dtype=np.float64), "given (checkpoints)"
        effective_V = V
    else:
        alpha = operators.coefficients(merge)
        added = operators.added_dispersion(merge, d)
        side = optimization_side(risks, p, stiff, d, alpha, added, False, given.get("base_risks"))
        V, effective_V, dispersion_form = side.V, side.effective_V, side.form
    trained = np.full(size, trained_heads)
    private = None if private_drift is None else np.asarray(private_drift, dtype=np.float64)
    total = d if private is None else np.hypot(*lifted(d, private))
    eps = epsilon_cap(total) if epsilon is None else np.asarray(epsilon, dtype=np.float64)
    eps_form = "cap sqrt(2) d" if epsilon is None else "measured"
    if trained_heads and private is None and epsilon is None and not held_out:
        raise RecipeError(
            "network bound: private_drift is missing; with trained heads give the rms distance of the head from its "
            "start (or epsilon, measured on everything that was trained)"
        )
    parts = Ingredients(
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
    assumptions = base_assumptions(
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
    measured = ["L", "expert risks", *(["V"] if dispersion is not None else [])]
    if not held_out:
        measured.append("drift" if epsilon is None else "epsilon")
    if dispersion is None and "drift" not in measured:
        measured.append("drift")
    if side is not None and np.any(side.from_base):
        measured.append("base risks")
    return assemble_bound(parts, V, effective_V, dispersion_form, rows, assumptions, measured, None, side)
