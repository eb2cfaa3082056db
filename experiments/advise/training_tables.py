"""Tables of advice before fine-tuning: by number of experts, single changes, elasticities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from experiments.advise.pilot import Pilot, coordinates
from experiments.advise.response import Response, features, sensitivity
from experiments.grid.run_spec import RunSpec


def by_number(
    pilot: Pilot, row: pd.Series, risk: Response, accuracy: Response, own_accuracy: Response, keep: float
) -> pd.DataFrame:
    """Predicted risk and accuracy of averages by number of experts at the recommended recipe."""
    counts = list(range(2, len(pilot.tasks) + 1))
    table = pd.DataFrame([row.to_dict() | {"experts": n, "scale": 1.0} for n in counts])
    points = features(table)
    value, low, high = risk.predict(points)
    hits = accuracy.predict(points)
    alone = own_accuracy.predict(features(table.assign(experts=len(pilot.tasks))))
    kept = np.clip(hits[0] / np.maximum(alone[0], 1e-9), 0.0, None)
    return pd.DataFrame(
        {
            "experts": counts,
            "predicted": value,
            "low": low,
            "high": high,
            "accuracy": np.clip(hits[0], 0, 1),
            "accuracy_low": np.clip(hits[1], 0, 1),
            "accuracy_high": np.clip(hits[2], 0, 1),
            "kept": kept,
            "wanted": keep,
            "tier": "calibrated",
            "seed": pilot.spec.seed,
        }
    )


def usual_run(pilot: Pilot, samples: float) -> RunSpec:
    """`mergebound finetune`'s defaults with all samples of an expert."""
    from experiments.finetune.task_expert import FinetuneSpec

    spec = FinetuneSpec()
    batch = min(spec.batch_size, min(pilot.images))
    steps = max(1, int(samples / batch))
    used = replace(spec, batch_size=batch, steps=steps)
    return used.resolved(min(pilot.images), pilot.tasks[0], pilot.base)


def _row_of(run: RunSpec, scale: float, experts: int) -> dict[str, Any]:
    return coordinates(run, run.steps) | {"scale": scale, "experts": experts}


def single_changes(
    pilot: Pilot,
    risk: Response,
    row: pd.Series,
    recipe: Mapping[str, float],
    default: RunSpec,
    samples: float,
    caution: float,
) -> pd.DataFrame:
    """Single changes of the default recipe towards the recommended one, then of budget and number of experts."""
    size = len(pilot.tasks)
    start = _row_of(default, 1.0, size)
    options: list[tuple[str, dict[str, Any]]] = []
    for name in ("learning_rate", "steps", "batch_size", "momentum", "weight_decay"):
        value = recipe[name]
        if value == getattr(default, name):
            continue
        content = {name: int(value) if name in ("steps", "batch_size") else value, "checkpoints": ()}
        changed = RunSpec.model_validate(default.model_dump() | content)
        options.append((f"{name} {getattr(default, name):g} to {value:g}", _row_of(changed, 1.0, size)))
    if default.schedule != "constant":
        changed = RunSpec.model_validate(default.model_dump() | {"schedule": "constant", "warm_up": 0})
        options.append((f"schedule {default.schedule} to constant", _row_of(changed, 1.0, size)))
    if float(row["scale"]) != 1.0:
        options.append((f"coefficients sum to {row['scale']:g} in place of 1", start | {"scale": float(row["scale"])}))
    if size > 2:
        options.append(("merge one expert fewer", start | {"experts": size - 1}))
    options.append(("everything as recommended", {name: row[name] for name in start}))
    points = features(pd.DataFrame([start, *(one for _, one in options)]))
    priced, lows, highs = risk.predict(points)
    inside = np.asarray(np.all((points >= risk.low - 1e-9) & (points <= risk.high + 1e-9), axis=1))
    found = pd.DataFrame(
        {
            "what": [what for what, _ in options],
            "gain": priced[0] - priced[1:],
            "predicted": priced[1:],
            "low": lows[1:],
            "high": highs[1:],
            "inside": np.logical_and(inside[1:], inside[0]),
            "tier": "calibrated",
            "seed": pilot.spec.seed,
        }
    )
    return found.sort_values("gain", ascending=False).reset_index(drop=True)


def elasticities_table(risk: Response, point: np.ndarray, recipe: Mapping[str, float], seed: int) -> pd.DataFrame:
    """Elasticities of the predicted risk by hyperparameter, through the coordinates they move."""
    shrink = float(point[2])
    moves = {
        "learning_rate": np.array([1.0, 1.0, shrink, 0.0, 0.0]),
        "steps": np.array([1.0, 0.0, shrink, 0.0, 0.0]),
        "batch_size": np.array([0.0, -1.0, 0.0, 0.0, 0.0]),
        "weight_decay": np.array([0.0, 0.0, shrink, 0.0, 0.0]),
        "experts": np.array([0.0, 0.0, 0.0, 0.0, 1.0]),
    }
    rows = []
    for name, direction in moves.items():
        value, low, high = sensitivity(risk, point, direction)
        rows.append({"name": name, "elasticity": value, "low": low, "high": high, "tier": "calibrated", "seed": seed})
    return pd.DataFrame(rows)
