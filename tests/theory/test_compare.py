"""The comparison: kinds of bounds are kept apart, the smallest is a bound, and nothing is hidden."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratic_recipes import random_problem
from tiny_worlds import KNOWN, cosine, pseudo_huber, world

from theory import Expert, Merge, MergeboundError, RecipeError, Schedule, master_bound, merge_moments
from theory.comparison import QUANTITIES
from theory.generalization import l1_gap
from theory.side_by_side import compare

SLACK = 1 + 1e-9
CLAIMS: dict[str, Any] = dict(shared_samples=False, data_independent_choices=True, per_sample_loss=True)


def pair(**changes: Any) -> Merge:
    return Merge(tuple(Expert(name, **{**KNOWN, "D_inf": 2.0, "B": None, **changes}) for name in "ab"), **CLAIMS)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_every_row_bounds_its_quantity_where_everything_is_listed(seed: int, bounded: bool) -> None:
    make = (
        (lambda rng: cosine(float(rng.uniform(0.3, 4)))) if bounded else (lambda rng: pseudo_huber(rng.uniform(0.3, 3)))
    )
    merge, exact = world(seed, make, 2.0)
    result = compare(merge, dimension=1)
    truth = {"training": exact.training_risk, "gap": exact.gap, "risk": exact.risk}
    for row in result.rows:
        if row.value is not None:
            assert truth[row.quantity] <= row.value * SLACK, (row.quantity, row.name)
    for quantity in QUANTITIES:
        assert truth[quantity] <= result.smallest(quantity).value * SLACK
    names = {row.name for row in result.of("gap") if row.value is not None}
    assert {"ours, master bound", "ours, l1"} <= names
    assert ("PAC-Bayes in expectation" in names) == bounded
    assert ("Lei-Ying, l2" in names) == (not bounded)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_every_row_bounds_its_quantity_on_quadratics(seed: int) -> None:
    problem = random_problem(seed, momentum=0.0, weight_decay=0.0)
    size = len(problem.experts)
    merge = Merge(problem.experts, **CLAIMS)
    exact = merge_moments(
        problem.tasks, problem.base, problem.experts, np.full(size, 1 / size), np.full(size, 1 / size)
    )
    truth = {"training": exact.training_risk, "gap": exact.gap, "risk": exact.risk}
    for row in compare(merge).rows:
        if row.value is not None:
            assert truth[row.quantity] <= row.value * SLACK, (row.quantity, row.name)


def test_quantities_are_kept_apart_and_the_smallest_is_the_minimum() -> None:
    result = compare(pair(B=5.0), dimension=3)
    with pytest.raises(MergeboundError, match="quantity"):
        result.of("everything")  # type: ignore[arg-type]
    for quantity in QUANTITIES:
        values = [float(row.value) for row in result.of(quantity) if row.value is not None]
        best = result.smallest(quantity)
        assert float(best.value) == min(values)
        assert str(best.names) in {row.name for row in result.of(quantity)}
    # a gap is never offered as a risk: adding what it leaves out makes the risk
    base = float(result.smallest("training").value)
    rows = {row.name: row for row in result.of("risk")}
    for row in result.of("gap"):
        if row.value is not None and row.name != "ours, master bound":
            assert float(rows[row.name].value) == pytest.approx(base + float(row.value), rel=1e-12)  # type: ignore[arg-type]


def test_master_rows_are_the_master_bound() -> None:
    merge = pair()
    bound = master_bound(merge)
    result = compare(merge)
    rows = {(row.quantity, row.name): row for row in result.rows}
    assert float(rows["risk", "ours, master bound"].value) == float(bound.value)  # type: ignore[arg-type]
    start = float(rows["training", "ours, Theorem 4 (dispersion)"].value)  # type: ignore[arg-type]
    gap = float(rows["gap", "ours, master bound"].value)  # type: ignore[arg-type]
    assert start + gap == pytest.approx(float(bound.value), rel=1e-12)


def test_l1_row_is_the_l1_gap_and_meets_hardt() -> None:
    merge = pair(G=1.5, D_inf=2.0)
    rows = {row.name: row for row in compare(merge).of("gap")}
    assert float(rows["ours, l1"].value) == float(l1_gap(merge).value)  # type: ignore[arg-type]
    # convex, D = 2G, no rms gap: the number of Hardt-Recht-Singer
    plain = {row.name: row for row in compare(pair(D_inf=None, batch_losses=None, n=10**6)).of("gap")}
    assert float(plain["ours, l1"].value) == pytest.approx(float(plain["Hardt-Recht-Singer, convex"].value))  # type: ignore[arg-type]
    # with decay only ours applies
    decayed = {row.name: row for row in compare(pair(weight_decay=0.1)).of("gap")}
    assert decayed["ours, l1"].value is not None
    assert decayed["Hardt-Recht-Singer, convex"].value is None
    assert "weight_decay" in decayed["Hardt-Recht-Singer, convex"].reason


def test_a_given_training_risk_sharpens_the_risk() -> None:
    merge = pair()
    without, given_ = compare(merge), compare(merge, merged_training_risk=0.3)
    assert float(given_.smallest("training").value) == 0.3
    assert float(given_.smallest("risk").value) < float(without.smallest("risk").value)
    measured = compare(merge, merged_training_risk=0.3, measured=["merged_training_risk"])
    assert given_.smallest("training").tier == "certified"
    assert measured.smallest("training").tier == "estimated"
    assert measured.smallest("risk").tier == "estimated"
    certified = given_.smallest("gap", certified_only=True)
    assert certified.tier == "certified"
    assert certified.value >= given_.smallest("gap").value


def test_vacuous_rows_are_marked() -> None:
    exploding = pair(curvature="smooth", L=50.0, learning_rate=1.0, steps=3000, D_inf=2.0, batch_losses=None)
    rows = {row.name: row for row in compare(exploding).of("gap")}
    assert bool(rows["ours, l1"].vacuous.all())  # type: ignore[union-attr]
    assert np.isinf(rows["ours, l1"].value).all()  # type: ignore[arg-type]
    limited = {row.name: row for row in compare(pair(B=0.01, measured=frozenset({"B"}))).of("gap")}
    assert bool(limited["Hardt-Recht-Singer, convex"].vacuous)
    assert not bool({row.name: row for row in compare(pair()).of("gap")}["ours, l1"].vacuous)


def test_arrays_give_a_winner_per_configuration() -> None:
    steps = np.array([50, 50, 50, 50])
    sizes = np.array([10, 100, 10_000, 1_000_000])
    result = compare(pair(n=sizes, steps=steps, B=2.0), dimension=5)
    best = result.smallest("gap")
    assert best.value.shape == best.names.shape == (4,)
    for i, size in enumerate(sizes):
        alone = compare(pair(n=int(size), B=2.0), dimension=5).smallest("gap")
        assert best.value[i] == pytest.approx(float(alone.value), rel=1e-12)
        assert best.names[i] == str(alone.names)
    text = result.explain()
    assert "nan" not in text.lower().replace("dominant", "")


def test_table_and_text_show_everything() -> None:
    result = compare(replace(pair(), shared_samples=None))
    table = result.table()
    assert len(table) == len(result.rows)
    for entry, row in zip(table, result.rows, strict=True):
        assert entry["name"] == row.name
        if row.value is None:
            assert entry["reason"]
        else:
            assert np.all(np.asarray(entry["ratio"]) >= 1 - 1e-12)
            assert entry["formula"]
    best = [entry for entry in table if entry["ratio"] is not None and np.all(np.asarray(entry["ratio"]) == 1)]
    assert {entry["quantity"] for entry in best} == set(QUANTITIES)
    text = result.explain()
    for piece in (
        "E F_S(M)",
        "E[F(M) - F_S(M)]",
        "E F(M)",
        "smallest:",
        "does not apply",
        "B is missing",
        "A1",
    ):
        assert piece in text
    for name in {row.name for row in result.rows}:
        assert name in text


def test_recipes_that_only_some_bounds_cover_do_not_raise() -> None:
    adam = pair(optimizer="adamw", drift=0.5, B=1.0)
    result = compare(adam, dimension=10)
    names = {row.name for row in result.of("gap") if row.value is not None}
    assert {"ours, master bound", "PAC-Bayes in expectation"} <= names
    assert not any(name.startswith(("Hardt", "Lei")) for name in names)
    broken = compare(replace(pair(), data_independent_choices=False))
    assert all(row.value is None and "data_independent_choices" in row.reason for row in broken.of("gap"))
    with pytest.raises(MergeboundError, match="applies"):
        broken.smallest("risk")
    assert "no bound applies" in broken.explain()
    logged = pair(
        batch_losses=Schedule(np.linspace(1, 0.2, 50)), initial_gradient_norm=None, training_risk=None, sigma=None
    )
    reasons = {row.name: row.reason for row in compare(logged).of("risk") if row.value is None}
    assert "merged_training_risk" in reasons["ours, l1"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (dict(dimension=-3), "dimension"),
        (dict(joint_gradient_norm=float("inf")), "joint_gradient_norm"),
        (dict(merge_distance=float("nan")), "merge_distance"),
        (dict(merged_training_risk=-0.1), "merged_training_risk"),
        (dict(measured=["nonsense"]), "nonsense"),
    ],
)
def test_arguments_out_of_their_domain_are_refused_by_name(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        compare(pair(), **arguments)
