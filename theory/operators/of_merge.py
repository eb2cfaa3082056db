"""What a recipe's method means for the bounds: mean coefficients, sensitivity, added dispersion, assumptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from theory.assumptions import Assumption
from theory.errors import AssumptionError, RecipeError
from theory.operators.catalogue import operator
from theory.operators.effects import frozen
from theory.recipe import COEFFICIENT_METHODS, Expert, Merge, per_expert
from theory.symbolic import FloatArray, times, vacuous

_CHOSEN = ("risk_optimal", "curvature_optimal", "adamerging", "fisher", "regmean")


def coefficients(merge: Merge) -> FloatArray:
    """Mean coefficients alpha of a linear (or linear in expectation) merge, shape ``(N, ...)``.

    Averaging 1/N; weighted the given ones (default p); task arithmetic lambda; methods with solved coefficients those;
    DARE lambda, times ``1 - drop`` where the survivors are not rescaled.  Raises :class:`AssumptionError` for methods
    that are not linear in the task vectors with one coefficient per expert.
    """
    if merge.method in ("average", "uniform_soup"):
        return np.full(merge.size, 1.0 / merge.size)
    if merge.method == "weighted" and merge.coefficients is None:
        return per_expert(merge, "weights")
    if merge.method not in ("weighted", *COEFFICIENT_METHODS):
        raise AssumptionError(
            f"merge: method {merge.method!r} is no linear combination with one coefficient per expert, so its "
            "dispersion does not follow from the recipe; give dispersion, V measured on the checkpoints"
        )
    alpha = per_expert(merge, "coefficients")
    if merge.method == "dare" and not merge.rescale:
        alpha, keep = _lift(alpha, 1 - _on_experts(merge.drop_rate))
        return np.asarray(alpha * keep)
    return alpha


def sensitivity(merge: Merge) -> FloatArray:
    """Sensitivity c_i of the merged model to expert i, shape ``(N, ...)``; the given one where the recipe gives it.

    DARE: ``c_i^2 = alpha_i^2/(1-drop)`` rescaled, ``alpha_i^2 (1-drop)`` not (mean over masks).  Raises
    :class:`AssumptionError` with reason and remedy for methods whose sensitivity does not follow from the recipe:
    because they are discontinuous and have none, or because it depends on statistics of the checkpoints.
    """
    if merge.sensitivity is not None:
        return per_expert(merge, "sensitivity")
    if not from_recipe(merge.method):
        found = operator(merge.method)
        none = found.guarantee in ("local", "none") and "no guarantee" in found.sensitivity
        raise AssumptionError(
            f"merge: method {merge.method!r} has no sensitivity that follows from the recipe ({found.sensitivity}); "
            + ("nothing about it is certified: " if none else "")
            + f"give sensitivity, as from operator({merge.method!r}).effect(...) or measured on the checkpoints"
            + (" (local, tier estimated)" if none else "")
        )
    if merge.method != "dare":
        return np.abs(coefficients(merge))
    alpha, keep = _lift(np.abs(per_expert(merge, "coefficients")), 1 - _on_experts(merge.drop_rate))
    return np.asarray(alpha / np.sqrt(keep) if merge.rescale else alpha * np.sqrt(keep))


def from_recipe(method: str) -> bool:
    """Whether coefficients and sensitivity of a method follow from the recipe alone."""
    return method in ("average", "uniform_soup", "weighted", *COEFFICIENT_METHODS)


def operator_assumptions(merge: Merge) -> list[Assumption]:
    """What a bound has to assume about a method beyond A1 to A4; nothing for linear merges with given coefficients."""
    found = operator(merge.method)
    if merge.method in _CHOSEN:
        why = f"{merge.method} computes them from the experts (or data seen through them); then the bound is local"
        return [frozen("coefficients (or statistics) of the merge", why)]
    if found.guarantee in ("local", "none"):
        why = f"{merge.method} has no guarantee: the sensitivity given is local (theory section 10)"
        return [Assumption("10", "the operator has the stated sensitivity everywhere", "unknown", why)]
    return []


def merge_with(
    experts: Sequence[Expert], method: str, settings: Mapping[str, Any] | None = None, **fields: Any
) -> Merge:
    """A :class:`Merge` by any method, with coefficients or sensitivity filled in from its operator.

    ``settings`` are those of ``operator(method).effect``: settings and statistics of the checkpoints; ``fields`` are
    further fields of :class:`Merge` (``weights``, ``dispersion``, ...).  Methods that are not linear with one
    coefficient per expert also need ``dispersion``.  Raises :class:`AssumptionError` with the reason for methods
    without a sensitivity at these settings (give ``sensitivity`` measured on the checkpoints), :class:`RecipeError` for
    unknown settings.

    >>> from theory import Expert
    >>> run = dict(n=100, batch_size=10, learning_rate=0.1, steps=10, L=1.0)
    >>> pair = (Expert("a", **run), Expert("b", **run))
    >>> merge_with(pair, "wise_ft", {"alpha": 0.6}).coefficients.tolist()
    [0.3, 0.3]
    >>> import numpy as np
    >>> merge_with(pair, "fisher", {"fisher": np.array([[3.0], [1.0]])}, dispersion=0.1).sensitivity.tolist()
    [0.75, 0.25]
    """
    given = dict(settings or {})
    for name in ("method", "coefficients", "drop_rate", "rescale"):
        if name in fields:
            raise RecipeError(
                f"merge: {name} is given twice; put it into settings under the name that {method} has for it"
            )
    effect = operator(method).effect(len(experts), **given)
    kind: Any = method
    if method == "dare" and effect.guarantee == "mean square":
        assert effect.reference is not None
        return Merge(
            tuple(experts),
            method="dare",
            coefficients=effect.reference,
            drop_rate=given.get("drop", 0.5),
            rescale=given.get("rescale", True),
            **fields,
        )
    linear = effect.guarantee == "global" and effect.mean is not None
    if linear and method in ("weighted", *COEFFICIENT_METHODS):
        return Merge(tuple(experts), method=kind, coefficients=effect.mean, **fields)
    if method in ("average", "uniform_soup"):
        return Merge(tuple(experts), method=kind, **fields)
    if "sensitivity" not in fields:
        if effect.sensitivity is None:
            raise AssumptionError(
                f"merge: method {method!r} has no sensitivity here: {effect.reason}; or give sensitivity, measured on "
                "the checkpoints (local, tier estimated)"
            )
        fields["sensitivity"] = effect.sensitivity
        if effect.guarantee in ("global", "mean square") and "measured" not in fields:
            fields["measured"] = frozenset({"dispersion"})
    if method in COEFFICIENT_METHODS:  # coefficients per layer, or DARE with L1 norms: V does not follow from one each
        fields.setdefault("dispersion", None)
        if fields["dispersion"] is None:
            raise AssumptionError(
                f"merge: method {method!r} at these settings is no linear combination with one coefficient per expert; "
                "give dispersion, V measured on the checkpoints"
            )
        reference = effect.reference if effect.reference is not None else effect.sensitivity
        return Merge(tuple(experts), method=kind, coefficients=reference, **fields)
    return Merge(tuple(experts), method=kind, **fields)


@vacuous
def added_dispersion(merge: Merge, drift: FloatArray) -> FloatArray:
    """What DARE's masks add to E V, from the drifts (shape ``(N, ...)``); 0 for other methods; shape ``(...)``.

    Rescaled: ``drop/(1-drop) sum alpha_i^2 d_i^2``; not rescaled: ``drop (1-drop) sum alpha_i^2 d_i^2``; one mask
    shared by all experts: the norm of the sum instead, at most ``(sum |alpha_i| d_i)^2``.
    """
    if merge.method != "dare":
        return np.zeros(())
    alpha, drop = per_expert(merge, "coefficients"), np.asarray(merge.drop_rate, dtype=np.float64)
    alpha, d = np.broadcast_arrays(*_lift(alpha, drift))
    factor = drop / (1 - drop) if merge.rescale else drop * (1 - drop)
    if merge.independent_masks:
        return times(factor, times(alpha**2, d**2).sum(axis=0))
    return times(factor, times(np.abs(alpha), d).sum(axis=0) ** 2)


def _on_experts(value: object) -> FloatArray:
    """A configuration field with an axis of length one for the experts in front."""
    return np.asarray(value, dtype=np.float64)[None]


def _lift(*arrays: FloatArray) -> list[FloatArray]:
    """Experts on axis 0; the axes of configurations are aligned at the end, as everywhere, by axes of length one."""
    depth = max(array.ndim for array in arrays)
    return [array.reshape(array.shape[:1] + (1,) * (depth - array.ndim) + array.shape[1:]) for array in arrays]
