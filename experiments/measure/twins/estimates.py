"""From distances of twins to eps_i: mean, root mean square and largest, with intervals.

Squared distances are skewed (a sample that was never drawn moves nothing, one of the last batches moves most), so that
percentiles of resampled means lie too low when twins are few.  Intervals are therefore made on the logarithm of the
mean, and are the wider of two: Student's t from the delta method, and the studentised bootstrap (Efron and Tibshirani,
*An Introduction to the Bootstrap*, 1993, section 12.5: bootstrap-t on a scale where the spread is stable).

Coverage of nominal 95 % intervals of the rms over all n = 160 samples of a quadratic task (40 data sets, 25 draws of T
twins each; ``tests/experiments/test_measure_twins_intervals.py`` repeats a part):

====  ==========  =====  ======  ==========  =========  ==============================================
T     percentile  BCa    log t   bootstrap   both       recipe (quadratic task, d = 4, batches of 4)
====  ==========  =====  ======  ==========  =========  ==============================================
4     0.67        0.68   0.89    0.93        0.94       1 epoch, eta = 0.005 (1000 intervals a line)
8     0.77        0.79   0.89    0.90        0.93
16    0.84        0.87   0.92    0.93        0.94
32    0.91        0.92   0.94    0.95        0.96
4     0.47        0.48   0.75    0.99        0.99       half an epoch with replacement, eta = 0.005 (400)
8     0.61        0.67   0.80    0.93        0.95
16    0.70        0.78   0.83    0.90        0.90
32    0.80        0.84   0.86    0.90        0.90
4     0.48        0.48   0.69    0.83        0.84       1 epoch, eta = 0.05 (400)
8     0.59        0.64   0.73    0.81        0.83
16    0.73        0.78   0.80    0.89        0.89
32    0.82        0.86   0.86    0.91        0.91
====  ==========  =====  ======  ==========  =========  ==============================================

The first recipe is the usual one; in the second 60 % of the twins never leave the base run, in the third only the last
steps count (both: squared distances with a coefficient of variation of about 3).  There the level is not reached, and
with few twins the interval has no upper end (T = 8, second recipe: two times of five) or is very wide.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from experiments.measure.twins.train import PARTS, TwinRun
from theory.errors import MergeboundError

if TYPE_CHECKING:
    import pandas as pd

_LOG = logging.getLogger(__name__)
_BOOTSTRAP = 0xB0075
LEVEL, RESAMPLES = 0.95, 1000
_ROUNDING = 1e-9
"""Relative spread that is rounding."""
_REPLICATES = 8
"""From so many replicates on they are the units that the bootstrap draws."""
FEW = 8
"""Fewer twins than these give intervals that fall short of their level or say next to nothing."""
Statistic = Literal["mean", "rms", "sup"]


@dataclass(frozen=True)
class Quantity:
    """A measured number.

    Attributes:
        value: of the estimator.
        low, high: its interval at level 0.95; of ``sup`` from the value to infinity unless every sample was exchanged.
            ``high`` is infinite, too, where so few twins moved that nothing bounds the spread.
        error: standard error by the delta method; NaN of ``sup``.
        count: twins behind it.
        seed: of the resampling.
        tier: of the theory's tiers.
    """

    value: float
    low: float
    high: float
    error: float
    count: int
    seed: int
    tier: str = "estimated"


@dataclass(frozen=True, eq=False)
class Stability:
    """On-average stability of one expert, at each checkpoint (theory.md section 3).

    Attributes:
        steps: (C,) checkpoints.
        n: samples of S.
        mean: by part, (C,) of E |x(S) - x(S^(j))|, the l1 form of on-average stability.
        rms: by part, (C,) of the root of E |x(S) - x(S^(j))|^2: theory.md's eps_i.
        sup: by part, (C,) of the largest distance that was seen.
        seeds: replicates (data, fresh samples and seeds) behind them.
    """

    steps: np.ndarray
    n: int
    mean: dict[str, tuple[Quantity, ...]]
    rms: dict[str, tuple[Quantity, ...]]
    sup: dict[str, tuple[Quantity, ...]]
    seeds: int

    @property
    def epsilon(self) -> Quantity:
        """eps_i of all trained numbers at the last checkpoint."""
        return self.rms["all"][-1]

    def to_frame(self) -> pd.DataFrame:
        """One row per checkpoint, part and statistic."""
        import pandas as pd

        rows = [
            {"step": int(step), "part": part, "statistic": name, **vars(table[part][k]), "replicates": self.seeds}
            for name, table in (("mean", self.mean), ("rms", self.rms), ("sup", self.sup))
            for part in PARTS
            for k, step in enumerate(self.steps)
        ]
        return pd.DataFrame(rows)


def stability(
    twins: TwinRun | Sequence[TwinRun], *, seed: int = 0, level: float = LEVEL, resamples: int = RESAMPLES
) -> Stability:
    """eps_i from one or several replicates of a run (other data, fresh samples or seeds).

    Args:
        twins: replicates with the same checkpoints; twins that exchange samples at random stand for all n.
        seed: of the bootstrap.  Units are twins (conservative where T is near n, as samples are drawn without
            repetition); with several replicates see :func:`summary`.
        level: of the intervals.
        resamples: of the bootstrap.

    Raises:
        MergeboundError: no replicates, or other checkpoints.
    """
    runs = [twins] if isinstance(twins, TwinRun) else list(twins)
    if not runs or any(not np.array_equal(each.steps, runs[0].steps) for each in runs):
        raise MergeboundError("stability: give one or more twin runs with the same checkpoints")
    groups = [each.distances for each in runs]
    count = sum(len(group) for group in groups)
    if count < FEW:
        _LOG.warning("eps_i from %d twins: its interval falls short of its level, or says next to nothing", count)
    exhaustive = all(len(np.unique(each.pairs.samples)) == each.n for each in runs)
    tables: dict[Statistic, dict[str, tuple[Quantity, ...]]] = {"mean": {}, "rms": {}, "sup": {}}
    for kind, table in tables.items():
        for number, part in enumerate(PARTS):
            columns = [[group[:, k, number] for group in groups] for k in range(len(runs[0].steps))]
            table[part] = tuple(
                summary(column, kind, seed=seed, level=level, resamples=resamples, exhaustive=exhaustive)
                for column in columns
            )
    return Stability(runs[0].steps, runs[0].n, tables["mean"], tables["rms"], tables["sup"], len(runs))


def summary(
    groups: Sequence[np.ndarray],
    kind: Statistic = "rms",
    *,
    seed: int = 0,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    exhaustive: bool = False,
) -> Quantity:
    """Mean, root mean square or largest of distances, with its interval (see the top of this module).

    One replicate: twins are the units.  Several: their mean powers are the units, with Student's t of R - 1 degrees;
    the bootstrap takes them where R >= 8, and the twins of all replicates where there are fewer.

    Args:
        groups: (T_r,) distances of each replicate.
        kind: of the statistic.
        exhaustive: every sample was exchanged, so that the largest distance is the largest.
    """
    count = sum(len(group) for group in groups)
    every = np.concatenate(list(groups))
    if kind == "sup":
        top = float(every.max())
        return Quantity(top, top, top if exhaustive else float("inf"), float("nan"), count, seed)
    power = 2 if kind == "rms" else 1
    raised = [np.asarray(group, dtype=np.float64) ** power for group in groups]
    twins = np.concatenate(raised)
    value = float(twins.mean())
    if not np.isfinite(value) or count < 2:
        return Quantity(value ** (1 / power), float("nan"), float("nan"), float("nan"), count, seed)
    if value == 0.0:  # no twin has moved: of the others nothing is known
        return Quantity(0.0, 0.0, 0.0 if exhaustive else float("inf"), 0.0, count, seed)
    sums = np.array([part.sum() for part in raised]) * len(raised) / count
    units = twins if len(raised) == 1 else sums
    error = float(units.std(ddof=1) / np.sqrt(len(units))) / value
    rng = np.random.default_rng([seed, _BOOTSTRAP])
    drawn = units if len(raised) >= _REPLICATES else twins
    below, above = log_interval(drawn / value, rng, level=level, resamples=resamples)
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, len(units) - 1)) * error
    low, high = (value * np.exp(min(below, -half)), value * np.exp(max(above, half)))
    root = value ** (1 / power)
    return Quantity(root, float(low ** (1 / power)), float(high ** (1 / power)), root * error / power, count, seed)


def log_interval(
    units: np.ndarray,
    rng: np.random.Generator,
    *,
    below: np.ndarray | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """Studentised bootstrap interval of the logarithm of a mean, or of a ratio of means, relative to the estimate.

    Args:
        units: (U,) independent, at least 0, of mean 1.
        rng: draws resamples.
        below: (U,) of mean 1, in pairs with ``units``: the denominator of a ratio of means; default: none.
        level, resamples: of the interval.

    Returns:
        Both ends, at most and at least 0; infinite where so many resamples have no spread that no quantile is known.
    """
    size = len(units)
    other = np.ones(size) if below is None else below
    spread = float(np.sqrt(((units - other) ** 2).sum() / (size - 1) / size))
    if spread <= _ROUNDING:
        return 0.0, 0.0
    weights = rng.multinomial(size, np.full(size, 1 / size), size=resamples) / size
    top, bottom = weights @ units, weights @ other
    with np.errstate(divide="ignore", invalid="ignore"):
        squares = weights @ units**2 / top**2 - 2 * (weights @ (units * other)) / (top * bottom)
        errors = np.sqrt(np.maximum(squares + weights @ other**2 / bottom**2, 0.0) / (size - 1))
        ratios = np.log(top / bottom) / np.where(errors > _ROUNDING, errors, 0.0)
    ratios = ratios[~np.isnan(ratios)]
    if not len(ratios):
        return -float("inf"), float("inf")
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return min(float(-high * spread), 0.0), max(float(-low * spread), 0.0)
