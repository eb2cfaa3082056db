"""Advice before fine-tuning: a pilot, the theory, and the recipe whose experts are predicted to merge best."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.advise.numbers import Number
from experiments.advise.pilot import Pilot, coordinates, run_pilot
from experiments.advise.pilot_spec import PilotSpec
from experiments.advise.response import Response, features, fit_response, sensitivity
from experiments.advise.theory_side import TheoryAdvice, theory_advice
from experiments.bases.spec import BaseSpec
from experiments.grid.run_spec import RunSpec
from theory.errors import MergeboundError

TRUSTED = 0.5
"""Rank correlation on left-out recipes below which the response is not used."""
CHEAPEST = 0.01
"""Of recipes within this relative distance of the smallest cautious prediction, the cheapest is recommended."""
LENGTHS = (1.0, 0.5, 0.25, 0.125, 0.0625)
"""Shares of the affordable steps that are considered."""
RATES = 33
FINE_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainingAdvice:
    """How to fine-tune experts that shall be merged.

    Attributes:
        recipe: ``learning_rate``, ``batch_size``, ``steps``, ``momentum``, ``weight_decay``, ``data_share``; constant
            learning rate, no augmentation.
        method, coefficient: how to merge them; ``coefficient`` is lambda of task arithmetic (1/N for the average).
        experts: how many of them to merge into one model, by ``keep``.
        predicted: joint validation risk of the merge of all tasks, nats.
        own: predicted risk of the experts alone.
        accuracy: predicted accuracy of the average of all tasks' experts.
        source: ``response``, or ``best of the pilot`` where the response is not trusted.
        active: the largest of training risk, generalization gap and merging cost at the recommended recipe (nats).
        parts: these three.
        theory: what the bound alone says.
        changes: what to change first, starting from `mergebound finetune`'s defaults: columns ``what``, ``gain``
            (nats), ``predicted``, ``low``, ``high``, ``inside`` (whether the pilot covers it), ``tier``, ``seed``.
        elasticities: d log(risk) / d log(hyperparameter) at the recommended recipe.
        numbers: predicted risk and accuracy by number of experts.
        candidates: the best recipes by cautious prediction.
        quality: of the response on recipes that were left out.
        pilot: that was run.
        samples: per expert: ``pilot`` and ``training``.
        seconds: of everything.
        notes: what a reader must know.
        seed: of the pilot.
    """

    recipe: Mapping[str, float]
    method: str
    coefficient: float
    experts: int
    predicted: Number
    own: Number
    accuracy: Number
    source: str
    active: str
    parts: Mapping[str, float]
    theory: TheoryAdvice
    changes: pd.DataFrame
    elasticities: pd.DataFrame
    numbers: pd.DataFrame
    candidates: pd.DataFrame
    quality: Any
    pilot: Pilot
    samples: Mapping[str, float]
    seconds: float
    notes: tuple[str, ...]
    seed: int

    def runs(self, tasks: Sequence[str], base: BaseSpec, seed: int = 0) -> tuple[RunSpec, ...]:
        """The recommended runs of some tasks."""
        return tuple(run_of(self.recipe, task, base, seed) for task in tasks)


def run_of(recipe: Mapping[str, float], task: str, base: BaseSpec, seed: int = 0) -> RunSpec:
    """One run of a recommended recipe."""
    whole = {name: int(recipe[name]) for name in ("batch_size", "steps")}
    rest = {name: float(recipe[name]) for name in ("learning_rate", "momentum", "weight_decay", "data_share")}
    return RunSpec(task=task, base=base, seed=seed, **whole, **rest)


def advise_training(
    tasks: Sequence[str],
    base: BaseSpec,
    samples: float,
    folder: Path,
    *,
    pilot: PilotSpec = PilotSpec(),
    keep: float = 0.5,
    caution: float = 1.0,
    default: RunSpec | None = None,
    theory: bool = True,
    root: str | Path | None = None,
    workers: int | None = None,
    made: Pilot | None = None,
    say: Say | None = None,
) -> TrainingAdvice:
    """Run a pilot and recommend a recipe for what is left of the budget.

    Args:
        tasks: two or more, as :func:`experiments.tasks.named.open_task` takes them.
        base: of all experts.
        samples: gradients of single samples for every expert, pilot included.
        folder: where the pilot's runs are kept; a second call goes on.
        pilot: what is tried.
        keep: share of the experts' accuracy that a merge must keep; decides how many experts go into one.
        caution: standard deviations that are added to predictions before they are compared.
        default: recipe to start changes from; default: `mergebound finetune`'s with all samples.
        theory: measure constants and ask the bound, too.
        root: of the data sets.
        workers: processes.
        made: a pilot that was run already.
        say: is told what is being done.

    Raises:
        MergeboundError: what pilots raise, or a pilot of which no recipe survived.

    Source: theory.md section 11 for the bound's advice; the response is calibrated on the pilot.
    """
    started = time.perf_counter()
    if not 0.0 < keep <= 1.0:
        raise MergeboundError(f"keep = {keep}: give a share of the experts' accuracy, above 0 and at most 1")
    found = made or run_pilot(pilot, tasks, base, samples, folder, root=root, workers=workers, say=say)
    left = samples - found.samples
    whole = found.rows["experts"] == len(found.tasks)
    good = found.rows[whole & found.rows["finite"]]
    if good.empty:
        raise MergeboundError("pilot: every recipe diverged or collapsed; lower rates, or take another base")
    risk = fit_response(found.rows, "risk", seed=found.spec.seed)
    once = found.rows[whole & (found.rows["scale"] == 1.0)]  # experts alone do not depend on how they are merged
    own = fit_response(once, "own_risk", seed=found.spec.seed)
    own_accuracy = fit_response(once, "own_accuracy", log=False, seed=found.spec.seed)
    accuracy = fit_response(
        found.rows[found.rows["scale"] == 1.0], "accuracy", log=False, seed=found.spec.seed
    )  # fmt: skip
    table = considered(found, risk, left, caution)
    trusted = risk.quality.spearman >= TRUSTED and len(table) > 0
    row = table.iloc[0] if trusted else _of_pilot(good)
    recipe, scale = _recipe(row), float(row["scale"])
    point = features(pd.DataFrame([row]))
    plainly = features(pd.DataFrame([row.to_dict() | {"scale": 1.0, "experts": len(found.tasks)}]))
    training = fit_response(once[once["training_risk"] > 0], "training_risk", seed=found.spec.seed)
    values = {name: float(r.predict(plainly)[0][0]) for name, r in (("own", own), ("training", training))}
    values["risk"] = float(risk.predict(point)[0][0])
    parts = {
        "training": values["training"],
        "instability": max(values["own"] - values["training"], 0.0),
        "dispersion": max(values["risk"] - values["own"], 0.0),
    }
    asked = _silent_theory(found) if not theory else theory_advice(
        found, int(good.loc[good["risk"].idxmin(), "recipe"]), left, batch_size=int(recipe["batch_size"]), root=root
    )  # fmt: skip
    numbers = by_number(found, row, risk, accuracy, own_accuracy, keep)
    fits = numbers[numbers["kept"] >= keep]
    changed = default or _usual(found, samples)
    return TrainingAdvice(
        recipe=recipe,
        method="average" if abs(scale - 1.0) < 1e-9 else "task_arithmetic",
        coefficient=scale / len(found.tasks),
        experts=int(fits["experts"].max()) if len(fits) else 1,
        predicted=_number(risk, point, found, row, trusted),
        own=_number(own, plainly, found, None, True),
        accuracy=_number(accuracy, plainly, found, None, True),
        source="response" if trusted else "best of the pilot",
        active=max(parts, key=lambda name: parts[name]),
        parts=parts,
        theory=asked,
        changes=_changes(found, risk, row, recipe, changed, samples, caution),
        elasticities=_elasticities(risk, point[0], recipe, found.spec.seed),
        numbers=numbers,
        candidates=table.head(20),
        quality=risk.quality,
        pilot=found,
        samples={"pilot": found.samples, "training": float(recipe["steps"] * recipe["batch_size"]), "left": left},
        seconds=time.perf_counter() - started,
        notes=_notes(found, risk, trusted, asked, row, point[0]),
        seed=found.spec.seed,
    )


def considered(pilot: Pilot, risk: Response, samples: float, caution: float) -> pd.DataFrame:
    """Recipes that the rest of the budget affords, by cautious prediction, the cheapest of the best first.

    Training time is kept within what the pilot saw, and the effective learning rate at most at the largest that stayed
    finite in the pilot with any of its tasks.
    """
    usable = pilot.rows[pilot.rows["finite"]]
    effective = usable["learning_rate"] / (1.0 - usable["momentum"])
    rates = np.geomspace(pilot.spec.rates[0], float(effective.max()), RATES)
    least = min(pilot.images)
    scales = [s for s in FINE_SCALES if s <= max(pilot.spec.scales) and not (pilot.hull and s > 1.0)]
    rows = []
    for batch in sorted({min(b, least) for b in pilot.spec.batch_sizes}):
        for share in LENGTHS:
            steps = int(share * samples / batch)
            if steps < 1:
                continue
            for rate in rates:
                for decay in pilot.spec.decays:
                    for scale in scales:
                        rows.append((batch, steps, rate, decay, scale))
    table = pd.DataFrame(rows, columns=["batch_size", "steps", "effective", "weight_decay", "scale"])
    table["time"] = table["effective"] * table["steps"]
    table["noise"] = table["effective"] / table["batch_size"]
    table["shrink"] = table["weight_decay"] * table["time"]
    table["experts"] = len(pilot.tasks)
    table = table[(np.log(table["time"]) >= risk.low[0] - 1e-9) & (np.log(table["time"]) <= risk.high[0] + 1e-9)]
    if table.empty:
        return table
    points = features(table)
    mean, deviation = risk.mean_and_deviation(points)
    value, low, high = risk.predict(points)
    table = table.assign(
        predicted=value, low=low, high=high, cautious=np.exp(mean + caution * deviation),
        samples=table["steps"] * table["batch_size"], tier="calibrated", seed=pilot.spec.seed,
    )  # fmt: skip
    best = float(table["cautious"].min())
    table["near"] = table["cautious"] <= best * (1.0 + CHEAPEST)
    near = table[table["near"]].sort_values(["samples", "cautious"])
    rest = table[~table["near"]].sort_values("cautious")
    ordered = pd.concat([near, rest], ignore_index=True).head(200)
    momenta = [_momentum(pilot, row) for row in ordered.to_dict("records")]
    ordered["momentum"] = momenta
    ordered["learning_rate"] = [float(f"{e * (1 - m):.4g}") for e, m in zip(ordered["effective"], momenta, strict=True)]
    return ordered.drop(columns="near")


def _momentum(pilot: Pilot, row: Mapping[Any, Any]) -> float:
    """The momentum of the pilot's finite recipe that is nearest in training time and noise."""
    usable = pilot.rows[pilot.rows["finite"]]
    distance = (np.log(usable["time"] / row["time"])) ** 2 + (np.log(usable["noise"] / row["noise"])) ** 2
    return float(usable.loc[distance.idxmin(), "momentum"])


def _of_pilot(good: pd.DataFrame) -> pd.Series:
    """The pilot's own best merge, as a row of what is considered."""
    row = good.loc[good["risk"].idxmin()].copy()
    row["steps"] = row["step"]
    return row


def _recipe(row: pd.Series) -> dict[str, float]:
    names = ("learning_rate", "batch_size", "steps", "momentum", "weight_decay")
    return {name: float(row[name]) for name in names} | {"data_share": 1.0}


def _number(response: Response, point: np.ndarray, pilot: Pilot, row: pd.Series | None, trusted: bool) -> Number:
    if not trusted and row is not None:
        value, error = float(row["risk"]), float(row["standard_error"])
        return Number(
            value, max(value - 1.96 * error, 0.0), value + 1.96 * error, "measured", pilot.spec.seed,
            "validation images of the pilot; best of several, so a little too low",
        )  # fmt: skip
    value, low, high = (float(v[0]) for v in response.predict(point))
    note = "90 % of left-out pilot recipes lie inside with all their merges"
    return Number(value, low, high, "calibrated", pilot.spec.seed, note)


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


def _usual(pilot: Pilot, samples: float) -> RunSpec:
    """`mergebound finetune`'s defaults with all samples of an expert."""
    from experiments.finetune.task_expert import FinetuneSpec

    spec = FinetuneSpec()
    batch = min(spec.batch_size, min(pilot.images))
    steps = max(1, int(samples / batch))
    used = replace(spec, batch_size=batch, steps=steps)
    return used.resolved(min(pilot.images), pilot.tasks[0], pilot.base)


def _row_of(run: RunSpec, scale: float, experts: int) -> dict[str, Any]:
    return coordinates(run, run.steps) | {"scale": scale, "experts": experts}


def _changes(
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
    value, low, high = risk.predict(points)
    inside = ((points >= risk.low - 1e-9) & (points <= risk.high + 1e-9)).all(axis=1)
    found = pd.DataFrame(
        {
            "what": [what for what, _ in options],
            "gain": value[0] - value[1:],
            "predicted": value[1:],
            "low": low[1:],
            "high": high[1:],
            "inside": inside[1:] & inside[0],
            "tier": "calibrated",
            "seed": pilot.spec.seed,
        }
    )
    return found.sort_values("gain", ascending=False).reset_index(drop=True)


def _elasticities(risk: Response, point: np.ndarray, recipe: Mapping[str, float], seed: int) -> pd.DataFrame:
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


def _silent_theory(pilot: Pilot) -> TheoryAdvice:
    empty = pd.DataFrame(columns=["expert", "constant", "value", "low", "high", "tier", "seed"])
    nan = float("nan")
    return TheoryAdvice({}, nan, True, "", "not informative", "not asked", {}, empty, nan, pilot.spec.seed)


def _notes(
    pilot: Pilot, risk: Response, trusted: bool, asked: TheoryAdvice, row: pd.Series, point: np.ndarray
) -> tuple[str, ...]:
    notes = []
    if not trusted:
        notes.append(
            f"the response ranks left-out recipes with Spearman {risk.quality.spearman:.2f} (below {TRUSTED}): the "
            "pilot's own best recipe is recommended instead"
        )
    outside = [n for n, v, a, b in zip(("training time", "noise"), point[:2], risk.low[:2], risk.high[:2], strict=True)
               if v < a - 1e-9 or v > b + 1e-9]  # fmt: skip
    if trusted and outside:
        notes.append(f"{' and '.join(outside)} of the recommended recipe lie outside the pilot: extrapolated")
    if asked.verdict == "do not train":
        notes.append("the bound alone says: do not train; that is what norms without angles give, so the pilot decides")
    elif asked.verdict == "not informative":
        notes.append(f"the bound is not informative here ({asked.words}); the pilot decides")
    elif asked.choices:
        notes.append("the bound proposes a recipe of its own (see Theory); the pilot decides")
    bad = sorted(set(pilot.rows.loc[~pilot.rows["finite"], "recipe"]))
    if bad:
        notes.append(f"{len(bad)} of {pilot.spec.recipes} pilot recipes diverged or collapsed in some merge")
    notes.append("all training images are used: every term of the bound falls with n; smaller shares were not tried")
    return tuple(notes)
