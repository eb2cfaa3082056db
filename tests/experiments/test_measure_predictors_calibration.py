"""Certificates, weights, intervals, flags and the command: against simulation and direct computation."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import experiments.commands.about_experts as about_experts
import experiments.commands.measure_function_space as command
from experiments.measure.layerwise import LayerGroup
from experiments.measure.predictors import (
    FieldStatistics,
    bracket_of,
    calibrate_flag,
    calibrate_interval,
    estimate,
    fit_combination,
    output_certificate,
    remainder_certificate,
)
from experiments.measure.predictors.break_even import BreakEven, break_even
from experiments.measure.predictors.calibration import quantile_line
from experiments.measure.predictors.certificates import smallest
from tests.experiments.predictor_cases import collected, subject
from theory.errors import MergeboundError


def random_statistics(seed: int = 0, images: int = 40) -> FieldStatistics:
    rng = np.random.default_rng(seed)
    return FieldStatistics(
        names=("a", "b"),
        groups=(LayerGroup("all", ("w",)),),
        labels=tuple(rng.integers(0, 4, images) for _ in range(2)),
        data=tuple({"secant": 2 * rng.standard_normal((3, images, 4))} for _ in range(2)),
        gram=np.eye(2)[None],
        sources=(np.arange(images), np.arange(images)),
        tasks=("s", "t"),
    )


def test_certificates_hold_for_the_truth_they_are_given() -> None:
    st = random_statistics()
    rng = np.random.default_rng(1)
    guess = [3 * rng.standard_normal((6, 40, 4)) for _ in range(2)]
    scale = np.linspace(0.05, 3.0, 6)[:, None, None]
    truth = [h + scale * rng.standard_normal(h.shape) for h in guess]
    risk = estimate(st, truth).risk
    found = [
        output_certificate(st, truth, own_merge=True),
        output_certificate(st, truth, labelled=True, own_merge=True),
        remainder_certificate(st, guess, [truth], sharp=False),
        remainder_certificate(st, guess, [truth]),
    ]
    for certificate in found:
        assert (certificate.upper >= risk).all(), certificate.name
        assert (certificate.lower <= risk).all(), certificate.name
    assert (found[3].upper <= found[2].upper + 1e-12).all()
    assert (found[3].lower > 0.0).all()
    assert found[0].tier == "certified"
    best = smallest(found)
    assert best.tier == "estimated"
    assert (best.upper == np.min([one.upper for one in found], axis=0)).all()
    wider = remainder_certificate(st, guess, [truth, guess], inflate=2.0)
    assert (wider.upper >= found[3].upper).all()


def test_the_bracket_is_the_ends() -> None:
    found = bracket_of({"secant": np.array([1.0, 3.0]), "tangent_base": np.array([np.e, 1.5])})
    assert found.low.tolist() == [1.0, 1.5]
    np.testing.assert_allclose(found.gap, [1.0, np.log(2.0)])


def simulated(rng: np.random.Generator, groups: int, per_group: int = 6) -> pd.DataFrame:
    """Groups share an error, and errors grow with the gap."""
    group = np.repeat(np.arange(groups), per_group)
    gap = rng.random(len(group)) * 2
    error = (rng.standard_normal(groups)[group] + rng.standard_normal(len(group))) * (0.05 + 0.2 * gap)
    prediction = np.exp(rng.standard_normal(len(group)))
    return pd.DataFrame({"prediction": prediction, "gap": gap, "measured": prediction * np.exp(error), "group": group})


def test_intervals_cover_new_groups_as_promised() -> None:
    rng = np.random.default_rng(0)
    covered, widths = [], []
    for repeat in range(40):
        interval = calibrate_interval(simulated(rng, 40), groups="group", coverage=0.8, seed=repeat)
        fresh = simulated(rng, 40)
        covered.append(interval.covers(fresh).mean())
        low, high = interval.ends(fresh)
        widths.append(np.corrcoef(np.log(high / low), fresh["gap"])[0, 1])
    error = np.std(covered) / np.sqrt(len(covered))
    assert 0.8 - 2.5 * error <= np.mean(covered) <= 0.9
    assert np.mean(widths) > 0.99  # wider where the bracket is
    few = calibrate_interval(simulated(rng, 6), groups="group", coverage=0.9)
    assert few.margin == np.inf  # three groups cannot promise 90 %
    with pytest.raises(MergeboundError, match="four or more"):
        calibrate_interval(simulated(rng, 3), groups="group")


def test_flags_miss_no_more_collapsed_merges_than_allowed() -> None:
    rng = np.random.default_rng(0)

    def merges(groups: int) -> pd.DataFrame:
        collapsed = rng.random(groups) < 0.4
        score = rng.standard_normal(groups) + 2.0 * collapsed
        return pd.DataFrame({"gap": score, "collapsed": collapsed, "group": np.arange(groups)})

    missed, seen = 0, 0
    for _ in range(60):
        flag = calibrate_flag(merges(100), misses=0.1, groups="group")
        fresh = merges(100)
        bad = fresh["collapsed"].to_numpy()
        missed += int((~flag.raised(fresh) & bad).sum())
        seen += int(bad.sum())
    share = missed / seen
    assert 0.05 < share < 0.1 + 3 * np.sqrt(0.09 / seen)
    with pytest.raises(MergeboundError, match="no merge"):
        calibrate_flag(merges(5).assign(collapsed=False))


def test_weights_inside_the_bracket_are_found_again() -> None:
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"secant": np.exp(rng.standard_normal(80)), "tangent_base": np.exp(rng.standard_normal(80))})
    rows["measured"] = rows["secant"] ** 0.7 * rows["tangent_base"] ** 0.3
    rows.loc[:9, "measured"] *= 50.0  # least absolute deviations do not mind
    found = fit_combination(rows, ["secant", "tangent_base"])
    assert found.weights == pytest.approx((0.7, 0.3), abs=1e-6)
    np.testing.assert_allclose(found.predict(rows)[10:], rows["measured"][10:], rtol=1e-5)
    scaled = rows.assign(measured=rows["secant"] ** 1.2 * 3.0)
    free = fit_combination(scaled, ["secant"], between=False, constant=True)
    assert (*free.weights, free.constant) == pytest.approx((1.2, np.log(3.0)), abs=1e-6)
    assert free.tier == "calibrated"
    with pytest.raises(MergeboundError, match="is not in the table"):
        fit_combination(rows, ["pairs"])


def test_quantile_lines_leave_the_right_share_below() -> None:
    rng = np.random.default_rng(0)
    x = rng.random(200)
    y = 1.0 + 2.0 * x + rng.standard_normal(200) * (0.1 + x)
    constant, slope = quantile_line(x, y, 0.9)
    assert abs((y <= constant + slope * x + 1e-9).mean() - 0.9) <= 2 / 200
    assert quantile_line(np.zeros(5), np.arange(5.0), 0.5) == (2.0, 0.0)


def test_break_even_counts_candidates() -> None:
    row = BreakEven("secant", 10.0, 0.1, 0.2, 1.1, (1.0, 1.2), 64, 3, 0)
    assert row.candidates == 10  # 10 + 10 * 0.1 = 10 * 1.1
    assert BreakEven("secant", 10.0, 2.0, 0.2, 1.1, (1.0, 1.2), 64, 3, 0).candidates == np.inf
    measured = break_even(subject(True), collected(True), ["secant", "pairs"], candidates=4, repeats=2)
    assert measured[1].collect == sum(collected(True).seconds[kind] for kind in ("secant", "pairs"))


def test_the_command_shows_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    monkeypatch.setattr(about_experts, "open_subject", lambda **options: subject(True))
    app = typer.Typer()
    app.callback()(lambda: None)
    command.register(app)
    arguments = ["function-space", "--base", "x", "--alpha", "0.2,0.5,0.1", "--methods", "ties,average", "--json"]
    arguments += ["--set", "ties.density=0.5", "--predictors", "secant,pairs", "--optimal", "pairs", "--times"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    shown = json.loads(result.output)
    rows = {(row["merge"], row["predictor"]): row for row in shown["predictions"]}
    from experiments.measure.predictors import ZOO
    from theory.function_space import predict_risk

    fields = ZOO["pairs"].fields(collected(True))
    expected = predict_risk(fields, [[0.2, 0.5, 0.1], [1 / 3] * 3]).risk
    assert rows["alpha(0.2, 0.5, 0.1)", "pairs"]["risk"] == pytest.approx(expected[0])
    assert rows["average", "pairs"]["risk"] == pytest.approx(expected[1])
    best = next(row for (merge, name), row in rows.items() if merge.startswith("optimal") and name == "pairs")
    assert best["risk"] <= expected[1] + 1e-9
    assert {row["predictor"] for row in shown["break_even"]} == {"secant", "pairs"}
    failed = CliRunner().invoke(app, ["function-space", "--base", "x", "--alpha", "a,b"])
    assert isinstance(failed.exception, MergeboundError)
