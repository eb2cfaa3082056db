"""What is expected at a recommended recipe: by the response where it is trusted, else what the pilot measured there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.advise.numbers import Z95, Number, around, simultaneous
from experiments.advise.pilot import Pilot
from experiments.advise.recipes import nearest
from experiments.advise.response import Response, features, fit_response
from experiments.advise.training_tables import by_number

BEST = "validation images of the pilot; best of several, so a little too low"
SHORTER = "of the pilot's shorter run with the same recipe"
LEFT_OUT = "90 % of left-out pilot recipes lie inside with all their merges"


@dataclass(frozen=True)
class Expected:
    """Numbers at a recommended recipe.

    Attributes:
        predicted: joint validation risk of the merge, nats.
        own: risk of the experts alone, nats.
        base: risk of the base (with the experts' heads, where those are trained), nats, measured.
        accuracy: of the average of all tasks' experts.
        parts: ``training``, ``instability`` (own minus training risk) and ``dispersion`` (merged minus own risk) in
            nats; they sum to ``predicted``, and each of the last two may be negative.
        high: upper limit of ``predicted`` that also holds for the best of all merges of the pilot, where it is that.
        numbers: risk and accuracy by number of experts, as :func:`experiments.advise.training_tables.by_number`.
    """

    predicted: Number
    own: Number
    base: Number
    accuracy: Number
    parts: Mapping[str, float]
    high: float
    numbers: pd.DataFrame


def by_response(pilot: Pilot, row: pd.Series, risk: Response, keep: float, extended: bool) -> Expected:
    """Everything by responses fitted to the pilot (tier: calibrated); the base as measured nearest to the recipe."""
    seed, rows = pilot.spec.seed, pilot.rows
    once = rows[(rows["experts"] == len(pilot.tasks)) & (rows["scale"] == 1.0)]  # experts alone: however they merge
    plainly = features(pd.DataFrame([row.to_dict() | {"scale": 1.0, "experts": len(pilot.tasks)}]))
    own = fit_response(once, "own_risk", seed=seed)
    alone = fit_response(once, "own_accuracy", log=False, seed=seed)
    accuracy = fit_response(rows[rows["scale"] == 1.0], "accuracy", log=False, seed=seed)
    training = fit_response(once[once["training_risk"] > 0], "training_risk", seed=seed)
    note = LEFT_OUT + ("; of the shorter run that the pilot covers" if extended else "")
    predicted = _calibrated(risk, features(pd.DataFrame([row])), seed, note)
    found = _calibrated(own, plainly, seed, LEFT_OUT)
    near = nearest(rows[rows["experts"] == len(pilot.tasks)], row)
    return Expected(
        predicted, found, around(float(near["base_risk"]), float(near["base_error"]), "measured", seed, "images"),
        _calibrated(accuracy, plainly, seed, LEFT_OUT),
        _parts(float(training.predict(plainly)[0][0]), found.value, predicted.value), predicted.high,
        by_number(pilot, row, risk, accuracy, alone, keep),
    )  # fmt: skip


def by_pilot(pilot: Pilot, row: pd.Series, keep: float, extended: bool) -> Expected:
    """Everything as the pilot measured it at one of its own rows (tier: measured)."""
    seed, rows = pilot.spec.seed, pilot.rows
    here = rows[(rows["recipe"] == row["recipe"]) & (rows["step"] == row["step"])]
    averages = here[here["scale"] == 1.0].sort_values("experts").drop_duplicates("experts", keep="last")
    average = averages.iloc[-1]

    def measured(source: pd.Series, name: str, error: str, note: str) -> Number:
        return around(float(source[name]), float(source[error]), "measured", seed, note)

    note = SHORTER if extended else BEST
    return Expected(
        measured(row, "risk", "standard_error", note), measured(row, "own_risk", "own_error", note),
        measured(row, "base_risk", "base_error", "images"), measured(average, "accuracy", "accuracy_error", note),
        _parts(float(row["training_risk"]), float(row["own_risk"]), float(row["risk"])),
        float(row["risk"]) + simultaneous(int((rows["finite"] & (rows["experts"] == row["experts"])).sum()))
        * float(row["standard_error"]), _measured_numbers(averages, keep, seed),
    )  # fmt: skip


def small_budget(found: Expected, guess: float) -> tuple[str, ...]:
    """Notes on a merge that is not better than the base, or not told from guessing (``guess``: its loss in nats)."""
    notes = []
    if found.predicted.value >= found.base.value:
        notes.append(
            f"the merge is no better than the base ({found.base} nats): do not fine-tune for a merge on this budget, "
            "raise it"
        )
    elif not found.high < found.base.value:
        notes.append(
            f"the merge is not told from the base ({found.base} nats): its interval, widened where it is the best "
            "of the pilot, reaches it; the budget may be too small"
        )
    if not found.high < guess:
        notes.append(
            f"the merge is not told from guessing ({guess:.3g} nats): the budget is too small for these tasks, raise it"
        )
    return tuple(notes)


def _parts(training: float, own: float, risk: float) -> dict[str, float]:
    return {"training": training, "instability": own - training, "dispersion": risk - own}


def _calibrated(response: Response, point: np.ndarray, seed: int, note: str) -> Number:
    value, low, high = (float(v[0]) for v in response.predict(point))
    return Number(value, low, high, "calibrated", seed, note)


def _measured_numbers(averages: pd.DataFrame, keep: float, seed: int) -> pd.DataFrame:
    """The table by number of experts from one checkpoint's averages, one random group of each smaller number."""
    half, accuracy = Z95 * averages["standard_error"], averages["accuracy"]
    around_it = Z95 * averages["accuracy_error"]
    alone = max(float(averages["own_accuracy"].iloc[-1]), 1e-9)
    return pd.DataFrame(
        {
            "experts": averages["experts"].astype(int),
            "predicted": averages["risk"],
            "low": (averages["risk"] - half).clip(lower=0.0),
            "high": averages["risk"] + half,
            "accuracy": accuracy,
            "accuracy_low": (accuracy - around_it).clip(0, 1),
            "accuracy_high": (accuracy + around_it).clip(0, 1),
            "kept": accuracy / alone,
            "wanted": keep,
            "tier": "measured",
            "seed": seed,
        }
    ).reset_index(drop=True)
