"""What is chosen or fitted on one half of the experts and judged on the other: predictor, certificate, interval, flag.

Choices and fits use merges measured on calibration images; intervals and flags are fitted on every second test image of
one half's merges and judged on the other test images of the other half's merges, so that neither experts nor images are
shared (the tasks are).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.measure.predictors.calibration import calibrate_flag, calibrate_interval
from experiments.validation import Settings, cells, log_error
from theory.errors import MergeboundError

Row = dict[str, Any]
SELF = {"anchored": None, "anchored_tangent": None, "pairs_average": None, "hermite_average": None}
"""Predictors that evaluate the group's average: no prediction where the average is what is predicted."""
PAIRED = ("pairs", "pairs_halves", "pairs_tangent", "pairs_wide")
"""Predictors that evaluate averages of two experts: no prediction of the average where the group is a pair."""
MERGING = ("pairs", "anchored", "hermite_average", "tangent_average", "cubic")
"""How the names of predictors begin that evaluate some merge of experts."""
USABLE, COLLAPSED = "usable", "collapsed"
COVERAGE = 0.9
MISSES = 0.1
COLUMNS_CHOSEN = ("best", "best_no_tangent", "best_no_merge")


def honest(merges: pd.DataFrame) -> pd.DataFrame:
    """The rows with everything that judgement needs: ``state`` (usable: accuracy above half the experts'), ``gap`` of
    the bracket, and no prediction where a predictor has evaluated the very merge."""
    out = merges.copy()
    average = out["method"] == "average"
    pair = average & (out["N"] == 2)
    for column in [c for c in out.columns if c.startswith(("pred_", "cert_", "acc_"))]:
        name = column.removeprefix("pred_").removeprefix("cert_").removeprefix("acc_")
        if name in SELF:
            out.loc[average, column] = np.nan
        elif name in PAIRED or name.startswith(("remainder_", "output_pairs")):
            out.loc[pair, column] = np.nan
    usable = out["measured_accuracy"] > 0.5 * out["expert_accuracy"]
    out["state"] = np.where(usable, USABLE, COLLAPSED)
    sides = out[["pred_secant", "pred_tangent_base"]].to_numpy(dtype=float)
    out["gap"] = np.log(sides.max(axis=1) / sides.min(axis=1))
    out["over_base"] = np.log(sides.max(axis=1) / out["trivial_base_risk"].to_numpy(dtype=float))
    return out


def directions(part: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """(fitted on, judged on) for every half in turn; nothing where there is one half only."""
    halves = list(dict.fromkeys(part["half"]))
    if len(halves) < 2:
        return
    for half in halves:
        yield part[part["half"] != half], part[part["half"] == half]


def candidates(merges: pd.DataFrame) -> list[str]:
    """Function-space predictors that were made."""
    names = [c.removeprefix("pred_") for c in merges.columns if c.startswith("pred_")]
    return [n for n in names if not n.startswith(("curvature", "best", "calibrated", "midpoint"))]


def with_choices(merges: pd.DataFrame) -> pd.DataFrame:
    """``pred_best`` (of all predictors), ``pred_best_no_tangent`` (forward passes only), ``pred_best_no_merge`` (no
    passes at merges of experts) and, by cell, what was chosen on the other half: ``chosen_best`` and so on.

    Where the choice makes no prediction (it has evaluated that merge), the next best does.
    """
    out = merges.copy()
    families: dict[str, Callable[[str], bool]] = {
        "best": lambda name: True,
        "best_no_tangent": lambda name: "tangent" not in name and name not in ("second_order", "hermite_own"),
        "best_no_merge": lambda name: not name.startswith(MERGING),
    }
    for column, allowed in families.items():
        out[f"pred_{column}"], out[f"chosen_{column}"] = np.nan, ""
        for _, part in cells(merges):
            for fit, judged in directions(part):
                names = [n for n in candidates(merges) if allowed(n) and np.isfinite(log_error(fit, n))]
                order = sorted(names, key=lambda n: log_error(fit, n))
                if not order:
                    continue
                values = judged[[f"pred_{n}" for n in order]].to_numpy(dtype=float)
                first = np.isfinite(values).argmax(axis=1)
                out.loc[judged.index, f"pred_{column}"] = values[np.arange(len(values)), first]
                out.loc[judged.index, f"chosen_{column}"] = order[0]
    return out


def with_certificate(merges: pd.DataFrame, share: float = 0.95) -> pd.DataFrame:
    """``cert_best``: of the certificates valid in at least ``share`` of the other half's merges (on calibration
    images) the one with the smallest median ratio; the one valid most often where none is. Inflated by nothing.

    Certificates are compared on *all* merges of the other half, since those that a certificate leaves out (large
    groups, say) may be the ones that are hard to bound. One that is not given everywhere is completed by the best of
    those that are (``chosen_cert_best_else``), in the choice as in what is judged; without such a one its gaps count as
    not valid.

    ``cert_best_no_merge`` is chosen in the same way from certificates that evaluate no merge of experts, averages of
    pairs included (a remainder is read off from all other predictors, so these are left out too).
    """
    out = merges.copy()
    names = [c for c in merges.columns if c.startswith("cert_")]
    families = {
        "cert_best": names,
        "cert_best_no_merge": [n for n in names if "pairs" not in n and not n.startswith("cert_remainder")],
    }
    for column, family in families.items():
        out[column], out[f"chosen_{column}"], out[f"chosen_{column}_else"] = np.nan, "", ""
        for _, part in cells(merges):
            for fit, judged in directions(part):
                known = [name for name in family if fit[name].notna().any()]
                if not known:
                    continue
                best, rest = _chosen_certificate(fit, known, share)
                value = judged[best] if rest is None else judged[best].fillna(judged[rest])
                out.loc[judged.index, column] = value
                out.loc[judged.index, f"chosen_{column}"] = best.removeprefix("cert_")
                out.loc[judged.index, f"chosen_{column}_else"] = (rest or "").removeprefix("cert_")
    return out


def _chosen_certificate(fit: pd.DataFrame, names: Sequence[str], share: float) -> tuple[str, str | None]:
    """The best of some certificates on one half, and the one that stands in where it is not given (if ever)."""

    def score(values: pd.Series) -> tuple[float, float]:
        """What validity lacks, then the median ratio; a missing certificate is not valid, its ratio infinite."""
        ratio = (values / fit["measured_loss_calibration"]).fillna(np.inf)
        valid = float((values.notna() & (ratio >= 1.0)).mean())
        return max(0.0, share - valid), float(ratio.median())

    own = {name: score(fit[name]) for name in names}
    whole = [name for name in names if fit[name].notna().all()]
    rest = min(whole, key=lambda name: (own[name], name)) if whole else None
    completed = own if rest is None else {name: score(fit[name].fillna(fit[rest])) for name in names}
    best = min(names, key=lambda name: (completed[name], name))
    return best, None if best == rest else rest


def interval_table(merges: pd.DataFrame, predictions: Sequence[str], settings: Settings) -> pd.DataFrame:
    """Coverage of prediction intervals calibrated on one half and judged on the other, both directions pooled.

    Each network has one interval, calibrated on all regimes: to promise 90 % takes nine groups and more.
    Columns: regime (``all``: together), architecture, prediction, ``asked``, ``covered`` (share of judged merges, odd
    test images), ``covered_by_group`` (every group counts the same), ``width`` (median high/low), ``unbounded`` (merges
    whose interval has no upper end, since there were too few groups).
    """
    rows: list[Row] = []
    for (architecture,), part in cells(merges, ("architecture",)):
        for name in predictions:
            column = f"pred_{name}"
            need = [column, "gap", "measured_loss_even", "measured_loss_odd"]
            known = part[np.isfinite(part[need].to_numpy(dtype=float)).all(axis=1)]
            judged_rows = []
            for fit, judged in directions(known):
                try:
                    found = calibrate_interval(
                        fit, prediction=column, gap="gap", measured="measured_loss_even", groups="group",
                        coverage=COVERAGE, seed=settings.seed,
                    )  # fmt: skip
                except MergeboundError:
                    continue
                low, high = found.ends(judged)
                inside = found.covers(judged, "measured_loss_odd")
                ends = {"inside": inside.astype(float), "width": high / np.maximum(low, 1e-12)}
                judged_rows.append(judged[["regime", "group"]].assign(**ends))
            if not judged_rows:
                continue
            for regime, some in _regimes(pd.concat(judged_rows)):
                by_group = some.groupby("group")["inside"].mean()
                rows.append(
                    {
                        "regime": regime, "architecture": architecture, "prediction": name, "asked": COVERAGE,
                        "covered": float(some["inside"].mean()), "covered_by_group": float(by_group.mean()),
                        "covered_se": float(by_group.std(ddof=1) / np.sqrt(len(by_group))),
                        "width": float(some["width"].median()), "groups": len(by_group), "merges": len(some),
                        "unbounded": int(np.isinf(some["width"]).sum()), "tier": "calibrated", "seed": settings.seed,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def flag_table(merges: pd.DataFrame, scores: Sequence[str], settings: Settings) -> pd.DataFrame:
    """Flags of collapse fitted on one half and judged on the other: misses and false alarms, both directions pooled.

    Each network has one flag for all regimes, fitted to miss a share :data:`MISSES` of collapsed merges at most.
    ``either`` is raised by the flag, or where merging clamps a running variance at zero (known from the checkpoints).
    """
    rows: list[Row] = []
    frame = merges.assign(
        collapsed_even=merges["measured_accuracy_even"] <= 0.5 * merges["expert_accuracy"],
        collapsed_odd=merges["measured_accuracy_odd"] <= 0.5 * merges["expert_accuracy"],
    )
    for (architecture,), part in cells(frame, ("architecture",)):
        for score in scores:
            known = part[np.isfinite(part[score].to_numpy(dtype=float))]
            judged_rows = []
            for fit, judged in directions(known):
                try:
                    flag = calibrate_flag(fit, score=score, collapsed="collapsed_even", groups="group", misses=MISSES)
                except MergeboundError:
                    continue
                up = np.asarray(flag.raised(judged), dtype=bool)
                clamped = (
                    (judged["clamped"] > 0).to_numpy(dtype=bool)
                    if "clamped" in judged
                    else np.zeros(len(judged), dtype=bool)
                )
                seen = judged[["regime", "collapsed_odd"]]
                judged_rows.append(seen.assign(raised=up, either=up | clamped))
            if not judged_rows:
                continue
            for regime, some in _regimes(pd.concat(judged_rows)):
                truth = some["collapsed_odd"].to_numpy(dtype=bool)
                up, either = (np.asarray(some[name], dtype=bool) for name in ("raised", "either"))
                rows.append(
                    {
                        "regime": regime, "architecture": architecture, "score": score, "merges": len(up),
                        "collapsed": int(truth.sum()), "missed": int((truth & ~up).sum()),
                        "alarms": int((~truth & up).sum()),
                        "missed_either": int((truth & ~either).sum()),
                        "alarms_either": int((~truth & either).sum()), "tier": "calibrated", "seed": settings.seed,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def _regimes(frame: pd.DataFrame) -> Iterator[tuple[object, pd.DataFrame]]:
    yield "all", frame
    for (regime,), part in cells(frame, ("regime",)):
        yield regime, part
