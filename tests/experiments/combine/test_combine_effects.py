"""Effects of a factor on tables with known effects."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from experiments.combine.effects import factor_differences, factor_means, size_differences
from theory.errors import MergeboundError


def made(effect: float, *, groups: int = 40, experts: int = 30, seed: int = 0, noise: float = 0.05) -> pd.DataFrame:
    """Groups of 3 of experts with effects of their own, at levels 0 and 1 with the same experts' twins."""
    rng = np.random.default_rng([seed, 0xEFFE])
    own = 0.1 * rng.standard_normal(experts)
    rows = []
    for number in range(groups):
        chosen = rng.choice(experts, 3, replace=False)
        for level in (0, 1):
            value = 0.5 + own[chosen].mean() + effect * level + noise * rng.standard_normal()
            rows.append(
                {
                    "factor": "momentum", "stratum": "{}", "size": 3, "label": "average", "evaluation": "e",
                    "level": level, "seed": number, "matched": True, "accuracy": value,
                    "experts": ";".join(f"{level}-{k}" for k in chosen),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def test_means_are_means_over_groups() -> None:
    table = made(0.2)
    means = factor_means(table)
    assert list(means["level"]) == [0, 1]
    for row in means.itertuples():
        own = table[table["level"] == row.level]["accuracy"]
        assert row.mean == pytest.approx(own.mean(), abs=1e-12)
        assert row.low < row.mean < row.high
        assert (row.groups, row.experts) == (40, len({e for t in table[table["level"] == row.level]["experts"]
                                                      for e in t.split(";")}))  # fmt: skip


def test_differences_are_paired_by_seed() -> None:
    table = made(0.2).sample(frac=1.0, random_state=3)
    [row] = factor_differences(table).itertuples()
    wide = table.pivot(index="seed", columns="level", values="accuracy")
    assert row.mean == pytest.approx((wide[1] - wide[0]).mean(), abs=1e-12)
    assert (row.level, row.reference, row.groups) == (1, 0, 40)
    apart = factor_means(table)
    assert row.high - row.low < (apart["high"] - apart["low"]).max()  # experts' own effects cancel


def test_pairs_that_only_one_level_has_do_not_count() -> None:
    table = made(0.2)
    lost = table[~((table["level"] == 1) & (table["seed"] < 10))]
    [row] = factor_differences(lost).itertuples()
    wide = lost.pivot(index="seed", columns="level", values="accuracy").dropna()
    assert row.groups == 30
    assert row.mean == pytest.approx((wide[1] - wide[0]).mean(), abs=1e-12)


def test_intervals_cover_the_true_mean_over_experts() -> None:
    inside = 0
    for seed in range(60):
        [row] = factor_differences(made(0.1, seed=seed, groups=25, noise=0.03), resamples=300).itertuples()
        inside += row.low <= 0.1 <= row.high
    assert inside >= 53  # 95 % intervals, conservative where noise dominates


def test_numbers_of_experts_are_compared_too() -> None:
    small = made(0.0)
    large = small.assign(size=6, accuracy=small["accuracy"] - 0.1)
    found = size_differences(pd.concat([small, large]))
    assert len(found) == 2  # one for each level
    assert found["mean"].to_numpy() == pytest.approx([-0.1, -0.1], abs=1e-12)
    assert set(zip(found["level"], found["reference"], strict=True)) == {(6, 3)}


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(MergeboundError, match="no numbers 'speed'"):
        factor_means(made(0.0), "speed")
    with pytest.raises(MergeboundError, match="not matched"):
        factor_differences(made(0.0).assign(matched=False))
    with pytest.raises(MergeboundError, match="no merges of a factor"):
        factor_means(pd.DataFrame())
