"""Every label is earned: tight statements are attained by their instance, upper ones by the stated ratio."""

from __future__ import annotations

import numpy as np
import pytest

from theory import Expert, master_bound
from theory.clocks import heavy_ball_convex_response
from theory.statement_labels import Statement, statements
from theory.tightness import all_ratios, expert_ratios, merge_ratios, random_batch

ROWS = statements()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_instances_attain_what_is_claimed(row: Statement) -> None:
    exact, upper = row.instance()
    assert 0 < exact <= upper * (1 + 1e-9)
    assert exact / upper == pytest.approx(row.ratio, rel=1e-7)
    if row.label in ("tight", "limit"):
        assert row.ratio == 1.0
    else:
        assert row.ratio < 1
        assert row.search != "attained"  # says how a larger ratio was looked for


def test_every_statement_has_one_label() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names) >= 25
    assert {row.label for row in ROWS} == {"tight", "limit", "upper"}


def test_momentum_response_by_performance_estimation() -> None:
    """Worst cases over all convex functions, K = 1, 3, 6, 10 later steps at the largest step size, beta = 1/2.

    Recorded from the semidefinite programs of ``benchmarks/worst_case.py``: the response without curvature is the worst
    case there, and the certified constant is above it by the factor 1 + beta at most.
    """
    recorded = {1: 0.5, 3: 0.625, 6: 0.661461, 10: 0.666341}
    beta, eta = 0.5, 2 * 0.25 / 1.5
    expert = Expert("a", 5, 5, eta, 12, momentum=beta, curvature="convex", L=1.0)
    response, holds = heavy_ball_convex_response(expert)
    assert holds
    for later, ratio in recorded.items():
        curve = eta * (1 - beta ** (later + 1)) / (1 - beta)
        assert curve / response == pytest.approx(ratio, rel=1e-4)
        assert ratio <= 1 / (1 + beta)


def test_ratios_of_random_recipes_are_reproducible_and_at_most_one() -> None:
    first, second = random_batch(4, 16), random_batch(4, 16)
    a, b = all_ratios(first), all_ratios(second)
    assert a.keys() == b.keys()
    for name, values in a.items():
        assert np.array_equal(values, b[name])
        assert values.max() <= 1 + 1e-8
        assert values.min() >= 0
    assert "master bound" in merge_ratios(first)
    for expert, exact in zip(first.merge.experts, first.experts, strict=True):
        rows = expert_ratios(expert, exact)
        assert np.all(rows["smallest stability"] >= rows["Theorem 2 (sup, envelope)"] * (1 - 1e-12))


def test_ratio_is_not_trivial() -> None:
    """The bounds are worth having: the median over random recipes is not hidden by a constant."""
    values = np.concatenate([merge_ratios(random_batch(seed, 64))["master bound"] for seed in range(10)])
    assert 0.02 < np.median(values) < 1
    finite = np.concatenate([np.ravel(master_bound(random_batch(seed, 64).merge).value < np.inf) for seed in range(10)])
    assert finite.mean() > 0.95
