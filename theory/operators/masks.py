"""Random masks: DARE and DELLA are Lipschitz in mean square over the seeds, and pay for it with dispersion.

For one coordinate of one expert, kept with probability ``1 - q`` and divided by it, the merge holds ``alpha m/(1-q)``:
mean ``alpha``, second moment ``alpha^2/(1-q)``, variance ``alpha^2 q/(1-q)``.  Twins share the masks (A2), so the
second moment is the squared sensitivity, and the largest value ``alpha/(1-q)`` holds for every seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    numbers,
    over,
    rows_of,
    scaled,
)
from theory.operators.elected import ceiling, elected_sensitivity
from theory.symbolic import FloatArray, Formula, evaluate, times
from theory.symbols import symbol


def mask_sensitivity_formula() -> Formula:
    """Root mean square over masks, survivors rescaled: ``|alpha|/sqrt(1 - drop)``."""
    import sympy

    alpha, drop = symbol("alpha"), symbol("drop")
    return Formula("sensitivity", ("alpha", "drop"), sympy.Abs(alpha) / sympy.sqrt(1 - drop), "section 10, DARE")


def plain_mask_sensitivity_formula() -> Formula:
    """Root mean square over masks, survivors as they are: ``|alpha| sqrt(1 - drop)``."""
    import sympy

    alpha, drop = symbol("alpha"), symbol("drop")
    return Formula("sensitivity", ("alpha", "drop"), sympy.Abs(alpha) * sympy.sqrt(1 - drop), "section 10, DARE")


def mask_noise_formula() -> Formula:
    """What a rescaled mask adds to V per unit of squared task vector: ``alpha^2 drop/(1 - drop)``."""
    alpha, drop = symbol("alpha"), symbol("drop")
    return Formula("noise", ("alpha", "drop"), alpha**2 * drop / (1 - drop), "section 10, DARE")


def plain_mask_noise_formula() -> Formula:
    """What a mask without rescaling adds to V per unit of squared task vector: ``alpha^2 drop (1 - drop)``."""
    alpha, drop = symbol("alpha"), symbol("drop")
    return Formula("noise", ("alpha", "drop"), alpha**2 * drop * (1 - drop), "section 10, DARE")


def _noise(formula: Callable[[], Formula], alpha: FloatArray, drop: FloatArray) -> FloatArray:
    """A noise formula with ``0 * inf = 0``: nothing is dropped, or nothing is there."""
    return np.where((alpha == 0) | (drop == 0), 0.0, evaluate(formula, alpha, drop))


def _masked(alpha: FloatArray, drop: Any, rescale: bool, reason: str) -> Effect:
    alpha, rate = over(alpha, drop)
    size = np.abs(alpha)
    if rescale:
        c, noise = evaluate(mask_sensitivity_formula, alpha, rate), _noise(mask_noise_formula, alpha, rate)
        return Effect("mean square", reason, c, size / (1 - rate), alpha + 0 * rate, alpha + 0 * rate, noise)
    c, noise = evaluate(plain_mask_sensitivity_formula, alpha, rate), _noise(plain_mask_noise_formula, alpha, rate)
    return Effect("mean square", reason, c, size + 0 * rate, alpha * (1 - rate), alpha + 0 * rate, noise)


_MASKS = "linear for each mask, and twins share masks; c_i is the root mean square over them, exact for every pair"
_L1 = (
    "survivors are rescaled to the L1 norm of their tensor: where all that survives is small, the factor "
    "|Delta|_1/|m Delta|_1 grows without bound, so no constant serves all inputs"
)


def _dare(experts: int, given: Mapping[str, Any]) -> Effect:
    alpha = scaled(given, experts)
    if not given["rescale"] or given["rescaling"] == "probability":
        return _masked(alpha, given["drop"], given["rescale"], _MASKS)
    if "task_vectors" not in given or "masks" not in given:
        return Effect("none", _L1 + "; give task_vectors and masks (one tensor) for the sensitivity there")
    rows = rows_of("dare", "task_vectors", given["task_vectors"], experts)
    masks = boolean_rows("dare", "masks", given["masks"], experts)
    if rows.shape != masks.shape:
        raise RecipeError(f"dare: masks of shape {masks.shape} do not fit task_vectors of shape {rows.shape}")
    local = np.array([l1_mask_sensitivity(row, mask > 0) for row, mask in zip(rows, masks, strict=True)])
    c = np.abs(alpha) * local.reshape(local.shape + (1,) * (alpha.ndim - 1))
    return Effect("local", _L1 + "; this is the Jacobian's norm for the given masks", c, c)


def l1_mask_sensitivity(task_vector: ArrayLike, mask: ArrayLike) -> float:
    """Norm of the Jacobian of ``m Delta |Delta|_1/|m Delta|_1`` (one tensor, flat) for a fixed mask m; unit 1.

    ``J = r diag(m) + (m Delta) g'`` with ``r = |Delta|_1/|m Delta|_1`` and ``g = sign(Delta) (1 - r m)/|m Delta|_1``: a
    projection plus a rank-one matrix.  Local: signs fixed.  Zero where nothing survives (the shipped convention).

    >>> round(l1_mask_sensitivity([1.0, 1.0], [True, False]), 12)  # M = (Delta_1 + Delta_2, 0) up to signs
    1.414213562373
    """
    x, m = np.asarray(task_vector, dtype=np.float64), np.asarray(mask, dtype=bool)
    x = x / max(float(np.abs(x).max(initial=0.0)), 1e-300)  # the sensitivity does not depend on the unit
    kept = np.where(m, x, 0.0)
    rest = float(np.abs(kept).sum())
    if rest == 0:
        return 0.0
    r = float(np.abs(x).sum()) / rest
    g = np.sign(x) * (1.0 - r * m) / rest
    return projection_plus_rank_one(r, int(m.sum()), kept, g, np.where(m, g, 0.0))


def projection_plus_rank_one(r: float, rank: int, a: FloatArray, g: FloatArray, projected: FloatArray) -> float:
    """Norm of ``r P + a g'`` for an orthogonal projection P of this rank with ``P a = a`` and ``P g`` as given."""
    # J J' = r^2 P + r (a (Pg)' + (Pg) a') + |g|^2 a a': r^2 on the rest of the range, a 2x2 problem on span(a, Pg)
    basis = np.linalg.qr(np.stack([a, projected], axis=1))[0]
    A, B = basis.T @ a, basis.T @ projected
    small = r**2 * np.eye(2) + r * (np.outer(A, B) + np.outer(B, A)) + float(g @ g) * np.outer(A, A)
    if rank <= 1:
        return float(np.sqrt(r**2 + 2 * r * float(a @ projected) + float(g @ g) * float(a @ a)))
    return float(np.sqrt(max(np.linalg.eigvalsh(small).max(), r**2 if rank > 2 else 0.0)))


def _fused(name: str, experts: int, given: Mapping[str, Any], factor: FloatArray, gain: FloatArray) -> Effect:
    """Election after masks: nothing global; at fixed masks, support and signs a diagonal Jacobian."""
    if "agreeing" in given:
        agreeing = boolean_rows(name, "agreeing", given["agreeing"], experts)
        scale = given["coefficient"]
        c = elected_sensitivity(agreeing, given.get("coefficients"), given["aggregation"], scale, factor)
        c = np.multiply(*over(c, gain))
        return Effect("local", _ELECTED + "; this is the Jacobian's norm for these masks, support and signs", c, c)
    reason = _ELECTED + "; at fixed masks, support and signs c_i is at most this (where the expert alone is heard)"
    c = ceiling(experts, given, given["aggregation"] == "sum")
    c = np.multiply(*over(c, gain))
    return Effect("local", reason, c, c)


_ELECTED = "the elected sign jumps where the votes cancel: discontinuous for every mask, so there is no guarantee"


def _dare_ties(experts: int, given: Mapping[str, Any]) -> Effect:
    if given["rescale"] and given["rescaling"] == "l1":
        return Effect("none", _ELECTED + "; " + _L1)
    keep = 1 - np.asarray(given["drop"], dtype=np.float64)
    return _fused("dare_ties", experts, given, np.ones(()), 1 / keep if given["rescale"] else np.ones_like(keep))


def drop_probabilities(
    task_vector: ArrayLike, drop: float = 0.3, window: float = 0.14, probability: str = "rank"
) -> FloatArray:
    """DELLA's drop probability of every entry of one row (flat): from ``drop - window/2`` for the largest magnitude to
    ``drop + window/2`` for the smallest, by rank (of equal ones the first counts as larger).

    >>> drop_probabilities([3.0, -1.0, 2.0], 0.3, 0.2).round(9).tolist()
    [0.2, 0.4, 0.3]
    """
    x = np.abs(np.asarray(task_vector, dtype=np.float64))
    if probability == "magnitude":
        low, high = x.min(), x.max()
        place = (high - x) / (high - low) if high > low else np.full(x.shape, 0.5)
    else:
        rank = np.empty(x.size)
        rank[np.argsort(-x, kind="stable")] = np.arange(x.size)
        place = rank / x.size if probability == "step" else rank / (x.size - 1) if x.size > 1 else np.full(1, 0.5)
    return np.asarray((drop - window / 2) + window * place)


def mask_variance(
    task_vectors: ArrayLike, probabilities: ArrayLike, alpha: ArrayLike, *, rescale: bool = True
) -> FloatArray:
    """``E |M - E M|^2 = sum_i alpha_i^2 sum_j f(p_ij) Delta_ij^2``, ``f = p/(1-p)`` rescaled, ``p(1-p)`` not (param^2).

    Exact for independent masks without election.  ``task_vectors`` and ``probabilities`` have shape ``(N, P)``.  With
    probabilities that fall with the magnitude this is below DARE's at the same mean rate if mass is concentrated, and
    *above* it for equal magnitudes, because ``p/(1-p)`` is convex.

    >>> float(mask_variance([[2.0, 0.0]], [[0.5, 0.9]], [0.5]))
    1.0
    """
    rows = np.atleast_2d(np.asarray(task_vectors, dtype=np.float64))
    p = np.atleast_2d(np.asarray(probabilities, dtype=np.float64))
    if np.any((p < 0) | (p >= 1)):
        raise RecipeError("masks: probabilities are outside [0, 1); correct drop and window")
    weights = np.asarray(alpha, dtype=np.float64).reshape(-1, 1)
    formula = mask_noise_formula if rescale else plain_mask_noise_formula
    return np.asarray(times(_noise(formula, weights, p), rows**2).sum())


_RANKS = (
    "drop probabilities follow the ranks of magnitudes, and jump where two entries swap: exact at fixed ranks, "
    "discontinuous (also in mean square) across them"
)
_MAGNITUDE = (
    "drop probabilities move with the magnitudes, so twins differ in |p - p'| of their masks: the mean square is of "
    "first order in the distance, and no constant bounds it even nearby"
)


def _della(experts: int, given: Mapping[str, Any]) -> Effect:
    drop, window = np.asarray(given["drop"], dtype=np.float64), np.asarray(given["window"], dtype=np.float64)
    low, high = drop - window / 2, drop + window / 2
    if np.any(low < 0) or np.any(high >= 1):
        raise RecipeError("della: drop -+ window/2 leaves [0, 1); choose a smaller window")
    rescale = given["rescale"]
    if rescale and given["rescaling"] == "l1":
        return Effect("none", _L1)
    if given["election"] != "none":
        if "probabilities" in given and "agreeing" in given and rescale:
            chances = rows_of("della", "probabilities", given["probabilities"], experts)
            if np.any((chances < 0) | (chances >= 1)):
                raise RecipeError("della: probabilities are outside [0, 1); correct drop and window")
            factor = 1 / (1 - chances)
            return _fused("della", experts, given, factor, np.ones(()))
        return _fused("della", experts, given, np.ones(()), 1 / (1 - high) if rescale else np.ones_like(high))
    alpha = scaled(given, experts)
    if given["aggregation"] == "mean":
        weights = np.asarray(given.get("coefficients", np.ones(experts)))
        total = weights.sum(axis=0)
        if np.any(total == 0):
            raise RecipeError("della: coefficients sum to zero, so that there is no mean; choose aggregation sum")
        alpha = alpha / total
    if np.all(window == 0):
        return _masked(alpha, drop, rescale, _MASKS + " (no window: DARE)")
    if given["probability"] == "magnitude":
        return Effect("none", _MAGNITUDE, reference=alpha)
    if "probabilities" in given:
        chances = rows_of("della", "probabilities", given["probabilities"], experts)
        if np.any((chances < 0) | (chances >= 1)):
            raise RecipeError("della: probabilities are outside [0, 1); correct drop and window")
        low, high = (edge(chances, axis=1).reshape(-1, *(1,) * (alpha.ndim - 1)) for edge in (np.min, np.max))
    else:
        (_, low), (alpha, high) = over(alpha, low), over(alpha, high)
    reference, size = alpha + 0 * high, np.abs(alpha)
    if rescale:
        c, noise = evaluate(mask_sensitivity_formula, alpha, high), _noise(mask_noise_formula, alpha, high)
        return Effect("local", _RANKS, c, size / (1 - high), reference, reference, noise)
    c = evaluate(plain_mask_sensitivity_formula, alpha, low)
    noise = _noise(plain_mask_noise_formula, alpha, np.clip(0.5, low, high))  # p(1-p) is largest next to one half
    return Effect("local", _RANKS, c, size + 0 * high, None, reference, noise)


def trim_change_formula() -> Formula:
    """Change of V when mass d^2 of task i is trimmed and no other task moves there: ``(2 p lambda - lambda^2) d^2``."""
    p, lam, d = symbol("p"), symbol("lambda_"), symbol("d")
    return Formula("V", ("p", "lambda_", "d"), (2 * p * lam - lam**2) * d**2, "section 10, trim")


def trim_change(weight: ArrayLike, coefficient: ArrayLike, removed: ArrayLike) -> FloatArray:
    """What trimming does to V for disjoint supports: ``V' - V = (2 p_i - lambda) lambda |removed|^2`` (param^2).

    ``weight`` p_i, ``coefficient`` lambda, ``removed`` the norm of what is set to zero; broadcasting.  Trimming lowers
    V exactly if ``lambda > 2 p_i``: it removes cross-task mass (``(1 - p_i) lambda^2``) and own mass alike.  *Tight*
    (an identity).

    >>> float(trim_change(0.5, 0.3, 2.0)) > 0, float(trim_change(0.125, 0.3, 2.0)) < 0
    (True, True)
    """
    p, lam, mass = (
        numbers("trim", name, value)
        for name, value in (("weight", weight), ("coefficient", coefficient), ("removed", removed))
    )
    for name, good in (("weight", (p >= 0) & (p <= 1)), ("coefficient", np.isfinite(lam)), ("removed", mass >= 0)):
        if not np.all(good):
            raise RecipeError(f"trim: {name} is outside its domain; give p in [0, 1], a finite lambda, a norm >= 0")
    change = evaluate(trim_change_formula, p, lam, mass)
    return np.where((mass == 0) | (lam == 0), 0.0, change)


def mask_operators() -> tuple[Operator, ...]:
    """DARE, DARE-TIES, DELLA."""
    raises = Action(
        "dispersion", "raises", "the masks' variance is added to V: never below task arithmetic", "rescaled"
    )
    drop = Setting("drop", 0.5, 0.0, 1.0, high_open=True)
    rescale = Setting("rescale", True)
    rescaling = Setting("rescaling", "probability", choices=("probability", "l1"))
    aggregation = Setting("aggregation", "mean", choices=("mean", "sum"))
    agreeing = {"agreeing": "entries that survive and agree with the elected sign, boolean, shape (N, P)"}
    ties = (
        Action("dispersion", "either way", "conflict mass is set to zero, the masks' variance is added"),
        Action("instability", "raises", "an expert heard alone enters with lambda/(1-drop)", "fixed masks and signs"),
    )
    return (
        Operator(
            name="dare",
            statement="lambda sum_i alpha_i m_i Delta_i/(1-q), masks Bernoulli(1-q)",
            guarantee="mean square",
            sensitivity="|lambda alpha_i|/sqrt(1-q) in mean square, |lambda alpha_i|/(1-q) for every seed; "
            "without rescaling |lambda alpha_i| sqrt(1-q) and |lambda alpha_i|; rescaling to L1 norms: no guarantee",
            bias="none rescaled by probability; -q lambda sum Delta_i without rescaling; L1 rescaling is biased",
            second_moment="lambda^2 q/(1-q) sum |Delta_i|^2 (one mask for all: |sum Delta_i|^2); "
            "without rescaling lambda^2 q(1-q) sum |Delta_i|^2",
            actions=(
                raises,
                Action("instability", "raises", "1/sqrt(1-q) above task arithmetic", "rescaled"),
                Action("instability", "lowers", "sqrt(1-q) below task arithmetic", "not rescaled"),
            ),
            source="Yu et al. 2024, arXiv:2311.03099",
            compute=_dare,
            settings=(drop, rescale, rescaling, Setting("coefficient", 0.3)),
            coefficients="optional",
            statistics={
                "task_vectors": "flat task vectors of one tensor, shape (N, P) (for rescaling='l1')",
                "masks": "which entries were kept, boolean, shape (N, P) (for rescaling='l1')",
            },
        ),
        Operator(
            name="dare_ties",
            statement="lambda mean{s_i : sign(s_i) = gamma}, s_i = m_i Delta_i/(1-q), gamma = sign(sum s_i)",
            guarantee="local",
            sensitivity="no guarantee globally (the election is discontinuous); for fixed masks, support and signs "
            "max over coordinates of lambda w_i/((1-q) sum of agreeing w), at most lambda/(1-q)",
            bias="not linear in expectation: the election keeps the majority's entries",
            second_moment="no closed form: the masks also decide who is heard; measure V on the checkpoints",
            actions=ties,
            source="Yu et al. 2024, arXiv:2311.03099",
            compute=_dare_ties,
            settings=(
                drop,
                rescale,
                rescaling,
                Setting("density", 1.0, 0.0, 1.0, low_open=True),
                Setting("scope", "tensor", choices=("tensor", "global")),
                aggregation,
                Setting("election", "plain", choices=("plain", "weighted")),
                Setting("coefficient", 1.0),
            ),
            coefficients="optional",
            statistics=agreeing,
        ),
        Operator(
            name="della",
            statement="lambda mean{s_i : sign(s_i) = gamma}, s_ij = m_ij Delta_ij/(1-p_ij), p_ij by magnitude rank",
            guarantee="local",
            sensitivity="no guarantee globally (ranks and election are discontinuous); without election, at fixed "
            "ranks, c_i^2 = alpha_i^2 max_j 1/(1-p_ij) in mean square; with it at most lambda/(1-p_max)",
            bias="none without election, rescaled by probability; else not linear in expectation",
            second_moment="sum_i alpha_i^2 sum_j p_ij/(1-p_ij) Delta_ij^2 without election (exact given ranks): below "
            "DARE's where mass is concentrated, above it for equal magnitudes",
            actions=ties,
            source="Deep et al. 2024, arXiv:2406.11617",
            compute=_della,
            settings=(
                Setting("drop", 0.3, 0.0, 1.0, high_open=True),
                Setting("window", 0.14, 0.0, 1.0, high_open=True),
                Setting("ranking", "row", choices=("row", "tensor")),
                Setting("probability", "rank", choices=("rank", "step", "magnitude")),
                rescale,
                rescaling,
                Setting("election", "plain", choices=("plain", "weighted", "none")),
                aggregation,
                Setting("coefficient", 1.0),
            ),
            coefficients="optional",
            statistics={**agreeing, "probabilities": "drop probability of every entry, shape (N, P)"},
        ),
    )
