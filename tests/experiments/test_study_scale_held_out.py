"""Held-out tasks as units: the interval against scipy, its coverage, near chance, and who is the strongest base."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.studies.scale.comparisons import multitask_effects, spread
from experiments.studies.scale.effects import Effects, Table
from experiments.studies.scale.findings import Chance, answer, findings_table, questions
from experiments.studies.scale.over_tasks import against_base, judged_over_tasks, summary, tasks_interval
from experiments.studies.scale.saying_held_out import base_words, changed, interval_words, on_these, rule_words
from experiments.studies.scale.spec import ScaleSpec, read_scale
from experiments.studies.scale.verdicts import ADDED, classes_named, mean_chance, verdict

OF_TASKS = np.array([-0.176, -0.152, 0.000, -0.004])
"""Merge minus multitask on four tasks: clearly below zero on these, and no more than undecided for tasks in general."""


def _effects(tasks: np.ndarray, noise: float = 0.02, seed: int = 0) -> Effects:
    draws = tasks.mean() + noise * np.random.default_rng(seed).standard_normal(4000)
    return Effects(np.array([tasks.mean()]), draws[None], ("all",), tasks[None])


def test_the_interval_over_held_out_tasks_is_students() -> None:
    found = judged_over_tasks(_effects(OF_TASKS))
    wanted = stats.ttest_1samp(OF_TASKS, 0.0).confidence_interval(0.95)
    assert (found.tasks.low, found.tasks.high) == pytest.approx((wanted.low, wanted.high))
    assert (found.general.low, found.general.high) == pytest.approx((wanted.low, wanted.high))
    assert found.fixed.high - found.fixed.low == pytest.approx(2 * 1.96 * 0.02, rel=0.1)
    assert verdict(found.fixed, 1) == "disagrees"
    assert verdict(found.general, 1) == "undecided"
    assert found.over == "test images, 4 held-out tasks"
    two = tasks_interval(0.5, np.array([0.4, 0.6]))
    assert two.high - 0.5 == pytest.approx(12.7062 * 0.1, rel=1e-4)


def test_where_the_tasks_agree_the_hull_is_the_interval_over_images() -> None:
    found = judged_over_tasks(_effects(np.array([0.1, 0.1001, 0.0999])))
    assert found.general == found.fixed
    assert verdict(found.general, 1) == "agrees"


def test_one_held_out_task_says_nothing_of_others_and_held_in_measures_have_none() -> None:
    one = judged_over_tasks(_effects(np.array([0.3])))
    assert verdict(one.fixed, 1) == "agrees"
    assert verdict(one.general, 1) == "undecided"
    assert np.isnan(one.general.low)
    plain = judged_over_tasks(Effects(np.array([0.3]), np.array([[0.2, 0.3, 0.4]]), ("all",)))
    assert plain.general == plain.fixed
    assert plain.held_out_tasks == 0


@pytest.mark.parametrize("tasks", [3, 4, 5])
def test_the_hull_covers_the_mean_of_all_held_out_tasks_and_these_tasks_alone_do_not(tasks: int) -> None:
    rng = np.random.default_rng([tasks, 0xC0])
    truth, members = 0.05, tuple(f"t{k}" for k in range(8))
    hull = fixed = 0
    worlds = 150
    for _ in range(worlds):
        of_task, of_expert = 0.1 * rng.standard_normal(tasks), 0.05 * rng.standard_normal(8)
        noise = 0.03 * rng.standard_normal((8, tasks))
        by_task = truth + of_task + of_expert[:, None] + noise
        value = by_task.mean(axis=1)
        draws = value[:, None] + 0.03 / np.sqrt(tasks) * rng.standard_normal((8, 120))
        found = judged_over_tasks(Effects(value, draws, members, by_task))
        hull += found.general.low <= truth <= found.general.high
        fixed += found.fixed.low <= truth <= found.fixed.high
    assert hull / worlds >= 0.9
    assert fixed / worlds < 0.75


def test_a_gap_over_methods_has_the_jackknifes_pseudo_values() -> None:
    by_task = np.array([[0.9, 0.2, 0.5], [0.1, 0.6, 0.4]])
    means = zip("xy", by_task.mean(axis=1), strict=True)
    about = [{"chain": 0, "method": name, "members": "a", "value": value} for name, value in means]
    found = spread(Table(pd.DataFrame(about), np.zeros((2, 3)), by_task), ("chain",))
    gap = abs(by_task[0].mean() - by_task[1].mean())
    without = [abs(np.delete(by_task[0], j).mean() - np.delete(by_task[1], j).mean()) for j in range(3)]
    assert found.rows["value"].iloc[0] == pytest.approx(gap)
    assert found.by_task is not None
    np.testing.assert_allclose(found.by_task[0], [3 * gap - 2 * one for one in without])
    ordered = Table(pd.DataFrame(about), np.zeros((2, 3)), np.array([[0.9, 0.8, 0.7], [0.1, 0.6, 0.4]]))
    linear = spread(ordered, ("chain",)).by_task
    assert linear is not None
    np.testing.assert_allclose(linear[0], [0.8, 0.2, 0.3])


# --- a study of made-up numbers ---------------------------------------------------------------------------------------


def _made_up(spec: ScaleSpec, trained: tuple[str, ...]) -> Table:
    """Merges with 0.6 held in, on held-out tasks 0.5 + 0.01 j; the base has 0.6 there, the multitask model 0.7."""
    rows: list[dict[str, object]] = []
    by_task: list[np.ndarray] = []
    tasks = np.arange(len(spec.held_out))

    def add(about: dict[str, object], kind: str, members: str, held_in: float, outside: float, **more: object) -> None:
        point = {"method": "", "experts": 0, "chain": -1, "seed": spec.seeds[0], **about, "kind": kind, **more}
        single = outside + 0.01 * tasks
        for measure, value, own in (
            ("held_in", held_in / 0.8, None), ("held_in_accuracy", held_in, None),
            *((f"held_out/{t}", float((single / (0.6 + 0.01 * tasks)).mean()), single / (0.6 + 0.01 * tasks))
              for t in spec.transfers),
            *((f"held_out_accuracy/{t}", float(single.mean()), single) for t in spec.transfers),
        ):  # fmt: skip
            rows.append({**point, "members": members, "measure": measure, "value": value})
            by_task.append(np.full(len(tasks), np.nan) if own is None else own)

    every = ";".join(spec.held_in)
    for family in spec.families:
        for place, architecture in enumerate(family.architectures):
            for rank, base in enumerate(spec.bases_of(family)):
                about = {"family": family.name, "architecture": architecture, "base": base,
                         "parameters": 10 ** (5 + place), "place": place}  # fmt: skip
                add(about, "base", "", 0.1, 0.6)
                for task in spec.held_in:
                    add(about, "expert", task, 0.8, 0.6, experts=1)
                for chain, n in [(c, n) for c in (0, 3) for n in spec.experts[:-1]] + [(0, spec.experts[-1])]:
                    members = every if n == len(spec.held_in) else ";".join(spec.held_in[chain : chain + n])
                    for method in ("average", "ties"):
                        gain = 0.5 + 0.002 * n + (0.001 if method == "ties" else 0.0)
                        add(about, "merge", members, 0.4 + 0.1 * rank + 0.02 * place, gain, experts=n, chain=chain,
                            method=method)  # fmt: skip
                if base in trained:
                    for kind in ("multitask_fixed", "multitask_optimised"):
                        add(about, kind, "", 0.7, 0.7)
    frame = pd.DataFrame(rows)
    return Table(frame, np.tile(frame["value"].to_numpy(dtype=float)[:, None], (1, 40)), np.stack(by_task))


@pytest.fixture(scope="module")
def paper() -> ScaleSpec:
    return read_scale("paper").model_copy(update={"transfers": ("ncm_cosine",)})


def test_every_family_is_asked_of_its_own_strongest_base(paper: ScaleSpec) -> None:
    assert paper.multitask is not None
    table = _made_up(paper, paper.multitask.bases)
    asked = [q for q in questions(table, paper) if q.role in ("yes", "other family", "optimised multitask")]
    names = {(q.finding[0], q.role): q.scope for q in asked}
    assert len(asked) == len(names) + 1  # the optimised multitask model of both families
    for number in "2345":
        assert names[number, "yes"].startswith("vit: strong base")
        assert names[number, "other family"].startswith("resnet: weak base")
    assert names["1", "yes"] == "vit: strong against none"
    assert names["1", "other family"] == "resnet: weak against none"
    found = findings_table(table, paper, Chance(0.1, 0.1))
    rows = found[found["papers_own"] == "other family"].set_index("finding")
    assert rows.loc["1 stronger base", "effect"] == pytest.approx(0.1 / 0.8)
    assert rows.loc["4 beats multitask", "effect"] == pytest.approx(0.5 + 0.016 + 0.0005 - 0.7)
    assert rows.loc["4 beats multitask", "verdict"] == "disagrees"
    assert rows.loc["3 more experts", "verdict"] == "agrees"
    assert rows.loc["3 more experts", "held_out_tasks"] == len(paper.held_out)


def test_a_family_without_a_multitask_model_of_its_strongest_base_says_so(paper: ScaleSpec) -> None:
    assert paper.multitask is not None
    spec = paper.model_copy(update={"multitask": paper.multitask.model_copy(update={"bases": ("strong",)})})
    found = findings_table(_made_up(spec, ("strong",)), spec)
    said = found[found["finding"] == "4 beats multitask"].set_index("papers_own")["verdict"]
    assert said["yes"] == "disagrees"
    assert said["other family"] == "not measured"


def test_held_out_scores_near_chance_test_nothing(paper: ScaleSpec) -> None:
    table = _made_up(paper, ("strong",))
    rng = np.random.default_rng(0)
    noisy = Table(table.rows, table.draws + 0.01 * rng.standard_normal((1, 40)), table.by_task)
    three = next(q for q in questions(noisy, paper) if q.finding[0] == "3")
    said = [answer(three, paper, Chance(0.1, chance)) for chance in (np.nan, 0.2, 0.3)]
    assert [row["verdict"] for row in said] == ["agrees", "agrees", "not testable"]
    assert [row["verdict_on_these_tasks"] for row in said] == ["agrees", "agrees", "not testable"]
    merges = noisy.rows[(noisy.rows["kind"] == "merge") & (noisy.rows["measure"] == "held_out_accuracy/ncm_cosine")]
    own = merges[(merges["base"] == "strong") & (merges["family"] == "vit")]
    assert said[0]["held_out_accuracy"] == pytest.approx(own["value"].mean())
    two = next(q for q in questions(noisy, paper) if q.finding[0] == "2")
    assert answer(two, paper, Chance(0.1, 0.9))["verdict"] != "not testable"
    names = ("digits8:blocks", "npz8:ucmerced", "npz8:chars74k", "flowers102", "./folder")
    assert [classes_named(name) for name in names] == [10, 21, 36, 102, 0]
    small = read_scale("small").held_out
    assert mean_chance({t: classes_named(t) for t in small}, small) == pytest.approx((1 / 21 + 1 / 36) / 2)


def test_merging_is_held_against_the_untouched_base(paper: ScaleSpec) -> None:
    table = _made_up(paper, ("strong",))
    cell = ["family", "architecture", "parameters", "base"]
    means = summary(table.where(kind="merge"), cell, ["held_in", "held_out/ncm_cosine", "held_out_accuracy/ncm_cosine"])
    found = against_base(means)
    assert set(found["measure"]) == {"held_out/ncm_cosine"}
    row = found[(found["architecture"] == "vit_large_patch16_224") & (found["base"] == "strong")].iloc[0]
    merges = table.rows[(table.rows["kind"] == "merge") & (table.rows["measure"] == "held_out/ncm_cosine")]
    own = merges[(merges["architecture"] == "vit_large_patch16_224") & (merges["base"] == "strong")]["value"]
    assert row["value"] == pytest.approx(own.mean())
    assert row["merging"] == "below the base"
    words = base_words(found, paper)
    assert "vit_large_patch16_224 (strong base)" in words
    assert "resnet152 (weak base)" in words
    assert words.count("merging loses to the untouched base") == 4


def test_no_interval_of_an_accuracy_or_a_ratio_leaves_what_it_can_be() -> None:
    about = {"base": "strong", "members": "", "kind": "merge"}
    rows = [{**about, "measure": m, "value": v} for m, v in (("held_out/x", 1.0), ("held_out_accuracy/x", 0.5))]
    by_task = np.array([[0.1, 1.9], [0.1, 0.9]])
    table = Table(pd.DataFrame(rows), np.array([[1.0], [0.5]]), by_task)
    found = summary(table, ["base"], ["held_out/x", "held_out_accuracy/x"])
    assert list(found["value_low"]) == [0.0, 0.0]
    assert found["value_high"].iloc[0] == pytest.approx(1.0 + 12.7062 * 0.9, rel=1e-4)
    assert found["value_high"].iloc[1] == 1.0


def test_sentences_name_both_intervals_and_say_what_was_added(paper: ScaleSpec) -> None:
    row = {"held_out_tasks": 4, "on_these_tasks": -0.083, "on_these_tasks_low": -0.136, "on_these_tasks_high": -0.033,
           "verdict": "undecided", "verdict_on_these_tasks": "disagrees"}  # fmt: skip
    assert on_these(row) == "on these 4 held-out tasks as they are [-0.136, -0.033], disagrees"
    assert changed(row) == " (disagrees on these held-out tasks)"
    assert on_these({**row, "held_out_tasks": 0}) == ""
    assert "3 degrees of freedom" in interval_words(paper)
    assert "not over training seeds (3)" in interval_words(paper)
    frame = pd.DataFrame({"chance": [0.1, 0.1], "held_out_chance": [np.nan, 0.04]})
    said = rule_words(paper, frame)
    assert "(0.1)" in said
    assert "(0.04)" in said
    assert said.endswith(ADDED)


def test_effects_against_multitask_keep_their_tasks() -> None:
    about = {"family": "f", "architecture": "a", "base": "b"}
    merge = pd.DataFrame([{**about, "kind": "merge", "method": "average", "members": "x;y", "value": 0.5}])
    model = pd.DataFrame([{**about, "kind": "multitask_fixed", "method": "", "members": "", "value": 0.7}])
    merged = Table(merge, np.full((1, 5), 0.5), np.array([[0.4, 0.6]]))
    found = multitask_effects(merged, Table(model, np.full((1, 5), 0.7), np.array([[0.9, 0.5]])))
    assert found.by_task is not None
    np.testing.assert_allclose(found.by_task, [[-0.5, 0.1]])
    assert judged_over_tasks(found).tasks.value == pytest.approx(-0.2)
