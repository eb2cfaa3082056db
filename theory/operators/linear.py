"""Linear merges ``x_0 + sum_i alpha_i Delta_i``: ``c_i = |alpha_i|``, no bias, no noise; per layer the largest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from theory.errors import RecipeError
from theory.operators.effects import (
    Action,
    Effect,
    Operator,
    Setting,
    frozen,
    group_rows,
    normalised,
    numbers,
    one_number,
    rows_of,
    scaled,
)
from theory.symbolic import FloatArray

EXACT = "linear with fixed coefficients: a change of expert i moves the merge by exactly |alpha_i| times as much"

INSTABILITY = Action("instability", "lowers", "every expert's stability is multiplied by |alpha_i|", "|alpha_i| < 1")
DISPERSION = Action(
    "dispersion", "either way", "V(alpha) is a quadratic with its minimum at the p-average when H is isotropic"
)


def linear_effect(alpha: FloatArray, reference: FloatArray | None = None, **more: Any) -> Effect:
    """The effect of a linear merge with coefficients of shape ``(N, ...)``."""
    size = np.abs(alpha)
    base = alpha if reference is None else reference
    return Effect("global", EXACT, size, size, alpha, base, np.zeros_like(size), **more)


def _average(experts: int, given: Mapping[str, Any]) -> Effect:
    return linear_effect(np.full(experts, 1.0 / experts))


def _weighted(experts: int, given: Mapping[str, Any]) -> Effect:
    weights = given["coefficients"]
    if given["normalize"]:
        weights = normalised(weights)
        total = weights.sum(axis=0)
        if np.any(total == 0):
            raise RecipeError("weighted: coefficients sum to zero; change one, or set normalize=False")
        weights = weights / total
    return linear_effect(weights)


def _task_arithmetic(experts: int, given: Mapping[str, Any]) -> Effect:
    return linear_effect(scaled(given, experts))


def _wise_ft(experts: int, given: Mapping[str, Any]) -> Effect:
    alpha = np.asarray(given["alpha"], dtype=np.float64)
    return linear_effect(np.broadcast_to(alpha / experts, (experts, *alpha.shape)).copy())


def layered(alphas: FloatArray) -> Effect:
    """A merge with coefficients of its own in each layer, ``alphas`` of shape ``(layers, N)``: the largest counts."""
    size = np.abs(alphas).max(axis=0)
    if len(alphas) == 1 or np.all(alphas == alphas[:1]):
        return linear_effect(alphas[0])
    reason = "linear with fixed coefficients per layer: c_i is the largest |alpha_i| of a layer (attained there)"
    return Effect("global", reason, size, size, None, None, np.zeros_like(size))


def _lines(experts: int, given: Mapping[str, Any]) -> Effect:
    if "scales" in given:
        scales = numbers("lines", "scales", given["scales"]).reshape(-1, 1)
        return layered(np.repeat(scales, experts, axis=1))
    first, step = np.broadcast_arrays(given["alpha"] / experts, given["beta"])
    size = np.maximum(np.abs(first), np.abs(first + step))
    c = np.broadcast_to(size, (experts, *size.shape)).copy()
    reason = "linear per layer; scales run from alpha/N to alpha/N + beta, and the larger end is attained"
    return Effect("global", reason, c, c, None, None, np.zeros_like(c))


def _solved(name: str, why: str) -> Any:
    def compute(experts: int, given: Mapping[str, Any]) -> Effect:
        rows = [given["coefficients"]]
        if given.get("groups") is not None:
            rows += group_rows(name, given["groups"], experts)
            if rows[0].ndim != 1:
                raise RecipeError(f"{name}: coefficients over configurations do not go with groups; give N numbers")
        assumption = frozen("coefficients", why)
        if len(rows) == 1:
            return linear_effect(rows[0], assumptions=(assumption,))
        found = layered(np.stack(rows))
        return Effect(
            found.guarantee, found.reason, found.sensitivity, found.surely, found.mean, found.reference, found.noise,
            (assumption,),
        )  # fmt: skip

    return compute


def _greedy(experts: int, given: Mapping[str, Any]) -> Effect:
    reason = "which models enter changes abruptly with their held-out accuracies: the merge is discontinuous"
    if "ingredients" not in given:
        return Effect("none", reason + "; give ingredients for the sensitivity at that selection")
    given_places = numbers("greedy_soup", "ingredients", given["ingredients"]).ravel()
    if np.any(given_places != np.floor(given_places)) or not np.all(np.isfinite(given_places)):
        raise RecipeError("greedy_soup: ingredients are not whole numbers; give positions of the models in the soup")
    chosen = sorted({int(index) for index in given_places})
    if chosen[0] < 0 or chosen[-1] >= experts:
        raise RecipeError(f"greedy_soup: ingredients {chosen} are not positions of {experts} experts; correct them")
    alpha = np.zeros(experts)
    alpha[chosen] = 1.0 / len(chosen)
    return Effect(
        "local", reason + " (1/k for the k ingredients of a fixed selection)", alpha, alpha, alpha, alpha, 0 * alpha
    )


def _fisher(experts: int, given: Mapping[str, Any]) -> Effect:
    weights = np.asarray(given.get("coefficients", np.ones(experts)))
    if np.any(weights < 0) or not np.any(weights > 0):
        raise RecipeError("fisher: coefficients are negative or all zero; give nonnegative numbers, one positive")
    reason = "linear in every coordinate once the information is frozen; the largest share of an expert counts"
    assumption = frozen(
        "Fisher diagonals",
        "they are measured at the experts and on samples; where they move, add |d alpha/d x_i| |Delta|",
    )
    if "fisher" not in given:
        c = np.where(weights > 0, 1.0, 0.0)
        why = reason + "; without the diagonals only c_i <= 1 is known (a share), attained where others know nothing"
        return Effect("global", why, c, c, None, None, np.zeros(experts), (assumption,))
    share = fisher_shares(
        rows_of("fisher", "fisher", given["fisher"], experts),
        weights,
        floor=one_number("fisher", "floor", given["floor"]),
        flooring=given["flooring"],
        normalize=given["normalize"],
    )
    c = share.max(axis=1)
    return Effect("global", reason, c, c, None, None, np.zeros(experts), (assumption,))


def fisher_shares(
    fisher: FloatArray,
    coefficients: FloatArray,
    *,
    floor: float = 1e-6,
    flooring: str = "max",
    normalize: str = "none",
) -> FloatArray:
    """Every expert's share of every coordinate, ``w_i F_ik / sum_l w_l F_lk``, shape ``(N, P)``.

    ``fisher`` has shape ``(N, P)`` (nonnegative); ``normalize="none"`` takes the coefficients as they are, otherwise
    each is divided by the norm of its expert's row first (give the rows of one tensor at a time for ``"tensor"``).
    Where nobody knows anything the shares are those of the coefficients.  Source: Matena and Raffel 2022, section 3.2.

    >>> import numpy as np
    >>> fisher_shares(np.array([[3.0, 0.0], [1.0, 2.0]]), np.ones(2), floor=0.0).tolist()
    [[0.75, 0.0], [0.25, 1.0]]
    """
    if np.any(fisher < 0):
        raise RecipeError("fisher: fisher holds negative numbers; information is at least 0")
    scale = normalised(np.asarray(coefficients, dtype=np.float64))
    if not np.all(np.isfinite(fisher)) or not np.isfinite(floor):
        raise RecipeError("fisher: fisher or floor is not finite; collect it again")
    unit = max(float(fisher.max()), float(floor), 1e-300)  # shares do not depend on the unit
    fisher, floor = fisher / unit, floor / unit
    if normalize != "none":
        lengths = np.sqrt((fisher**2).sum(axis=1))
        if np.any(lengths == 0):
            raise RecipeError("fisher: the information of an expert is zero everywhere; set normalize='none'")
        scale = scale / lengths
    known = (fisher + floor if flooring == "add" else np.maximum(fisher, floor)) * scale[:, None]
    peak = known.max(axis=0)
    known = known / np.where(peak > 0, peak, 1.0)
    total = known.sum(axis=0)
    weights = normalised(np.asarray(coefficients, dtype=np.float64))
    plain = weights / weights.sum()
    return np.asarray(np.where(total > 0, known / np.where(total > 0, total, 1.0), plain[:, None]))


_SOUPS = "Wortsman et al. 2022, arXiv:2203.05482"
_NONE, _EXPECT = "none (deterministic)", "none: it is task arithmetic with these coefficients"
_CHOSEN = "coefficients are found from data: on held-out data A2 asks that it be independent of the training samples"
_GROUPS = {"groups": "coefficients of groups of tensors: mapping or sequence of rows of N numbers"}


def linear_operators() -> tuple[Operator, ...]:
    """Operators whose merged task vector is a linear combination (per coordinate) with frozen coefficients."""
    average = (
        Action("instability", "lowers", "every stability is divided by N, and the mean square by N^2"),
        Action(
            "dispersion",
            "lowers",
            "the p-average minimises isotropic V; V = mean(d^2)(1 - 1/N) if orthogonal",
            "uniform p",
        ),
    )
    solved = (
        Action("dispersion", "lowers", "coefficients minimise a prediction of the left side, not a term of the bound"),
        INSTABILITY,
    )
    return (
        Operator("average", "(1/N) sum_i Delta_i", "global", "1/N", _EXPECT, _NONE, average, _SOUPS, _average),
        Operator("uniform_soup", "(1/N) sum_i Delta_i", "global", "1/N", _EXPECT, _NONE, average, _SOUPS, _average),
        Operator(
            "weighted", "sum_i w_i Delta_i, w normalised to sum 1", "global", "|w_i|", _EXPECT, _NONE,
            (INSTABILITY, Action("dispersion", "lowers", "w = p minimises isotropic V", "w = p")),
            "Matena and Raffel 2022, arXiv:2111.09832", _weighted, (Setting("normalize", True),), "required",
        ),
        Operator(
            "task_arithmetic", "lambda sum_i alpha_i Delta_i", "global", "|lambda alpha_i|", _EXPECT, _NONE,
            (
                Action("instability", "lowers", "proportional to lambda", "lambda < 1"),
                Action("dispersion", "either way", "lambda* = 1/(1 + (N-1) rho) balances own and cross-task mass"),
            ),
            "Ilharco et al. 2023, arXiv:2212.04089", _task_arithmetic, (Setting("coefficient", 0.3),), "optional",
        ),
        Operator(
            "wise_ft", "(alpha/N) sum_i Delta_i", "global", "alpha/N",
            "none: task arithmetic with lambda = alpha/N", _NONE,
            (
                Action("instability", "lowers", "proportional to alpha", "alpha < 1"),
                Action("dispersion", "raises", "V = V_average + (1-alpha)^2 |mean task vector|^2", "uniform p"),
            ),
            "Wortsman et al. 2022, arXiv:2109.01903", _wise_ft, (Setting("alpha", 0.5, 0.0, 1.0),),
        ),
        Operator(
            "lines", "lambda_l sum_i Delta_i in layer l, lambda_l = alpha/N + beta (l-1)/(L-1)", "global",
            "max_l |lambda_l| = max(|alpha/N|, |alpha/N + beta|)",
            "none: task arithmetic with a coefficient per layer", _NONE,
            (
                Action("instability", "raises", "the last layer carries alpha/N + beta", "alpha = 1, beta > 0"),
                Action("dispersion", "either way", "pays in shallow layers only if task vectors conflict there"),
            ),
            "Wang et al. 2025, arXiv:2410.17146", _lines,
            (Setting("alpha", 1.0), Setting("beta", 0.5), Setting("outside", "first", choices=("first", "depth"))),
            statistics={"scales": "the scale of every layer that is present, shape (layers,)"},
        ),
        Operator(
            "risk_optimal", "sum_i alpha_i Delta_i minimising the predicted risk", "global", "|alpha_i|", _EXPECT,
            _NONE, solved, "this project", _solved("risk_optimal", _CHOSEN), (), "required", _GROUPS,
        ),
        Operator(
            "curvature_optimal", "sum_i alpha_i Delta_i, alpha minimising a curvature model", "global", "|alpha_i|",
            _EXPECT, _NONE, solved, "this project", _solved("curvature_optimal", _CHOSEN), (), "required", _GROUPS,
        ),
        Operator(
            "adamerging", "sum_i lambda_i^l Delta_i^l, lambda adapted to images", "global",
            "max_l |lambda_i^l|", _EXPECT, _NONE,
            (Action("dispersion", "either way", "minimises entropy, a proxy of the left side"), INSTABILITY),
            "Yang et al. 2024, arXiv:2310.02575", _solved("adamerging", _CHOSEN), (), "required", _GROUPS,
        ),
        Operator(
            "greedy_soup", "mean of the models that do not lower held-out accuracy", "none",
            "no guarantee globally (the selection jumps); 1/k for the k ingredients of a fixed selection",
            "none given the selection", _NONE,
            (
                Action("training", "lowers", "models with a high risk are left out"),
                Action("dispersion", "lowers", "distant models are left out: V counts the ingredients", "one task"),
                Action("instability", "raises", "1/k instead of 1/N", "k < N and a fixed selection"),
            ),
            _SOUPS, _greedy,
            (Setting("accept", "at_least", choices=("at_least", "above")),),
            statistics={"ingredients": "positions of the models in the soup"},
        ),
        Operator(
            "fisher", "sum_i w_i F_i Delta_i / sum_l w_l F_l, coordinate by coordinate", "global",
            "max over coordinates of w_i F_ik / sum_l w_l F_lk",
            "none against a weighted mean with these shares; shares differ between coordinates", _NONE,
            (
                Action(
                    "dispersion", "lowers", "minimises sum_i p_i |M - x_i|^2 in the Fisher norms (isotropic V rises)",
                    "weighted by p_i F_i, and F_i close to the Hessian",
                ),
                Action("instability", "raises", "an expert that alone knows a coordinate decides it: c_i up to 1"),
            ),
            "Matena and Raffel 2022, arXiv:2111.09832", _fisher,
            (
                Setting("floor", 1e-6, low=0.0),
                Setting("flooring", "max", choices=("max", "add")),
                Setting("normalize", "none", choices=("none", "model", "tensor")),
            ),
            "optional",
            {"fisher": "diagonals, shape (N, P) (one tensor's for normalize='tensor')"},
        ),
    )  # fmt: skip
