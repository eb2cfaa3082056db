"""Advice: the recommended merge against brute force, the hull, the response against a known law, paired differences."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.advise.account import account
from experiments.advise.candidates import candidates, judge_of, subsets_table
from experiments.advise.collecting import MergeBudget, collect_within, halves, kinds_cost
from experiments.advise.compare import splits, units
from experiments.advise.compare_page import COLLAPSED, coverage, training_differences
from experiments.advise.compare_spec import comparison_sizes, read_comparison
from experiments.advise.domain import domain_of
from experiments.advise.making import merge_arguments
from experiments.advise.merge_page import merge_page, plain, summary, write_merge_advice
from experiments.advise.merging import advise_merge
from experiments.advise.numbers import around, simultaneous
from experiments.advise.pilot import Pilot, coordinates
from experiments.advise.pilot_spec import PilotSpec, pilot_of, recipes
from experiments.advise.recipes import considered
from experiments.advise.response import features, fit_response, sensitivity
from experiments.advise.training import advise_training
from experiments.advise.training_page import summary as training_summary
from experiments.bases.spec import BaseSpec
from experiments.grid.run_spec import RunSpec
from experiments.measure.predictors import collect_fields, point_at
from experiments.measure.subject import Subject
from experiments.tasks.types import Split
from tests.experiments.predictor_cases import subject as case
from theory.errors import MergeboundError

IMAGES = 24


def wide(norm: bool = False, experts: int = 3) -> Subject:
    """The case with more images, labelled mostly by each expert itself, so that experts are good at their tasks."""
    small = case(norm=norm, experts=experts)
    torch.manual_seed(1)
    found = []
    for j, network in enumerate(small.networks):
        images = torch.randn(IMAGES, 1, 2, 3, dtype=torch.float64)
        labels = network.features(small.vectors[j], images).argmax(dim=1)
        labels[:3] = (labels[:3] + 1) % 3
        found.append(Split(images, labels, np.arange(IMAGES) + 1000 * j))
    return replace(small, calibration=tuple(found))


def risk(subject: Subject, alpha: np.ndarray, rows: slice) -> float:
    """Joint cross-entropy of the merge itself, by torch."""
    point, total = point_at(subject, alpha), 0.0
    for network, split in zip(subject.networks, subject.calibration, strict=True):
        logits = network.features(point, split.images[rows])
        total += float(torch.nn.functional.cross_entropy(logits, split.labels[rows]))
    return total / subject.size


def test_what_is_measured_is_the_loss_of_the_very_merge_on_images_that_chose_nothing() -> None:
    subject = wide()
    advice = advise_merge(subject, verify=5)
    judged = slice(IMAGES // 2, None)
    table = advice.candidates.dropna(subset=["measured"])
    table = table[table["coefficients"] != ""]
    assert len(table) >= 3
    assert "average" in set(table["label"])
    for row in table.to_dict("records"):
        alpha = np.array([float(v) for v in str(row["coefficients"]).split(";")])
        assert row["measured"] == pytest.approx(risk(subject, alpha, judged), abs=2e-3)
    assert advice.measured is not None
    assert advice.measured.value == pytest.approx(float(advice.candidates["measured"].min()))
    assert advice.measured.value == pytest.approx(risk(subject, np.array(advice.alpha), judged), abs=1e-6)
    checked = len(advice.candidates.dropna(subset=["measured"]))
    assert "holds for all" in advice.measured.note
    assert str(checked) in advice.measured.note
    assert advice.own.value == pytest.approx(
        np.mean([risk_of_own(subject, j, judged) for j in range(subject.size)]), abs=1e-9
    )


def risk_of_own(subject: Subject, j: int, rows: slice) -> float:
    split = subject.calibration[j]
    logits = subject.networks[j].features(subject.vectors[j], split.images[rows])
    return float(torch.nn.functional.cross_entropy(logits, split.labels[rows]))


def test_without_evaluation_the_judge_decides() -> None:
    """The case without activation has logits quadratic in the layers; pairs of experts price mixtures well."""
    subject = wide()
    advice = advise_merge(subject, verify=0, nonlinear=False)
    assert advice.measured is None
    assert advice.judge == "pairs"
    chosen = advice.candidates["chosen_on"].to_numpy(dtype=float)
    row = advice.candidates[advice.candidates["label"] == advice.label].iloc[0]
    assert row["chosen_on"] == pytest.approx(chosen.min())
    mixture = advice.candidates[advice.candidates["label"] == "average"].iloc[0]
    third = np.full(3, 1 / 3)
    assert mixture["predicted"] == pytest.approx(risk(subject, third, slice(IMAGES // 2, None)), rel=0.2)


def test_more_evaluations_never_recommend_a_merge_that_was_measured_worse() -> None:
    subject = wide()
    few, many = advise_merge(subject, verify=1), advise_merge(subject, verify=8)
    assert few.label == "average"
    assert few.measured is not None
    assert many.measured is not None
    assert many.measured.value <= few.measured.value


def test_networks_with_batchnorm_stay_in_the_hull() -> None:
    subject = wide(norm=True)
    domain = domain_of(subject)
    assert domain.hull
    assert not domain_of(wide()).hull
    assert domain.allows([0.2, 0.3, 0.5])
    assert not domain.allows([0.5, 0.5, 0.5])
    assert not domain.allows([-0.1, 0.5, 0.5])
    statistics = collect_fields(subject, kinds=("secant", "pairs"))
    for one in candidates(statistics, domain):
        assert one.alpha is not None
        assert domain.allows(one.alpha), one.label
    advice = advise_merge(subject)
    assert domain.allows(advice.alpha)
    for piece in (p for n, p in subject.networks[0].space.segments() if n.endswith("running_var")):
        merged = subject.base + torch.tensor(advice.alpha, dtype=torch.float64) @ subject.deltas
        assert (merged[piece] >= 0).all()  # nothing had to be clamped


def test_the_best_subset_is_the_best_of_all_subsets() -> None:
    subject = wide(experts=4)
    statistics = collect_fields(subject, kinds=("secant",))
    table = subsets_table(statistics, domain_of(subject))
    table = table[table["rule"] == "averaging"].set_index("experts")
    from theory.function_space import cross_entropy

    for k in (1, 2, 3, 4):
        found = []
        for mask in product([0, 1], repeat=4):
            if sum(mask) != k:
                continue
            alpha = np.array(mask) / k
            logits = [
                statistics.base_logits(j)
                + np.tensordot(alpha, statistics.expert_logits(j) - statistics.base_logits(j), 1)
                for j in range(4)
            ]
            losses = [cross_entropy(h, y).mean() for h, y in zip(logits, statistics.labels, strict=True)]
            found.append(float(np.mean(losses)))
        assert table.loc[k, "predicted"] == pytest.approx(min(found), abs=1e-12)


def test_a_budget_buys_what_it_says() -> None:
    subject = wide()
    secant, pairs = kinds_cost(("secant",), subject), kinds_cost(("pairs",), subject)
    assert secant == 3 * IMAGES * 4
    assert pairs == 3 * IMAGES * 3
    with pytest.raises(MergeboundError, match="do not pay for the secant"):
        collect_within(subject, MergeBudget(samples=secant - 1))
    only = collect_within(subject, MergeBudget(samples=secant))
    assert only.statistics.kinds == ("secant",)
    assert only.samples == secant
    assert len(only.skipped) == 2
    both = collect_within(subject, MergeBudget(samples=secant + pairs))
    assert both.statistics.kinds == ("secant", "pairs")
    assert judge_of(both.statistics) == "pairs"
    with pytest.raises(MergeboundError, match="not both"):
        MergeBudget(samples=1.0, minutes=1.0)
    first, second = halves(subject, only.statistics)
    assert [len(y) for y in (*first[1].labels, *second[1].labels)] == [IMAGES // 2] * 6
    assert not set(first[0].calibration[0].source) & set(second[0].calibration[0].source)


def test_the_dispersion_of_the_account_is_the_mean_squared_distance() -> None:
    subject = wide()
    statistics = collect_fields(subject, kinds=("secant",))
    alpha = np.array([0.2, 0.5, 0.1])
    found = account(subject, statistics, alpha, 1.0)
    merged = subject.base + torch.tensor(alpha) @ subject.deltas
    assert found.dispersion == pytest.approx(float((merged - subject.vectors).square().sum(dim=1).mean()))
    assert found.per_expert["share_of_dispersion"].sum() == pytest.approx(1.0)
    assert found.bound >= 0
    assert found.active == max(found.terms, key=lambda n: found.terms[n])


def test_advice_is_written_and_names_the_merge(tmp_path: Path) -> None:
    advice = advise_merge(wide(), verify=2)
    page = write_merge_advice(tmp_path, advice, command="mergebound advise merge", merge="mergebound merge ...")
    text = page.read_text()
    assert advice.label in text
    assert "What to change" in text
    assert "seed 0" in text.lower()
    assert {"candidates.csv", "subsets.csv", "experts.csv", "changes.csv", "advice.json"} <= {
        p.name for p in tmp_path.iterdir()
    }
    table = pd.read_csv(tmp_path / "candidates.csv")
    assert {"tier", "seed", "low", "high"} <= set(table.columns)
    assert plain(advice) == plain(advise_merge(wide(), verify=2))  # same command, same numbers
    arguments = merge_arguments(advice)
    assert arguments[:2] == ["--method", advice.method]
    assert len(merge_page(advice).sections) == 4


@pytest.mark.parametrize("verify", [5, 0])
def test_changes_have_intervals_of_paired_losses(verify: int) -> None:
    """The first changes again, image by image with torch (predictions: mixtures of logits)."""
    subject, judged = wide(), slice(IMAGES // 2, None)
    advice = advise_merge(subject, verify=verify, nonlinear=False, kinds=("secant",))
    assert advice.label != "average"

    def images(j: int, logits: torch.Tensor) -> np.ndarray:
        labels = subject.calibration[j].labels[judged]
        return np.asarray(torch.nn.functional.cross_entropy(logits, labels, reduction="none").numpy())

    def at(j: int, point: torch.Tensor) -> torch.Tensor:
        return subject.networks[j].features(point, subject.calibration[j].images[judged])

    def mixture(j: int, alpha: np.ndarray) -> np.ndarray:
        base = at(j, subject.base)
        return images(j, base + sum(a * (at(j, x) - base) for a, x in zip(alpha, subject.vectors, strict=True)))

    def merged(j: int, alpha: np.ndarray) -> np.ndarray:
        return images(j, at(j, point_at(subject, alpha))) if verify else mixture(j, alpha)

    even, alpha, size = np.full(3, 1 / 3), np.array(advice.alpha), 3
    found = {change.what.split(" ")[0]: change for change in advice.changes}
    falls = [merged(j, even) - merged(j, alpha) for j in range(size)]
    own = [images(j, at(j, subject.vectors[j])) for j in range(size)]
    k = int(found["keep"].what.split(" ")[1][-1]) if "keep" in found else -1
    wanted = {"merge": falls}
    if k >= 0:
        others = np.where(np.arange(size) == k, 0.0, 0.5)
        wanted["keep"] = [mixture(j, even) - (own[j] if j == k else mixture(j, others)) for j in range(size)]
    checked = simultaneous(len(advice.candidates.dropna(subset=["measured"]))) if verify else 1.959964
    for word, gains in wanted.items():
        gain = float(np.mean([g.mean() for g in gains]))
        error = np.sqrt(sum(g.var(ddof=0) / len(g) for g in gains) / size**2 * 36 / 35)  # 36 images, 3 means
        change, z = found[word], checked if word == "merge" else 1.959964
        assert change.gain == pytest.approx(gain, abs=1e-5)
        assert [change.low, change.high] == pytest.approx([gain - z * error, gain + z * error], abs=1e-5)
    assert f"{advice.changes[0].low:.3g} to {advice.changes[0].high:.3g}" in "".join(summary(advice)[1])


def test_averaging_is_no_change_where_it_is_the_advice() -> None:
    advice = advise_merge(wide(), verify=1)
    assert advice.label == "average"
    assert not any("in place of averaging" in change.what for change in advice.changes)


def test_halves_too_small_for_an_interval_are_refused() -> None:
    """One image per half once had 95 % intervals of no width."""
    small = wide()
    few = tuple(Split(s.images[:15], s.labels[:15], s.source[:15]) for s in small.calibration)
    with pytest.raises(MergeboundError, match=r"15 images of .*give 16 or more"):
        advise_merge(replace(small, calibration=few))
    assert str(around(2.15, float("nan"), "measured", 0)) == "2.15 (no interval; measured)"


@pytest.mark.parametrize(
    ("what", "options"),
    [("nothing to merge", {"one": True}), ("0 or more", {"verify": -1}), ("lower bound", {"bounds": (0.5, 1.0)})],
)
def test_questions_without_an_answer_are_refused(what: str, options: dict) -> None:  # type: ignore[type-arg]
    subject = wide()
    if options.pop("one", False):
        subject = subject.choose([0])
    with pytest.raises(MergeboundError, match=what):
        advise_merge(subject, **options)


def test_intervals_for_many_values_are_wider() -> None:
    """Bonferroni: at least the nominal coverage for five independent values at once, by simulation."""
    draws = np.random.default_rng(0).standard_normal((20_000, 5))
    inside = (np.abs(draws) <= simultaneous(5)).all(axis=1).mean()
    assert 0.94 < inside < 0.96
    assert around(0.1, 1.0, "measured", 0).low == 0.0


# --- before fine-tuning ----------------------------------------------------------------------------------------------


BASE = BaseSpec(kind="random", architecture="mlp_8", classes=10)


def law(time: np.ndarray, noise: np.ndarray, scale: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """A made-up merged risk in the shape of the master bound: training falls, dispersion and noise grow."""
    return np.asarray(
        2.0 * np.exp(-time) + 0.1 * scale**2 * time * (1 - 1 / experts) + 2.0 * noise + 0.3 * (scale - 1.2) ** 2 + 0.05
    )


def made_pilot(seed: int = 0, count: int = 8, flat: bool = False) -> Pilot:
    """A pilot of four tasks whose merges cost what the law says, without training anything."""
    spec = PilotSpec(recipes=count, seed=seed, parts=(0.25, 1.0), scales=(0.5, 1.0, 1.5))
    rng = np.random.default_rng(seed)
    rows, runs = [], []
    for number, one in enumerate(recipes(spec, 6400, 80)):
        run = RunSpec(
            task="digits8:identity", base=BASE, learning_rate=one["learning_rate"], batch_size=int(one["batch_size"]),
            steps=int(one["steps"]), momentum=one["momentum"], weight_decay=one["weight_decay"],
        )  # fmt: skip
        runs.append(run)
        for part in spec.parts:
            step = max(1, round(part * run.steps))
            for experts, scale in [(4, s) for s in spec.scales] + [(2, 1.0), (3, 1.0)]:
                where = coordinates(run, step)
                arguments = [np.array([v]) for v in (where["time"], where["noise"], scale, experts)]
                value = float(law(*arguments)[0]) if not flat else float(np.exp(rng.normal()))
                own = float(2.0 * np.exp(-where["time"]) + 0.05)
                rows.append(
                    {"recipe": number, "step": step, **where, "learning_rate": run.learning_rate,
                     "batch_size": run.batch_size, "momentum": run.momentum, "weight_decay": run.weight_decay,
                     "experts": experts, "group": "", "scale": scale, "risk": value, "standard_error": 0.01,
                     "accuracy": float(np.exp(-value)), "own_risk": own, "own_accuracy": float(np.exp(-own)),
                     "own_error": 0.01, "accuracy_error": 0.01, "base_risk": 2.5, "base_error": 0.02,
                     "training_risk": 0.9 * own, "finite": True, "tier": "measured", "seed": seed}
                )  # fmt: skip
    digests = tuple(("a", "b", "c", "d") for _ in runs)
    return Pilot(
        spec, ("a", "b", "c", "d"), BASE, Path("nowhere"), digests, tuple(runs), pd.DataFrame(rows), 6400.0, 1.0,
        (80,) * 4, (10,) * 4, False,
    )  # fmt: skip


def test_coordinates_are_sums_over_the_schedule() -> None:
    run = RunSpec(
        task="a",
        base=BASE,
        learning_rate=0.1,
        steps=40,
        batch_size=5,
        momentum=0.5,
        weight_decay=0.01,
        schedule="cosine",
    )
    found = coordinates(run, 40)
    rates = 0.1 * 0.5 * (1 + np.cos(np.pi * np.arange(40) / 40))
    assert found["time"] == pytest.approx(2 * rates.sum(), rel=0.05)
    assert found["noise"] == pytest.approx(2 * (rates**2).sum() / rates.sum() / 5, rel=0.05)
    assert found["shrink"] == pytest.approx(0.01 * found["time"])
    constant = coordinates(run.model_copy(update={"schedule": "constant"}), 10)
    assert constant["time"] == pytest.approx(2.0)
    assert constant["noise"] == pytest.approx(0.04)


def test_the_response_recovers_a_law_and_its_derivatives() -> None:
    pilot = made_pilot()
    response = fit_response(pilot.rows, "risk")
    assert response.quality.spearman > 0.9
    rng = np.random.default_rng(1)
    time, noise = np.exp(rng.uniform(-0.5, 1.0, 40)), np.exp(rng.uniform(-7.0, -4.5, 40))
    points = pd.DataFrame({"time": time, "noise": noise, "shrink": 1e-3, "scale": 1.0, "experts": 4})
    value, low, high = response.predict(features(points))
    truth = law(time, noise, np.ones(40), np.full(40, 4))
    assert np.median(np.abs(np.log(value / truth))) < 0.1
    assert ((low <= truth) & (truth <= high)).mean() > 0.8
    here = features(points.iloc[:1])[0]
    slope, least, most = sensitivity(response, here, np.array([1.0, 0.0, 0.0, 0.0, 0.0]))
    step = 1e-4
    ends = law(time[:1] * np.exp([-step, step]), noise[:1], np.ones(2), np.full(2, 4.0))
    assert slope == pytest.approx(float(np.diff(np.log(ends))[0] / (2 * step)), abs=0.25)
    assert least <= slope <= most


def test_the_recommended_recipe_is_close_to_the_best_of_the_law() -> None:
    """The law's own minimum over what the budget affords, against the law at the recommended recipe."""
    pilot = made_pilot()
    found = advise_training(("a", "b", "c", "d"), BASE, 25_600.0, Path("nowhere"), made=pilot, theory=False)
    assert found.source == "response"
    recipe = found.recipe
    assert recipe["steps"] * recipe["batch_size"] <= 25_600 - pilot.samples
    table = considered(pilot, fit_response(pilot.rows, "risk"), 25_600 - pilot.samples, 1.0)
    best = law(*(table[n].to_numpy(dtype=float) for n in ("time", "noise", "scale", "experts"))).min()
    effective = recipe["learning_rate"] / (1 - recipe["momentum"])
    mine = law(
        *(
            np.array([v])
            for v in (effective * recipe["steps"], effective / recipe["batch_size"], found.coefficient * 4, 4)
        )
    )[0]
    assert mine <= 1.15 * best
    assert found.predicted.low <= mine <= found.predicted.high
    assert found.predicted.tier == "calibrated"
    assert found.active == "dispersion"
    assert sum(found.parts.values()) == pytest.approx(found.predicted.value)
    assert found.base.value == 2.5
    assert not any("guessing" in text or "the base (" in text for text in found.notes)
    assert found.theory.verdict == "not informative"
    assert set(found.numbers["experts"]) == {2, 3, 4}
    assert {"gain", "low", "high", "inside", "tier", "seed"} <= set(found.changes.columns)


def test_a_response_that_cannot_rank_falls_back_to_the_pilot() -> None:
    pilot = made_pilot(flat=True, count=5)
    found = advise_training(("a", "b", "c", "d"), BASE, 25_600.0, Path("nowhere"), made=pilot, theory=False)
    whole = pilot.rows[pilot.rows["experts"] == 4]
    assert found.source == "best of the pilot"
    assert found.predicted.tier == "measured"
    assert found.predicted.value == pytest.approx(float(whole["risk"].min()))
    assert any("own best recipe" in text for text in found.notes)
    row = whole.loc[whole["risk"].idxmin()]  # nothing comes from the response that was refused
    assert found.own.value == row["own_risk"]
    assert found.own.tier == found.accuracy.tier == "measured"
    assert found.parts["training"] == row["training_risk"]
    assert sum(found.parts.values()) == pytest.approx(row["risk"])
    assert set(found.numbers["tier"]) == {"measured"}
    lines = " ".join(training_summary(found)[1])
    assert "First change" not in lines
    assert "calibrated" not in lines
    # merges that are no better than the base, or than guessing, are said to be so
    for low, word in ((1.9, "no better than the base"), (2.02, "not told from the base"), (9.0, "from guessing")):
        rows = pilot.rows.assign(risk=np.maximum(pilot.rows["risk"], 2.0 if low < 3 else 2.3), base_risk=low)
        weak = replace(pilot, rows=rows.assign(standard_error=0.02))
        said = advise_training(("a", "b", "c", "d"), BASE, 25_600.0, Path("nowhere"), made=weak, theory=False).notes
        assert any(word in text for text in said), word


def test_a_pilot_spends_its_share_and_refuses_too_little() -> None:
    spec = PilotSpec(recipes=8)
    made = recipes(spec, 1600, 80)
    assert sum(one["steps"] * one["batch_size"] for one in made) <= 1600
    rates = [one["learning_rate"] / (1 - one["momentum"]) for one in made]
    assert 0.0019 <= min(rates) < 0.01
    assert 0.1 < max(rates) <= 0.51
    assert recipes(spec, 1600, 80) == made != recipes(spec.model_copy(update={"seed": 1}), 1600, 80)
    assert all(one["steps"] >= len(spec.parts) for one in recipes(spec, 100, 80))  # batches are lowered
    with pytest.raises(MergeboundError, match="raise the budget"):
        recipes(spec, 30, 80)
    with pytest.raises(MergeboundError, match="rates"):
        pilot_of({"rates": [0.5, 0.1]})
    with pytest.raises(MergeboundError, match=r"x.yaml: recipe:"):
        pilot_of({"recipe": 3}, "x.yaml")


def test_a_pilot_that_was_too_short_says_so_and_the_rest_of_the_budget_is_used() -> None:
    """Merges that improve until the end, in an order that no response can rank."""
    pilot = made_pilot(flat=True, count=5)
    rows = pilot.rows.copy()
    last = rows.groupby("recipe")["step"].transform("max") == rows["step"]
    rows.loc[~last, "risk"] = 2.2
    rows.loc[last, "risk"] = np.random.default_rng(3).uniform(1.9, 2.1, int(last.sum()))
    short = replace(pilot, rows=rows)
    found = advise_training(("a", "b", "c", "d"), BASE, 25_600.0, Path("nowhere"), made=short, theory=False)
    spent = found.recipe["steps"] * found.recipe["batch_size"]
    left = 25_600 - pilot.samples
    assert found.source == "best of the pilot"
    assert left - found.recipe["batch_size"] < spent <= left
    assert any("all remaining samples" in text for text in found.notes)
    assert "shorter run" in found.predicted.note


# --- the comparison --------------------------------------------------------------------------------------------------


def test_the_comparison_judges_tasks_that_were_not_advised_on() -> None:
    spec = read_comparison("tiny")
    assert comparison_sizes() == ("tiny",)
    assert len(units(spec)) == 4
    found = splits(spec, 8)
    assert len(found) == spec.splits == len({advised for advised, _ in found})
    for advised, judged in found:
        assert not set(advised) & set(judged)
        assert sorted((*advised, *judged)) == list(range(8))
    with pytest.raises(MergeboundError, match="no size is called"):
        read_comparison("huge")


def rows_of(loss: dict[str, list[float]]) -> pd.DataFrame:
    rows = []
    for recipe, values in loss.items():
        for split, value in enumerate(values):
            rows.append(
                {"network": "n", "samples": 1, "split": split, "judged": f"a{split};b", "recipe": recipe,
                 "method": "advised" if recipe == "advice" else "average", "loss": value, "accuracy": 1 - value / 10}
            )  # fmt: skip
    return pd.DataFrame(rows)


def test_differences_are_paired_and_a_collapse_is_cut() -> None:
    frame = rows_of({"advice": [1.0, 2.0, 3.0], "other": [1.5, 2.5, 1e9]})
    table = training_differences(frame)
    row = table[(table["network"] == "all") & (table["recipe"] == "other")].iloc[0]
    assert row["difference"] == pytest.approx(np.mean([-0.5, -0.5, 3.0 - COLLAPSED]))
    assert row["wins"] == 1.0
    assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    advice = pd.DataFrame(
        [{"network": "n", "samples": 1, "split": k, "predicted": 2.0, "low": 1.5, "high": 2.5,
          "source": "best of the pilot" if k == 2 else "response"} for k in range(3)]
    )  # fmt: skip
    rows = coverage(frame, advice, pd.DataFrame(), 0)
    covered = rows.iloc[0]
    assert dict(zip(rows["what"].str.partition("source: ")[2], rows["merges"], strict=True)) == {
        "": 3, "best of the pilot": 1, "response": 2,
    }  # fmt: skip
    inside = [float(1.5 <= loss <= 2.5) for loss in frame[frame["method"] == "advised"]["loss"]]
    assert list(rows["inside"]) == pytest.approx([np.mean(inside), inside[2], np.mean(inside[:2])])
    assert covered["inside"] == pytest.approx(1 / 3)
    assert covered["below"] == covered["above"] == pytest.approx(1 / 3)
