"""Constants of every expert as the theory takes them, measured once per checkpoint and kept as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from experiments.studies.hyperparameters.spec import ConstantsSpec
from experiments.studies.hyperparameters.work import Row
from theory.recipe import Expert, Schedule

ENDS = ("value", "low", "high")
LOGS = ("batch_gradient_norms", "batch_losses")
"""Fields that hold one number per step of one very run."""


@dataclass(frozen=True)
class ConstantsUnit:
    """Experts whose constants are measured together, all of one base and checkpoint.

    Attributes:
        store: folder of their grid.
        runs: digests.
        step: of the checkpoints; ``None``: each run's last.
        images: fresh samples for D_2.
        seed: names every draw.
        how: cost and accuracy.
        root: of the data sets.
    """

    store: str
    runs: tuple[str, ...]
    step: int | None
    images: int
    seed: int
    how: ConstantsSpec
    root: str | None = None


def measure_constants(unit: ConstantsUnit) -> list[Row]:
    """One row per expert: its name ``run@step`` and :class:`theory.Expert` with constants at value, low and high end.

    ``drift`` and ``private_drift`` (measured) stand beside the recipe, which has bounds of Theorem 3 only.
    """
    from experiments.measure.noise.constants import constants_of
    from experiments.measure.noise.objective import checkpoint_points
    from experiments.measure.noise.recipe import expert_of
    from experiments.measure.opening import from_store
    from experiments.store import Store

    rows: list[Row] = []
    how = unit.how
    with Store.open(unit.store, "r") as store:
        subject = from_store(
            store, unit.runs, images=unit.images, seed=unit.seed, root=unit.root, step=unit.step
        )  # fmt: skip
        subject = at_step(subject, unit.step)
        visited: list[tuple[Any, ...]] = [() for _ in unit.runs]
        if how.checkpoints:
            most = max(len(store.spec(run).checkpoints) for run in unit.runs)
            every = checkpoint_points(store, unit.runs, subject, most)
            for j, points in enumerate(every):
                run = subject.runs[j]
                assert run is not None
                inner = [point for point in points if point.step < run.steps]
                places = np.linspace(0, len(inner) + 1, min(how.checkpoints, len(inner)) + 2)[1:-1]
                chosen = sorted({min(round(place), len(inner)) - 1 for place in places})
                visited[j] = tuple(inner[i] for i in chosen)
        found = constants_of(
            subject,
            samples=how.samples,
            pairs=how.pairs,
            checkpoints=visited,
            curvature_samples=how.curvature_samples,
            curvature_iterations=how.curvature_iterations,
            lanczos=how.lanczos,
            batches=how.batches,
            seed=unit.seed,
        )
    for j, (digest, constants) in enumerate(zip(unit.runs, found.experts, strict=True)):
        run = subject.runs[j]
        assert run is not None
        recipes = {which: expert_of(subject, j, constants, which=which) for which in ENDS}  # type: ignore[arg-type]
        rows.append(
            {
                "expert": f"{digest}@{run.steps if unit.step is None else unit.step}",
                "task": run.task,
                "drift": constants.drift.value,
                "private_drift": constants.private_drift.value,
                "per_sample_loss": found.per_sample_loss,
                "trained_head": bool(subject.heads[j]) and run.trained != "backbone",
                "risk": {end: max(constants.training_risk.at(end), 0.0) for end in ENDS},
                "smoothness": {end: max(constants.L.at(end), constants.highest.at(end)) for end in ENDS},
                "recipe": to_json(recipes),
                "tier": "estimated",
                "seed": unit.seed,
            }
        )
    return rows


def at_step(subject: Any, step: int | None) -> Any:
    """A subject whose runs ended at a checkpoint: fewer steps, and the beginning of their logs."""
    if step is None:
        return subject
    runs, logs = [], []
    for run, log in zip(subject.runs, subject.logs, strict=True):
        if run is not None and step < run.steps:
            run = run.model_copy(update={"steps": step, "checkpoints": (step,)})
            if log is not None:
                cut = {f.name: getattr(log, f.name) for f in fields(log)}
                log = replace(log, **{n: v[:step] for n, v in cut.items() if isinstance(v, np.ndarray)})
        runs.append(run)
        logs.append(log)
    return replace(subject, runs=tuple(runs), logs=tuple(logs))


def to_json(recipes: Mapping[str, Expert]) -> dict[str, Any]:
    """Recipes with constants at their value and at their ends as plain data; fields that are equal stand once."""
    found: dict[str, Any] = {}
    for field in fields(Expert):
        values = [_plain(getattr(recipes[end], field.name)) for end in ENDS]
        found[field.name] = values[0] if values[1:] == values[:1] * 2 else {"ends": values}
    return found


def from_json(row: Mapping[str, Any], end: str = "value") -> Expert:
    """The recipe that :func:`to_json` wrote, with constants at one end."""
    content: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping) and "ends" in value:
            value = value["ends"][ENDS.index(end)]
        if isinstance(value, Mapping):
            value = Schedule(np.array(value["schedule"], dtype=np.float64))
        content[name] = frozenset(value) if name == "measured" else value
    return Expert(**content)


def without_logs(expert: Expert) -> Expert:
    """The recipe without what was logged or measured on its very run: only hyperparameters and constants."""
    nothing = dict.fromkeys((*LOGS, "drift", "private_drift"))
    return replace(expert, **nothing, measured=expert.measured - set(nothing))  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    if isinstance(value, Schedule):
        return {"schedule": value.values.tolist()}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def named(rows: Sequence[Row]) -> dict[str, Row]:
    """Rows by ``run@step``."""
    return {str(row["expert"]): row for row in rows}
