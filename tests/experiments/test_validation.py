"""The validation table against independent computations on frames with a planted truth."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats
from sklearn.metrics import roc_auc_score

from experiments import validation as v
from tests.experiments.synthetic_frames import Frames, make_frames

QUICK = v.Settings(resamples=100)


@pytest.fixture(scope="module")
def frames() -> Frames:
    return make_frames(architectures=("vit",), groups_per_size=6)


def test_table_agrees_with_scipy(frames: Frames) -> None:
    table = v.validation_table(frames.merges, QUICK)
    part = frames.merges[frames.merges["regime"] == "harsh"]
    row = table[(table["regime"] == "harsh") & (table["predictor"] == "secant")].iloc[0]
    measured, predicted = part["measured_loss"], part["pred_secant"]
    cost = predicted - part["expert_loss_calibration"]
    assert row["spearman_risk"] == pytest.approx(stats.spearmanr(predicted, measured).statistic)
    assert row["kendall_risk"] == pytest.approx(stats.kendalltau(predicted, measured).statistic)
    assert row["spearman_cost"] == pytest.approx(stats.spearmanr(cost, part["merging_cost"]).statistic)
    inside = [
        (len(group), stats.spearmanr(group["pred_secant"], group["measured_loss"]).statistic)
        for _, group in part.groupby("N")
    ]
    assert row["spearman_risk_within"] == pytest.approx(
        np.average([r for _, r in inside], weights=[n for n, _ in inside])
    )
    ratio = predicted / measured
    assert row["ratio_q50"] == pytest.approx(ratio.median())
    assert row["ratio_q95"] == pytest.approx(ratio.quantile(0.95))
    assert row["median_error"] == pytest.approx((ratio - 1).abs().median())
    assert row["relative_cost"] == pytest.approx(0.25)
    assert row["merges"] == len(part)
    for name in ("spearman_risk", "kendall_cost", "spearman_cost_within"):
        assert -1 <= row[f"{name}_low"] <= row[name] <= row[f"{name}_high"] <= 1


def test_kinds_tiers_validity_and_vacuity(frames: Frames) -> None:
    table = v.validation_table(frames.merges, QUICK).set_index(["regime", "predictor"])
    part = frames.merges[frames.merges["regime"] == "mild"]
    row = table.loc[("mild", "output_range")]
    assert (row["kind"], row["tier"]) == ("certificate", "estimated")
    assert row["valid"] == pytest.approx((part["measured_loss"] <= part["cert_output_range"]).mean())
    bound = table.loc[("mild", "master_checkpoints")]
    assert (bound["kind"], bound["vacuous"]) == ("bound", pytest.approx(part["vacuous_master_checkpoints"].mean()))
    always = table.loc[("mild", "master_logs")]
    assert (always["valid"], always["valid_high"]) == (1.0, 1.0)
    assert 0.8 < always["valid_low"] < 1.0
    trivial = table.loc[("mild", "V")]
    assert trivial["tier"] == "-"
    assert np.isnan(trivial["ratio_q50"])
    assert trivial["spearman_cost"] == pytest.approx(stats.spearmanr(part["trivial_V"], part["merging_cost"]).statistic)


def test_missing_predictions_are_counted_not_hidden(frames: Frames) -> None:
    merges = frames.merges.copy()
    merges.loc[merges["method"].isin(["ties", "dare"]), "pred_secant"] = np.nan
    table = v.validation_table(merges, QUICK, names=["secant"])
    assert set(table["predictor"]) == {"secant"}
    assert (table["merges"] == len(merges) // 4).all()
    by_method = v.validation_table(merges, QUICK, by=("regime", "architecture", "method"), names=["secant"])
    assert len(by_method) == 4


def test_bracket(frames: Frames) -> None:
    table = v.bracket_table(frames.merges, QUICK).set_index("regime")
    part = frames.merges[frames.merges["regime"] == "harsh"]
    low, high = (
        part[["pred_secant", "pred_tangent_base"]].min(axis=1),
        part[["pred_secant", "pred_tangent_base"]].max(axis=1),
    )
    row = table.loc["harsh"]
    assert row["inside"] == pytest.approx(part["measured_loss"].between(low, high).mean())
    assert row["inside_tolerance"] >= row["inside"]
    assert row["below"] + row["above"] + row["inside"] == pytest.approx(1)
    collapsed = part["measured_loss"] > part["base_loss"]
    assert row["auc"] == pytest.approx(roc_auc_score(collapsed, np.log(high / low)))
    assert row["collapsed"] == pytest.approx(collapsed.mean())


@pytest.mark.parametrize("best", ["tangent_both", "secant_tangent"])
def test_planted_best_predictor_is_chosen_on_the_other_half(best: str) -> None:
    merges = make_frames(architectures=("vit",), groups_per_size=6, best=best).merges
    table = v.selection_table(merges, QUICK)
    chosen = table[table["tier"] == "estimated"]
    assert set(chosen["chosen"]) == {best}
    assert len(chosen) == 4
    assert (chosen["fit_half"] != chosen["judged_half"]).all()
    one = chosen[(chosen["regime"] == "mild") & (chosen["judged_half"] == "B")].iloc[0]
    part = merges[(merges["regime"] == "mild") & (merges["half"] == "B")]
    assert one["median_error"] == pytest.approx((part[f"pred_{best}"] / part["measured_loss"] - 1).abs().median())


def test_choice_never_sees_the_judged_half(frames: Frames) -> None:
    merges = frames.merges.copy()
    spoiled = merges["half"] == "B"
    merges.loc[spoiled, "measured_loss"] *= np.random.default_rng(0).uniform(0.1, 10, spoiled.sum())
    key = ["regime", "fit_half", "tier"]
    before = v.selection_table(frames.merges, QUICK).set_index(key)["chosen"]
    after = v.selection_table(merges, QUICK).set_index(key)["chosen"]
    for regime in ("mild", "harsh"):
        for tier in ("estimated", "calibrated"):
            assert before[(regime, "A", tier)] == after[(regime, "A", tier)]


@pytest.mark.parametrize(("form", "slope"), [("constant", 0.0), ("linear", -0.25)])
def test_combination_recovers_the_planted_weight(form: str, slope: float) -> None:
    rng = np.random.default_rng(0)
    gap, low = rng.uniform(0.1, 2, 200), rng.uniform(0.1, 1, 200)
    log = np.log(low) + (0.6 + slope * gap) * gap + 0.002 * rng.normal(size=200)
    frame = pd.DataFrame(
        {
            "group": np.arange(200),
            "pred_secant": low,
            "pred_tangent_base": low * np.exp(gap),
            "measured_loss": np.exp(log),
        }
    )
    fitted = v.fit_combination(frame)
    assert fitted.form == form
    assert fitted.intercept == pytest.approx(0.6, abs=0.02)
    assert fitted.slope == pytest.approx(slope, abs=0.02)
    assert np.median(np.abs(np.log(fitted.predict(frame)) - log)) < 0.01


def test_cross_calibrated_is_better_than_either_side(frames: Frames) -> None:
    merges = frames.merges.assign(pred_calibrated=v.cross_calibrated(frames.merges))
    assert merges["pred_calibrated"].notna().all()
    assert v.log_error(merges, "calibrated") < min(v.log_error(merges, n) for n in ("secant", "tangent_base"))
    tiers = {predictor.name: predictor.tier for predictor in v.predictors(merges)}
    assert (tiers["calibrated"], tiers["secant"]) == ("calibrated", "estimated")


def test_aims(frames: Frames) -> None:
    aims = v.aims_table(v.selection_table(frames.merges, QUICK), v.bracket_table(frames.merges, QUICK))
    assert set(aims[aims["aim"].str.startswith("median")]["regime"]) == {"mild"}
    assert aims[aims["aim"].str.startswith("median")]["met"].all()
    assert len(aims[aims["aim"].str.startswith("bracket holds")]) == 2


def test_optimal_table_pairs_groups(frames: Frames) -> None:
    table = v.optimal_table(frames.optimal, frames.merges, QUICK)
    every = table[(table["N"] == "all") & (table["regime"] == "mild")].set_index("method")
    wide = frames.optimal[frames.optimal["regime"] == "mild"].pivot(
        index="group", columns="method", values="measured_loss"
    )
    difference = wide["risk_optimal_both"] - wide["average"]
    row = every.loc["risk_optimal_both"]
    assert row["difference"] == pytest.approx(difference.mean())
    assert row["difference_low"] < row["difference"] < row["difference_high"] < 0
    assert row["wins"] == pytest.approx((difference < 0).mean())
    assert every.loc["average", "difference"] == 0
    assert set(table["N"]) == {"all", 2, 4, 6, 8}
    assert len(v.optimal_table(frames.optimal, None, QUICK)) == len(table)


def test_rendering() -> None:
    table = pd.DataFrame(
        {
            "regime": ["mild", "mild"],
            "value": [0.9312, np.nan],
            "value_low": [0.9, np.nan],
            "value_high": [0.961, np.nan],
            "big": [123456.0, 12.34],
            "met": [True, False],
        }
    )
    text = v.to_markdown(table, {"regime": "Regime", "value": "Spearman", "big": "Bound", "met": "Met", "absent": "x"})
    assert text.splitlines()[2].split("|")[1:-1] == [" mild   ", " 0.931 [0.900, 0.961] ", " 1.23e+05 ", " yes "]
    assert "–" in text.splitlines()[3]
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(v.rich_table(table, "Title"))
    shown = console.export_text()
    assert "Title" in shown
    assert "0.931 [0.900, 0.961]" in shown
    assert shown.count("mild") == 1
