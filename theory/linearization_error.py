r"""What the secant and the tangent miss, to second order, and what that does to the loss (theory.md section 8).

Let ``h(alpha)`` be the logits of one task at ``x_0 + sum_i alpha_i Delta_i``, ``t_i = J(x_0) Delta_i`` and
``B_ik = D^2 h(x_0)[Delta_i, Delta_k]``.  Taylor at the base, and the same at ``alpha = e_i``:

    h(alpha)        = h(x_0) + sum_i alpha_i t_i + 1/2 sum_ik alpha_i alpha_k B_ik + third order,
    h(x_i) - h(x_0) = t_i + 1/2 B_ii + third order.

Subtracting each prediction leaves its error, as *truth minus prediction*:

    tangent at a:  1/2 sum_ik (alpha - a)_i (alpha - a)_k B_ik                  (any anchor a, the base is a = 0)
    secant:        1/2 sum_ik (alpha_i alpha_k - alpha_i [i = k]) B_ik

For one expert the two are ``1/2 alpha^2 B`` and ``-1/2 alpha (1 - alpha) B``: opposite signs for 0 < alpha < 1, so that
the two bracket the logits; the mixed terms ``B_ik`` are common to both and can move the truth out of the bracket.

A logit error e changes the loss of an image with probabilities p and label y by

    ell(h + e) - ell(h) = (p - e_y) . e  +  1/2 Var_p(e)  +  rest.

The first term is of second order in the task vectors.  Averaged at the base it is ``G_ik = E (p - e_y) . B_ik``, which
is *the Hessian of the risk minus its Gauss-Newton part* (:func:`risk_error_form`): N Hessian-vector products measure
it without any second difference of logits.  The second term is of fourth order.  The rest is bounded on both sides
(:func:`loss_change`), so the account is exact where the logits are quadratic in alpha, and an estimate elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from theory.arguments import advised_fields
from theory.certificate import logit_range
from theory.checks import fitting
from theory.errors import MergeboundError
from theory.function_space import Array, Field, Labels, LogitField, cross_entropy, log_softmax
from theory.symbolic import Formula, times

_SERIES = 18
_LARGEST = 1e300
_THIRD_MOMENT = 1.0 / (36.0 * np.sqrt(3.0))


@advised_fields
@dataclass(frozen=True)
class LogitCurvature:
    """Second derivatives of one task's logits between K merging directions.

    Attributes:
        own: B_ii, (K, n, C), in logits per squared coefficient.
        mixed: B_ik, (K, K, n, C), symmetric in its first two axes, its diagonal unused; ``None`` where only the
            directions' own terms were collected.
    """

    own: Array
    mixed: Array | None = None

    def __post_init__(self) -> None:
        if self.own.ndim != 3:
            raise MergeboundError(f"own has shape {self.own.shape}, expected (directions, images, classes)")
        if not np.isfinite(self.own).all():
            raise MergeboundError("own holds values that are not finite: check the logits they were computed from")
        if self.mixed is None:
            return
        expected = (len(self.own), *self.own.shape)
        if self.mixed.shape != expected:
            raise MergeboundError(f"mixed has shape {self.mixed.shape}, expected {expected}: one entry per pair")
        if not np.isfinite(self.mixed).all():
            raise MergeboundError("mixed holds values that are not finite: check the logits they were computed from")
        if not np.allclose(self.mixed, self.mixed.swapaxes(0, 1), rtol=1e-6, atol=1e-8 * (1.0 + _largest(self.mixed))):
            raise MergeboundError("mixed is not symmetric in its two directions: average it with its transpose")

    @property
    def size(self) -> int:
        """Number of directions K."""
        return len(self.own)

    def along(self, direction: npt.ArrayLike) -> Array:
        """``sum_ik d_i d_k B_ik`` for directions d of shape (..., K): (..., n, C); own terms only without ``mixed``."""
        d = _coefficients(direction, self.size)
        total = np.tensordot(d**2, self.own, axes=1)
        if self.mixed is not None:
            pairs = d[..., :, None] * d[..., None, :] * (1.0 - np.eye(self.size))
            total = total + np.tensordot(pairs, self.mixed, axes=2)
        return np.asarray(total)


def own_curvature(at_secant: LogitField, at_tangent: LogitField) -> LogitCurvature:
    """B_ii read off from the secant's excess over the tangent, ``2 (s_i - t_i)``: no further passes.

    Exact for quadratic logits; in general off by a third of the third derivative along Delta_i.  Both fields must be
    anchored at the base.

    >>> import numpy as np
    >>> from theory.function_space import secant, tangent
    >>> base, y = np.zeros((1, 2)), np.array([0])
    >>> found = own_curvature(secant(base, np.full((1, 1, 2), 3.0), y), tangent(base, np.full((1, 1, 2), 2.0), y))
    >>> found.own.tolist()
    [[[2.0, 2.0]]]
    """
    if at_secant.slopes.shape != at_tangent.slopes.shape:
        raise MergeboundError(
            f"the secant has slopes of shape {at_secant.slopes.shape} and the tangent of {at_tangent.slopes.shape}: "
            "collect both for the same experts and images"
        )
    return LogitCurvature(2.0 * (at_secant.slopes - at_tangent.slopes))


def curvature_from_merges(base: Array, single: Array, double: Array, scale: float = 1.0) -> LogitCurvature:
    """All B_ik from forward passes: second differences ``[h(i+k) - h(i) - h(k) + h(0)] / scale^2``.

    Args:
        base: h(x_0), (n, C).
        single: h(x_0 + scale Delta_i), (K, n, C).
        double: h(x_0 + scale (Delta_i + Delta_k)), (K, K, n, C); the diagonal is a step of twice the scale.
        scale: size t of the steps; small ones are closer to the derivative, large ones see further (and lose fewer
            digits).  Exact at any scale for quadratic logits, else the error is of order t.  At 1/2 the double steps
            are the averages of pairs, and for *any* network the secant plus its :func:`secant_error` is exact at the
            base, at every expert, half-way to it, and at the average of every pair (:func:`pair_interpolant`).

    Raises:
        MergeboundError: shapes that do not fit, or a scale of zero.

    >>> import numpy as np
    >>> table = curvature_from_merges(np.zeros((1, 1)), np.full((1, 1, 1), 1.0), np.full((1, 1, 1, 1), 4.0))
    >>> table.own.tolist()  # h(alpha) = alpha^2
    [[[2.0]]]
    """
    if not (np.isfinite(scale) and scale != 0.0):
        raise MergeboundError(f"scale = {scale}: the step of a second difference is a number other than zero")
    if single.ndim != 3 or single.shape[1:] != base.shape:
        raise MergeboundError(f"single has shape {single.shape}, expected (directions, *{base.shape})")
    if double.shape != (len(single), *single.shape):
        raise MergeboundError(f"double has shape {double.shape}, expected {(len(single), *single.shape)}")
    table = (double - single[:, None] - single[None, :] + base) / scale**2
    table = 0.5 * (table + table.swapaxes(0, 1))
    diagonal = np.arange(len(single))
    return LogitCurvature(table[diagonal, diagonal], table)


def pair_interpolant(corners: Array, middles: Array, shares: npt.ArrayLike) -> Array:
    """Logits of a mixture from models and the averages of pairs: quadratic interpolation, forward passes only.

        h(b) = sum_i b_i (2 b_i - 1) h_i + 4 sum_{i<k} b_i b_k h_ik,      sum_i b_i = 1,

    the Lagrange interpolant of second degree on a simplex (the P2 finite element).  It contains the mixed second
    derivatives that secant and tangent both miss.  Exact for quadratic logits, and at corners and pairs for any.  It
    prices every mixture of N experts from the N (N - 1) / 2 averages of two; with the base as one more corner, all of
    task arithmetic (b_base = 1 - sum alpha), where it is the secant plus its error.  *Estimated.*

    Args:
        corners: logits of the experts (and of the base), (V, n, C).
        middles: logits of the averages of pairs, (V, V, n, C), symmetric; the diagonal is not used.
        shares: b, (..., V), with sum one.

    Raises:
        MergeboundError: shapes that do not fit, or shares that do not sum to one.

    >>> import numpy as np
    >>> pair_interpolant(np.array([[[0.0]], [[1.0]]]), np.full((2, 2, 1, 1), 0.25), [0.4, 0.6]).round(6).tolist()
    [[0.36]]
    """
    if corners.ndim != 3 or middles.shape != (len(corners), *corners.shape):
        raise MergeboundError(f"middles has shape {middles.shape}, expected one entry per pair of {corners.shape}")
    b = _coefficients(shares, len(corners))
    if not np.allclose(b.sum(axis=-1), 1.0):
        raise MergeboundError("shares must sum to one: give the base the rest, 1 minus the sum of the coefficients")
    pairs = 2.0 * b[..., :, None] * b[..., None, :] * (1.0 - np.eye(len(corners)))
    return np.asarray(np.tensordot(b * (2.0 * b - 1.0), corners, axes=1) + np.tensordot(pairs, middles, axes=2))


def tangent_error(curvature: LogitCurvature, alpha: npt.ArrayLike, anchor: npt.ArrayLike | None = None) -> Array:
    """Logits that the tangent at ``anchor`` misses, ``1/2 (alpha - a)' B (alpha - a)``: (..., n, C).

    Args:
        curvature: B at the base; for another anchor it is that anchor's B up to third order.
        alpha: (..., K).
        anchor: (K,), default the base.

    >>> bent = LogitCurvature(own=np.array([[[2.0, 0.0]]]))
    >>> tangent_error(bent, [0.5]).tolist()
    [[0.25, 0.0]]
    """
    a = _coefficients(alpha, curvature.size)
    return 0.5 * curvature.along(a if anchor is None else a - _coefficients(anchor, curvature.size))


def secant_error(curvature: LogitCurvature, alpha: npt.ArrayLike) -> Array:
    """Logits that the secant misses, ``1/2 (alpha' B alpha - sum_i alpha_i B_ii)``: (..., n, C).

    Zero at the base and at every expert.  Without ``mixed`` it is the part ``-1/2 sum_i alpha_i (1 - alpha_i) B_ii``.

    >>> bent = LogitCurvature(own=np.array([[[2.0, 0.0]]]))
    >>> secant_error(bent, [0.5]).tolist()  # negative where the logits are convex along the way
    [[-0.25, 0.0]]
    """
    a = _coefficients(alpha, curvature.size)
    return np.asarray(0.5 * (curvature.along(a) - np.tensordot(a, curvature.own, axes=1)))


def combined_error(curvature: LogitCurvature, alpha: npt.ArrayLike, weight: float = 0.5) -> Array:
    """What ``combine(secant, tangent, weight)`` misses (:func:`theory.function_space.combine`): (..., n, C)."""
    return (1.0 - weight) * secant_error(curvature, alpha) + weight * tangent_error(curvature, alpha)


def best_weight(curvature: LogitCurvature, alpha: npt.ArrayLike) -> Array:
    """Weight of the tangent (the rest on the secant) whose logits are closest to second order, (...).

    Least squares over images and classes, constants over the classes removed (they do not change the loss).  Outside
    [0, 1] the truth is outside the bracket.  Own terms only, equal coefficients lambda: ``1 - lambda``.  Where secant
    and tangent agree every weight is as good and 1/2 is returned.

    >>> import numpy as np
    >>> round(float(best_weight(LogitCurvature(np.array([[[1.0, -1.0]]])), [0.25])), 3)
    0.75
    """
    low, high = _centred(secant_error(curvature, alpha)), _centred(tangent_error(curvature, alpha))
    apart = high - low
    size = (apart**2).sum(axis=(-2, -1))
    with np.errstate(all="ignore"):
        weight = -(low * apart).sum(axis=(-2, -1)) / size
    return np.where(size > 0.0, weight, 0.5)


def mixed_spread(ranges: Array, alpha: npt.ArrayLike) -> Array:
    """Bound on the range of the mixed terms ``sum_{i<k} alpha_i alpha_k B_ik`` of every image: (..., n).

    For an account from own terms only: classes need not be kept.

    Args:
        ranges: max minus min over classes of B_ik, or an upper bound of it, (K, K, n); its diagonal is not used.
        alpha: (..., K).
    """
    if ranges.ndim != 3 or ranges.shape[0] != ranges.shape[1]:
        raise MergeboundError(f"ranges have shape {ranges.shape}, expected (directions, directions, images)")
    a = np.abs(_coefficients(alpha, len(ranges)))
    pairs = 0.5 * a[..., :, None] * a[..., None, :] * (1.0 - np.eye(len(ranges)))
    return np.asarray(np.tensordot(pairs, ranges, axes=2))


def risk_error_form(logits: Array, labels: Labels, curvature: LogitCurvature) -> Array:
    """``G_ik = E (p - e_y) . B_ik``, (K, K): the Hessian of the task's risk at the base minus its Gauss-Newton part.

    To second order in the task vectors the tangent's risk is too small by ``1/2 alpha' G alpha``, the secant's by
    ``1/2 (alpha' G alpha - sum_i alpha_i G_ii)`` (:func:`risk_error`).  Off-diagonal zeros without ``mixed``.

    Args:
        logits: h(x_0), (n, C).
        labels: (n,).
    """
    residual = _residual(logits, labels) / len(labels)
    own = np.tensordot(curvature.own, residual, axes=2)
    if curvature.mixed is None:
        return np.diag(own)
    form = np.tensordot(curvature.mixed, residual, axes=2)
    np.fill_diagonal(form, own)
    return np.asarray(form)


def risk_error(form: Array, alpha: npt.ArrayLike, kind: str = "tangent") -> Array:
    """True minus predicted risk of a task to second order in the task vectors, from its :func:`risk_error_form`.

    Args:
        form: G, (K, K).
        alpha: (..., K).
        kind: ``"tangent"`` (at the base) or ``"secant"``.
    """
    a = _coefficients(alpha, len(form))
    total = np.einsum("...i,ik,...k->...", a, form, a)
    if kind == "secant":
        return np.asarray(0.5 * (total - a @ np.diag(form)))
    if kind == "tangent":
        return np.asarray(0.5 * total)
    raise MergeboundError(f"kind = {kind!r}: choose 'secant' or 'tangent'")


# --- what a change of the logits does to the loss -----------------------------------------------------------------


@dataclass(frozen=True)
class LossChange:
    """``ell(h + e) - ell(h)`` of every image, (..., n) each, in nats.

    Attributes:
        slope: ``(p - e_y) . e``.
        curvature: ``1/2 Var_p(e)``, the Gauss-Newton term.
        lower, upper: proven bounds on the change.
    """

    slope: Array
    curvature: Array
    lower: Array
    upper: Array

    @property
    def estimate(self) -> Array:
        """Slope plus curvature."""
        return self.slope + self.curvature


def loss_change(logits: Array, labels: Labels, change: Array) -> LossChange:
    r"""The change of the cross-entropy along a logit change, term by term and with two-sided bounds.

    Statement: with r = range(e), v = Var_p(e) at the start and ``psi(r) = (e^r - 1 - r) / r^2``,

        change - slope <= min{ v psi(r), v/2 + r^3/(36 sqrt 3), r^2/8 },
        change - slope >= max{ v psi(-r), v/2 - r^3/(36 sqrt 3), 0 },

    and ``min_c e_c - e_y <= change <= max_c e_c - e_y``.

    Proof: along the line, phi'' is the variance of e under the softmax, phi''' its third central moment.  On an
    interval of length r, ``Var <= r^2/4`` (Popoviciu), ``|third moment| <= r^3/(6 sqrt 3)`` (two ends, weights
    (1 -+ 1/sqrt 3)/2) and ``|third moment| <= r Var``, hence ``phi''(t) in v e^{-+rt}``; integrate (1 - t) phi''(t).
    The exponential form is that of self-concordant analysis (Bach 2010, Prop. 1).

    Args:
        logits: h, (..., n, C).
        labels: (n,).
        change: e, (..., n, C), at most 1e300 in size.

    >>> import numpy as np
    >>> found = loss_change(np.zeros((1, 2)), np.array([0]), np.array([[0.0, 1.0]]))
    >>> found.slope.item(), found.curvature.item()
    (0.5, 0.125)
    """
    if not (np.abs(change) <= _LARGEST).all():
        raise MergeboundError(f"change holds values that are not finite or beyond {_LARGEST:g}: check the logits")
    p = np.exp(log_softmax(logits))
    own = _picked(change, labels)
    from_own = change - own[..., None]
    slope = (p * from_own).sum(axis=-1)
    spread = logit_range(change)
    with np.errstate(all="ignore"):
        variance = (p * (from_own - slope[..., None]) ** 2).sum(axis=-1)
        third = _THIRD_MOMENT * spread**3
        above = np.fmin(spread**2 / 8.0, np.fmin(times(variance, taylor_factor(spread)), variance / 2.0 + third))
        below = np.fmax(times(variance, taylor_factor(-spread)), np.fmax(variance / 2.0 - third, 0.0))
        below = np.fmin(below, above)
        upper = np.fmin(slope + above, from_own.max(axis=-1))
        lower = np.fmax(slope + below, from_own.min(axis=-1))
        curvature = np.fmin(variance, spread**2 / 4.0) / 2.0
    return LossChange(slope, curvature, np.fmin(lower, upper), upper)


def taylor_factor_formula() -> Formula:
    """``psi(rho) = (e^rho - 1 - rho) / rho^2``, the integral of ``(1 - t) e^{rho t}`` over [0, 1]."""
    import sympy

    from theory.symbols import symbol

    rho = symbol("rho")
    return Formula("taylor_factor", ("rho",), (sympy.exp(rho) - 1 - rho) / rho**2, "theory.md section 8")


def taylor_factor(spread: npt.ArrayLike) -> Array:
    """``psi`` of :func:`taylor_factor_formula` at any real argument, without cancellation; 1/2 at zero.

    >>> taylor_factor([0.0, 1.0]).round(6).tolist()
    [0.5, 0.718282]
    """
    r = np.asarray(spread, dtype=np.float64)
    small = np.abs(r) < 1.0
    inner, outer = np.where(small, r, 0.0), np.where(small, 1.0, r)
    series = np.zeros_like(r)
    for k in range(_SERIES, -1, -1):  # Horner's scheme of sum_k r^k / (k + 2)!
        series = (1.0 + inner * series) / (k + 2.0)
    with np.errstate(all="ignore"):
        direct = (np.expm1(outer) - outer) / outer / outer
    return np.where(small, series, np.where(np.isnan(direct), np.where(r > 0, np.inf, 0.0), direct))


def largest_loss_formula() -> Formula:
    """``log(1 + (e^ell - 1) e^rho)``: the largest loss within a range rho of logits that cost ell."""
    import sympy

    from theory.symbols import symbol

    ell, rho = symbol("ell"), symbol("rho")
    return Formula(
        "largest_loss",
        ("ell", "rho"),
        sympy.log(1 + (sympy.exp(ell) - 1) * sympy.exp(rho)),
        "theory.md section 8, remainder certificate, sharp form",
    )


def loss_interval(loss: npt.ArrayLike, spread: npt.ArrayLike) -> tuple[Array, Array]:
    """Smallest and largest cross-entropy of an image whose logits are known up to a range.

    Statement: if range(r) <= rho then ``ell(h + r)`` lies in ``log(1 + (e^ell - 1) e^{-+rho})``.  Proof: ``ell =
    log(1 + sum_{c != y} e^{h_c - h_y})`` and every exponent moves by at most rho.  *Tight*: attained by r = rho on all
    wrong classes.  Its square root is below ``sqrt(ell) + rho / sqrt 8`` (theory.md's remainder certificate).

    Args:
        loss: ell >= 0, in nats; inf allowed.
        spread: rho >= 0; inf allowed (then 0 or inf is returned where nothing is known).

    Returns:
        Lower and upper end, of the broadcast shape.

    >>> low, high = loss_interval(0.5, 1.0)
    >>> round(float(low), 4), round(float(high), 4)
    (0.214, 1.0165)
    """
    ell, rho = np.asarray(loss, dtype=np.float64), np.asarray(spread, dtype=np.float64)
    fitting("loss interval", loss=ell, spread=rho)
    ell, rho = np.broadcast_arrays(ell, rho)
    if not (ell >= 0.0).all():
        raise MergeboundError("loss holds values that are negative or missing: a cross-entropy is at least zero")
    if not (rho >= 0.0).all():
        raise MergeboundError("spread holds values that are negative or missing: a range is at least zero")
    with np.errstate(all="ignore"):
        odds = np.where(ell > 30.0, ell + np.log1p(-np.exp(-ell)), np.log(np.expm1(ell)))
        low, high = np.logaddexp(0.0, odds - rho), np.logaddexp(0.0, odds + rho)
    low = np.where(np.isnan(low) | (rho == np.inf), 0.0, low)
    high = np.where(ell == 0.0, 0.0, np.where(np.isnan(high), np.inf, high))
    return np.minimum(low, ell), np.maximum(high, ell)


# --- the account of a prediction ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    """A task's predicted risk, what the second order adds, and what is proven; (...) each, in nats.

    Attributes:
        predicted: mean loss of the affine prediction.
        slope: mean of ``(p - e_y) . e``: its error to first order in the logit error e.
        curvature: mean of ``1/2 Var_p(e)``.
        corrected: mean loss at the predicted logits plus e: the second-order prediction itself.
        lower, upper: bounds on the true risk, given that the logits beyond second order have a range of at most what
            was called ``unexplained``.
        logit_error: root mean square range of e over the images, in logits.
        tier: always ``"estimated"``: third derivatives of a network are not known.
    """

    predicted: Array
    slope: Array
    curvature: Array
    corrected: Array
    lower: Array
    upper: Array
    logit_error: Array
    tier: str = "estimated"

    @property
    def error(self) -> Array:
        """Predicted error of the prediction: corrected minus predicted."""
        return self.corrected - self.predicted


def error_account(field: Field, alpha: npt.ArrayLike, missed: Array, unexplained: npt.ArrayLike = 0.0) -> Account:
    """The second-order account of a prediction at the coefficients ``alpha``.

    Args:
        field: the secant or the tangent of one task, over K directions.
        alpha: (..., K).
        missed: what it misses, from :func:`secant_error`, :func:`tangent_error` or :func:`combined_error`, (..., n, C).
        unexplained: bound on the range of the rest of every image, broadcasting to (..., n): third order, and mixed
            terms that were not collected (:func:`mixed_spread`).

    Returns:
        ``lower <= risk <= upper`` whenever ``unexplained`` is such a bound; with 0 they equal ``corrected``.

    >>> import numpy as np
    >>> from theory.function_space import tangent
    >>> field = tangent(np.zeros((1, 2)), np.array([[[1.0, -1.0]]]), np.array([0]))
    >>> curved = LogitCurvature(np.array([[[-1.0, 1.0]]]))
    >>> found = error_account(field, [1.0], tangent_error(curved, [1.0]))
    >>> round(float(found.predicted), 4), round(float(found.corrected), 4)
    (0.1269, 0.3133)
    """
    logits = field.at(alpha)
    if missed.shape != logits.shape:
        raise MergeboundError(f"missed has shape {missed.shape}, expected {logits.shape}: use the same alpha for both")
    change = loss_change(logits, field.labels, missed)
    losses = cross_entropy(logits + missed, field.labels)
    low, high = loss_interval(losses, unexplained)
    return Account(
        predicted=np.asarray(cross_entropy(logits, field.labels).mean(axis=-1)),
        slope=np.asarray(change.slope.mean(axis=-1)),
        curvature=np.asarray(change.curvature.mean(axis=-1)),
        corrected=np.asarray(losses.mean(axis=-1)),
        lower=np.asarray(low.mean(axis=-1)),
        upper=np.asarray(high.mean(axis=-1)),
        logit_error=np.sqrt((logit_range(missed) ** 2).mean(axis=-1)),
    )


def _coefficients(alpha: npt.ArrayLike, size: int) -> Array:
    a = np.asarray(alpha, dtype=np.float64)
    if a.shape[-1:] != (size,):
        raise MergeboundError(f"alpha has shape {a.shape}, expected {size} coefficients, one per direction")
    if not np.isfinite(a).all():
        raise MergeboundError("alpha holds values that are not finite: give one number per direction")
    return a


def _residual(logits: Array, labels: Labels) -> Array:
    residual = np.exp(log_softmax(logits))
    residual[np.arange(len(labels)), labels] -= 1.0
    return residual


def _picked(change: Array, labels: Labels) -> Array:
    index = np.broadcast_to(labels[:, None], (*change.shape[:-1], 1))
    return np.asarray(np.take_along_axis(change, index, axis=-1)[..., 0])


def _centred(logits: Array) -> Array:
    return np.asarray(logits - logits.mean(axis=-1, keepdims=True))


def _largest(values: Array) -> float:
    return float(np.abs(values).max(initial=0.0))
