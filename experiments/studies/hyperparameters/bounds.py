"""The master bound of every merge: from the recipe with measured constants, and from measured drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from experiments.studies.hyperparameters.constants import ENDS, from_json
from experiments.studies.hyperparameters.work import Row
from theory.errors import MergeboundError
from theory.recipe import Expert, Merge, Schedule

SOURCES = ("recipe", "measured_drift")
TERMS = ("training", "dispersion", "instability")


def bound_rows(
    key: str, members: Sequence[str], alpha: float, experts: Mapping[str, Row], V: float, shared: bool | None, seed: int
) -> list[Row]:
    """Both bounds of one merge.

    Args:
        key: of the merge.
        members: names ``run@step``.
        alpha: common coefficient of every expert; 1/N is the average.
        experts: rows of :func:`experiments.studies.hyperparameters.constants.measure_constants` by name.
        V: measured dispersion, for the bound from measured drift.
        shared: whether tasks share training images (A1).
        seed: of the constants.

    Returns:
        One row per source: ``bound`` (loss) with ``bound_low`` and ``bound_high`` at the ends of the constants'
        intervals, the square roots of its terms, ``drift`` and ``epsilon`` (root mean squares over experts of what
        Theorems 3 and 2 give), their forms, ``V_bound``, ``tier``; ``why`` where there is none.
    """
    rows = [experts[name] for name in members]
    return [
        {"key": key, "source": source, "seed": seed, **made}
        for source, made in (
            ("recipe", _from_recipe(rows, alpha, shared)),
            ("measured_drift", _from_drift(rows, alpha, V, shared)),
        )
    ]


def _method(size: int, alpha: float) -> dict[str, Any]:
    if abs(alpha * size - 1.0) < 1e-12:
        return {"method": "average"}
    return {"method": "task_arithmetic", "coefficients": alpha}


def stacked(row: Row) -> Expert:
    """The recipe with every constant as an array of its value, low and high end, (3,)."""
    ends = [from_json(row["recipe"], end) for end in ENDS]
    changed: dict[str, Any] = {}
    for field in fields(Expert):
        values = [getattr(one, field.name) for one in ends]
        if isinstance(values[0], float) and values[1:] != values[:1] * 2:
            changed[field.name] = np.array(values)
        elif isinstance(values[0], Schedule):
            changed[field.name] = values[0]
    return replace(ends[0], **changed)


def _from_recipe(rows: Sequence[Row], alpha: float, shared: bool | None) -> dict[str, Any]:
    from theory import master_bound

    per_sample = all(bool(row["per_sample_loss"]) for row in rows)
    try:
        experts = tuple(replace(stacked(row), name=f"{k} {row['task']}") for k, row in enumerate(rows))
        merge = Merge(
            experts, per_sample_loss=per_sample, shared_samples=shared, data_independent_choices=True,
            **_method(len(rows), alpha),
        )  # fmt: skip
        bound = master_bound(merge)
    except MergeboundError as error:
        return {"why": str(error).split("; ")[0]}
    made = _read(bound)
    drifts = [_first(row.drift) for row in bound.experts if row.drift is not None]
    epsilons = [_first(row.epsilon) for row in bound.experts]
    made["drift"] = _rms(drifts) if len(drifts) == len(rows) else None
    made["epsilon"] = _rms(epsilons)
    made["drift_form"] = _common([row.drift_form for row in bound.experts])
    made["epsilon_form"] = _common([row.epsilon_form for row in bound.experts])
    return made


def _from_drift(rows: Sequence[Row], alpha: float, V: float, shared: bool | None) -> dict[str, Any]:
    from theory.network import network_bound

    heads = any(bool(row["trained_head"]) for row in rows)
    per_sample = all(bool(row["per_sample_loss"]) for row in rows)
    method = _method(len(rows), alpha)
    if "coefficients" in method:
        method["coefficients"] = [alpha] * len(rows)

    def table(name: str) -> np.ndarray:
        return np.array([[row[name][end] for end in ENDS] for row in rows])

    def wide(name: str) -> np.ndarray:
        return np.repeat(np.array([[row[name]] for row in rows]), len(ENDS), axis=1)

    try:
        bound = network_bound(
            table("risk"),
            table("smoothness"),
            wide("drift"),
            private_drift=wide("private_drift") if heads else None,
            trained_heads=heads,
            names=[f"{k} {row['task']}" for k, row in enumerate(rows)],
            shared_samples=shared,
            data_independent_choices=True,
            per_sample_loss=per_sample,
            dispersion=V,
            **method,
        )
    except MergeboundError as error:
        return {"why": str(error).split("; ")[0]}
    return _read(bound)


def _read(bound: Any) -> dict[str, Any]:
    values = np.broadcast_to(np.asarray(bound.value, dtype=np.float64), (3,))
    made: dict[str, Any] = {
        "bound": float(values[0]),
        "bound_low": float(values.min()),
        "bound_high": float(values.max()),
    }
    made |= {term.name: _first(term.value) for term in bound.terms}
    made |= {"V_bound": _first(bound.V), "tier": str(bound.tier), "why": ""}
    return made


def _first(value: Any) -> float:
    return float(np.asarray(value, dtype=np.float64).reshape(-1)[0])


def _rms(values: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _common(forms: Sequence[str]) -> str:
    return " or ".join(sorted(set(forms)))
