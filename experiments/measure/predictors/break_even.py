"""From how many candidate coefficients on predicting is cheaper than merging and evaluating: measured in seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from experiments.measure.predictors.collect import point_at
from experiments.measure.predictors.statistics import FieldStatistics
from experiments.measure.predictors.zoo import predictors
from experiments.measure.subject import Subject
from theory.errors import MergeboundError
from theory.function_space import predict_risk, risk_gradient, uniform_weights

if TYPE_CHECKING:
    import pandas as pd

CANDIDATES = 0xB2EA
"""Names the stream of coefficients that are timed: ``default_rng([seed, CANDIDATES])``."""


@dataclass(frozen=True)
class BreakEven:
    """Seconds of one predictor and of evaluating, on the same images.

    Attributes:
        predictor: its name.
        collect: seconds of the collection that it needs.
        per_alpha: to price one coefficient vector after that (median over repeats; mean within one).
        per_gradient: to price one and its gradient.
        evaluate: to form one merge and pass every task's calibration images through it (median).
        spread: (smallest, largest) of the repeats of ``evaluate``.
        images: calibration images per task.
        repeats: timings.
    """

    predictor: str
    collect: float
    per_alpha: float
    per_gradient: float
    evaluate: float
    spread: tuple[float, float]
    images: int
    repeats: int
    seed: int
    tier: str = "measured"

    @property
    def candidates(self) -> float:
        """Smallest number of coefficient vectors from which on predicting is cheaper; infinite if never."""
        saved = self.evaluate - self.per_alpha
        return math.ceil(self.collect / saved) if saved > 0.0 else math.inf


def break_even(
    subject: Subject,
    statistics: FieldStatistics,
    names: Sequence[str] | None = None,
    *,
    candidates: int = 32,
    repeats: int = 3,
    batch: int = 256,
    seed: int = 0,
) -> list[BreakEven]:
    """Time predictors against forming and evaluating merges.

    Args:
        subject: as collected.
        statistics: with the seconds of their collection.
        names: of predictors; default all that are available.
        candidates: coefficient vectors that are priced at once.
        repeats: how often everything is timed.
        batch: images per pass when evaluating.
        seed: names the coefficients.

    Raises:
        MergeboundError: numbers below one, or an unknown predictor.
    """
    if min(candidates, repeats, batch) < 1:
        raise MergeboundError("candidates, repeats and batch: give 1 or more")
    alphas = np.random.default_rng([seed, CANDIDATES]).dirichlet(np.ones(statistics.size), candidates)
    evaluating = sorted(_evaluate(subject, statistics, alpha, batch) for alpha in alphas[:repeats])
    found = []
    for predictor in predictors(names, statistics):
        fields = predictor.fields(statistics)
        weights = uniform_weights(statistics.size)
        pricing, sloping = [], []
        for _ in range(repeats):
            started = time.perf_counter()
            predict_risk(fields, alphas)
            pricing.append((time.perf_counter() - started) / candidates)
            started = time.perf_counter()
            risk_gradient(fields, alphas[0], weights)
            sloping.append(time.perf_counter() - started)
        found.append(
            BreakEven(
                predictor.name,
                sum(statistics.seconds.get(kind, 0.0) for kind in predictor.known_kinds()),
                float(np.median(pricing)),
                float(np.median(sloping)),
                float(np.median(evaluating)),
                (evaluating[0], evaluating[-1]),
                min(statistics.images),
                repeats,
                seed,
            )
        )
    return found


def _evaluate(subject: Subject, statistics: FieldStatistics, alpha: np.ndarray, batch: int) -> float:
    started = time.perf_counter()
    point = point_at(subject, alpha)
    with torch.no_grad():
        for j, network in enumerate(subject.networks):
            for part in torch.split(subject.calibration[j].images[: statistics.images[j]], batch):
                network.call(point, part)
    return time.perf_counter() - started


def to_frame(rows: Sequence[BreakEven]) -> pd.DataFrame:
    """One row per predictor, in seconds."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "predictor": row.predictor,
                "collect": row.collect,
                "per_alpha": row.per_alpha,
                "per_gradient": row.per_gradient,
                "evaluate": row.evaluate,
                "evaluate_low": row.spread[0],
                "evaluate_high": row.spread[1],
                "candidates": row.candidates,
                "images": row.images,
                "repeats": row.repeats,
                "seed": row.seed,
                "tier": row.tier,
            }
            for row in rows
        ]
    )
