"""The study of scale: nested groups, disjoint tasks, effects with known answers, laws that recover themselves."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from experiments.bases.spec import BaseSpec
from experiments.grid.run_spec import RunSpec
from experiments.models.build import build_shapes
from experiments.statistics import Estimate
from experiments.studies.scale.cells import Cell, cells, chains, runs_of
from experiments.studies.scale.checks import open_checks
from experiments.studies.scale.comparisons import number_effects, spread
from experiments.studies.scale.effects import Effects, Table, contrast, estimate, slope_weights, table_of
from experiments.studies.scale.findings import Chance, answer, findings_table, questions
from experiments.studies.scale.laws import LAWS, compared, fits, identified, judged, quadratic
from experiments.studies.scale.multitask import Start, train_fixed, train_optimised, why_stopped
from experiments.studies.scale.points import Points, read_points, save_points
from experiments.studies.scale.runner import Measured
from experiments.studies.scale.saying import counted, law_words
from experiments.studies.scale.scores_table import packed, unpacked
from experiments.studies.scale.spec import MultitaskSpec, ScaleSpec, read_scale, settings_for, study_sizes
from experiments.studies.scale.theory_says import CHANCE, CLAIMS, SAYS, moving_words, says_table, theory_lines
from experiments.studies.scale.training_table import choices, with_stops
from experiments.studies.scale.verdicts import borderline, can_test, mean_chance, verdict
from experiments.tasks.digits8 import EIGHT, MORE
from experiments.tasks.digits_images import digits_task
from experiments.tasks.images import shared_rows
from experiments.tasks.types import Split
from theory.errors import MergeboundError


@pytest.fixture(scope="module")
def tiny() -> ScaleSpec:
    return read_scale("tiny")


def test_nobody_was_trained_on_images_of_the_further_digit_tasks() -> None:
    def rows(part: object) -> set[int]:
        found = shared_rows(part)  # type: ignore[arg-type]
        assert found is not None
        return set(found.tolist())

    trained = rows(digits_task("pretraining").train)
    for name in EIGHT:
        trained |= rows(digits_task(name).train)
    assert len(trained) == 500 + 8 * 80
    for name in MORE:
        task = digits_task(name)
        parts = [rows(part) for part in (task.train, task.validation, task.test)]
        assert [len(part) for part in parts] == [160, 96, 400]
        assert not trained & (parts[0] | parts[1] | parts[2])
        assert not parts[0] & parts[1]
        assert not (parts[0] | parts[1]) & parts[2]
        assert set(task.train.labels) == set(range(10))


@pytest.mark.parametrize("size", ["tiny", "small", "paper"])
def test_every_size_is_a_grid_with_one_run_per_cell_task_and_seed(size: str) -> None:
    spec = read_scale(size)
    assert size in study_sizes()
    for family in spec.families:
        found = runs_of(spec, family)
        assert set(found) == {cell for cell in cells(spec) if cell.family == family.name}
        for cell, runs in found.items():
            assert {(run.task.removeprefix("./"), run.seed) for run in runs} == {
                (task, seed) for task in spec.held_in for seed in spec.seeds
            }
            assert all(run.base == runs[0].base for run in runs)
            assert runs[0].base.architecture.startswith(cell.architecture)


def test_a_vit_of_the_family_takes_patches_that_divide_the_image() -> None:
    model = build_shapes("vit_s1", 10, img_size=8, in_chans=1, patch_size=2)
    assert model.patch_embed.num_patches == 16  # type: ignore[union-attr]
    with pytest.raises(MergeboundError, match="divisor"):
        build_shapes("vit_s1", 10, img_size=8, patch_size=3)


def test_groups_of_a_chain_are_nested_and_the_group_of_all_is_there_once(tiny: ScaleSpec) -> None:
    groups = chains(tiny)
    assert len(groups) == tiny.chains * 3 + 1
    for chain in range(tiny.chains):
        own = [set(group.members) for group in groups if group.chain == chain and group.size < 8]
        assert all(a < b for a, b in itertools.pairwise(own))
    assert [group.members for group in groups if group.size == 8] == [tuple(range(8))]


def test_chains_with_equal_groups_keep_every_size(tiny: ScaleSpec) -> None:
    spec = tiny.model_copy(update={"chains": 40, "held_in": tiny.held_in[:3], "experts": (2, 3), "seeds": (0, 1)})
    groups = chains(spec)
    assert [group.chain for group in groups if group.size == 2] == list(range(40))
    assert [(group.chain, group.seed) for group in groups if group.size == 3] == [(0, 0), (1, 1)]


def test_the_coefficient_one_over_n_follows_the_number_of_experts(tiny: ScaleSpec) -> None:
    method = tiny.methods[1].model_copy(update={"settings": {"coefficient": "1/N"}})
    assert settings_for(method, 4) == {"coefficient": 0.25}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"held_out": ["digits8:identity"]}, "held in as well"),
        ({"experts": [2, 9]}, "must ascend up to the 8"),
        ({"transfers": ["ncm"]}, "transfers"),
        ({"laws": {"method": "slerp"}}, "is not merged"),
    ],
)
def test_a_wrong_entry_is_named(tiny: ScaleSpec, tmp_path: Path, change: dict[str, object], said: str) -> None:
    import yaml

    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(tiny.model_dump(mode="json") | change))
    with pytest.raises(MergeboundError, match=said):
        read_scale(path)


# --- effects ---------------------------------------------------------------------------------------------------------


def _table(rows: list[dict[str, object]], draws: np.ndarray) -> Table:
    return Table(pd.DataFrame(rows), draws)


def test_a_contrast_is_the_slope_that_was_put_in() -> None:
    rng = np.random.default_rng(3)
    sizes, rows = (1e5, 1e6, 1e7), []
    for chain in range(4):
        level = rng.normal()
        rows += [
            {"architecture": f"a{k}", "chain": chain, "members": f"t{chain};u", "value": level + 0.25 * np.log10(p)}
            for k, p in enumerate(sizes)
        ]
    table = _table(rows, np.tile([[float(row["value"])] for row in rows], (1, 50)))
    found = contrast(table, "architecture", ("a0", "a1", "a2"), slope_weights(np.log10(sizes)), ("chain",))
    np.testing.assert_allclose(found.value, 0.25, atol=1e-12)
    one_missing = contrast(
        table.take(np.arange(11)), "architecture", ("a0", "a1", "a2"), slope_weights(np.log10(sizes)), ("chain",)
    )
    assert len(one_missing) == 3


def test_the_interval_joins_the_variances_of_tasks_and_of_images() -> None:
    rng = np.random.default_rng(0)
    tasks, draws = 200, 4000
    value = rng.normal(0.0, 1.0, tasks)
    images = rng.normal(0.0, 0.1, draws)
    found = estimate(Effects(value, value[:, None] + images, tuple(f"t{k}" for k in range(tasks))), seed=1)
    expected = 1.96 * np.sqrt(value.var() / tasks + 0.1**2)
    assert found.value == pytest.approx(value.mean())
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.08)


def test_the_spread_over_methods_is_the_largest_gap() -> None:
    rows = [
        {"chain": chain, "method": m, "members": "a", "value": v}
        for chain, values in enumerate([(0.1, 0.4, 0.3), (0.5, 0.5, 0.5)])
        for m, v in zip("xyz", values, strict=True)
    ]
    found = spread(_table(rows, np.array([[float(row["value"])] for row in rows])), ("chain",))
    np.testing.assert_allclose(found.rows["value"], [0.3, 0.0])
    np.testing.assert_allclose(found.draws[:, 0], [0.3, 0.0])


@pytest.mark.parametrize(
    ("low", "high", "direction", "said"),
    [(0.1, 0.3, 1, "agrees"), (-0.3, -0.1, 1, "disagrees"), (-0.3, -0.1, -1, "agrees"), (-0.1, 0.3, 1, "undecided"),
     (np.nan, np.nan, 1, "not measured")],
)  # fmt: skip
def test_verdicts_compare_directions_beyond_the_interval(low: float, high: float, direction: int, said: str) -> None:
    assert verdict(Estimate((low + high) / 2, low, high), direction) == said


def test_a_verdict_near_zero_is_borderline_and_experts_near_chance_test_nothing(tiny: ScaleSpec) -> None:
    assert borderline(Estimate(0.085, 1.08e-4, 0.143), 0.1)
    assert borderline(Estimate(0.02, -0.004, 0.05), 0.1)
    assert not borderline(Estimate(0.085, 0.05, 0.143), 0.1)
    assert not borderline(Estimate(0.1, np.nan, np.nan), 0.1)
    chance = mean_chance({"a": 10, "b": 5}, ("a", "b"))
    assert chance == pytest.approx(0.15)
    assert np.isnan(mean_chance({"a": 10}, ("a", "b")))
    assert not can_test(Estimate(0.4, 0.29, 0.5), chance, tiny.rule)
    assert can_test(Estimate(0.4, 0.31, 0.5), chance, tiny.rule)
    assert can_test(Estimate(0.1, 0.05, 0.2), float("nan"), tiny.rule)
    assert counted(pd.Series(["agrees", "not measured", "not testable"])) == (
        "1 agree in direction, 0 disagree, 0 undecided, 1 not testable, 1 not measured"
    )


def test_the_rule_of_verdicts_does_not_change_what_is_run_but_the_qualities_do(tiny: ScaleSpec) -> None:
    rule = tiny.rule.model_copy(update={"chance_times": 3.0})
    assert tiny.model_copy(update={"rule": rule}).digest() == tiny.digest()
    first = tiny.families[0].model_copy(update={"qualities": {"strong": {"steps": 7}}})
    other = tiny.model_copy(update={"families": (first,)})
    assert other.digest() != tiny.model_copy(update={"families": tiny.families[:1]}).digest()
    cell, runs = next(item for item in runs_of(other, first).items() if item[0].base == "strong")
    assert cell.architecture == first.architectures[0]
    given = tiny.bases["strong"]["quality"]
    assert runs[0].base.quality.model_dump() == {  # type: ignore[union-attr]
        **runs[0].base.quality.model_dump(), **given, "steps": 7,  # type: ignore[union-attr]
    }  # fmt: skip
    assert read_scale("small").digest() == "2a6e5433bebc"


# --- from points to findings -----------------------------------------------------------------------------------------


def _points(spec: ScaleSpec, cell: Cell, quality: float) -> Points:
    """A cell whose merges keep ``quality`` of every expert's accuracy, and grow by 0.1 per doubling held out."""
    rows, correct, number = [], [], 0
    n = 200

    def add(kind: str, members: str, method: str, experts: int, chain: int, accuracy: float, out: float) -> None:
        nonlocal number
        for task in (*spec.held_in, *spec.held_out):
            ways = ("head",) if task in spec.held_in else spec.transfers
            for way in ways:
                value = accuracy if way == "head" else out
                rows.append(
                    {"point": number, "kind": kind, "method": method, "experts": experts, "chain": chain, "seed": 0,
                     "members": members, "task": task, "group": "held_in" if way == "head" else "held_out",
                     "scored_by": way, "accuracy": value, "loss": 1.0 if way == "head" else np.nan, "images": n}
                )  # fmt: skip
                correct.append((np.arange(n) < round(value * n)).astype(np.float32))
        number += 1

    add("base", "", "", 0, -1, 0.1, 0.4)
    for task in spec.held_in:
        add("expert", task, "", 1, -1, 0.8, 0.4)
    for group in chains(spec):
        members = ";".join(spec.held_in[i] for i in group.members)
        for method in spec.methods:
            gain = 0.4 * (1.0 + 0.1 * np.log2(group.size))
            add("merge", members, method.name, group.size, group.chain, 0.8 * quality, gain)
    return Points(pd.DataFrame(rows), np.stack(correct), {})


def test_findings_of_scores_that_were_made_up(tiny: ScaleSpec) -> None:
    spec = tiny.model_copy(
        update={
            "families": tiny.families[:1],
            "methods": tuple(m.model_copy(update={"settings": {}}) for m in tiny.methods),
        }
    )
    quality = {"none": 0.25, "weak": 0.5, "strong": 0.75}
    points = {cell: _points(spec, cell, quality[cell.base] + 0.05 * cell.place) for cell in cells(spec)}
    about = pd.DataFrame(
        [{"architecture": c.architecture, "base": c.base, "parameters": 10 ** (5 + c.place)} for c in points]
    )
    none = pd.DataFrame()
    table = table_of(Measured(points, about, none, none, none, 1, 1, ()), resamples=60)
    found = findings_table(table, spec)
    own = found[found["papers_own"] == "yes"].set_index("finding")
    assert own.loc["1 stronger base", "effect"] == pytest.approx(0.5, abs=0.01)
    assert own.loc["2 larger model", "effect"] == pytest.approx(0.05, abs=0.005)
    assert own.loc["3 more experts", "effect"] == pytest.approx(0.1, abs=0.01)
    assert own.loc["5 methods converge", "effect"] == pytest.approx(0.0, abs=1e-12)
    assert list(own.loc[["1 stronger base", "2 larger model"], "verdict"]) == ["agrees", "agrees"]
    assert own.loc["5 methods converge", "verdict"] == "undecided"
    assert own.loc["1 stronger base", "in_accuracy"] == pytest.approx(0.8 * 0.5, abs=0.01)
    assert own.loc["1 stronger base", "experts_accuracy"] == pytest.approx(0.8, abs=0.01)
    first = next(iter(questions(table, spec)))
    assert answer(first, spec, Chance(0.1))["verdict"] == "agrees"
    assert answer(first, spec, Chance(0.5))["verdict"] == "not testable"
    checks = open_checks(found, none, spec)
    assert set(checks["check"]) == {"optimised multitask"}
    assert set(checks["verdict"]) == {"not measured"}
    merges = table.where(kind="merge", measure="held_out/ncm_cosine", base="strong")
    assert len(number_effects(merges, spec)) == len(spec.families[0].architectures) * spec.chains * len(spec.methods)


def test_points_survive_the_disk(tmp_path: Path, tiny: ScaleSpec) -> None:
    points = _points(tiny, cells(tiny)[0], 0.5)
    points.correct[0, 150:] = np.nan
    kept = Points(points.rows, points.correct, {tiny.held_in[0]: np.arange(5)})
    save_points(tmp_path / "points.npz", kept)
    again = read_points(tmp_path / "points.npz")
    pd.testing.assert_frame_equal(again.rows, kept.rows, check_dtype=False)
    np.testing.assert_array_equal(again.correct, kept.correct)
    np.testing.assert_array_equal(again.sources[tiny.held_in[0]], np.arange(5))
    (tmp_path / "points.npz").write_bytes(b"other")
    with pytest.raises(MergeboundError, match="remove it"):
        read_points(tmp_path / "points.npz")


# --- laws and baselines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "curve"),
    [
        ("empirical", lambda k: 0.3 + 0.8 / (k + 1.5)),
        ("quadratic", lambda k: 0.3 + 0.8 / k),
        ("dispersion", lambda k: (np.sqrt(0.2) + np.sqrt(0.6 * (1 - 1 / k))) ** 2),
    ],
)
def test_a_law_predicts_its_own_held_out_k(tiny: ScaleSpec, name: str, curve: object) -> None:
    k = np.array([1.0, 2.0, 4.0, 6.0, 8.0])
    loss = curve(k)  # type: ignore[operator]
    rows = [
        {
            "family": "f",
            "architecture": "a",
            "base": "b",
            "parameters": 1,
            "target": "own",
            "k": int(a),
            "loss": b,
            "groups": 1,
        }
        for a, b in zip(k, loss, strict=True)
    ]
    found = judged(pd.DataFrame(rows), tiny)
    errors = found[found["law"] == name].set_index("held_out")["log_error"]
    assert set(errors.index) == set(tiny.laws.held_out)
    assert errors.max() < 2e-3
    assert errors.max() < found[found["law"] == "constant"]["log_error"].min()
    assert set(found["law"]) == set(LAWS)


def test_a_law_that_can_only_fall_is_not_called_beaten_on_a_loss_that_rises(tiny: ScaleSpec) -> None:
    k = np.array([1, 2, 4, 6, 8])
    about = {"family": "f", "architecture": "a", "base": "b", "parameters": 1, "groups": 1}
    rows = [
        {**about, "target": target, "k": int(a), "loss": float(b)}
        for target, curve in (("own", 1 + 0.3 * (1 - 1 / k)), ("joint", 1 + 0.3 / k))
        for a, b in zip(k, curve, strict=True)
    ]
    losses = pd.DataFrame(rows)
    laws = compared(judged(losses, tiny), losses, tiny).set_index(["target", "law", "held_out"])
    assert set(laws.loc["own"]["rising"]) == {1}
    assert set(laws.loc["joint"]["rising"]) == {0}
    assert set(laws["rising_merges"]) == {0, 1}
    words = law_words(laws.reset_index())
    assert "the fall is over" not in words
    assert "Target own" in words.split("one-sided")[0]
    assert "smallest error is that of the dispersion law" not in words


def _losses(curve: dict[int, float], target: str = "joint") -> pd.DataFrame:
    about = {"family": "f", "architecture": "a", "base": "b", "parameters": 1, "groups": 1, "target": target}
    return pd.DataFrame([{**about, "k": k, "loss": loss} for k, loss in curve.items()])


def test_fits_of_planted_curves_find_their_parameters_and_flat_ones_are_not_identified(tiny: ScaleSpec) -> None:
    k = (1, 2, 4, 6, 8)
    wave = dict(zip(k, (1.0, -1.0, 0.5, 1.0, -0.7), strict=True))
    found = fits(_losses({i: 1.3 + 0.9 / (i + 0.6) + 1e-4 * wave[i] for i in k}), tiny).iloc[0]
    assert found["not_identified"] == ""
    for name, truth, close in (("floor", 1.3, 0.002), ("tail", 0.9, 0.02), ("shift", 0.6, 0.03)):
        assert found[name] == pytest.approx(truth, abs=close)
        assert found[f"{name}_low"] - close <= truth <= found[f"{name}_high"] + close
    for level, slope, noise in ((2.0, 0.0, 0.0), (2.0, 0.0, 0.05), (2.0, 0.05, 0.01), (2.0, -0.1, 0.02)):
        lost = fits(_losses({i: level + slope * i + noise * wave[i] for i in k}), tiny)
        assert "floor" in lost["not_identified"].iloc[0]  # flat, noisy, rising, and falling without an end in sight
        assert lost["floor_low"].iloc[0] >= 0.0
        shown = identified(lost).iloc[0]
        assert shown[["floor", "floor_low", "floor_high"]].isna().all()
    falling = np.array([1.0, 0.55, 0.2, 0.15, 0.1])
    line = quadratic(np.array(k, dtype=float), falling - 0.09, 0)(np.array([1e9]))
    assert line[0] == pytest.approx(0.0, abs=1e-6)  # unconstrained, its floor would be below a cross-entropy's 0


def test_merges_that_rise_after_the_fall_from_single_experts_are_counted(tiny: ScaleSpec) -> None:
    losses = pd.concat([_losses({1: 2.0, 2: 1.4, 4: 1.5, 6: 1.6, 8: 1.7}), _losses({1: 1.0, 2: 1.2, 8: 1.3}, "own")])
    laws = compared(judged(losses, tiny), losses, tiny)
    joint = laws[laws["target"] == "joint"]
    assert (set(joint["rising"]), set(joint["rising_merges"])) == ({0}, {1})
    words = law_words(joint, fits(losses, tiny))
    assert "above that at the smallest k >= 2 in 1." in words
    assert "In 1 of 1 cells the fall is over once experts are merged" in words
    assert "Of 1 fits of the empirical law to all k, the points identify l_inf in 0, a in 0, c in 0" in words


def _account(changes: dict[tuple[str, str], float], spec: ScaleSpec) -> pd.DataFrame:
    """Changes of terms of the first family, each with an interval of +-0.1 around it."""
    family = spec.families[0].name
    scopes = {
        "base": f"{family}: strong against none",
        "size": f"{family}: strong base",
        "number": f"{family}: strong base",
    }
    rows = [
        {"factor": factor, "scope": scopes[factor], "term": term, "change": value, "change_low": value - 0.1,
         "change_high": value + 0.1, "moves": "undecided" if abs(value) < 0.1 else "grows" if value > 0 else "falls"}
        for (factor, term), value in changes.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("drift", "curved", "said"),
    [(-0.3, -0.2, "supported"), (-0.3, 0.05, "supported"), (0.3, -0.2, "mixed"), (0.3, 0.05, "contradicted"),
     (0.3, 0.5, "contradicted"), (0.05, -0.05, "undecided")],
)  # fmt: skip
def test_the_theorys_account_is_judged_by_the_terms_that_it_names(
    tiny: ScaleSpec, drift: float, curved: float, said: str
) -> None:
    account = _account({("base", "drift"): drift, ("base", "curved"): curved, ("base", "noise"): 0.4}, tiny)
    found = says_table(account, pd.DataFrame(), tiny)
    row = found[(found["finding"] == "1 stronger base") & found["scope"].str.startswith(tiny.families[0].name)].iloc[0]
    assert row["verdict"] == said  # noise moves in all of them, and the theory does not name it
    moved = {"as_it_says": {n for n, v in (("drift", drift), ("curved", curved)) if v <= -0.1},
             "against_it": {n for n, v in (("drift", drift), ("curved", curved)) if v >= 0.1}}  # fmt: skip
    assert {name: set(row[name].split()) for name in moved} == moved
    assert (row["terms"], row["moving"]) == (3, 1 + (abs(drift) >= 0.1) + (abs(curved) >= 0.1))
    assert row["by_chance"] == pytest.approx(0.15)
    assert ("against it: drift +0.3 [+0.2, +0.4]" in row["measured"]) == (drift > 0.1)


def test_where_the_theory_is_silent_it_says_so_and_terms_are_counted_beside_chance(tiny: ScaleSpec) -> None:
    changes = {("number", "dispersion"): 0.13, ("number", "average_risk"): 0.02, ("size", "drift"): 0.2,
               ("size", "curvature"): 0.0, ("size", "gap"): -0.4}  # fmt: skip
    account = _account(changes, tiny)
    family = tiny.families[0].name
    findings = pd.DataFrame(
        [{"finding": "2 larger model", "scope": f"{family}: strong base", "papers_own": "yes", "verdict": "agrees"}]
    )
    found = says_table(account, findings, tiny).set_index(["finding", "scope"])
    assert set(CLAIMS) == set(SAYS) == set(found.index.get_level_values(0))
    assert found.loc[("4 beats multitask", "all"), "verdict"] == "silent"
    assert found.loc[("3 more experts", "all"), "verdict"] == "silent"
    held_in = found.loc[("3 more experts", f"{family}: strong base, held-in tasks")]
    assert held_in["verdict"] == "supported"
    n = np.array(tiny.experts, dtype=float)
    slope = np.polyfit(np.log2(n), np.log10(1 - 1 / n), 1)[0]
    assert f"1 - 1/N itself: {slope:+.3g}" in held_in["measured"]
    larger = found.loc[("2 larger model", f"{family}: strong base")]
    assert (larger["verdict"], larger["finding_here"], larger["not_moved"]) == ("mixed", "agrees", "curvature")
    assert found.loc[("5 methods converge", f"{family}: strong base"), "verdict"] == "not measured"
    assert set(found[found["verdict"] == "not measured"].index.get_level_values(1).str.split(":").str[0]) <= {
        one.name for one in tiny.families
    }
    assert moving_words(account, tiny).startswith(f"3 of 5 changes leave zero out; {5 * CHANCE:.1f} would by chance")
    lines = theory_lines(found.reset_index())
    assert len(lines) == len(SAYS)
    assert all(line.startswith(f"{name}: {SAYS[name]}") for name, line in zip(SAYS, lines, strict=True))
    assert "mixed** (as it says: gap -0.4" in lines[1]
    empty = says_table(pd.DataFrame(), pd.DataFrame(), tiny)
    assert set(empty["verdict"]) == {"silent", "not measured"}


def test_the_end_of_a_rate_is_read_from_its_losses_and_the_choice_knows_its_edges(tiny: ScaleSpec) -> None:
    assert why_stopped([3.0, 2.0, 1.0], 2) == "budget"
    assert why_stopped([3.0, 2.0, 2.5, 2.1], 2) == "patience"
    assert why_stopped([3.0, float("nan")], 2) == "diverged"
    assert tiny.multitask is not None
    about = {"family": "resnet", "architecture": "a", "base": "strong", "model": "optimised", "tier": "measured"}
    spec = tiny.model_copy(update={"multitask": tiny.multitask.model_copy(update={"budget": 1.5, "patience": 2})})
    rows = [
        {**about, "chosen_rate": 0.06, "chosen_step": 160, "steps_spent": 800, "rate": rate, "step": step,
         "validation_loss": loss}
        for rate, curve in ((0.06, (1.0, 0.5, 0.6, 0.7)), (0.02, (2.0, 1.5, 1.0, 0.9)))
        for step, loss in zip((80, 160, 240, 320), curve, strict=True)
    ]  # fmt: skip
    training = with_stops(pd.DataFrame(rows), spec)
    assert list(training.groupby("rate")["stopped"].first()) == ["budget", "patience"]
    chosen = choices(training, spec).iloc[0]
    assert chosen["decided_by"] == "early stopping"
    assert (chosen["rate_at"], chosen["chosen_step"], chosen["budget_steps"]) == ("top", 160, 480)


def test_right_and_wrong_survive_packing() -> None:
    right = np.random.default_rng(0).random(21) < 0.5
    np.testing.assert_array_equal(unpacked(packed(right), 21), right)


def _small_start() -> tuple[Start, list[Split]]:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("body", nn.Linear(5, 4))
    model.add_module("head", nn.Linear(4, 3))
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    head = {name: state[name] for name in ("head.weight", "head.bias")}
    x, y = torch.randn(12, 5), torch.arange(12) % 3
    return Start(model, state, (head,)), [Split(x, y, np.arange(12))]


def _run(**changes: object) -> RunSpec:
    given = {"learning_rate": 0.2, "steps": 5, "batch_size": 12, "momentum": 0.6, "weight_decay": 0.01, **changes}
    return RunSpec(task="t", base=BaseSpec(kind="random", architecture="mlp_64", classes=3), **given)  # type: ignore[arg-type]


def test_multitask_training_follows_the_experts_schedule_and_optimizer_or_refuses() -> None:
    start, data = _small_start()
    x, y = data[0].images, data[0].labels
    for optimizer in ("sgd", "adamw"):
        run = _run(schedule="linear", optimizer=optimizer)
        found = train_fixed(start, data, run, seed=0)
        model = nn.Sequential()
        model.add_module("body", nn.Linear(5, 4))
        model.add_module("head", nn.Linear(4, 3))
        model.load_state_dict(dict(start.state))
        rule = (
            torch.optim.SGD(model.parameters(), 0.2, momentum=0.6, weight_decay=0.01)
            if optimizer == "sgd"
            else torch.optim.AdamW(model.parameters(), 0.2, (0.6, 0.999), weight_decay=0.01)
        )
        for step in range(5):
            rule.param_groups[0]["lr"] = 0.2 * (1 - step / 5)
            rule.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            rule.step()
        wanted = model.state_dict()
        for name, tensor in {**found.shared, **found.heads[0]}.items():
            torch.testing.assert_close(tensor, wanted[name], atol=2e-5, rtol=1e-4)
    with pytest.raises(MergeboundError, match="label_smoothing"):
        train_fixed(start, data, _run(label_smoothing=0.1), seed=0)
    with pytest.raises(MergeboundError, match="sam"):
        train_fixed(start, data, _run(optimizer="sam"), seed=0)


def test_early_stopping_ends_a_rate_that_gets_no_better() -> None:
    start, data = _small_start()
    spec = MultitaskSpec(bases=("strong",), rates=(1e-30,), budget=8.0, every=1, patience=3)
    found = train_optimised(start, data, data, _run(weight_decay=0.0), spec, seed=0)
    assert [step for _, step, _ in found.trace] == [1, 2, 3, 4]  # a loss that never moves: the first, then patience
    assert (found.steps, found.trained) == (1, 4)


def test_multitask_training_on_one_task_is_gradient_descent_written_out() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(12, 5), torch.arange(12) % 3
    model = nn.Sequential()
    model.add_module("body", nn.Linear(5, 4))
    model.add_module("head", nn.Linear(4, 3))
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    head = {name: state[name] for name in ("head.weight", "head.bias")}
    run = RunSpec(
        task="t", base=BaseSpec(kind="random", architecture="mlp_64", classes=3), learning_rate=0.2, steps=5,
        batch_size=12, momentum=0.6, weight_decay=0.01,
    )  # fmt: skip
    found = train_fixed(Start(model, state, (head,)), [Split(x, y, np.arange(12))], run, seed=0)
    w = {name: t.double().numpy().copy() for name, t in state.items()}
    v = {name: np.zeros_like(t) for name, t in w.items()}
    inputs, hot = x.double().numpy(), np.eye(3)[y.numpy()]
    for _ in range(5):
        hidden = inputs @ w["body.weight"].T + w["body.bias"]
        logits = hidden @ w["head.weight"].T + w["head.bias"]
        p = np.exp(logits - logits.max(1, keepdims=True))
        error = (p / p.sum(1, keepdims=True) - hot) / 12
        back = error @ w["head.weight"]
        g = {"head.weight": error.T @ hidden, "head.bias": error.sum(0), "body.weight": back.T @ inputs,
             "body.bias": back.sum(0)}  # fmt: skip
        for name in w:
            v[name] = 0.6 * v[name] + g[name] + 0.01 * w[name]
            w[name] = w[name] - 0.2 * v[name]
    for name, tensor in {**found.shared, **found.heads[0]}.items():
        np.testing.assert_allclose(tensor.numpy(), w[name], atol=2e-6)
    assert found.steps == found.trained == 5
