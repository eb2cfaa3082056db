"""Trimming and sign election: discontinuous, hence no guarantee; closed forms on a fixed support with fixed signs.

Where support and signs do not change, every coordinate of the merge is a linear function of the experts' entries at
that coordinate, so that the Jacobian with respect to one expert is diagonal and its norm is a maximum over coordinates.
*Trap:* that maximum is ``lambda`` and not ``lambda/N`` under the disjoint mean, because somewhere an expert is heard
alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, floor
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from theory.errors import RecipeError
from theory.operators.effects import (
    Action,
    Effect,
    Operator,
    Setting,
    boolean_rows,
    group_rows,
    normalised,
    numbers,
    one_number,
    rows_of,
    scaled,
)
from theory.symbolic import FloatArray

JUMPS = {
    "ties": "an entry that crosses the trimming threshold, or votes that cancel, change the merge abruptly",
    "breadcrumbs": "an entry that crosses one of the two thresholds changes the merge abruptly",
    "sce": "selection by variance and sign election change the merge abruptly",
    "consensus_ta": "an entry that enters or leaves a TALL mask changes the merge abruptly",
    "consensus_ties": "trimming, election and TALL masks change the merge abruptly",
    "magmax": "where two entries of opposite signs have the same magnitude the merge jumps from one to the other",
    "emr": "where the votes cancel the elected sign jumps, and with it the merge",
    "adamerging_pp": "trimming and sign election change the merge abruptly",
    "pcb": "the entries kept jump with the scores",
}


def trimmed(task_vectors: ArrayLike, density: float, rounding: str = "up") -> FloatArray:
    """Keep the ``density`` share of largest magnitudes of each row of ``(N, P)``, zero elsewhere.

    >>> trimmed([[3.0, -1.0, 2.0, 0.5]], 0.5).tolist()
    [[3.0, 0.0, 2.0, 0.0]]
    """
    rows = np.atleast_2d(np.asarray(task_vectors, dtype=np.float64))
    exact = round(float(density) * rows.shape[1], 9)
    count = ceil(exact) if rounding == "up" else floor(exact)
    order = np.argsort(-np.abs(rows), axis=1, kind="stable")[:, :count]
    result = np.zeros_like(rows)
    np.put_along_axis(result, order, np.take_along_axis(rows, order, axis=1), axis=1)
    return result


def agreement(rows: ArrayLike, votes: ArrayLike | None = None) -> np.ndarray:
    """Which entries have the elected sign ``sign(sum_i rows_i)`` (or that of ``votes``), boolean ``(N, P)``."""
    entries = np.atleast_2d(np.asarray(rows, dtype=np.float64))
    sign = np.sign(entries.sum(axis=0) if votes is None else np.asarray(votes, dtype=np.float64))
    return np.asarray((np.sign(entries) == sign) & (sign != 0))


def elected_sensitivity(
    agreeing: ArrayLike,
    coefficients: ArrayLike | None = None,
    aggregation: str = "mean",
    coefficient: ArrayLike = 1.0,
    factor: ArrayLike = 1.0,
) -> FloatArray:
    """Norm of an elected merge's Jacobian in each expert, at fixed support and signs; shape ``(N, ...)``.

    ``M_k = lambda sum_i w_i a_ik f_ik Delta_ik / (sum_i w_i a_ik)`` (``mean``; without the denominator ``sum``), ``a``
    the boolean ``agreeing`` of shape ``(N, P)``, ``f`` a factor of the entries (1/(1-p) of survivors).  Exact and
    attained; *local*: the tier is *estimated*.

    >>> elected_sensitivity([[True, True], [True, False]]).tolist()  # expert 0 is heard alone at the second coordinate
    [1.0, 0.5]
    """
    a = np.atleast_2d(np.asarray(agreeing, dtype=np.float64))
    w = np.ones(len(a)) if coefficients is None else np.asarray(coefficients, dtype=np.float64)
    if w.shape != (len(a),):
        raise RecipeError("operator: coefficients over configurations do not go with agreeing; give N numbers")
    if aggregation == "mean" and np.any(w <= 0):
        raise RecipeError("operator: a weighted disjoint mean needs positive coefficients; use aggregation='sum'")
    gain = a * (normalised(w) if aggregation == "mean" else w)[:, None]
    if aggregation == "mean":
        mass = gain.sum(axis=0)
        gain = gain / np.where(mass == 0, 1.0, mass)
    largest = np.max(np.abs(gain * np.asarray(factor, dtype=np.float64)), axis=1)
    scale = np.abs(np.asarray(coefficient, dtype=np.float64))
    return np.asarray(largest.reshape(largest.shape + (1,) * scale.ndim) * scale)


def _no(name: str) -> str:
    return f"no guarantee: {JUMPS[name]}"


def _local(name: str, c: FloatArray, exact: bool) -> Effect:
    end = (
        "; this is the Jacobian's norm at the given support and signs"
        if exact
        else "; at fixed support and signs c_i is at most this (attained where the expert is heard alone)"
    )
    return Effect("local", _no(name) + end, c, c)


def ceiling(experts: int, given: Mapping[str, Any], by_coefficient: bool) -> FloatArray:
    """The largest local sensitivity whatever the support: lambda, times |alpha_i| where nothing is normalised."""
    if by_coefficient:
        return np.abs(scaled(given, experts))
    if np.any(np.asarray(given.get("coefficients", 1.0)) <= 0):
        raise RecipeError("operator: a weighted disjoint mean needs positive coefficients; use aggregation='sum'")
    scale = np.abs(np.asarray(given.get("coefficient", 1.0), dtype=np.float64))
    return np.broadcast_to(scale, (experts, *scale.shape)).copy()


def _ties(experts: int, given: Mapping[str, Any]) -> Effect:
    mean, weights = given["aggregation"] == "mean", given.get("coefficients")
    agreeing = given.get("agreeing")
    if agreeing is None and "task_vectors" in given:
        rows = rows_of("ties", "task_vectors", given["task_vectors"], experts)
        kept = trimmed(rows, one_number("ties", "density", given["density"]), given["rounding"])
        alpha = np.ones(experts) if weights is None or given["election"] == "plain" else np.asarray(weights)
        if alpha.ndim != 1:
            raise RecipeError("ties: coefficients over configurations do not go with task_vectors; give N numbers")
        turned = kept * (alpha[:, None] if not mean else 1.0)
        agreeing = agreement(turned, alpha @ kept)
    if agreeing is None:
        return _local("ties", ceiling(experts, given, not mean), False)
    votes = boolean_rows("ties", "agreeing", agreeing, experts)
    return _local("ties", elected_sensitivity(votes, weights, given["aggregation"], given["coefficient"]), True)


def _breadcrumbs(experts: int, given: Mapping[str, Any]) -> Effect:
    if given["election"] == "none":
        alpha = scaled(given, experts)
        if given["aggregation"] == "mean":
            total = np.asarray(given.get("coefficients", np.ones(experts))).sum(axis=0)
            if np.any(total == 0):
                raise RecipeError(
                    "breadcrumbs: coefficients sum to zero, so that there is no mean; choose aggregation sum"
                )
            alpha = alpha / total
        return _local("breadcrumbs", np.abs(alpha), True)
    if "agreeing" not in given:
        return _local("breadcrumbs", ceiling(experts, given, given["aggregation"] == "sum"), False)
    votes = boolean_rows("breadcrumbs", "agreeing", given["agreeing"], experts)
    c = elected_sensitivity(votes, given.get("coefficients"), given["aggregation"], given["coefficient"])
    return _local("breadcrumbs", c, True)


def _consensus_ta(experts: int, given: Mapping[str, Any]) -> Effect:
    alpha = scaled(given, experts)
    if np.all(given["threshold"] <= 0):
        c = np.abs(alpha)
        return Effect("global", "no coordinate is left out: task arithmetic", c, c, alpha, alpha, 0 * c)
    return _local("consensus_ta", np.abs(alpha), True)


def _consensus_ties(experts: int, given: Mapping[str, Any]) -> Effect:
    if "agreeing" not in given:
        return _local("consensus_ties", ceiling(experts, given, given["aggregation"] == "sum"), False)
    votes = boolean_rows("consensus_ties", "agreeing", given["agreeing"], experts)
    kept = votes
    if "used" in given:
        used = numbers("consensus_ties", "used", given["used"])
        if used.shape not in ((), (votes.shape[1],)):
            raise RecipeError(f"consensus_ties: used has shape {used.shape}; give one entry per coordinate")
        kept = votes * (used != 0)
    weights = given.get("coefficients")
    if given["aggregation"] == "mean":  # the mean is taken before the TALL masks
        w = np.ones(experts) if weights is None else normalised(np.asarray(weights))
        if w.ndim != 1:
            raise RecipeError(
                "consensus_ties: coefficients over configurations do not go with agreeing; give N numbers"
            )
        mass = (votes * w[:, None]).sum(axis=0)
        gain = kept * w[:, None] / np.where(mass == 0, 1.0, mass)
        heard = np.abs(gain).max(axis=1)
        scale = np.abs(np.asarray(given["coefficient"], dtype=np.float64))
        c = heard.reshape(heard.shape + (1,) * scale.ndim) * scale
    else:
        c = elected_sensitivity(kept, weights, "sum", given["coefficient"])
    return _local("consensus_ties", np.asarray(c), True)


def _winners(name: str) -> Any:
    def compute(experts: int, given: Mapping[str, Any]) -> Effect:
        scale = np.abs(np.asarray(given.get("coefficient", 1.0), dtype=np.float64))
        if "task_vectors" not in given:
            if experts == 1:
                reason = "of one expert it is that expert's task vector, scaled: linear"
                c = np.broadcast_to(scale, (1, *scale.shape)).copy()
                return Effect("global", reason, c, c, c, c, 0 * c)
            return _local(name, np.broadcast_to(scale, (experts, *scale.shape)).copy(), False)
        rows = rows_of(name, "task_vectors", given["task_vectors"], experts)
        if name == "emr":
            sign = np.sign(rows.sum(axis=0))
            rows = np.maximum(rows * sign, 0.0)
        size = np.abs(rows)
        wins = (size == size.max(axis=0)) & (size > 0)
        heard = wins.any(axis=1).astype(float)
        return _local(name, heard.reshape(heard.shape + (1,) * scale.ndim) * scale, True)

    return compute


def _adamerging_pp(experts: int, given: Mapping[str, Any]) -> Effect:
    rows = [np.asarray(given["coefficients"], dtype=np.float64)]
    if given.get("groups") is not None:
        rows += group_rows("adamerging_pp", given["groups"], experts)
        if rows[0].ndim != 1:
            raise RecipeError("adamerging_pp: coefficients over configurations do not go with groups; give N numbers")
    return _local("adamerging_pp", np.abs(np.stack(rows)).max(axis=0), True)


def sce_sensitivity(selected: ArrayLike) -> FloatArray:
    """Upper bound on SCE's local sensitivity in one tensor, from the selected entries ``(N, P)``; shape ``(N,)``.

    ``M_k = sum_i e_i a_ik s_ik/sum_i e_i a_ik`` with energies ``e_i = |s_i|^2``.  At fixed selection and signs the
    Jacobian is ``diag(e_i a_ik/mass_k) + u_i (2 s_i)'``, ``u_ik = a_ik (s_ik - M_k)/mass_k``: its norm is at most the
    largest share plus ``2 |u_i| |s_i|``.  (The weights react to the expert: the largest share alone is too small.)

    >>> sce_sensitivity([[2.0, 0.0], [0.0, 1.0]]).tolist()
    [1.0, 1.0]
    """
    s = np.atleast_2d(numbers("sce", "selected", selected))
    s = s / max(float(np.abs(s).max()), 1e-300)  # the sensitivity does not depend on the unit
    energy = (s**2).sum(axis=1)
    a = agreement(s) * energy[:, None]
    mass = a.sum(axis=0)
    safe = np.where(mass > 0, mass, 1.0)
    share = a / safe
    merged = (share * s).sum(axis=0)
    u = (a > 0) * (s - merged) / safe
    return np.asarray(share.max(axis=1) + 2 * np.sqrt((u**2).sum(axis=1)) * np.sqrt(energy))


def _sce(experts: int, given: Mapping[str, Any]) -> Effect:
    if "selected" not in given or given["selection"] != "merge" or np.any(given["floor"] > 0):
        return Effect(
            "none", _no("sce") + "; the energies react to the experts as well: give selected, or use products"
        )
    c = sce_sensitivity(rows_of("sce", "selected", given["selected"], experts))
    return Effect("local", _no("sce") + "; at fixed selection and signs the Jacobian's norm is at most this", c, c)


def _pcb(experts: int, given: Mapping[str, Any]) -> Effect:
    return Effect("none", _no("pcb") + ", and its weights depend on all entries: use derivative products")


def _operator(name: str, statement: str, source: str, compute: Any, sensitivity: str, **more: Any) -> Operator:
    actions = more.pop(
        "actions",
        (
            Action("dispersion", "either way", "conflict and own mass go to zero: V from the checkpoints"),
            Action("instability", "raises", "an expert heard alone enters with lambda", "fixed support and signs"),
        ),
    )  # fmt: skip
    return Operator(
        name=name,
        statement=statement,
        guarantee=more.pop("guarantee", "local"),
        sensitivity=f"no guarantee globally ({JUMPS[name]}); {sensitivity}",
        bias=more.pop("bias", "not linear: what is trimmed or outvoted is missing; measure it on the checkpoints"),
        second_moment="none (deterministic)",
        actions=actions,
        source=source,
        compute=compute,
        **more,
    )


def elected_operators() -> tuple[Operator, ...]:
    """Methods that trim, select or elect entries."""
    trim = Action("dispersion", "lowers", "on disjoint supports trimming task i lowers V", "lambda > 2 p_i")
    density = Setting("density", 0.2, 0.0, 1.0, low_open=True)
    scope = Setting("scope", "global", choices=("global", "tensor"))
    rounding = Setting("rounding", "up", choices=("up", "down"))
    mean = Setting("aggregation", "mean", choices=("mean", "sum"))
    total = Setting("aggregation", "sum", choices=("sum", "mean"))
    one = Setting("coefficient", 1.0)
    lambdas = (Setting("mask_lambda", 0.4, low=0.0), Setting("threshold", 2.0, low=0.0))
    agreeing = {"agreeing": "entries kept that have the elected sign, boolean, shape (N, P)"}
    vectors = {"task_vectors": "flat task vectors, shape (N, P)"}
    conflict = Action("dispersion", "either way", "conflict mass is set to zero; V from the checkpoints")
    alone = Action(
        "instability", "raises", "an expert heard alone enters with lambda, not lambda/N", "the disjoint mean"
    )
    return (
        _operator(
            "ties",
            "lambda mean{t_i : sign(t_i) = gamma}, t_i = trim(Delta_i), gamma = sign(sum t_i)",
            "Yadav et al. 2023, arXiv:2306.01708",
            _ties,
            "at fixed support and signs max over coordinates of lambda w_i/(sum of agreeing w), at most lambda",
            actions=(conflict, trim, alone),
            settings=(density, scope, mean, one, rounding, Setting("election", "plain", choices=("plain", "weighted"))),
            coefficients="optional",
            statistics={**agreeing, "task_vectors": "flat, shape (N, P) (of one tensor for scope='tensor')"},
        ),
        _operator(
            "breadcrumbs",
            "lambda sum_i alpha_i m_i Delta_i, m_i without the largest and the smallest entries",
            "Davari and Belilovsky 2024, arXiv:2312.06795",
            _breadcrumbs,
            "at fixed masks |lambda alpha_i|",
            actions=(trim, Action("instability", "lowers", "proportional to lambda", "fixed masks, lambda < 1")),
            settings=(
                Setting("density", 0.15, 0.0, 1.0, low_open=True),
                Setting("gamma", 0.006, 0.0, 1.0, high_open=True),
                Setting("ranking", "tensor", choices=("tensor", "row")),
                rounding,
                Setting("election", "none", choices=("none", "plain", "weighted")),
                total,
                Setting("coefficient", 0.2),
            ),
            coefficients="optional",
            statistics=agreeing,
        ),
        _operator(
            "sce",
            "sum_i e_i a_i s_i/sum_i e_i a_i on the coordinates of largest variance, e_i = |s_i|^2",
            "Wan et al. 2024, arXiv:2408.07990",
            _sce,
            "at fixed selection and signs at most max share + 2 |u_i| |s_i| (the energies react to the expert)",
            guarantee="none",
            settings=(
                Setting("density", 0.1, 0.0, 1.0, low_open=True),
                rounding,
                Setting("selection", "merge", choices=("merge", "weights")),
                Setting("floor", 0.0, low=0.0),
            ),
            statistics={"selected": "selected entries of one tensor, zero elsewhere, shape (N, P)"},
            experts=(2, None),
        ),
        _operator(
            "consensus_ta",
            "lambda [at least k experts use it] sum_i alpha_i Delta_i",
            "Wang et al. 2024, arXiv:2405.07813",
            _consensus_ta,
            "at fixed masks |lambda alpha_i|",
            actions=(
                Action(
                    "dispersion", "lowers", "leaves out mass that one expert uses", "disjoint supports, lambda > 2 p_i"
                ),
                Action("instability", "lowers", "proportional to lambda", "fixed masks, lambda < 1"),
            ),
            settings=(*lambdas, Setting("coefficient", 0.3)),
            coefficients="optional",
            statistics={"mask_lambdas": "one l per expert (does not change the sensitivity)"},
            experts=(2, None),
        ),
        _operator(
            "consensus_ties",
            "TIES on the coordinates that at least k experts use",
            "Wang et al. 2024, arXiv:2405.07813",
            _consensus_ties,
            "at fixed support, signs and masks TIES' on the coordinates that are left",
            actions=(conflict, trim, alone),
            settings=(*lambdas, density, scope, total, rounding, one),
            coefficients="optional",
            statistics={
                **agreeing,
                "used": "coordinates that are left, boolean, shape (P,)",
                "mask_lambdas": "one l per expert (does not change the sensitivity)",
            },
            experts=(2, None),
        ),
        _operator(
            "magmax",
            "lambda Delta_k at each coordinate, k of largest magnitude",
            "Marczak et al. 2024, arXiv:2407.06322",
            _winners("magmax"),
            "with fixed winners lambda for every expert that wins anywhere, 0 for others",
            actions=(
                Action("dispersion", "either way", "every coordinate is one expert's: the others' mass is lost"),
                Action("instability", "raises", "a winner enters with lambda, not lambda/N", "fixed winners"),
            ),
            settings=(Setting("coefficient", 0.5),),
            statistics=vectors,
        ),
        _operator(
            "emr",
            "gamma max{|Delta_i| : sign(Delta_i) = gamma}, gamma = sign(sum Delta_i)",
            "Huang et al. 2024, arXiv:2405.17461",
            _winners("emr"),
            "with fixed signs and winners 1 for every expert that wins anywhere, 0 for others",
            actions=(
                Action(
                    "dispersion", "raises", "takes the largest entry where averaging takes the mean", "entries agree"
                ),
                Action("instability", "raises", "a winner enters with 1, not 1/N", "fixed signs and winners"),
            ),
            settings=(Setting("rescaler", "sum", choices=("sum", "tensor_mean")),),
            statistics=vectors,
        ),
        _operator(
            "pcb",
            "lambda sum_i b_i alpha_i Delta_i/sum_i b_i, b_i by importance and agreement",
            "Du et al. 2024, arXiv:2410.02396",
            _pcb,
            "no closed form: the weights depend on all entries (softmax, extremes); use derivative products",
            guarantee="none",
            settings=(
                Setting("density", 0.1, 0.0, 1.0, low_open=True),
                scope,
                Setting("variant", "paper", choices=("paper", "code")),
                one,
            ),
            coefficients="optional",
        ),
        _operator(
            "adamerging_pp",
            "sum_i lambda_i Phi(Delta_i), Phi trims and removes what opposes the elected sign",
            "Yang et al. 2024, arXiv:2310.02575",
            _adamerging_pp,
            "at fixed support and signs |lambda_i| (the largest of all groups)",
            actions=(
                conflict,
                trim,
                Action("instability", "lowers", "|lambda_i|", "fixed support and signs, lambda < 1"),
            ),
            settings=(density,),
            coefficients="required",
            statistics={"groups": "coefficients of groups of tensors: mapping or sequence of rows of N numbers"},
        ),
    )
