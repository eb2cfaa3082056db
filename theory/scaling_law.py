"""The merging scaling law and its fit (Wang et al., *Model merging scaling laws*, arXiv 2509.24244).

At one model size, the loss of merges of k experts, averaged over which k, is ``l_inf + l_1/(k + k_0)``: a floor and a
tail with diminishing returns (``k_0 >= 0``); floor and tail shrink as powers of the model size
(``l_* + B N^-beta`` and ``A_0 N^-gamma``).  The abstract and a summary with the formula were read.  It is an empirical
law: *calibrated*, never a guarantee.

Where it is exact: averages of k experts drawn from a finite pool (or independently) with a quadratic joint risk.  Then
``E F = l_inf + l_1/k`` with ``k_0 = 0``, as the covariance of a mean of k draws is proportional to ``1/k - 1/N``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from theory.assumptions import Tier
from theory.checks import one_number, whole_number
from theory.errors import MergeboundError
from theory.symbolic import FloatArray, Formula, evaluate
from theory.symbols import symbol

LARGEST_SHIFT = 1e3


def merging_law_formula() -> Formula:
    """``l_inf + l_1/(k + k_0)``."""
    floor, tail, k, shift = (symbol(key) for key in ("l_inf", "l_tail", "k", "k0"))
    return Formula("loss", ("l_inf", "l_tail", "k", "k0"), floor + tail / (k + shift), "arXiv 2509.24244")


@dataclass(frozen=True, eq=False)
class MergingLaw:
    """A fitted law: ``floor`` l_inf (loss), ``tail`` l_1 (loss), ``shift`` k_0, what it was fitted on, and its quality.

    ``draws`` (B, 3) are bootstrap refits, from which the intervals come (empty without bootstrap); ``rmse`` is the
    residual on the fitted points; ``seed`` reproduces the draws; ``at_bound`` names parameters that ended on a bound,
    where the data do not determine them.
    """

    floor: float
    tail: float
    shift: float
    experts: FloatArray
    losses: FloatArray
    rmse: float
    draws: FloatArray
    seed: int
    at_bound: tuple[str, ...]
    tier: Tier = "calibrated"

    def predict(self, experts: ArrayLike) -> FloatArray:
        """Loss of a merge of ``experts`` (k >= 1, any shape)."""
        return evaluate(merging_law_formula, self.floor, self.tail, _counts(experts), self.shift)

    def interval(self, experts: ArrayLike, level: float = 0.9) -> tuple[FloatArray, FloatArray]:
        """Lower and upper bootstrap percentile of the mean curve at ``experts``, each of its shape."""
        self._need_draws()
        _probability("level", level)
        k = _counts(experts)[..., None]
        curves = evaluate(merging_law_formula, self.draws[:, 0], self.draws[:, 1], k, self.draws[:, 2])
        low, high = np.quantile(curves, [(1 - level) / 2, (1 + level) / 2], axis=-1)
        return np.asarray(low), np.asarray(high)

    def parameter_intervals(self, level: float = 0.9) -> dict[str, tuple[float, float]]:
        """Bootstrap percentile interval of floor, tail and shift."""
        self._need_draws()
        _probability("level", level)
        low, high = np.quantile(self.draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(("floor", "tail", "shift"))}

    def experts_needed(self, target: float) -> float:
        """Smallest real k >= 1 with predicted loss at most ``target``; ``inf`` where the floor is above it."""
        if self.floor + self.tail / (1 + self.shift) <= target:
            return 1.0
        if target <= self.floor:
            return float("inf")
        return self.tail / (target - self.floor) - self.shift

    def evaluate(self, experts: ArrayLike, losses: ArrayLike, level: float = 0.9) -> HeldOut:
        """How well the law predicts merges that were not fitted."""
        k, y = _pairs(experts, losses)
        error = self.predict(k) - y
        spread = float(np.sum((y - y.mean()) ** 2))
        covered = None
        if len(self.draws):
            low, high = self.interval(k, level)
            covered = float(np.mean((y >= low) & (y <= high)))
        return HeldOut(
            rmse=float(np.sqrt(np.mean(error**2))),
            bias=float(error.mean()),
            relative=float(np.median(np.abs(error) / np.maximum(np.abs(y), np.finfo(float).tiny))),
            r_squared=1 - float(np.sum(error**2)) / spread if spread > 0 else None,
            coverage=covered,
            count=int(k.size),
            seen=tuple(sorted(set(k.tolist()) & set(self.experts.tolist()))),
        )

    def _need_draws(self) -> None:
        if not len(self.draws):
            raise MergeboundError("the law was fitted without bootstrap; fit it with bootstrap >= 2 for intervals")


@dataclass(frozen=True)
class HeldOut:
    """Quality on held-out merges.

    ``rmse`` and ``bias`` (prediction minus loss), median ``relative`` error, ``r_squared`` (None if all losses are
    equal), ``coverage`` of the interval of the mean curve (None without bootstrap), ``count`` of points, and ``seen``:
    expert counts that also occur among the fitted points (empty for a true extrapolation).
    """

    rmse: float
    bias: float
    relative: float
    r_squared: float | None
    coverage: float | None
    count: int
    seen: tuple[float, ...]


def fit_merging_law(
    experts: ArrayLike,
    losses: ArrayLike,
    *,
    seed: int,
    bootstrap: int = 200,
    largest_shift: float = LARGEST_SHIFT,
    least_floor: float | None = None,
) -> MergingLaw:
    """Least squares fit of ``l_inf + l_1/(k + k_0)`` with ``l_1 >= 0``, ``0 <= k_0 <= largest_shift``, bootstrap.

    Args:
        experts: (P,) numbers of merged experts, at least three different ones.
        losses: (P,) losses, one per merge or one mean per k.
        seed: of the bootstrap: points are drawn within each k (where a k has several), else residuals are.
        bootstrap: number of refits; 0 for none.
        largest_shift: bound of ``k_0``; a fit that ends there is close to a straight line.
        least_floor: bound of ``l_inf``, of the fit and of every refit: 0 for a loss that cannot be negative, as a
            cross-entropy.

    For a fixed shift the other two are a linear problem solved exactly; the shift is found by grids that close
    in, so the result does not depend on a starting point.  Raises :class:`MergeboundError`.

    >>> k = [1, 2, 3, 4, 6, 8]
    >>> law = fit_merging_law(k, [1.0 + 0.6 / (i + 0.5) for i in k], seed=1, bootstrap=0)
    >>> round(law.floor, 4), round(law.tail, 4), round(law.shift, 4)
    (1.0, 0.6, 0.5)
    >>> round(law.experts_needed(1.05), 2)
    11.5
    """
    k, y = _pairs(experts, losses)
    if len(np.unique(k)) < 3:
        raise MergeboundError(
            f"{len(np.unique(k))} different numbers of experts; the law has three parameters: give at least three"
        )
    if not one_number("merging law", "largest_shift", largest_shift) > 0:
        raise MergeboundError(f"largest_shift is {largest_shift!r}; give a finite positive number")
    if bootstrap < 0 or bootstrap == 1:
        raise MergeboundError(f"bootstrap is {bootstrap}; give 0 for none, or at least 2")
    least = -np.inf if least_floor is None else one_number("merging law", "least_floor", least_floor)
    best = _fit(k, y, largest_shift, least)
    floor, tail, shift = best
    rng = np.random.default_rng(whole_number("merging law", "seed", seed))
    fitted = floor + tail / (k + shift)
    draws = [_fit(*_resample(k, y, fitted, rng), largest_shift, least) for _ in range(bootstrap)]
    stuck = {
        "floor": floor <= least,
        "tail": tail == 0,
        "shift": shift <= 1e-9 * largest_shift or shift >= largest_shift * (1 - 1e-9),
    }
    return MergingLaw(
        floor=floor,
        tail=tail,
        shift=shift,
        experts=k,
        losses=y,
        rmse=float(np.sqrt(np.mean((y - fitted) ** 2))),
        draws=np.asarray(draws, dtype=np.float64).reshape(-1, 3),
        seed=seed,
        at_bound=tuple(name for name, yes in stuck.items() if yes),
    )


def _resample(
    k: FloatArray, y: FloatArray, fitted: FloatArray, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    index = np.arange(len(k))
    groups = [index[k == value] for value in np.unique(k)]
    if all(len(group) > 1 for group in groups):
        chosen = np.concatenate([rng.choice(group, size=len(group)) for group in groups])
        return k[chosen], y[chosen]
    residual = y - fitted
    # three parameters were spent on the residuals
    inflate = np.sqrt(len(k) / max(len(k) - 3, 1))
    return k, fitted + inflate * rng.choice(residual - residual.mean(), size=len(k))


def _linear(k: FloatArray, y: FloatArray, shift: FloatArray, least: float) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Best floor >= least and tail >= 0 at every shift (S,), and the sums of squares, each (S,)."""
    x = 1 / (k + shift[:, None])
    mean = x.mean(axis=1)
    centred = x - mean[:, None]
    spread = (centred**2).sum(axis=1)
    tail = np.maximum(centred @ (y - y.mean()) / np.where(spread > 0, spread, 1.0), 0.0)
    floor = y.mean() - tail * mean
    below = floor < least  # a convex problem: what leaves the bound has its optimum on it
    if below.any():
        alone = np.maximum(x @ (y - least) / (x**2).sum(axis=1), 0.0)
        floor, tail = np.where(below, least, floor), np.where(below, alone, tail)
    residual = y - floor[:, None] - tail[:, None] * x
    return floor, tail, (residual**2).sum(axis=1)


def _fit(k: FloatArray, y: FloatArray, largest_shift: float, least: float) -> tuple[float, float, float]:
    """Search over ``u = log(1 + shift)``, from the pure 1/k law to a straight line, by grids that close in."""
    low, high = 0.0, float(np.log1p(largest_shift))
    best = (np.inf, 0.0, 0.0, 0.0)
    for points in (80, *(30,) * 6):
        grid = np.linspace(low, high, points)
        floor, tail, cost = _linear(k, y, np.minimum(np.expm1(grid), largest_shift), least)
        at = int(np.argmin(cost))
        if cost[at] <= best[0]:
            shift = min(float(np.expm1(grid[at])), largest_shift)
            best = (float(cost[at]), float(floor[at]), float(tail[at]), shift)
        low, high = float(grid[max(at - 1, 0)]), float(grid[min(at + 1, points - 1)])
    return best[1], best[2], best[3]


@dataclass(frozen=True, eq=False)
class SizeLaw:
    """``l(N, k) = floor + floor_size N^-beta + tail N^-gamma/(k + shift)``, N in the unit ``unit`` of model size."""

    floor: float
    floor_size: float
    beta: float
    tail: float
    gamma: float
    shift: float
    unit: float
    rmse: float
    tier: Tier = "calibrated"

    def predict(self, experts: ArrayLike, size: ArrayLike) -> FloatArray:
        """Loss at ``experts`` k and model ``size`` N (broadcast)."""
        k, N = _counts(experts), _counts(size, "size", least=0.0) / self.unit
        return np.asarray(self.floor + self.floor_size * N**-self.beta + self.tail * N**-self.gamma / (k + self.shift))


def fit_size_law(experts: ArrayLike, size: ArrayLike, losses: ArrayLike, *, seed: int, starts: int = 12) -> SizeLaw:
    """Fit floor and tail that shrink with the model size, by bounded least squares from several seeded starts.

    ``experts``, ``size`` and ``losses`` have shape (P,); six parameters need seven points, three sizes and three
    expert counts.  Exponents in [0, 3], all coefficients nonnegative.  Raises :class:`MergeboundError`.

    >>> k, size = (np.array(v, dtype=float) for v in zip(*[(k, s) for k in (1, 2, 4) for s in (1, 2, 4)]))
    >>> fit_size_law(k, size, 1 / size + 0.5 / k, seed=0).rmse < 0.01
    True
    """
    import scipy.optimize

    k, y = _pairs(experts, losses)
    N = _counts(size, "size", least=0.0)
    if N.shape != k.shape:
        raise MergeboundError(f"size has shape {N.shape} but experts has {k.shape}; give one model size per loss")
    if len(np.unique(N)) < 3 or len(np.unique(k)) < 3 or len(k) < 7:
        raise MergeboundError("six parameters need at least seven losses, three model sizes and three expert counts")
    unit = float(np.exp(np.mean(np.log(N))))
    n = N / unit
    reach = float(np.ptp(y)) or 1.0

    def model(theta: FloatArray) -> FloatArray:
        floor, extra, beta, tail, gamma, shift = theta
        return np.asarray(floor + extra * n**-beta + tail * n**-gamma / (k + shift) - y)

    low, high = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0]), np.array([np.inf, np.inf, 3.0, np.inf, 3.0, 50.0])
    rng = np.random.default_rng(whole_number("size law", "seed", seed))
    best = None
    for _ in range(max(starts, 1)):
        first = np.array([y.min() * rng.random(), y.min() * rng.random(), rng.random(), reach, rng.random(), 1.0])
        first = np.clip(first, low + 1e-9, high)
        found = scipy.optimize.least_squares(model, first, bounds=(low, high), x_scale="jac", max_nfev=2000)
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    floor, extra, beta, tail, gamma, shift = (float(value) for value in best.x)
    rmse = float(np.sqrt(2 * best.cost / len(k)))
    return SizeLaw(floor, extra, beta, tail, gamma, shift, unit, rmse)


def _counts(value: ArrayLike, field: str = "experts", least: float = 1.0) -> FloatArray:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise MergeboundError(f"{field} is not a number or an array of numbers; give numbers") from error
    good = np.isfinite(array) & ((array >= least) if least > 0 else (array > 0))
    if array.size == 0 or not good.all():
        raise MergeboundError(f"{field} must be finite and {'at least 1' if least > 0 else 'positive'}; check them")
    return array


def _pairs(experts: ArrayLike, losses: ArrayLike) -> tuple[FloatArray, FloatArray]:
    k = _counts(experts)
    try:
        y = np.asarray(losses, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise MergeboundError("losses are not numbers; give one loss per number of experts") from error
    if k.ndim != 1 or y.shape != k.shape:
        raise MergeboundError(f"experts has shape {k.shape} and losses {y.shape}; give two lists of the same length")
    if not np.isfinite(y).all():
        raise MergeboundError("losses hold a value that is not finite; leave failed merges out")
    return k, y


def _probability(field: str, value: float) -> None:
    if not 0 < value < 1:
        raise MergeboundError(f"{field} is {value!r}; give a number in (0, 1)")


__all__ = [
    "HeldOut",
    "MergingLaw",
    "SizeLaw",
    "fit_merging_law",
    "fit_size_law",
    "merging_law_formula",
]
