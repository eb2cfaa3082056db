"""The study of hyperparameters: designs, trends, exponents, predictions and bounds against independent computations."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import t as student

from experiments.bases.base import make_base
from experiments.grid.expand import expand
from experiments.measure.opening import from_store
from experiments.statistics import membership
from experiments.studies.hyperparameters.across import heterogeneous
from experiments.studies.hyperparameters.bounds import bound_rows
from experiments.studies.hyperparameters.constants import (
    ConstantsUnit,
    from_json,
    measure_constants,
    named,
    without_logs,
)
from experiments.studies.hyperparameters.designs import centre_of, draw
from experiments.studies.hyperparameters.grids import StudyGrid, complete, shares, study_grids
from experiments.studies.hyperparameters.jackknife import task_interval
from experiments.studies.hyperparameters.joined import Curve, calibrated, curves, joined, shared_between_halves
from experiments.studies.hyperparameters.law import Law, centre_curves, law_of
from experiments.studies.hyperparameters.paper import against_paper
from experiments.studies.hyperparameters.powers import EXPONENTIAL, power_verdict
from experiments.studies.hyperparameters.pricing import PriceUnit, Wanted, key_of, pools, price
from experiments.studies.hyperparameters.run import count_study, drawn_groups, merges_of
from experiments.studies.hyperparameters.spec import (
    ConstantsSpec,
    Rule,
    StudySpec,
    read_study,
    study_presets,
)
from experiments.studies.hyperparameters.tables import trend_where
from experiments.studies.hyperparameters.trends import (
    at_every_level,
    contrast,
    draws_of,
    estimate,
    group_slopes,
    position,
    regression_slopes,
    sign_kind,
    trend,
    verdict,
)
from experiments.studies.hyperparameters.words import done
from experiments.studies.hyperparameters.work import add_rows, read_rows, run_units
from tests.experiments.combine.stores import NAMES, finished_store
from theory import master_bound
from theory.errors import MergeboundError
from theory.network import network_bound
from theory.recipe import Expert, Merge

RULE = Rule(resamples=200)
CONTENT: dict[str, Any] = {
    "name": "micro",
    "tasks": list(NAMES),
    "base": {"kind": "random", "architecture": "mlp_8", "classes": 10},
    "centre": {"learning_rate": 0.1, "batch_size": 8, "steps": 4},
    "checkpoint_every": 2,
    "levels": {"learning_rate": [0.01, 0.1], "step": [2, 4], "experts": [2, 3], "coefficient": [0.3, 0.5]},
    "heterogeneous": {"count": 2, "groups": 3, "axes": {"learning_rate": [0.01, 0.1]}},
    "groups": 3,
    "size": 2,
    "shared_samples": False,
}


def spec(**changes: Any) -> StudySpec:
    return StudySpec.model_validate(CONTENT | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("study") / "store"
    finished_store(place, NAMES).close()
    return place


@pytest.fixture(scope="module")
def runs(folder: Path) -> tuple[str, ...]:
    """Digests of one run per task at the rate 0.1, in the order of tasks."""
    from experiments.store import Store

    with Store.open(folder, "r") as store:
        frame = store.frame()
    chosen = frame[(frame["learning_rate"] == 0.1) & (frame["step"] == 4)].sort_values("task")
    return tuple(str(digest) for digest in chosen["digest"])


@pytest.fixture(scope="module")
def constants(folder: Path, runs: tuple[str, ...]) -> list[dict[str, Any]]:
    how = ConstantsSpec(
        samples=12, pairs=4, curvature_samples=2, curvature_iterations=2, lanczos=3, batches=1, checkpoints=1
    )
    return measure_constants(ConstantsUnit(str(folder), runs[:2], 2, 12, 0, how))


# --- the specification and its grids


def test_factor_grid_has_one_factor_away_from_the_centre_at_most() -> None:
    levels: dict[str, list[Any]] = {
        "learning_rate": [0.01, 0.1],
        "batch_size": [4, 8, 16],
        "sampling": ["reshuffle", "with_replacement"],
    }
    study = spec(levels=levels, tasks=list(NAMES[:2]))
    (factors, _) = study_grids(study)
    runs = factors.runs()
    names = (*levels, "task")
    found = {tuple(getattr(run, name) for name in names) for run in runs}
    every = itertools.product(*levels.values(), NAMES[:2])
    centre = (0.1, 8, "reshuffle")
    assert found == {row for row in every if sum(a != b for a, b in zip(row, centre, strict=False)) <= 1}
    assert all(run.steps == study.centre.steps and run.checkpoints == (2, 4) for run in runs)
    assert len(runs) == len(found)
    assert {run.model_dump_json() for run in expand(factors.spec)} == {run.model_dump_json() for run in runs}


def test_specification_refuses_what_cannot_be(tmp_path: Path) -> None:
    assert study_presets() == ("paper", "small", "tiny")
    for changes, word in (
        ({"levels": {"learning_rate": [0.01, 0.02]}}, "centre"),
        ({"levels": {"learning_rate": [0.1, 0.01]}}, "ascend"),
        ({"levels": {"step": [2, 3]}}, "centre.steps"),
        ({"grids": ["paper-vit"]}, "not both"),
        ({"predictors": ["oracle"]}, "oracle"),
        ({"calibrated": ["secant", "secant"]}, "different"),
        ({"levels": CONTENT["levels"] | {"experts": [2, 5]}}, "levels.experts: groups of 5 experts need 5 tasks"),
        ({"size": 4}, "size: groups of 4"),
        ({"heterogeneous": CONTENT["heterogeneous"] | {"groups": 13}}, "3 tasks with 2 recipes have 12"),
        ({"tasks": ["digits8"], "levels": CONTENT["levels"] | {"experts": [2, 9]}}, "there are 8"),
    ):
        path = tmp_path / "study.yaml"
        path.write_text(json.dumps(CONTENT | changes))
        with pytest.raises(MergeboundError, match=word):
            read_study(path)
    assert spec().digest() != spec(seed=1).digest()
    assert spec().digest() == spec(rule={"least": 0.5}).digest()


def test_groups_are_matched_at_every_level_and_hold_the_centre(folder: Path) -> None:
    from experiments.store import Store

    study = spec()
    with Store.open(folder, "r") as store:
        frame = store.frame()
        specs = {digest: store.spec(digest) for digest in store.runs()}
    grid = StudyGrid("factors", study_grids(study)[0].spec, "both")
    drawn = {one.factor: one for one in draw(study, grid, frame)}
    assert set(drawn) == {"learning_rate", "step", "experts", "coefficient", "heterogeneous"}
    for factor in ("learning_rate", "step"):
        by_seed: dict[int, set[tuple[str, ...]]] = {}
        for group in drawn[factor].groups:
            by_seed.setdefault(group.seed, set()).add(group.tasks)
            for member in group.members:
                run = specs[member.run]
                held = centre_of(study, without=factor)
                assert all(getattr(run, name) == value for name, value in held.items())
                assert (run.learning_rate if factor == "learning_rate" else member.step) == group.level
        assert all(len(tasks) == 1 for tasks in by_seed.values())
        assert len(by_seed) == 3
    sizes: dict[int, dict[Any, set[Any]]] = {group.seed: {} for group in drawn["experts"].groups}
    for group in drawn["experts"].groups:
        assert group.level == len(group.members)
        sizes[group.seed][group.level] = set(group.members)
    assert all(of[2] < of[3] for of in sizes.values())
    assert [m.settings["coefficient"] for m in drawn["coefficient"].methods] == [0.3, 0.5]


def test_bases_that_a_grid_has_finished_are_studied_and_the_others_named(tmp_path: Path) -> None:
    from experiments.store import Store
    from tests.experiments.store.samples import BASE, result

    moved = {name: value + 1 for name, value in BASE.state.items()}
    made = {"mlp_8": BASE, "mlp_16": make_base(moved, "mlp", 2, {}, BASE.provenance)}
    bases = [{"kind": "random", "architecture": name, "classes": 10} for name in ("mlp_8", "mlp_16")]
    study = spec(base=bases)
    grids = study_grids(study)
    with pytest.raises(MergeboundError, match="no grid is finished for any base"):
        drawn_groups(study, grids, tmp_path)
    runs = grids[0].runs()
    digests = [run.digest(base=made[run.base.architecture].digest, split=run.task) for run in runs]
    with Store.create(tmp_path / "factors", meta={"digest": grids[0].spec.digest()}) as store:
        for name, base in made.items():
            store.add_base(base)
            for task in NAMES:
                own = {
                    d: run
                    for d, run in zip(digests, runs, strict=True)
                    if (run.base.architecture, run.task) == (name, task)
                }
                store.add_runs(own, base.digest, task)
        for k, (digest, run) in enumerate(zip(digests, runs, strict=True)):
            if run.base.architecture == "mlp_8" or k == len(runs) - 1:
                store.commit(digest, result(k))
    small = {d for d, run in zip(digests, runs, strict=True) if run.base.architecture == "mlp_8"}
    assert 0 < len(small) < len(runs) - 1

    drawn, recipes, last, parts = drawn_groups(study, grids, tmp_path)
    told = [(part.grid, part.architecture, len(part.finished), part.runs, part.complete) for part in parts]
    half, joint = len(runs) // 2, len(grids[1].runs()) // 2
    assert told == [
        ("factors", "mlp_8", half, half, True), ("factors", "mlp_16", 1, half, False),
        ("joint", "mlp_8", 0, joint, False), ("joint", "mlp_16", 0, joint, False),
    ]  # fmt: skip
    assert not complete(grids[0], tmp_path / "factors")
    assert parts[0].finished == small == set(recipes["digest"]) == set(last)
    assert {one.factor for one in drawn} == {"learning_rate", "step", "experts", "coefficient"}
    assert {member.run for one in drawn for group in one.groups for member in group.members} <= small
    lacking = [part for part in parts if not part.complete]
    assert done(7, 84, lacking) == (
        "7 of 84 merges are measured. Not finished and left out: mlp 16 in the grid factors (1 of "
        f"{half} runs are done); mlp 8 in the grid joint (0 of {joint} runs are done); mlp 16 in the grid joint (0 of "
        f"{joint} runs are done)."
    )
    assert [row["merges"] for row in count_study(study)] == [2 * merges_of(study, grid) for grid in grids] == [48, 6]

    other = [replace(grid, spec=grid.spec.model_copy(update={"name": "another"})) for grid in grids]
    assert not any(part.finished for part in shares(other[0], tmp_path / "factors")), "another grid's store"


# --- trends


def test_slopes_and_kinds_of_known_curves() -> None:
    x = np.array([1.0, 2.0, 4.0, 8.0])
    rng = np.random.default_rng(0)
    tasks = at_every_level([[f"t{(k + j) % 8}" for j in range(6)] for k in range(10)], 4)
    noise = rng.normal(size=(10, 4))
    power = 3.0 * x**-0.7
    assert group_slopes(x, np.log(power)[None])[0] == pytest.approx(-0.7)
    fall = trend(x, power * np.exp(0.02 * noise), tasks, RULE)
    assert fall.kind == "falls"
    assert fall.slope.low < -0.7 < fall.slope.high
    valley = np.exp(0.3 * np.abs(np.log2(x) - 1)) * np.exp(0.01 * noise)
    found = trend(x, valley, tasks, RULE)
    assert (found.kind, found.turn) == ("minimum", 1)
    assert trend(x, 1 / valley, tasks, RULE).kind == "maximum"
    assert trend(x, np.exp(0.2 * noise), tasks, RULE).kind == "undecided"
    assert trend(x, x**0.005 * np.exp(1e-4 * noise), tasks, RULE).kind == "undecided"  # sure, and too small to count
    holes = power * np.exp(0.02 * noise)
    holes[3:, 1] = np.inf
    assert trend(x, holes, tasks, RULE).groups == 3
    assert verdict("falls", "falls") == "agrees"
    assert verdict("falls", "minimum") == "disagrees"
    assert verdict("undecided", "falls") == verdict("rises", "undecided") == "undecided"


@pytest.mark.parametrize("count", [8, 7])
def test_intervals_cover_the_slope_when_tasks_have_effects_of_their_own(count: int) -> None:
    """Slopes and means over ten draws of six of eight or seven tasks: 93 to 97 % in 2,000 simulations; 400 here."""
    x, level, covered = np.log([1.0, 2.0, 4.0]), 0.4, []
    place = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    for seed in range(400):
        rng = np.random.default_rng([seed, 1])
        own = level + 0.3 * rng.normal(size=count)
        groups = [tuple(sorted(rng.choice(count, size=6, replace=False))) for _ in range(10)]
        noise = {g: 0.01 * rng.normal(size=3) for g in groups}
        logs = np.array([own[list(g)].mean() * x + noise[g] for g in groups])
        tasks = at_every_level([[f"t{i}" for i in g] for g in groups], 3)
        draws = draws_of(tasks, np.array([[str(g)] * 3 for g in groups], dtype=object))
        ends = [contrast(logs, w, draws, Rule(resamples=50), seed) for w in (place, [0.0, 0.0, 1 / x[2]])]
        covered.append([found.low <= level <= found.high for found in ends])
    slope, mean = np.mean(covered, axis=0)
    assert 0.92 < slope < 0.98
    assert 0.92 < mean < 0.98


def test_jackknife_over_tasks_is_student_s_interval_where_all_groups_are_there() -> None:
    """All groups of six of eight tasks: the mean over groups is the mean of the tasks' effects."""
    own = np.random.default_rng(4).normal(size=8)
    groups = list(itertools.combinations(range(8), 6))
    members = membership([[f"t{i}" for i in g] for g in groups])
    found = task_interval(np.array([own[list(g)].mean() for g in groups]), members, 0.9)
    low, high = student.interval(0.9, 7, own.mean(), own.std(ddof=1) / np.sqrt(8))
    assert (found.value, found.low, found.high) == pytest.approx((own.mean(), low, high))
    once = task_interval(np.array([1.0, 2.0]), membership([["a", "b"], ["a", "b"]]), 0.9)
    assert np.isnan([once.low, once.high]).all(), "no task is ever left out"


def test_draws_of_one_group_have_no_interval_and_leave_the_trend() -> None:
    """Eight tasks have one group of eight: ten draws of it are one number, not an interval of no width."""
    rng, sizes = np.random.default_rng(2), (2, 4, 8)
    effects = 0.3 * rng.normal(size=8)
    orders = [rng.permutation(8) for _ in range(10)]
    tasks = [[[f"t{i}" for i in order[:n]] for n in sizes] for order in orders]
    groups = np.array([[";".join(sorted(names)) for names in row] for row in tasks], dtype=object)
    # effect of a group: mean over its tasks; over n it rises like n to the power 0.5
    values = np.array([[np.sqrt(n) * np.exp(effects[o[:n]].mean()) for n in sizes] for o in orders])
    alone = estimate(values[:, 2], [row[2] for row in tasks], list(groups[:, 2]), RULE, 0)
    assert alone.value == pytest.approx(values[0, 2])
    assert np.isnan([alone.low, alone.high]).all()
    found = trend(np.array(sizes, dtype=float), values, tasks, RULE, 0, groups)
    assert (found.used, found.left_out, found.draws) == ((2.0, 4.0), (8.0,), 10)
    slopes = np.log(values[:, 1] / values[:, 0]) / np.log(2.0)
    assert found.slope.value == pytest.approx(slopes.mean())
    assert found.slope.low < 0.5 < found.slope.high
    # a draw that is repeated ten times moves the mean, and adds no group to the interval
    often = [0] * 10 + list(range(1, 10))
    pairs = [[row[0]] for row in tasks]
    many = estimate(values[often, 0], [pairs[k][0] for k in often], [groups[k, 0] for k in often], RULE, 0)
    once = estimate(values[:, 0], [own[0] for own in pairs], list(groups[:, 0]), RULE, 0)
    assert many.value == pytest.approx(values[often, 0].mean())
    assert many.high - many.low > 0.8 * (once.high - once.low)


def test_intervals_over_the_number_of_experts_cover_its_slope() -> None:
    """Groups that are parts of each other, of tasks with effects and with pairs that do not go together."""
    sizes, level, covered = (2, 3, 4, 6), 0.2, []
    for seed in range(100):
        rng = np.random.default_rng([seed, 7])
        own, pair = 0.3 * rng.normal(size=8), 0.15 * rng.normal(size=(8, 8))
        orders = [rng.permutation(8) for _ in range(10)]
        logs = np.array([
            [level * np.log(n) + own[o[:n]].mean() + pair[np.ix_(o[:n], o[:n])].mean() - np.trace(pair) / 8 / n
             for n in sizes] for o in orders
        ])  # fmt: skip
        logs -= np.array([pair.sum() / 64 * (1 - 1 / n) for n in sizes])  # what pairs alone do to the mean over draws
        tasks = [[[f"t{i}" for i in o[:n]] for n in sizes] for o in orders]
        found = trend(np.array(sizes, dtype=float), np.exp(logs), tasks, RULE, seed).slope
        covered.append(found.low <= level <= found.high)
    assert np.mean(covered) > 0.85


def test_regression_recovers_planted_elasticities() -> None:
    rng = np.random.default_rng(3)
    experts = [[f"e{i}" for i in rng.choice(20, size=4, replace=False)] for _ in range(30)]
    own = rng.normal(size=(20, 2))
    design = np.array([[own[[int(name[1:]) for name in group], k].mean() for k in range(2)] for group in experts])
    exact = regression_slopes(design, 1.0 + design @ np.array([0.5, -1.5]), experts, RULE)
    assert [found.value for found in exact] == pytest.approx([0.5, -1.5])
    noisy = regression_slopes(design, design @ np.array([2.0, 0.0]) + 0.3 * rng.normal(size=30), experts, RULE)
    assert [sign_kind(found) for found in noisy] == ["rises", "undecided"]


def test_positions() -> None:
    assert position("momentum", [0.0, 0.5, 0.9]) == pytest.approx([1.0, 2.0, 10.0])
    assert list(position("sampling", ["reshuffle", "with_replacement"])) == [1.0, 2.0]


# --- theory


def test_formula_exponents_where_they_are_known() -> None:
    """kappa = 0: drift (b) is proportional to eta and K; without gradient noise in d, sup stability under sampling with
    replacement falls like 1/n with full batches' mean part and like b^-1/2 where noise dominates."""
    study = spec(levels={"learning_rate": [0.05, 0.1], "batch_size": [4, 8], "step": [2, 4]})
    common = {"learning_rate": 0.1, "steps": 4, "kappa": 0.0, "L": 1.0, "D_inf": 1.0, "initial_gradient_norm": 1.0}
    expert = Expert("a", n=10**6, batch_size=8, sampling="with_replacement", sigma0=0.0, sigma=0.0, **common)  # type: ignore[arg-type]
    from experiments.studies.hyperparameters.constants import to_json

    row = {"recipe": json.loads(json.dumps(to_json(dict.fromkeys(("value", "low", "high"), expert))))}
    assert from_json(row["recipe"]) is not expert
    for factor, levels, quantity, exponent in (
        ("learning_rate", [0.05, 0.1], "drift", 1.0),
        ("learning_rate", [0.05, 0.1], "V", 2.0),
        ("learning_rate", [0.05, 0.1], "epsilon", 1.0),
        ("step", [2, 4], "drift", 1.0),
        ("step", [2, 4], "epsilon", 0.5),
        ("batch_size", [4, 8], "epsilon", -0.5),
        ("data_share", [0.5, 1.0], "epsilon", -0.5),
    ):
        made = centre_curves([row], factor, levels, study)[quantity]
        slope = group_slopes(position(factor, levels), np.log(made))[0]
        assert slope == pytest.approx(exponent, abs=2e-3), (factor, quantity)
        law = law_of(factor, quantity, levels)
        assert law is not None
        assert law.low - 2e-3 <= slope <= law.high + 2e-3
    law = law_of("experts", "V", [2, 8])
    assert law is not None
    assert law.low == pytest.approx(np.log((7 / 8) / (1 / 2)) / np.log(4))
    kept = without_logs(replace(expert, drift=0.5, measured=frozenset({"drift"})))
    assert kept.drift is None
    assert not kept.measured


def test_exponents_are_judged_by_the_law_and_exponentials_are_no_powers() -> None:
    x, law = np.array([1.0, 2.0, 4.0, 8.0]), Law(1.0, 1.0, "")
    rng = np.random.default_rng(6)
    tasks = at_every_level([[f"t{k}"] for k in range(8)], 4)

    def judged(curve: np.ndarray, own: Law | None, formula: bool = True, noise: float = 0.01) -> str:
        tilts = noise * rng.normal(size=(8, 1)) * np.log(x)
        found = trend(x, curve * np.exp(tilts), tasks, RULE)
        return power_verdict(found.slope, found.bend, own, formula)

    assert judged(x, law, noise=0.0) == judged(3 * x, law) == "agrees"
    assert judged(x**1.1, law) == "disagrees"
    assert judged(x**0.8, Law(0.5, 1.0, "")) == "agrees"
    assert judged(x, law, noise=2.0) == "undecided"  # meets the law, and would meet any other near it
    assert judged(x**9, law, noise=2.0) == EXPONENTIAL
    assert judged(x**4.0, None) == judged(np.exp(x), None, formula=False) == ""
    assert judged(np.exp(x), law) == judged(np.exp(x), None) == EXPONENTIAL
    assert judged(np.exp(x), law, formula=False) == "disagrees"
    assert judged(x + x**2, Law(1.0, 2.0, "")) == "agrees"  # bent, as a sum of two powers is


# --- predictions, constants and bounds of real checkpoints


def test_prices_against_mean_logits_and_distances(folder: Path, runs: tuple[str, ...]) -> None:
    wanted = (Wanted("g", (0, 2), (0.5, 0.3)), Wanted("h", (0, 1, 2), (1 / 3,)))
    unit = PriceUnit(str(folder), runs, None, 24, 0, ("secant",), wanted)
    rows = {row["key"]: row for row in price(unit)}
    assert set(rows) == {key_of("g", 0.5), key_of("g", 0.3), key_of("h", 1 / 3)}
    subject = from_store(folder, runs, images=24, seed=0)
    x = subject.vectors.double().numpy()
    base = subject.base.double().numpy()
    for members, alpha, key in (((0, 2), 0.3, key_of("g", 0.3)), ((0, 1, 2), 1 / 3, key_of("h", 1 / 3))):
        own = x[list(members)]
        merged = base + alpha * (own - base).sum(axis=0)
        assert rows[key]["V"] == pytest.approx(((merged - own) ** 2).sum(axis=1).mean(), rel=1e-4)
        assert rows[key]["drift"] == pytest.approx(np.sqrt(((own - base) ** 2).sum(axis=1).mean()), rel=1e-5)
        risks = []
        for j in members:
            images, labels = subject.calibration[j].images, subject.calibration[j].labels.numpy()
            with torch.no_grad():
                h0, *hs = (
                    subject.networks[j].call(torch.as_tensor(v, dtype=torch.float32), images).double().numpy()
                    for v in (base, *own)
                )
            h = h0 + alpha * sum(one - h0 for one in hs)
            risks.append((logsumexp(h, axis=1) - h[np.arange(len(h)), labels]).mean())
        assert rows[key]["predictions"]["secant"]["risk"] == pytest.approx(np.mean(risks), rel=1e-4)


def test_constants_of_a_checkpoint_have_its_steps_and_log(constants: list[dict[str, Any]]) -> None:
    for row in constants:
        assert str(row["expert"]).endswith("@2")
        expert = from_json(row["recipe"])
        assert int(np.asarray(expert.steps)) == 2
        assert expert.batch_losses is not None
        assert expert.batch_losses.steps == 2
        assert json.loads(json.dumps(row)) == row


def test_bounds_are_the_theory_s_at_value_and_at_both_ends(constants: list[dict[str, Any]]) -> None:
    rows = named(constants)
    members = list(rows)
    for alpha, method in ((0.5, {"method": "average"}), (0.3, {"method": "task_arithmetic", "coefficients": 0.3})):
        made = {row["source"]: row for row in bound_rows("k", members, alpha, rows, 0.07, False, 0)}
        direct = []
        for end in ("value", "low", "high"):
            experts = tuple(
                replace(from_json(rows[name]["recipe"], end), name=f"e{k}") for k, name in enumerate(members)
            )
            merge = Merge(experts, per_sample_loss=True, shared_samples=False, data_independent_choices=True, **method)
            direct.append(float(master_bound(merge).value))
        assert made["recipe"]["bound"] == pytest.approx(direct[0])
        assert made["recipe"]["bound_low"] == pytest.approx(min(direct))
        assert made["recipe"]["bound_high"] == pytest.approx(max(direct))
        root = made["recipe"]["training"] + made["recipe"]["dispersion"] + made["recipe"]["instability"]
        assert root**2 == pytest.approx(direct[0])
        other = network_bound(
            [r["risk"]["value"] for r in constants],
            [r["smoothness"]["value"] for r in constants],
            [r["drift"] for r in constants],
            private_drift=[r["private_drift"] for r in constants],
            trained_heads=True,
            dispersion=0.07,
            method="weighted",
            weights=[0.5, 0.5],
            coefficients=[alpha, alpha],
        )
        assert made["measured_drift"]["bound"] == pytest.approx(float(other.value))


def test_pools_are_used_where_they_save_passes(folder: Path) -> None:
    from experiments.store import Store

    with Store.open(folder, "r") as store:
        frame = store.frame()
    grid = StudyGrid("factors", study_grids(spec(groups=8))[0].spec, "factors")
    (rates, *_) = draw(spec(groups=8), grid, frame)
    found = pools([(group, (0.5,)) for group in rates.groups])
    assert len(found) == 2  # one per level: three experts (9 passes) against eight pairs (32)
    assert sorted(len(groups) for _, groups in found) == [8, 8]
    assert all(len(experts) == len({m for g, _ in groups for m in g.members}) for experts, groups in found)
    assert len(pools([(rates.groups[0], (0.5,))])) == 1


# --- tables


def table_of(losses: np.ndarray, factor: str = "learning_rate") -> pd.DataFrame:
    """Merges of matched groups with these losses (G, L)."""
    rows = []
    for seed, row in enumerate(losses):
        for level, loss in zip((0.01, 0.1, 1.0), row, strict=False):
            rows.append(
                {
                    **{"grid": "g", "architecture": "net", "base_digest": "b", "factor": factor, "level": level},
                    **{"seed": seed, "size": 2, "tasks": f"t{seed % 3};t{seed % 3 + 1}", "experts": f"e{seed};f{seed}"},
                    **{"group": f"{seed} {level}", "label": "average", "alpha": 0.5, "n": 100},
                    **{"loss": loss, "accuracy": 0.9, "merging_cost": loss / 2, "expert_loss": loss / 2},
                }
            )
    return pd.DataFrame(rows)


def joint_groups(recipes: list[tuple[float, int]], seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Thirty groups of four of eight tasks, each expert with a recipe (rate, steps) drawn for it; and the experts."""
    rng = np.random.default_rng(seed)
    experts = pd.DataFrame(
        [{"expert": f"t{t}r{r}", "learning_rate": lr, "step": k} for t in range(8) for r, (lr, k) in enumerate(recipes)]
    )
    groups = [[f"t{t}r{rng.integers(len(recipes))}" for t in rng.choice(8, 4, replace=False)] for _ in range(30)]
    about = {"factor": "heterogeneous", "base_digest": "b", "architecture": "net", "error": 0.1}
    return pd.DataFrame([about | {"experts": ";".join(group)} for group in groups]), experts


def test_heterogeneity_is_recovered_and_what_recipes_cannot_tell_is_left_empty() -> None:
    many = [(0.01, 2), (0.02, 16), (0.05, 4), (0.1, 2), (0.2, 8), (0.4, 32)]
    study = spec(rule={"resamples": 200})

    def rows(recipes: list[tuple[float, int]], slopes: tuple[float, ...], noise: float) -> pd.DataFrame:
        table, experts = joint_groups(recipes, 11)
        own = experts.set_index("expert")
        logs = [np.log(own.loc[text.split(";")].to_numpy(float)) for text in table["experts"]]
        parts = np.array([[*one.mean(axis=0), one.sum(axis=1).std()] for one in logs])
        table["loss"] = np.exp(parts @ np.array(slopes) + noise * np.random.default_rng(1).normal(size=30))
        found = heterogeneous(study, table.assign(pred_secant=1 / table["loss"]), experts)
        return found.set_index(["factor", "quantity"])

    exact = rows(many, (0.5, 0.5, 0.8), 0.0)
    assert exact.loc[("training_time", "loss"), "elasticity"] == pytest.approx(0.5)
    for name in ("heterogeneity", "spread_training_time"):
        assert exact.loc[(name, "loss"), "elasticity"] == pytest.approx(0.8)
        assert exact.loc[(name, "secant"), "verdict"] == "disagrees"
    means = rows(many, (0.3, -0.7, 0.0), 0.0)
    assert means.loc[("learning_rate", "loss"), "elasticity"] == pytest.approx(0.3)
    assert means.loc[("step", "loss"), "kind"] == "falls"
    noisy = rows(many, (0.5, 0.5, 0.0), 0.3).loc[("heterogeneity", "loss")]
    assert noisy["kind"] == "undecided"
    assert noisy["elasticity_low"] < 0 < noisy["elasticity_high"]
    # two recipes: rate and steps change together, and either explains the loss as well as the other
    few = rows(many[:2], (0.5, 0.5, 0.8), 0.0)
    assert few.loc[("heterogeneity", "loss"), "elasticity"] == pytest.approx(0.8)
    for name in ("learning_rate", "step"):
        assert np.isnan(few.loc[(name, "loss"), "elasticity"])
        assert few.loc[(name, "secant"), "verdict"] == "not identified"


def test_calibrated_predictions_never_see_their_own_half() -> None:
    rng = np.random.default_rng(5)
    study = spec()
    frame = table_of(np.exp(rng.normal(size=(8, 3))))
    frame["half"] = np.where(frame["seed"] % 2 == 0, "A", "B")
    frame["key"] = frame["group"]
    frame["pred_secant"] = frame["loss"] * np.exp(-0.3 + 0.01 * rng.normal(size=len(frame)))
    frame["pred_tangent_base"] = frame["loss"] * np.exp(0.9 + 0.01 * rng.normal(size=len(frame)))
    first = calibrated(frame, study)
    assert np.allclose(np.log(first / frame["loss"]), 0.0, atol=0.05)  # weights 3/4 and 1/4
    changed = frame.assign(loss=np.where(frame["half"] == "A", 7.0 * frame["loss"], frame["loss"]))
    second = calibrated(changed, study)
    in_a = (frame["half"] == "A").to_numpy()
    assert np.array_equal(first[in_a], second[in_a])  # fitted on B, where nothing changed
    assert np.allclose(second[~in_a] / first[~in_a], 7.0, rtol=0.1)
    # a merge that both halves drew is in neither fit: its loss moves no calibrated prediction at all
    frame.loc[frame["seed"].isin([0, 1]) & (frame["level"] == 1.0), "key"] = "both"
    both = (frame["key"] == "both").to_numpy()
    same = calibrated(frame, study)
    other = calibrated(frame.assign(loss=np.where(both, 50.0 * frame["loss"], frame["loss"])), study)
    assert np.array_equal(same, other)
    assert shared_between_halves(frame).iloc[0]["merges"] == 1


def test_a_prediction_without_numbers_is_judged_where_it_has_some() -> None:
    levels = [0.05, 0.1, 0.2, 0.3, 0.5]
    rng = np.random.default_rng(5)
    shape = np.array([1.0, 0.8, 0.6, 50.0, 1e6])  # falls, then collapses
    losses = shape * np.exp(0.01 * rng.standard_normal((6, 5)))
    tasks = at_every_level([[f"t{(g + k) % 8}" for k in range(6)] for g in range(6)], 5)
    names = np.array([[f"{g}{l}" for l in range(5)] for g in range(6)])
    measured = Curve(tuple(levels), losses, tuple(tuple(map(tuple, row)) for row in tasks), names)
    numbers = np.where(shape < 10, losses, np.nan)
    numbers[0, 2] = np.nan  # one draw lacks one more level
    study = spec(levels={"learning_rate": [0.01, 0.1], "coefficient": levels})
    whole = trend(np.array(levels), losses, measured.tasks, study.rule, 0, names)
    assert whole.kind == "minimum"  # which no prediction without its right half could show
    there = trend_where(measured, replace(measured, values=numbers), "coefficient", whole, study)
    truth = trend(np.array(levels[:3]), losses[1:, :3], measured.tasks[1:], study.rule, 0, names[1:])
    assert there.kind == truth.kind == "falls"
    assert there.used == (0.05, 0.1, 0.2)
    assert there.draws == 5
    assert there.slope.value == pytest.approx(truth.slope.value)
    assert trend_where(measured, measured, "coefficient", whole, study) is whole


def test_curves_keep_the_order_of_the_specification_and_pair_by_seed() -> None:
    losses = np.arange(6.0).reshape(2, 3) + 1
    frame = joined(table_of(losses).sample(frac=1.0, random_state=0), [], [], spec())
    found = curves(frame, "learning_rate", "loss", (1.0, 0.01, 0.1))["b"]
    assert found.levels == (1.0, 0.01, 0.1)
    assert np.array_equal(found.values, losses[:, [2, 0, 1]])
    assert found.tasks == ((("t0", "t1"),) * 3, (("t1", "t2"),) * 3)
    assert found.distinct == (2, 2, 2)
    assert frame["error"].to_numpy() == pytest.approx(np.full(6, 0.1))


def double(unit: int) -> list[dict[str, int]]:
    if unit == 3:
        raise MergeboundError("three")
    return [{"unit": unit, "twice": 2 * unit}]


def test_rows_survive_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    run_units([1, 2], double, path)
    with path.open("a") as stream:
        stream.write('{"unit": 9, "tw')
    assert [row["unit"] for row in read_rows(path)] == [1, 2]
    with pytest.raises(MergeboundError, match="three"):
        run_units([4, 3, 5], double, path)
    assert [row["unit"] for row in read_rows(path)] == [1, 2, 4]  # what was finished is kept, the torn line is gone
    path.write_text('{"unit": 1}\n{broken}\n{"unit": 2}\n{"unit": 3}\n')
    with pytest.raises(MergeboundError, match="line 2"):
        read_rows(path)
    add_rows(tmp_path / "none.jsonl", [])
    assert not (tmp_path / "none.jsonl").exists()


def test_the_paper_s_directions_are_compared_with_what_was_measured() -> None:
    kinds = [("learning_rate", "minimum"), ("step", "falls"), ("batch_size", "rises"), ("experts", "undecided")]
    rows = [
        {"architecture": "vit", "factor": factor, "prediction": name, "measured": kind, "groups": 10, "seed": 0}
        | {f"measured_exponent{end}": 0.1 for end in ("", "_low", "_high")}
        for factor, kind in [*kinds, ("data_share", "falls"), ("momentum", "rises")]
        for name in ("secant", "bound")
    ]
    found = against_paper(pd.DataFrame(rows)).set_index("factor")["verdict"]
    expected = {"learning_rate": "agrees", "step": "one side", "batch_size": "disagrees", "experts": "undecided"}
    assert found.to_dict() == expected | {"data_share": "agrees", "momentum": "no claim"}
