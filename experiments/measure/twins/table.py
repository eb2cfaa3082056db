"""Many recipes: measured eps_i next to Theorem 2, rank correlation, ratio and exponents."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from experiments.grid.run_spec import RunSpec
from experiments.inputs.training_data import TrainingData
from experiments.measure.twins.estimates import stability
from experiments.measure.twins.pairs import draw_pairs, fresh_rows, sample_of
from experiments.measure.twins.recipes import SWEPT, Recipe
from experiments.measure.twins.theorem2 import cap, elasticities, gradient_gaps, growth, theorem2
from experiments.measure.twins.train import train_twins

if TYPE_CHECKING:
    import pandas as pd

Cell = tuple[nn.Module, Mapping[str, Tensor], TrainingData, TrainingData]
"""Network, x_0 with a head for the task, training part, and held-back images."""
FIELDS = ("learning_rate", "steps", "batch_size", "n")
BOUNDS = ("rms", "envelope", "envelope_kappa", "cap")
_BOOTSTRAP, _KICKS = 0x57AB, 8
_log = logging.getLogger(__name__)


def opener(root: str | Path | None = None, *, cache_folder: Path | None = None) -> Callable[[RunSpec], Cell]:
    """Opens what a run needs; bases and images are kept."""
    from experiments.finetune.task_expert import start_from
    from experiments.grid.bases import open_base
    from experiments.inputs.resident import residents
    from experiments.models.form import input_format
    from experiments.tasks.named import open_task

    @cache
    def base_of(text: str) -> Any:
        from experiments.bases.spec import BaseSpec

        return open_base(BaseSpec.model_validate_json(text), root, cache=cache_folder)

    @cache
    def images_of(task: str, base: str) -> Any:
        opened = open_task(task, root)
        network, _ = start_from(base_of(base), opened.classes, 0)
        return opened.classes, residents(opened, input_format(network))

    def open_run(run: RunSpec) -> Cell:
        text = run.base.model_dump_json()
        classes, (train, validation, _) = images_of(run.task, text)
        network, start = start_from(base_of(text), classes, run.seed)
        return network, start, train, validation

    return open_run


def stability_table(
    recipes: Sequence[Recipe],
    open_run: Callable[[RunSpec], Cell],
    *,
    twins: int = 16,
    seed: int = 0,
    chunk: int | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> pd.DataFrame:
    """Measure every recipe.

    Args:
        recipes: what is run.
        open_run: gives network, x_0, training part and held-back images of a run (:func:`opener`).
        twins: exchanged samples of each recipe, at most those of S.
        seed: names which samples are exchanged; recipes share it.
        chunk: twins at a time.
        report: is told each row as it comes.

    Returns:
        One row per recipe: hyperparameters, n, ``epsilon`` (rms) with interval and standard error, ``epsilon_mean``,
        shared and private parts, ``left`` (share of twins whose sample was drawn), ``kappa`` and gaps as measured,
        Theorem 2's forms (``envelope_kappa`` with the measured kappa, the others with kappa 0), ``cap``, theory's
        elasticities, ``rounding``.  All numbers are of tier *estimated*.
    """
    import pandas as pd

    rows = []
    for number, recipe in enumerate(recipes):
        row = _measure(recipe, *open_run(recipe.run), twins=twins, seed=seed, chunk=chunk)
        rows.append({"recipe": number, **row})
        _log.info("recipe %d of %d: eps %.3g", number + 1, len(recipes), row["epsilon"])
        if report is not None:
            report(rows[-1])
    return pd.DataFrame(rows)


def _measure(
    recipe: Recipe,
    network: nn.Module,
    start: Mapping[str, Tensor],
    train: TrainingData,
    fresh: TrainingData,
    *,
    twins: int,
    seed: int,
    chunk: int | None,
) -> dict[str, Any]:
    run = recipe.run
    sample = sample_of(run, train)
    pairs = draw_pairs(len(sample), len(fresh), min(twins, len(sample), len(fresh)), seed)
    found = train_twins(run, network, start, train, fresh, pairs, chunk=chunk)
    kicks = np.flatnonzero(found.starts >= 0)[:_KICKS]
    kappa = float("nan")
    if len(kicks):
        stops = sorted({max(1, run.steps // 4), max(1, run.steps // 2), run.steps})
        kicked = train_twins(
            run, network, start, train, fresh, pairs.choose(kicks), chunk=chunk, steps=stops, once=True
        )
        kappa = growth(kicked, run)
    exchanged = fresh_rows(sample, fresh, pairs)
    gaps = np.stack(
        [gradient_gaps(run, network, state, sample, exchanged, pairs) for state in (start, found.state)], axis=1
    )
    plain = {each.form: each for each in theorem2(run, len(sample), gaps)}
    grown = {each.form: each for each in theorem2(run, len(sample), gaps, kappa)}
    measured = stability(found, seed=seed)
    eps, mean = measured.epsilon, measured.mean["all"][-1]
    row: dict[str, Any] = {
        "group": recipe.group, "task": run.task, "architecture": run.architecture, "optimizer": run.optimizer,
        "nesterov": run.nesterov, "sampling": run.sampling, "learning_rate": run.learning_rate, "steps": run.steps,
        "batch_size": run.batch_size, "n": len(sample), "momentum": run.momentum, "weight_decay": run.weight_decay,
        "schedule": run.schedule, "run_seed": run.seed, "seed": seed, "twins": len(pairs),
        "left": float((found.starts >= 0).mean()), "epsilon": eps.value, "low": eps.low, "high": eps.high,
        "error": eps.error, "epsilon_half": measured.rms["all"][0].value, "epsilon_mean": mean.value,
        "epsilon_sup": measured.sup["all"][-1].value, "shared": measured.rms["shared"][-1].value,
        "private": measured.rms["private"][-1].value, "drift": float(found.drift[-1, 0]),
        "rounding": float(found.rounding[-1]), "kappa": kappa, "D_2": plain["rms"].gap,
        "D_envelope": plain["envelope"].gap, "D_inf": plain["sup"].gap, "rms": plain["rms"].value,
        "envelope": plain["envelope"].value, "sup": plain["sup"].value, "envelope_kappa": grown["envelope"].value,
        "cap": cap([found]), "loss_first": float(found.losses[0]), "loss_last": float(found.losses[-1]),
        "tier": "estimated", "way": found.way, "seconds": found.seconds,
    }  # fmt: skip
    if run.optimizer == "sgd" and run.clip_norm is None:
        row |= {f"elasticity_{name}": value for name, value in elasticities(run, len(sample)).items()}
    return row


@dataclass(frozen=True)
class Comparison:
    """One number of a table with its interval (recipes resampled).

    Attributes:
        name: what it is; ``bound``: which bound, or empty.
        value, low, high: of it.
        theory: what the theory says, NaN where it says nothing.
        count: recipes behind it.
    """

    name: str
    bound: str
    value: float
    low: float
    high: float
    theory: float
    count: int
    seed: int = 0
    tier: str = "estimated"


def compare(table: pd.DataFrame, *, seed: int = 0, resamples: int = 1000) -> tuple[Comparison, ...]:
    """Rank correlation with each bound, quantiles of bound/measured, share of recipes below it, exponents.

    An exponent is the slope of log eps on the log of the swept hyperparameter, over the centre and its sweep; its
    interval draws each recipe's log eps from its own standard error.  ``theory`` is the slope of the envelope bound's
    clock over the same recipes (gap left out).
    """
    found: list[Comparison] = []
    for bound in BOUNDS:
        good = table[(table["epsilon"] > 0) & np.isfinite(table[bound]) & np.isfinite(table["epsilon"])]
        eps, value = good["epsilon"].to_numpy(), good[bound].to_numpy()
        if len(good) < 3:
            continue
        rng = np.random.default_rng([seed, _BOOTSTRAP])
        rows = rng.integers(0, len(good), (resamples, len(good)))

        def add(name: str, statistic: Callable[[np.ndarray, np.ndarray], float], bound: str = bound) -> None:
            draws = [statistic(eps[r], value[r]) for r in rows]  # noqa: B023
            low, high = np.nanquantile(draws, [0.025, 0.975])
            found.append(
                Comparison(name, bound, statistic(eps, value), float(low), float(high), np.nan, len(eps), seed)  # noqa: B023
            )

        add("spearman", _spearman)
        add("median bound/measured", lambda e, v: float(np.median(v / e)))
        add("5% of bound/measured", lambda e, v: float(np.quantile(v / e, 0.05)))
        add("95% of bound/measured", lambda e, v: float(np.quantile(v / e, 0.95)))
        add("bound holds", lambda e, v: float(np.mean(v >= e)))
    return (*found, *_exponents(table, seed, resamples))


def _exponents(table: pd.DataFrame, seed: int, resamples: int) -> list[Comparison]:
    found: list[Comparison] = []
    for field, name in zip(SWEPT, ("learning_rate", "steps", "batch_size", "n"), strict=True):
        part = table[(table["group"] == "centre") | (table["group"] == f"sweep:{field}")]
        part = part[(part["epsilon"] > 0) & np.isfinite(part["epsilon"])]
        if len(part) < 3:
            continue
        x, y = np.log(part[name].to_numpy(dtype=float)), np.log(part["epsilon"].to_numpy())
        spread = (part["error"] / part["epsilon"]).fillna(0.0).to_numpy()
        clock = np.log((part["envelope"] / part["D_envelope"]).to_numpy())
        rng = np.random.default_rng([seed, _BOOTSTRAP, len(found)])
        draws = [np.polyfit(x, y + spread * rng.standard_normal(len(y)), 1)[0] for _ in range(resamples)]
        low, high = np.quantile(draws, [0.025, 0.975])
        slope, theory = float(np.polyfit(x, y, 1)[0]), float(np.polyfit(x, clock, 1)[0])
        found.append(Comparison(f"exponent in {name}", "", slope, float(low), float(high), theory, len(part), seed))
    return found


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    from experiments.statistics import spearman

    return float(spearman(a, b)[0])


def comparison_frame(rows: Sequence[Comparison]) -> pd.DataFrame:
    """One row per comparison."""
    import pandas as pd

    return pd.DataFrame([vars(row) for row in rows])
