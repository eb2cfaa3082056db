"""Merges inside the span of their inputs, ``M = sum_l c_l(G) v_l`` with ``G_ik = <v_i, v_k>``: SLERP and its relatives.

Their Jacobian with respect to expert i is ``c_i I + sum_lk (dc_l/dG_ik) v_l v_k'`` (twice the derivative for k = i):
the identity plus a matrix that lives in the span.  With ``G = R R'`` its norm is

    ``max(|c_i|, |c_i I + R' B R|)``,  ``B_lk = dc_l/dG_ik``,

so that an exact local sensitivity needs the N x N inner products and nothing else.  The derivatives of the
(closed-form) coefficients are taken by complex steps, exact to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory.errors import RecipeError
from theory.operators.effects import Action, Effect, Operator, Setting, normalised, numbers, one_number
from theory.symbolic import FloatArray, Formula, evaluate
from theory.symbols import symbol

Complex = NDArray[np.complex128]
Coefficients = Callable[[Complex], Complex]
"""``(N, N)`` inner products to the N coefficients of the result, analytic where it is differentiable."""

_STEP = 1e-30


def span_sensitivity(gram: ArrayLike, coefficients: Coefficients, *, room: bool = True) -> FloatArray:
    """Norm of the Jacobian with respect to each vector of ``M = sum_l c_l(G) v_l``; shape ``(N,)``.

    Args:
        gram: inner products of the N vectors, shape ``(N, N)``; for blocks (tensors) with a problem of their own
            ``(blocks, N, N)``, of which the largest counts.
        coefficients: the function c, which must accept complex input (:mod:`theory.operators.span` has those of SLERP,
            multi-SLERP, Karcher and Model Stock).
        room: whether there are more dimensions than vectors, so that some direction is orthogonal to all of them.

    *Exact and attained*, at the given vectors only: *local*, tier *estimated*.

    >>> import numpy as np
    >>> span_sensitivity(np.eye(2), lambda G: np.array([0.5, 0.5]) + 0 * G[0]).tolist()  # constant: linear
    [0.5, 0.5]
    """
    blocks = np.asarray(gram, dtype=np.float64)
    if blocks.ndim not in (2, 3) or blocks.shape[-1] != blocks.shape[-2] or blocks.size == 0:
        raise RecipeError(f"span: gram has shape {blocks.shape}; give inner products, (N, N) or (blocks, N, N)")
    if not np.all(np.isfinite(blocks)):
        raise RecipeError("span: gram is not finite; compute the inner products in double precision")
    flat = blocks.reshape(-1, *blocks.shape[-2:])
    peak = np.abs(flat).max(axis=(1, 2))
    lowest = np.linalg.eigvalsh(flat / np.where(peak > 0, peak, 1.0)[:, None, None]).min()
    symmetric = np.all(np.abs(flat - np.swapaxes(flat, 1, 2)) <= 1e-9 * peak[:, None, None])
    if not symmetric or lowest < -1e-9:
        raise RecipeError("span: gram is not symmetric positive semidefinite; give inner products of vectors")
    found = [_block_norms(block, coefficients, room) for block in flat]
    return np.asarray(np.max(found, axis=0))


def _block_norms(gram: FloatArray, coefficients: Coefficients, room: bool) -> FloatArray:
    size = len(gram)
    own = np.real(coefficients(gram.astype(np.complex128)))
    values, vectors = np.linalg.eigh(gram)
    kept = values > 1e-14 * max(values[-1], 0.0)
    root = vectors[:, kept] * np.sqrt(values[kept])  # G = R R'
    norms = []
    for i in range(size):
        B = np.empty((size, size))
        for k in range(size):
            moved = gram.astype(np.complex128)
            moved[i, k] += 1j * _STEP
            if k != i:
                moved[k, i] += 1j * _STEP
            B[:, k] = np.imag(coefficients(moved)) / _STEP * (2.0 if k == i else 1.0)
        inner = own[i] * np.eye(root.shape[1]) + root.T @ B @ root
        if not np.all(np.isfinite(inner)):  # singular here: no derivative
            norms.append(np.inf)
            continue
        inside = float(np.linalg.norm(inner, 2)) if inner.size else 0.0
        norms.append(max(inside, abs(own[i])) if room or not inner.size else inside)
    return np.asarray(norms)


def model_stock_ratio_formula() -> Formula:
    """Model Stock's ratio ``t = N cos/(1 + (N-1) cos)``, cos the mean pairwise cosine."""
    N, cosine = symbol("N"), symbol("cosine")
    return Formula("t", ("N", "cosine"), N * cosine / (1 + (N - 1) * cosine), "section 10, Model Stock")


def model_stock_slope_formula() -> Formula:
    """``dt/dcos = N/(1 + (N-1) cos)^2``: how fast Model Stock's ratio reacts to the angle."""
    import sympy

    made = model_stock_ratio_formula()
    return Formula("slope", made.keys, sympy.simplify(sympy.diff(made.expression, symbol("cosine"))), made.source)


def model_stock_sensitivity(gram: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Model Stock with frozen ratio and with its derivative: ``(|t|/N, local c_i)`` from the task vectors' gram.

    ``J_i = (t/N) I + m (dt/dDelta_i)'``, ``m`` the mean task vector,
    ``dt/dDelta_i = N/(1+(N-1)cos)^2 * 2/(N(N-1)) sum_j (u_j - cos_ij u_i)/|Delta_i|``.  *Trap:* the frozen value is not
    the sensitivity: short task vectors turn easily.

    >>> frozen, full = model_stock_sensitivity([[1.0, 0.5], [0.5, 1.0]])
    >>> bool(full[0] > frozen[0])
    True
    """
    G = np.asarray(gram, dtype=np.float64)
    full = span_sensitivity(G, model_stock_coefficients)
    ratio = np.abs(np.real(model_stock_coefficients(G.astype(np.complex128))))
    return ratio, full


def _unit(gram: Complex) -> tuple[Complex, Complex]:
    squares = np.diagonal(gram)
    lengths = np.sqrt(squares)
    safe = np.where(np.real(squares) > 0, lengths, 1.0)
    return np.where(np.real(squares) > 0, lengths, 0.0), gram / safe[:, None] / safe[None, :]


def model_stock_coefficients(gram: Complex, average: str = "cosine", clamp: bool = False) -> Complex:
    """Coefficients of Model Stock, all ``t/N``."""
    size = len(gram)
    _, cosine = _unit(gram)
    pairs = cosine[np.triu_indices(size, 1)]
    common = pairs.mean() if average == "cosine" else np.cos(np.arccos(pairs).mean())
    below = 1 + (size - 1) * common
    ratio = size * common / below if abs(below) > 1e-9 else 0 * common
    if clamp and np.real(ratio) < 0:
        ratio = 0 * ratio
    return np.full(size, ratio / size, dtype=np.complex128)


def slerp_weight_formula() -> Formula:
    """SLERP's weight ``sin(s angle)/sin(angle)`` with ``s = 1 - t`` for the first vector and t for the second."""
    import sympy

    s, angle = symbol("fraction"), symbol("angle")
    return Formula("weight", ("fraction", "angle"), sympy.sin(s * angle) / sympy.sin(angle), "Shoemake 1985")


def slerp_coefficients(
    gram: Complex, t: float = 0.5, magnitude: str = "combined", threshold: float = 0.9995
) -> Complex:
    """SLERP's two coefficients; linear beyond the threshold and where a vector is zero."""
    lengths, cosine = _unit(gram)
    linear = np.array([1 - t, t], dtype=np.complex128)
    c = cosine[0, 1]
    if np.real(lengths).min() == 0 or abs(np.real(c)) > threshold or 1 - abs(np.real(c)) < 1e-12:
        return np.asarray(linear + 0 * c)
    angle = np.arccos(c)
    weights: Complex = np.sin(linear * angle) / np.sin(angle)
    return np.asarray(weights * (linear @ lengths) / lengths) if magnitude == "interpolated" else weights


def slerp_sensitivity(
    gram: ArrayLike, t: float = 0.5, magnitude: str = "combined", threshold: float = 0.9995
) -> FloatArray:
    """Local sensitivity of SLERP to its two vectors from their gram, shape ``(2,)``.

    >>> slerp_sensitivity([[1.0, 0.0], [0.0, 1.0]]).round(6).tolist()  # orthogonal: above the weight 0.707107
    [0.809017, 0.809017]
    """
    return span_sensitivity(gram, lambda G: slerp_coefficients(G, t, magnitude, threshold))


def multi_slerp_coefficients(gram: Complex, weights: FloatArray, projection: str = "orthogonal") -> Complex:
    """Coefficients of multi-SLERP: the normalised weighted mean direction times the mean length."""
    lengths, cosine = _unit(gram)
    directed = np.real(lengths) > 0
    pull = np.where(directed, weights, 0.0).astype(np.complex128)
    size = np.sqrt(pull @ cosine @ pull)
    if np.real(size) <= 1e-8 * max(float(np.abs(pull).sum()), 1e-300):
        return np.asarray(weights + 0j * gram[0])
    point = pull / size
    if projection == "logarithm":
        point = _walk(cosine, point, pull / pull.sum() if pull.sum() != 0 else pull)
    return np.asarray((weights @ lengths) * point / np.where(directed, lengths, 1.0))


def karcher_coefficients(gram: Complex, weights: FloatArray, steps: int = 400) -> Complex:
    """Coefficients of the Karcher mean on the sphere, times the mean length (iterated to convergence)."""
    lengths, cosine = _unit(gram)
    directed = np.real(lengths) > 0
    pull = np.where(directed, weights, 0.0).astype(np.complex128)
    if not np.any(pull != 0):
        return np.asarray(0j * gram[0])
    pull = pull / pull.sum()
    size = np.sqrt(pull @ cosine @ pull)
    point = pull / size if np.real(size) > 1e-8 else np.eye(len(weights))[int(np.argmax(np.abs(pull) > 0))] + 0j
    for _ in range(steps):
        moved = _walk(cosine, point, pull)
        moved = moved / np.sqrt(moved @ cosine @ moved)
        change = moved - point
        point = moved
        if np.abs(change.real).max() < 1e-15 and np.abs(change.imag).max() < 1e-15 * _STEP:
            break
    return np.asarray((weights @ lengths) * point / np.where(directed, lengths, 1.0))


def _walk(cosine: Complex, point: Complex, pull: Complex) -> Complex:
    """``exp_u(sum_i a_i log_u(u_i))`` in coordinates of the unit vectors."""
    towards = cosine @ point
    step = pull * _stretch(towards)
    step = step - (step @ towards) * point
    square = step @ cosine @ step
    if abs(square) < 1e-6:  # series of cos(s) and sin(s)/s in s^2: analytic at zero
        return np.asarray((1 - square / 2 + square**2 / 24) * point + (1 - square / 6 + square**2 / 120) * step)
    size = np.sqrt(square)
    return np.asarray(np.cos(size) * point + np.sin(size) / size * step)


def _stretch(cosine: Complex) -> Complex:
    """``angle/sin(angle)`` as an analytic function of the cosine, zero for opposite vectors.

    ``sum_k k!/(2k+1)!! (1-c)^k`` next to one.
    """
    z = 1 - cosine
    series, term = np.ones_like(z), np.ones_like(z)
    for k in range(1, 9):
        term = term * z * k / (2 * k + 1)
        series = series + term
    near, opposite = np.abs(z) < 1e-2, np.real(cosine) < -1 + 1e-12
    safe = np.where(near | opposite, 0.0, cosine)
    far = np.arccos(safe) / np.sqrt(1 - safe**2)
    return np.asarray(np.where(near, series, np.where(opposite, 0.0, far)))


_ANGLES = "coefficients follow the angles between the vectors: smooth nearby, but not Lipschitz over all inputs"


def _gram(name: str, given: Mapping[str, Any], experts: int) -> FloatArray:
    array = numbers(name, "gram", given["gram"])
    if array.shape[-2:] != (experts, experts):
        raise RecipeError(f"{name}: gram has shape {array.shape} for {experts} experts; give (N, N) or (blocks, N, N)")
    peak = np.abs(array).max(axis=(-1, -2), keepdims=True)  # coefficients depend on angles and length ratios only
    return np.asarray(array / np.where(np.isfinite(peak) & (peak > 0), peak, 1.0))


def _in_span(name: str, make: Callable[[Mapping[str, Any], int], Coefficients], why: str) -> Any:
    def compute(experts: int, given: Mapping[str, Any]) -> Effect:
        if "gram" not in given:
            return Effect("none", f"{_ANGLES} ({why}); give gram, the inner products, for the sensitivity there")
        c = span_sensitivity(_gram(name, given, experts), make(given, experts))
        return Effect("local", f"{_ANGLES} ({why}); this is the Jacobian's norm at the given vectors", c, c)

    return compute


def _shares(given: Mapping[str, Any], experts: int) -> FloatArray:
    weights = np.asarray(given.get("coefficients", np.ones(experts)), dtype=np.float64)
    if weights.ndim != 1:
        raise RecipeError("coefficients over configurations do not go with gram; give N numbers")
    if given.get("normalize", True):
        weights = normalised(weights)
        if weights.sum() == 0:
            raise RecipeError("coefficients sum to zero and cannot be normalised; change one")
        weights = weights / weights.sum()
    return weights


def _slerp(given: Mapping[str, Any], experts: int) -> Coefficients:
    t, threshold = one_number("slerp", "t", given["t"]), one_number("slerp", "threshold", given["threshold"])
    return lambda G: slerp_coefficients(G, t, given["magnitude"], threshold)


def _multi(given: Mapping[str, Any], experts: int) -> Coefficients:
    weights = _shares(given, experts)
    return lambda G: multi_slerp_coefficients(G, weights, given["projection"])


def _karcher(given: Mapping[str, Any], experts: int) -> Coefficients:
    weights = _shares(given, experts)
    if np.any(weights < 0) or not np.any(weights > 0):
        raise RecipeError("karcher: coefficients are negative; give numbers of at least 0")
    return lambda G: karcher_coefficients(G, weights)


def _stock(given: Mapping[str, Any], experts: int) -> Coefficients:
    return lambda G: model_stock_coefficients(G, given["average"], given["clamp"])


def span_operators() -> tuple[Operator, ...]:
    """Model Stock, SLERP, multi-SLERP, Karcher mean."""
    scope = Setting("scope", "tensor", choices=("tensor", "global"))
    on = Setting("on", "weights", choices=("weights", "task_vectors"))
    gram = {"gram": "inner products of what is merged (weights, or task vectors), (N, N) or (blocks, N, N)"}
    sphere = (
        Action(
            "dispersion", "raises", "restores the length that averaging loses: away from the p-average", "equal shares"
        ),
        Action("instability", "either way", "the direction turns with every expert; c_i from the gram", "locally"),
    )
    bias = "not task arithmetic: coefficients sum to more than one where the vectors disagree"
    none = "none (deterministic)"
    return (
        Operator(
            name="model_stock",
            statement="(t/N) sum_i Delta_i, t = N cos/(1 + (N-1) cos), cos the mean cosine",
            guarantee="none",
            sensitivity="no guarantee globally (the ratio reacts without bound to short or cancelling task vectors); "
            "locally |(t/N) I + m (dt/dDelta_i)'|, from the gram; t/N if the ratio is frozen",
            bias="shrinks towards the base by t: with orthogonal task vectors t = 0",
            second_moment=none,
            actions=(
                Action(
                    "dispersion", "raises", "V = V_average + (1-t)^2 |mean task vector|^2 in each block", "uniform p"
                ),
                Action("instability", "lowers", "t/N instead of 1/N", "ratio frozen, 0 <= t < 1"),
                Action(
                    "training", "either way", "t -> 0 anchors at the base: use the base-side alternative", "cos -> 0"
                ),
            ),
            source="Jang et al. 2024, arXiv:2403.19522",
            compute=_in_span("model_stock", _stock, "a zero task vector, or directions that cancel, are singular"),
            settings=(
                Setting("scope", "tensor", choices=("tensor", "global", "filter", "row")),
                Setting("average", "cosine", choices=("cosine", "angle")),
                Setting("clamp", False),
            ),
            statistics=gram,
            experts=(2, None),
        ),
        Operator(
            name="slerp",
            statement="sin((1-t) angle)/sin(angle) v_0 + sin(t angle)/sin(angle) v_1",
            guarantee="none",
            sensitivity="no guarantee globally (jumps at the threshold, singular when opposite); locally from the "
            "gram: |c_i I + sum dc_l/dG_ik v_l v_k'|",
            bias=bias,
            second_moment=none,
            actions=sphere,
            source="Shoemake 1985, doi:10.1145/325334.325242",
            compute=_in_span("slerp", _slerp, "it switches to a line at the threshold, and v = 0 has no direction"),
            settings=(
                Setting("t", 0.5, 0.0, 1.0),
                on,
                scope,
                Setting("magnitude", "combined", choices=("combined", "interpolated")),
                Setting("threshold", 0.9995, 0.0, 1.0),
            ),
            statistics=gram,
            experts=(2, 2),
        ),
        Operator(
            name="multi_slerp",
            statement="(sum_i w_i |v_i|) m, m the direction of sum_i w_i v_i/|v_i|",
            guarantee="none",
            sensitivity="no guarantee globally (directions that cancel are singular); locally from the gram",
            bias=bias,
            second_moment=none,
            actions=sphere,
            source="Goddard 2025, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
            compute=_in_span("multi_slerp", _multi, "where directions cancel, and at v = 0, it is singular"),
            settings=(
                on,
                scope,
                Setting("projection", "orthogonal", choices=("orthogonal", "logarithm")),
                Setting("normalize", True),
            ),
            coefficients="optional",
            statistics=gram,
        ),
        Operator(
            name="karcher",
            statement="(sum_i a_i |v_i|) argmin_u sum_i a_i angle(u, v_i)^2",
            guarantee="none",
            sensitivity="no guarantee globally (beyond 90 degrees the minimiser jumps); locally from the gram",
            bias=bias,
            second_moment=none,
            actions=sphere,
            source="Karcher 1977, doi:10.1002/cpa.3160300502",
            compute=_in_span("karcher", _karcher, "the centre is unique only within an open ball of 90 degrees"),
            settings=(on, scope, Setting("max_iter", 100, low=1.0), Setting("tolerance", 1e-10, low=0.0)),
            coefficients="optional",
            statistics=gram,
        ),
    )


def model_stock_ratio(experts: ArrayLike, cosine: ArrayLike) -> FloatArray:
    """``t = N cos/(1 + (N-1) cos)``, broadcasting; 0 where the denominator vanishes.

    >>> float(model_stock_ratio(4, 0.0)), float(model_stock_ratio(4, 1.0))
    (0.0, 1.0)
    """
    N, c = numbers("model stock", "experts", experts), numbers("model stock", "cosine", cosine)
    flat = np.abs(1 + (N - 1) * c) <= 1e-9
    return np.where(flat, 0.0, evaluate(model_stock_ratio_formula, N, np.where(flat, 1.0, c)))
