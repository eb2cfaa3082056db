"""Laws in the number k of merged experts, fitted to some k and judged on a k that was held out.

Two losses of averages of k experts, each a mean over groups: ``joint`` over all held-in tasks, and ``own`` over the
tasks of the merged experts.  k = 1 are the experts themselves.

==============  =====================================================  =========================================
``empirical``   ``l_inf + a / (k + c)``, all three >= 0                arXiv 2509.24244 (three parameters)
``quadratic``   ``l_inf + a / k``, both >= 0                           exact for the joint loss of averages under a
                                                                       quadratic risk (:mod:`theory.scaling_law`)
``dispersion``  ``(sqrt(R) + sqrt(d (1 - 1/k)))^2``, R, d >= 0         theory's N-law with orthogonal task vectors
                                                                       (:func:`theory.laws.number_law`), no instability
``constant``    the mean over the fitted k                             what a law has to beat
==============  =====================================================  =========================================

All are *calibrated*: fitted on one part, judged on the other.  The losses are cross-entropies, so no floor is below 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.statistics import mean_interval, membership
from experiments.studies.scale.effects import Table
from experiments.studies.scale.spec import ScaleSpec
from theory.errors import MergeboundError
from theory.laws import number_law
from theory.scaling_law import MergingLaw, fit_merging_law

Floats = NDArray[np.float64]
Law = Callable[[Floats, Floats, int], Callable[[Floats], Floats]]
CELL = ("family", "architecture", "base", "parameters")
PARAMETERS = ("floor", "tail", "shift")


def empirical(k: Floats, y: Floats, seed: int) -> Callable[[Floats], Floats]:
    """The empirical law."""
    return fit_merging_law(k, y, seed=seed, bootstrap=0, least_floor=0.0).predict


def quadratic(k: Floats, y: Floats, seed: int) -> Callable[[Floats], Floats]:
    """The law with ``c = 0``, by least squares with ``l_inf, a >= 0``."""
    x = 1.0 / k
    centred = x - x.mean()
    tail = max(0.0, float(centred @ (y - y.mean()) / (centred @ centred))) if np.ptp(x) > 0 else 0.0
    floor = float(y.mean() - tail * x.mean())
    if floor < 0.0:  # a convex problem: what leaves the bound has its optimum on it
        floor, tail = 0.0, max(0.0, float(x @ y / (x @ x)))

    def predict(at: Floats) -> Floats:
        return np.asarray(floor + tail / at)

    return predict


def dispersion(k: Floats, y: Floats, seed: int) -> Callable[[Floats], Floats]:
    """The N-law with two free numbers, R and ``d = L |Delta|^2 / 2``, by least squares."""
    import scipy.optimize

    def curve(theta: Floats, at: Floats) -> Floats:
        return np.asarray(number_law(at, theta[0], 2.0, np.sqrt(theta[1]), 0.0, orthogonal=True).value)

    def residual(theta: Floats) -> Floats:
        return curve(theta, k) - y

    best = None
    for share in (0.01, 0.1, 0.5):
        start = np.array([max(1e-6, float(y.min())), max(1e-6, share * float(y.max()))])
        found = scipy.optimize.least_squares(residual, start, bounds=(0.0, np.inf))
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    solution = best.x

    def predict(at: Floats) -> Floats:
        return curve(solution, at)

    return predict


def constant(k: Floats, y: Floats, seed: int) -> Callable[[Floats], Floats]:
    """The mean."""

    def predict(at: Floats) -> Floats:
        return np.full(np.shape(at), float(y.mean()))

    return predict


LAWS: dict[str, Law] = {"empirical": empirical, "quadratic": quadratic, "dispersion": dispersion, "constant": constant}


def curves(table: Table, spec: ScaleSpec) -> pd.DataFrame:
    """Mean losses by cell, target and k: ``target`` (joint, own), ``k``, ``loss``, ``groups``."""
    rows = table.rows
    chosen = rows[
        ((rows["kind"] == "expert") | ((rows["kind"] == "merge") & (rows["method"] == spec.laws.method)))
        & rows["measure"].isin(["joint_loss", "held_in_loss"])
    ]
    out = []
    for key, part in chosen.groupby([*CELL, "measure", "experts"], sort=False):
        names: tuple[Any, ...] = key
        *cell, measure, k = names
        about = dict(zip(CELL, cell, strict=True))
        target = "joint" if measure == "joint_loss" else "own"
        out.append({**about, "target": target, "k": int(k), "loss": float(part["value"].mean()), "groups": len(part)})
    return pd.DataFrame(out)


def judged(found: pd.DataFrame, spec: ScaleSpec) -> pd.DataFrame:
    """Every law's prediction of every held-out k, for every cell and target.

    Returns:
        ``family``, ``architecture``, ``base``, ``parameters``, ``target``, ``held_out``, ``extrapolates`` (the largest
        k), ``law``, ``predicted``, ``loss``, ``log_error`` = ``|log(predicted / loss)|``, ``tier``, ``seed``.
    """
    rows: list[dict[str, Any]] = []
    for key, part in found.groupby([*CELL, "target"], sort=False):
        k, y = part["k"].to_numpy(dtype=float), part["loss"].to_numpy(dtype=float)
        if not np.isfinite(y).all():
            continue
        for left in spec.laws.held_out:
            kept = k != left
            if kept.all() or len(np.unique(k[kept])) < 3:
                continue
            truth = float(y[~kept].mean())
            for name, law in LAWS.items():
                try:
                    predicted = float(law(k[kept], y[kept], spec.seed)(np.array([float(left)]))[0])
                except MergeboundError:
                    predicted = float("nan")
                error = abs(np.log(predicted / truth)) if predicted > 0 and truth > 0 else float("nan")
                about = dict(zip([*CELL, "target"], key, strict=True))
                rows.append(
                    {**about, "held_out": left, "extrapolates": bool(left == k.max()), "law": name,
                     "predicted": predicted, "loss": truth, "log_error": float(error)}
                )  # fmt: skip
    return pd.DataFrame(rows).assign(tier="calibrated", seed=spec.seed)


def rising_cells(losses: pd.DataFrame, least: int = 1) -> dict[str, int]:
    """By target: in how many cells the loss at the largest k is above that at the smallest k of at least ``least``.

    Where it is so from k = 1 on, the empirical law, which can only fall (a >= 0), is no more than a constant, and a
    comparison with it is one-sided; where it is so from k = 2 on, the law falls past the merges themselves.
    """
    out: dict[str, int] = {}
    for (*_, target), part in losses[losses["k"] >= least].groupby([*CELL, "target"], sort=False):
        own = part.sort_values("k")["loss"].to_numpy(dtype=float)
        out[str(target)] = out.get(str(target), 0) + int(own[-1] > own[0])
    return out


def compared(found: pd.DataFrame, losses: pd.DataFrame, spec: ScaleSpec) -> pd.DataFrame:
    """Mean error of every law, and its paired difference to the empirical law, with intervals over cells.

    Args:
        found: as :func:`judged` gives it.
        losses: as :func:`curves` gives it.
        spec: the study.

    Returns:
        ``target``, ``law``, ``held_out`` (inner or largest k), ``error`` with ``_low`` and ``_high``, ``difference``
        (error minus that of the empirical law) with ``_low`` and ``_high``, ``rising`` (see :func:`rising_cells`) and
        ``rising_merges`` (the same from k = 2 on), ``cells``, ``tier``, ``seed``.
    """
    rows = []
    rising, later = (rising_cells(losses, least) if len(losses) else {} for least in (1, 2))
    if found.empty:
        return pd.DataFrame()
    named = found.assign(cell=found["architecture"] + " " + found["base"])
    for (target, beyond), part in named.groupby(["target", "extrapolates"], sort=False):
        wide = part.pivot_table(index=["cell", "held_out"], columns="law", values="log_error")
        members = membership([[str(cell)] for cell, _ in wide.index])
        for law in LAWS:
            if law not in wide:
                continue
            own = mean_interval(wide[law], members, 500, spec.seed, domain=(0.0, np.inf))
            gap = mean_interval(wide[law] - wide["empirical"], members, 500, spec.seed)
            rows.append(
                {"target": target, "law": law, "held_out": "largest k" if beyond else "inner k", "error": own.value,
                 "error_low": own.low, "error_high": own.high, "difference": gap.value, "difference_low": gap.low,
                 "difference_high": gap.high, "rising": rising.get(str(target), 0),
                 "rising_merges": later.get(str(target), 0), "cells": int(part["cell"].nunique())}
            )  # fmt: skip
    return pd.DataFrame(rows).assign(tier="calibrated", seed=spec.seed)


def unidentified(law: MergingLaw) -> tuple[str, ...]:
    """Parameters of a fit with bootstrap that its points do not determine.

    Such a parameter lies on a bound, or has an interval wider than the range of what was measured: for the floor the
    range of the losses, for the shift that of k, for the tail that of the losses over that of 1/k.  Without a tail
    (a curve that does not fall, in the fit or at the lower end of its interval) there is no shift, and no floor that
    a loss would come down to.
    """
    ends = law.parameter_intervals()
    if law.tail <= 0.0 or ends["tail"][0] <= 0.0:
        return PARAMETERS
    losses = float(np.ptp(law.losses))
    own = {"floor": losses, "tail": losses / float(np.ptp(1.0 / law.experts)), "shift": float(np.ptp(law.experts))}
    return tuple(n for n in PARAMETERS if n in law.at_bound or ends[n][1] - ends[n][0] > own[n])


def fits(found: pd.DataFrame, spec: ScaleSpec) -> pd.DataFrame:
    """The empirical law fitted to all k of a cell.

    Returns:
        the cell, ``target``, ``floor`` (in nats, at least 0), ``tail`` and ``shift`` with 90 % bootstrap intervals
        (``_low``, ``_high``), ``rmse``, ``at_bound`` and ``not_identified`` (names of parameters, see
        :func:`unidentified`), ``tier``, ``seed``.
    """
    rows = []
    for key, part in found.groupby([*CELL, "target"], sort=False):
        k, y = part["k"].to_numpy(dtype=float), part["loss"].to_numpy(dtype=float)
        if len(np.unique(k)) < 3 or not np.isfinite(y).all():
            continue
        law = fit_merging_law(k, y, seed=spec.seed, bootstrap=spec.laws.bootstrap, least_floor=0.0)
        ends = law.parameter_intervals()
        row: dict[str, Any] = dict(zip([*CELL, "target"], key, strict=True))
        for name in PARAMETERS:
            row |= {name: getattr(law, name), f"{name}_low": ends[name][0], f"{name}_high": ends[name][1]}
        rows.append(
            {**row, "rmse": law.rmse, "at_bound": " ".join(law.at_bound),
             "not_identified": " ".join(unidentified(law)), "tier": law.tier, "seed": law.seed}
        )  # fmt: skip
    return pd.DataFrame(rows)


def identified(fitted: pd.DataFrame) -> pd.DataFrame:
    """The fits for a page: parameters that are not identified are left empty, with their intervals."""
    shown = fitted.copy()
    for name in PARAMETERS if len(shown) else ():
        blank = [name in str(which).split() for which in shown["not_identified"]]
        shown.loc[blank, [name, f"{name}_low", f"{name}_high"]] = np.nan
    return shown
