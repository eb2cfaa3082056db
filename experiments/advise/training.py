"""Advice before fine-tuning: a pilot, the theory, and the recipe whose experts are predicted to merge best."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.advise.expected import by_pilot, by_response, small_budget
from experiments.advise.numbers import Number
from experiments.advise.pilot import Pilot, run_pilot
from experiments.advise.pilot_spec import PilotSpec
from experiments.advise.recipes import considered
from experiments.advise.response import Response, features, fit_response
from experiments.advise.theory_side import TheoryAdvice, theory_advice
from experiments.advise.training_tables import elasticities_table, single_changes, usual_run
from experiments.bases.spec import BaseSpec
from experiments.grid.run_spec import RunSpec
from theory.errors import MergeboundError

TRUSTED = 0.5
"""Rank correlation on left-out recipes below which the response is not used."""
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
        own: risk of the experts alone, nats; predicted, or measured where the response is not trusted.
        base: risk of the base, nats, measured on the same images.
        accuracy: of the average of all tasks' experts; likewise.
        source: ``response``, or ``best of the pilot`` where the response is not trusted.
        active: the largest of training risk, generalization gap and merging cost at the recommended recipe (nats).
        parts: these three; they sum to ``predicted``, and the last two may be negative.
        theory: what the bound alone says.
        changes: what to change first, starting from `mergebound finetune`'s defaults: columns ``what``, ``gain``
            (nats), ``predicted``, ``low``, ``high``, ``inside`` (whether the pilot covers it), ``tier``, ``seed``.
        elasticities: d log(risk) / d log(hyperparameter) at the recommended recipe.
        numbers: risk and accuracy by number of experts; measured where the response is not trusted.
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
    base: Number
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
    content: dict[str, Any] = {name: int(recipe[name]) for name in ("batch_size", "steps")}
    content |= {name: float(recipe[name]) for name in ("learning_rate", "momentum", "weight_decay", "data_share")}
    return RunSpec(task=task, base=base, seed=seed, **content)


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
    table = considered(found, risk, left, caution)
    trusted = risk.quality.spearman >= TRUSTED and len(table) > 0
    row = table.iloc[0] if trusted else _of_pilot(good)
    extended = _still_falling(good, row, trusted)
    # predictions stay with what the pilot saw: of a longer run the response knows nothing
    recipe, scale = _recipe(_longer(row, left) if extended else row), float(row["scale"])
    point = features(pd.DataFrame([row]))
    at_it = by_response(found, row, risk, keep, extended) if trusted else by_pilot(found, row, keep, extended)
    parts = at_it.parts
    asked = _silent_theory(found) if not theory else theory_advice(
        found, int(_of_pilot(good)["recipe"]), left, batch_size=int(recipe["batch_size"]), root=root
    )  # fmt: skip
    numbers = at_it.numbers
    fits = numbers[numbers["kept"] >= keep]
    changed = default or usual_run(found, samples)
    return TrainingAdvice(
        recipe=recipe,
        method="average" if abs(scale - 1.0) < 1e-9 else "task_arithmetic",
        coefficient=scale / len(found.tasks),
        experts=int(fits["experts"].max()) if len(fits) else 1,
        predicted=at_it.predicted,
        own=at_it.own,
        base=at_it.base,
        accuracy=at_it.accuracy,
        source="response" if trusted else "best of the pilot",
        active=max(parts, key=lambda name: parts[name]),
        parts=parts,
        theory=asked,
        changes=single_changes(found, risk, row, recipe, changed, samples, caution),
        elasticities=elasticities_table(risk, point[0], recipe, found.spec.seed),
        numbers=numbers,
        candidates=table.head(20),
        quality=risk.quality,
        pilot=found,
        samples={"pilot": found.samples, "training": float(recipe["steps"] * recipe["batch_size"]), "left": left},
        seconds=time.perf_counter() - started,
        notes=(
            *small_budget(at_it, float(np.mean(np.log(found.classes)))),
            *_notes(found, risk, trusted, extended, asked, point[0]),
        ),
        seed=found.spec.seed,
    )


def _of_pilot(good: pd.DataFrame) -> pd.Series:
    """The pilot's own best merge, as a row of what is considered."""
    row: pd.Series = good.iloc[int(np.argmin(good["risk"].to_numpy(dtype=float)))].copy()
    row["steps"] = row["step"]
    return row


def _still_falling(good: pd.DataFrame, row: pd.Series, trusted: bool) -> bool:
    """Whether the recommended recipe trains as long as the pilot did and nothing says that longer would hurt.

    For a row of the pilot: it is its recipe's last checkpoint.  For a prediction: its training time is within five per
    cent of the pilot's longest, and the pilot's longest runs were still improving.
    """
    if trusted:
        if float(row["time"]) < 0.95 * float(good["time"].max()):
            return False
        row = good.iloc[int(np.argmax(good["time"].to_numpy(dtype=float)))]
    own = good[(good["recipe"] == row["recipe"]) & (good["scale"] == row["scale"])].sort_values("step")
    return bool(row["step"] == own["step"].max() and (len(own) < 2 or own["risk"].iloc[-1] < own["risk"].iloc[-2]))


def _longer(row: pd.Series, samples: float) -> pd.Series:
    """The same recipe with all of the remaining samples."""
    steps = max(int(samples / float(row["batch_size"])), int(row["steps"]))
    factor = steps / float(row["steps"])
    changed = row.copy()
    for name in ("steps", "time", "shrink"):
        changed[name] = float(row[name]) * factor
    changed["steps"] = float(steps)
    return changed


def _recipe(row: pd.Series) -> dict[str, float]:
    names = ("learning_rate", "batch_size", "steps", "momentum", "weight_decay")
    return {name: float(row[name]) for name in names} | {"data_share": 1.0}


def _silent_theory(pilot: Pilot) -> TheoryAdvice:
    empty = pd.DataFrame(columns=["expert", "constant", "value", "low", "high", "tier", "seed"])
    nan = float("nan")
    return TheoryAdvice({}, nan, True, "", "not informative", "not asked", {}, empty, nan, pilot.spec.seed)


def _notes(
    pilot: Pilot, risk: Response, trusted: bool, extended: bool, asked: TheoryAdvice, point: np.ndarray
) -> tuple[str, ...]:
    notes = []
    if extended:
        notes.append(
            "the pilot's longest training was best and still improving: the recipe uses all remaining samples, which "
            "is further than the pilot saw; a larger budget makes a longer pilot"
        )
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
