"""Designs against brute force over the rows of a grid."""

from __future__ import annotations

import collections
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from experiments.combine.designs import all_groups, by_factor, random_groups
from experiments.combine.groups import Group
from tests.experiments.combine.grids import TASKS, finished_grid
from theory.errors import MergeboundError

GRID = finished_grid(with_states=False).frame()
"""4 tasks, 2 rates, 2 batch sizes, 2 seeds, checkpoints 5 and 10: 32 runs."""
ROWS = {(row.digest, row.step): row for row in GRID.itertuples()}


def rows_of(group: Group) -> list:
    return [ROWS[member.run, member.step] for member in group.members]


def test_a_factor_varies_and_everything_else_is_held() -> None:
    design = by_factor(GRID, "learning_rate", sizes=(2, 3), groups=5)
    groups = list(design)
    assert len(groups) == design.count == 2 * 2 * 5
    for group in groups:
        for row in rows_of(group):
            assert row.learning_rate == group.level
            assert row.batch_size == 8  # the lower of the two middle values
            assert row.step == 10
        assert len(set(group.tasks)) == len(group.members)
    assert json.loads(groups[0].stratum)["batch_size"] == 8


def test_matched_levels_have_the_same_tasks_and_seeds() -> None:
    groups = list(by_factor(GRID, "learning_rate", sizes=(3,), groups=6))
    seen = {level: {} for level in (0.01, 0.1)}
    for group in groups:
        seen[group.level][group.seed] = [(row.task, row.seed) for row in rows_of(group)]
    assert seen[0.01] == seen[0.1]
    assert len({tuple(pairs) for pairs in seen[0.1].values()}) > 1


def test_levels_that_are_not_matched_draw_their_own() -> None:
    groups = list(by_factor(GRID, "learning_rate", sizes=(2,), groups=10, matched=False))
    tasks = {level: [group.tasks for group in groups if group.level == level] for level in (0.01, 0.1)}
    assert tasks[0.01] != tasks[0.1]
    assert not any(group.matched for group in groups)


def test_smaller_groups_are_parts_of_larger_ones() -> None:
    groups = list(by_factor(GRID, "learning_rate", sizes=(2, 3, 4), groups=4))
    for level, seed in itertools.product((0.01, 0.1), range(4)):
        own = {len(g.members): set(g.members) for g in groups if (g.level, g.seed) == (level, seed)}
        assert own[2] < own[3] < own[4]


def test_all_others_are_strata_and_free_ones_are_drawn() -> None:
    every = by_factor(GRID, "learning_rate", sizes=(2,), groups=2, others="all")
    assert every.count == 2 * 2 * 2
    assert {json.loads(g.stratum)["batch_size"] for g in every} == {8, 16}
    free = list(by_factor(GRID, "learning_rate", sizes=(4,), groups=20, others="free"))
    assert {row.batch_size for g in free for row in rows_of(g)} == {8, 16}
    assert all(row.learning_rate == g.level for g in free for row in rows_of(g))


def test_fixed_values_are_held() -> None:
    for group in by_factor(GRID, "learning_rate", sizes=(2,), groups=3, fixed={"batch_size": 16, "seed": 1}):
        assert {(row.batch_size, row.seed) for row in rows_of(group)} == {(16, 1)}


def test_steps_compare_checkpoints_of_the_same_runs() -> None:
    groups = list(by_factor(GRID, "step", sizes=(3,), groups=3))
    runs = {level: {g.seed: g.runs for g in groups if g.level == level} for level in (5, 10)}
    assert runs[5] == runs[10]
    assert {g.step for g in groups} == {5, 10}


def test_bins_cut_a_factor_of_many_values() -> None:
    grid = finished_grid(rates=np.geomspace(0.001, 1, 6), with_states=False).frame()
    design = by_factor(grid, "learning_rate", sizes=(2,), groups=2, bins=3, others="free")
    assert len(design.levels) == 3
    rates = {row.digest: row.learning_rate for row in grid.itertuples()}
    means = [np.mean([rates[r] for g in design if g.level == level for r in g.runs]) for level in design.levels]
    assert means == sorted(means)


def test_every_pair_once_against_brute_force() -> None:
    final = GRID[GRID["step"] == 10]
    wanted = {
        frozenset((a.digest, b.digest))
        for a, b in itertools.combinations(list(final.itertuples()), 2)
        if a.task != b.task
    }
    design = all_groups(GRID)
    found = [frozenset(group.runs) for group in design]
    assert design.count == len(found) == len(wanted)
    assert set(found) == wanted


@settings(max_examples=25)
@given(size=st.integers(1, 4), count=st.integers(1, 40), seed=st.integers(0, 1000))
def test_random_groups_are_different_and_have_every_task_once(size: int, count: int, seed: int) -> None:
    if size == 1 and count > 32:
        return
    groups = list(random_groups(GRID, sizes=(size,), groups=count, seed=seed))
    assert len(groups) == len({g.digest for g in groups}) == count
    assert all(len(set(g.tasks)) == size for g in groups)
    assert groups == list(random_groups(GRID.sample(frac=1.0, random_state=1), sizes=(size,), groups=count, seed=seed))


def test_random_groups_that_are_nearly_all_groups_end() -> None:
    groups = list(random_groups(GRID, sizes=(1,), groups=32))
    assert len({g.digest for g in groups}) == 32
    with pytest.raises(MergeboundError, match=r"33 groups of 1 experts.*there are 32"):
        random_groups(GRID, sizes=(1,), groups=33)


def test_more_random_groups_keep_the_first_ones_also_beyond_half_of_all() -> None:
    every = list(random_groups(GRID, sizes=(1,), groups=32, seed=3))
    for count in (1, 15, 17, 25, 31):
        assert list(random_groups(GRID, sizes=(1,), groups=count, seed=3)) == every[:count]
    pairs = all_groups(GRID)
    drawn = list(random_groups(GRID, sizes=(2,), groups=len(pairs)))
    assert {frozenset(g.runs) for g in drawn} == {frozenset(g.runs) for g in pairs}
    assert list(random_groups(GRID, sizes=(2,), groups=len(pairs) - 5)) == drawn[:-5]


def test_any_checkpoint_may_be_drawn() -> None:
    groups = list(random_groups(GRID, sizes=(4,), groups=20, steps="any"))
    assert {member.step for g in groups for member in g.members} == {5, 10}


def test_more_groups_keep_those_that_were_there() -> None:
    few = {g.digest for g in by_factor(GRID, "learning_rate", sizes=(3,), groups=3)}
    many = {g.digest for g in by_factor(GRID, "learning_rate", sizes=(2, 3), groups=9)}
    assert few <= many


def test_an_empty_cell_names_what_is_missing() -> None:
    hole = GRID[~((GRID["task"] == "cats") & (GRID["learning_rate"] == 0.1))]
    with pytest.raises(MergeboundError, match=r"no expert of cats at learning_rate = 0\.1"):
        by_factor(hole, "learning_rate", sizes=(3,))
    design = by_factor(hole, "learning_rate", sizes=(3,), on_missing="leave_out")
    assert all("cats" not in g.tasks for g in design)
    with pytest.raises(MergeboundError, match=r"groups of 4 tasks.*3 tasks.*left out: no expert of cats"):
        by_factor(hole, "learning_rate", sizes=(4,), on_missing="leave_out")


def test_diverged_runs_are_left_out_and_said() -> None:
    grid = GRID.copy()
    grid.loc[(grid["task"] == "dogs") & (grid["learning_rate"] == 0.1), "outcome"] = "diverged"
    with pytest.raises(MergeboundError, match=r"no expert of dogs at learning_rate = 0\.1 \(4 runs diverged"):
        by_factor(grid, "learning_rate", sizes=(2,))
    assert all(g.level == 0.01 or "dogs" not in g.tasks for g in by_factor(
        grid, "learning_rate", sizes=(2,), on_missing="leave_out"))  # fmt: skip


def test_a_seed_that_a_level_lacks_is_not_drawn() -> None:
    lacking = GRID[~((GRID["learning_rate"] == 0.1) & (GRID["seed"] == 1))]
    assert {row.seed for g in by_factor(lacking, "learning_rate", sizes=(4,)) for row in rows_of(g)} == {0}
    apart = GRID[((GRID["learning_rate"] == 0.1) & (GRID["seed"] == 1)) | ((GRID["learning_rate"] == 0.01) & (GRID["seed"] == 0))]  # fmt: skip  # noqa: E501
    with pytest.raises(MergeboundError, match="no seed of ants that every level"):
        by_factor(apart, "learning_rate", sizes=(2,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: by_factor(GRID, "learningrate"), "did you mean 'learning_rate'"),
        (lambda: by_factor(GRID, "momentum"), "momentum has one value, 0.9.*learning_rate, batch_size, step"),
        (lambda: by_factor(GRID, "learning_rate", sizes=(9,)), "groups of 9 tasks.*has 4 tasks"),
        (lambda: by_factor(GRID, "learning_rate", fixed={"batch_size": 7}), "batch_size = 7; there are 8, 16"),
        (lambda: random_groups(GRID, fixed={"rate": 1}), "no hyperparameter 'rate'"),
        (lambda: all_groups(GRID.iloc[:0]), "no finished run"),
        (lambda: all_groups(GRID.drop(columns="step")), "no column 'step'"),
        (lambda: all_groups(GRID, sizes=(5,)), "no groups of 5"),
        (lambda: by_factor(GRID, "learning_rate", sizes=(2,), groups=10**7), "more than 1,000,000"),
        (lambda: by_factor(GRID, "learning_rate", sizes=()), "sizes = "),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message) -> None:
    with pytest.raises(MergeboundError, match=message):
        call()


def test_two_bases_are_never_merged() -> None:
    grid = GRID.copy()
    grid.loc[grid["batch_size"] == 16, "base_digest"] = "b" * 64
    for group in random_groups(grid, sizes=(3,), groups=20):
        assert {row.batch_size for row in rows_of(group)} == ({16} if group.base == "b" * 64 else {8})
    by_base = list(by_factor(grid, "base_digest", sizes=(2,), groups=3, fixed={"batch_size": [8, 16]}))
    assert {g.base for g in by_base} == {g.level for g in by_base}


def test_the_grid_of_the_test_has_all_tasks() -> None:
    assert sorted(GRID["task"].unique()) == sorted(TASKS)


def test_bins_draw_among_all_their_runs_and_keep_the_seeds_matched() -> None:
    """Every rate of an interval serves every task, equally often: rate and task are not confounded."""
    grid = finished_grid(rates=np.geomspace(0.001, 1, 6), batch_sizes=(8,), steps=(10,), with_states=False).frame()
    rows = {row.digest: row for row in grid.itertuples()}
    design = by_factor(grid, "learning_rate", sizes=(3,), groups=400, bins=2)
    seeds: dict = {level: {} for level in design.levels}
    used: dict = {level: collections.Counter() for level in design.levels}
    for group in design:
        assert group.matched
        assert group.matched_seeds
        members = [rows[run] for run in group.runs]
        seeds[group.level][group.seed] = [(row.task, row.seed) for row in members]
        used[group.level].update((row.task, row.learning_rate, row.seed) for row in members)
    low, high = design.levels
    assert seeds[low] == seeds[high]
    for level, rates in ((low, np.geomspace(0.001, 1, 6)[:3]), (high, np.geomspace(0.001, 1, 6)[3:])):
        wanted = set(itertools.product(set(grid["task"]), rates, (0, 1)))
        assert set(used[level]) == wanted
        share = 400 * 3 / len(wanted)
        assert sum((n - share) ** 2 / share for n in used[level].values()) < chi2.ppf(1 - 1e-6, len(wanted) - 1)


def test_several_values_that_are_held_are_drawn_from_too() -> None:
    design = by_factor(GRID, "learning_rate", sizes=(3,), groups=20, fixed={"batch_size": [8, 16]})
    assert {row.batch_size for group in design for row in rows_of(group)} == {8, 16}


def test_what_is_matched_is_recorded_as_it_is() -> None:
    """With free others seeds are matched only where every level has them alike."""
    for frame, alike in ((GRID, True), (GRID[~((GRID["learning_rate"] == 0.1) & (GRID["seed"] == 0))], False)):
        groups = list(by_factor(frame, "learning_rate", sizes=(3,), groups=30, others="free"))
        seen: dict = {level: {} for level in (0.01, 0.1)}
        for group in groups:
            assert group.matched
            assert group.to_row()["matched_seeds"] == group.matched_seeds == alike
            seen[group.level][group.seed] = [(row.task, row.seed) for row in rows_of(group)]
        assert (seen[0.01] == seen[0.1]) == alike
        for seed, pairs in seen[0.01].items():
            assert [task for task, _ in pairs] == [task for task, _ in seen[0.1][seed]]
