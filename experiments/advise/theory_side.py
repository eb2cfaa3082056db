"""What the theory alone advises: constants measured on a pilot's experts, and the recipe that minimises the bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.advise.pilot import Pilot
from theory.errors import MergeboundError

ORTHOGONAL = 0.1
"""Largest |cosine| between task vectors of the pilot at which they are taken as orthogonal."""
_GONE = (
    *("training_risk", "drift", "private_drift", "epsilon", "batch_gradient_norms", "batch_losses"),
    *("base_norm",),
)


@dataclass(frozen=True)
class TheoryAdvice:
    """The bound's own advice.

    Attributes:
        choices: learning rate and steps that minimise the bound; empty where there is no design.
        bound: master bound there, in nats (tier estimated).
        vacuous: at or above the loss of guessing.
        active: its largest term.
        verdict: ``recipe``, ``do not train``, or ``not informative``.
        words: why.
        elasticities: d log(bound) / d log(field), by field, mean over experts.
        constants: measured, one row per expert and constant.
        cosine: largest |cosine| between task vectors of the pilot's experts.
        seed: of the constants.
    """

    choices: Mapping[str, float]
    bound: float
    vacuous: bool
    active: str
    verdict: str
    words: str
    elasticities: Mapping[str, float]
    constants: pd.DataFrame
    cosine: float
    seed: int
    tier: str = "estimated"


def theory_advice(
    pilot: Pilot,
    recipe: int,
    samples: float,
    *,
    batch_size: int,
    root: str | Path | None = None,
    measured: int = 48,
) -> TheoryAdvice:
    """Measure the constants of one recipe's experts and minimise the master bound over learning rate and steps.

    Plain SGD with independent batches and without decay stands for the recipes, because no bound on training risk
    covers momentum or reshuffling; the learning rate is then an effective one.

    Args:
        pilot: that was run.
        recipe: whose experts are measured (finished runs).
        samples: of each expert that remain for training.
        batch_size: of the design.
        root: of the data sets.
        measured: samples per expert for the constants.
    """
    from experiments.measure.noise.constants import constants_of
    from experiments.measure.noise.recipe import expert_of
    from experiments.measure.opening import from_store

    nothing = pd.DataFrame(columns=["expert", "constant", "value", "low", "high", "tier", "seed"])
    seed = pilot.spec.seed
    try:
        subject = from_store(pilot.folder, pilot.runs[recipe], images=measured, seed=seed, root=root)
        found = constants_of(
            subject, samples=measured, pairs=12, curvature_samples=4, curvature_iterations=6, lanczos=8, batches=2,
            seed=seed,
        )  # fmt: skip
    except MergeboundError as error:
        return _silent(f"constants cannot be measured: {error}", nothing, float("nan"), seed)
    table = constants_table(found, seed)
    deltas = subject.deltas.double()
    gram = (deltas @ deltas.T).numpy()
    norms = np.sqrt(np.maximum(np.diag(gram), 1e-300))
    cosine = float(np.max(np.abs(gram / np.outer(norms, norms) - np.eye(len(gram)))))
    if not found.per_sample_loss:
        return _silent(
            "BatchNorm trained on batch statistics: the loss is not a loss per sample (A3), and no theorem covers it",
            table, cosine, seed,
        )  # fmt: skip
    experts = []
    for j, constants in enumerate(found.experts):
        expert = expert_of(subject, j, constants, which="high", measured_kappa=True)
        pl = constants.pl.value
        changed: dict[str, Any] = dict.fromkeys(_GONE) | {
            "minimal_risk": 0.0,
            "pl_constant": max(pl, 1e-12),
            "sampling": "without_replacement",
            "momentum": 0.0,
            "nesterov": False,
            "weight_decay": 0.0,
            "batch_size": min(batch_size, int(expert.n)),
            "initial_risk": max(float(np.asarray(expert.initial_risk)), 1e-12),
        }
        kept = (expert.measured - set(_GONE)) | {"pl_constant"}
        experts.append(replace(expert, name=f"{j} {constants.task}", **changed, measured=kept))
    return _designed(experts, pilot, samples, cosine, table)


def _designed(experts: Sequence[Any], pilot: Pilot, samples: float, cosine: float, table: pd.DataFrame) -> TheoryAdvice:
    from theory.inverse_design import Budget, design
    from theory.recipe import Merge

    seed, size = pilot.spec.seed, len(experts)
    batch = float(np.asarray(experts[0].batch_size))
    merge = Merge(
        tuple(experts), method="average", per_sample_loss=True, data_independent_choices=True,
        orthogonal_task_vectors=True if cosine <= ORTHOGONAL else None,
    )  # fmt: skip
    top = max(samples / batch, 2.0)
    try:
        found = design(
            merge, {"all.learning_rate": (1e-6, pilot.spec.rates[1]), "all.steps": (1.0, top)},
            budgets=[Budget("samples", samples * size)], starts=512, boxes=0, seed=seed,
        )  # fmt: skip
    except MergeboundError as error:
        return _silent(str(error), table, cosine, seed)
    guess = float(np.mean(np.log(pilot.classes)))
    bound = float(np.asarray(found.bound.value))
    elasticities: dict[str, list[float]] = {}
    for item in found.sensitivities:
        elasticities.setdefault(item.field, []).append(item.elasticity)
    least = found.least_training is not None
    vacuous = not bound < guess
    verdict = "do not train" if least else "not informative" if vacuous else "recipe"
    words = f"the smallest bound is {bound:.3g} nats, guessing costs {guess:.3g}"
    if found.least_training is not None:
        words += "; " + found.least_training.explain().replace("\n", "; ")
    return TheoryAdvice(
        dict(found.choices), bound, vacuous, found.active_term, verdict, words,
        {name: float(np.mean(v)) for name, v in elasticities.items()}, table, cosine, seed,
    )  # fmt: skip


def _silent(why: str, table: pd.DataFrame, cosine: float, seed: int) -> TheoryAdvice:
    return TheoryAdvice({}, float("nan"), True, "", "not informative", why, {}, table, cosine, seed)


def constants_table(found: Any, seed: int) -> pd.DataFrame:
    """Measured constants with their intervals, one row per expert and constant; NaN for an end that nothing bounds."""
    names = ("g", "sigma0", "sigma", "D_2", "D_inf", "L", "highest", "pl", "initial_risk", "training_risk", "drift")
    rows = []
    for expert in found.experts:
        for name in names:
            one = getattr(expert, name)
            rows.append(
                {
                    "expert": expert.name, "constant": name, "value": float(one.at("value")),
                    "low": _or_nan(one.low), "high": _or_nan(one.high), "tier": "estimated", "seed": seed,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _or_nan(end: float) -> float:
    return float(end) if np.isfinite(end) else float("nan")
