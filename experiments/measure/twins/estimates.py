"""From distances of twins to eps_i: mean, root mean square and largest, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from experiments.measure.twins.train import PARTS, TwinRun
from theory.errors import MergeboundError

if TYPE_CHECKING:
    import pandas as pd

_BOOTSTRAP = 0xB0075
LEVEL, RESAMPLES = 0.95, 1000
Statistic = Literal["mean", "rms", "sup"]


@dataclass(frozen=True)
class Quantity:
    """A measured number.

    Attributes:
        value: of the estimator.
        low, high: its interval at level 0.95; of ``sup`` from the value to infinity unless every sample was exchanged.
        error: bootstrap standard error; NaN of ``sup``.
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
        seed: of the bootstrap.  With one replicate twins are resampled (conservative where T is near n, as samples are
            drawn without repetition); with several, replicates first and their twins then.
        level: of the intervals.
        resamples: of the bootstrap.

    Raises:
        MergeboundError: no replicates, or other checkpoints.
    """
    runs = [twins] if isinstance(twins, TwinRun) else list(twins)
    if not runs or any(not np.array_equal(each.steps, runs[0].steps) for each in runs):
        raise MergeboundError("stability: give one or more twin runs with the same checkpoints")
    groups = [each.distances for each in runs]
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
    """Mean, root mean square or largest of distances, with a two-stage bootstrap interval.

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
    value = float(np.mean(np.concatenate(raised)) ** (1 / power))
    if not np.isfinite(value) or count < 2:
        return Quantity(value, float("nan"), float("nan"), float("nan"), count, seed)
    rng = np.random.default_rng([seed, _BOOTSTRAP])
    if len(raised) == 1:
        weights = rng.multinomial(count, np.full(count, 1 / count), size=resamples) / count
        draws = weights @ raised[0]
    else:
        draws = np.empty(resamples)
        for r in range(resamples):
            chosen = [raised[g] for g in rng.integers(0, len(raised), len(raised))]
            draws[r] = np.mean(np.concatenate([part[rng.integers(0, len(part), len(part))] for part in chosen]))
    draws = draws ** (1 / power)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Quantity(value, float(low), float(high), float(draws.std(ddof=1)), count, seed)
