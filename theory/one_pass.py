"""One pass of minibatch SGD over fresh Gaussian samples: exact risk, training gap, stability, drift (theory section 9).

The tasks are those of :mod:`theory.regression`: ``f(x; a, y) = (a'x - y)^2/2``, ``y = a'w + xi``, ``a ~ N(0, Sigma)``.
Every sample is used at most once (``reshuffle`` and at most one epoch; a second epoch, or independent batches, would
need moments whose degree grows with every step), so a step is a fresh random affine map and moments close by Isserlis'
(Wick's) theorem:

* the second moment of ``(x - w, buffer)`` is a linear recursion through the fourth moments of a;
* the twins' distance follows the same recursion without noise;
* the training risk needs the second moment *seen by* each sample, ``E[a a' (x) z z']``, whose start is a sixth moment;
  later steps are the same linear map for all samples already drawn, so that their sum is one tensor.

SGD, heavy ball and Nesterov, coupled or decoupled decay, any schedule of rates and batch sizes; everything broadcasts
over configurations.  Overflow of a second moment gives ``inf`` in every field of that configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from theory.clocks import Steps, require_sgd, write_out
from theory.errors import AssumptionError
from theory.quadratic import MergeMoments, _plain, _trace
from theory.recipe import Expert
from theory.regression import RegressionMoments, RegressionTask, checked, regression_merge
from theory.symbolic import FloatArray


@dataclass(frozen=True, eq=False)
class SampleOverlap:
    """What separates a training sample from a fresh one, averaged over the n samples (``e = x_K - w``).

    ``square`` (...): ``E (a'e)^2`` of a fresh sample minus that of a training sample (loss); ``tilt`` (..., d):
    ``E a a'e``, fresh minus training; ``match`` (...): ``E xi a'e`` of a training sample.
    """

    square: FloatArray
    tilt: FloatArray
    match: FloatArray


def one_pass_steps(expert: Expert) -> Steps:
    """The steps of an expert; refused (:class:`AssumptionError`) unless every sample is used at most once."""
    require_sgd(expert)
    steps = write_out(expert)
    used = np.where(steps.present, steps.batch_size, 0.0).sum(axis=-1)
    starts = ((steps.position == 0) & steps.present).sum(axis=-1)
    good = (starts == 1) & (used <= np.asarray(expert.n))
    if expert.sampling == "with_replacement" or not np.all(good):  # one step without replacement is one pass, too
        raise AssumptionError(
            f"expert {expert.name!r}: {float(used.max()):g} draws from {float(np.max(expert.n)):g} samples by "
            f"{expert.sampling!r} are not one pass; the moments close for fresh samples only: choose sampling "
            "'reshuffle' and at most one epoch"
        )
    return steps


def isserlis(Sigma: FloatArray, S: FloatArray) -> FloatArray:
    """``E[(a a' - Sigma) S (a a' - Sigma)] = Sigma S Sigma + Sigma tr(Sigma S)``, ``a ~ N(0, Sigma)``; S symmetric.

    >>> isserlis(np.eye(1), np.ones((1, 1))).tolist()  # the variance of a^2
    [[2.0]]
    """
    return np.asarray(Sigma @ S @ Sigma + Sigma * _trace(Sigma @ S)[..., None, None])


def _fourth(Sigma: FloatArray) -> FloatArray:
    """``E a_p a_q a_r a_s`` (..., d, d, d, d)."""
    total = np.einsum("...pq,...rs->...pqrs", Sigma, Sigma) + np.einsum("...pr,...qs->...pqrs", Sigma, Sigma)
    return np.asarray(total + np.einsum("...ps,...qr->...pqrs", Sigma, Sigma))


def _sixth(Sigma: FloatArray, S: FloatArray) -> FloatArray:
    """``E a_p a_q a_r a_s (a'Sa)``: Wick's fifteen pairings, S symmetric."""
    D = Sigma @ S @ Sigma
    total = _trace(Sigma @ S)[..., None, None, None, None] * _fourth(Sigma)
    for pair, rest in (("pq", "rs"), ("pr", "qs"), ("ps", "qr")):
        total = total + 2 * np.einsum(f"...{pair},...{rest}->...pqrs", D, Sigma)
        total = total + 2 * np.einsum(f"...{rest},...{pair}->...pqrs", D, Sigma)
    return np.asarray(total)


def seen_noise(Sigma: FloatArray, S: FloatArray, variance: FloatArray) -> FloatArray:
    """``E[a_p a_q (u u')_rs]`` for the sample's own gradient noise ``u = (a a' - Sigma) e - xi a``, ``E e e' = S``.

    Shape (..., d, d, d, d); ``variance`` of xi (...).  Sixth moments of a by Wick's theorem.

    >>> seen_noise(np.eye(1), np.ones((1, 1)), np.zeros(())).ravel().tolist()  # E a^2 (a^2 - 1)^2 = 15 - 6 + 1
    [10.0]
    """
    fourth = _fourth(Sigma)
    left = np.einsum("...pqri,...ij,...js->...pqrs", fourth, S, Sigma)
    plain = np.einsum("...pq,...rs->...pqrs", Sigma, Sigma @ S @ Sigma)
    own = _sixth(Sigma, S) - left - np.swapaxes(left, -1, -2) + plain
    return np.asarray(own + variance[..., None, None, None, None] * fourth)


def _wide(matrix: FloatArray) -> FloatArray:
    """A matrix (..., m, n) that multiplies the last axes of (..., d, d, m, n)."""
    return matrix[..., None, None, :, :]


def _turn(matrix: FloatArray) -> FloatArray:
    return np.swapaxes(matrix, -1, -2)


def _outer(left: FloatArray, right: FloatArray) -> FloatArray:
    return np.asarray(left[..., :, None] * right[..., None, :])


def _apply(matrix: FloatArray, vector: FloatArray) -> FloatArray:
    return np.asarray((matrix @ vector[..., None])[..., 0])


@dataclass(frozen=True, eq=False)
class _Step:
    """One step ``z -> matrix z + constant + kick (noise of the batch mean)``, z = (x - w, buffer); ``b`` (...)."""

    matrix: FloatArray
    constant: FloatArray
    kick: FloatArray
    b: FloatArray
    drawn: FloatArray


@dataclass(frozen=True, eq=False)
class _State:
    """``first`` E z (..., 2d), ``second`` E zz', ``twins``: the same of the twins' difference, summed over samples."""

    first: FloatArray
    second: FloatArray
    twins: FloatArray


@dataclass(frozen=True, eq=False)
class _Seen:
    """Sums over the ``count`` samples drawn so far of ``E aa' (x) zz'``, ``E aa' (x) z`` and ``E xi a (x) z``."""

    second: FloatArray
    first: FloatArray
    match: FloatArray
    count: FloatArray


def _written(expert: Expert, Sigma: FloatArray, w: FloatArray, shape: tuple[int, ...]) -> Iterator[_Step]:
    """The steps of an expert as affine maps of ``(x - w, buffer)``; an absent step is the identity."""
    steps = one_pass_steps(expert)
    beta, omega = np.asarray(expert.momentum, dtype=np.float64), np.asarray(expert.weight_decay, dtype=np.float64)
    coupled, shrunk = (omega * 0, omega) if expert.decoupled_decay else (omega, omega * 0)
    ahead, carried = (1 + beta, beta**2) if expert.nesterov else (np.ones_like(beta), beta)
    dim = w.shape[-1]
    pull = Sigma + coupled[..., None, None] * np.eye(dim)
    for k in range(steps.present.shape[-1]):
        here = np.broadcast_to(steps.present[..., k], shape)
        eta = np.where(here, steps.learning_rate[..., k], 0.0)
        corner = np.zeros((*shape, 2, 2))  # what a step does without a gradient
        corner[..., 0, 0] = 1 - eta * shrunk
        corner[..., 0, 1] = -eta * carried
        corner[..., 1, 1] = np.where(here, beta, 1.0)
        into = np.stack([-eta * ahead, np.where(here, 1.0, 0.0)], axis=-1)
        kick = (into[..., :, None, None] * np.eye(dim)).reshape(*shape, 2 * dim, dim)
        matrix = np.einsum("...xy,ij->...xiyj", corner, np.eye(dim)).reshape(*shape, 2 * dim, 2 * dim)
        matrix[..., :dim] += kick @ pull
        constant = _apply(kick, coupled[..., None] * w)
        constant[..., :dim] -= (eta * shrunk)[..., None] * w
        b = np.broadcast_to(steps.batch_size[..., k], shape)
        yield _Step(matrix, constant, kick, b, np.where(here, b, 0.0))


def _next(state: _State, step: _Step, Sigma: FloatArray, variance: FloatArray) -> _State:
    dim, b = Sigma.shape[-1], step.b[..., None, None]
    one = isserlis(Sigma, state.second[..., :dim, :dim]) + variance[..., None, None] * Sigma
    kicked = step.kick @ one @ _turn(step.kick)  # covariance of one sample's gradient, where it lands
    moved = _apply(step.matrix, state.first)
    cross = _outer(moved, step.constant)
    spread = step.kick @ isserlis(Sigma, state.twins[..., :dim, :dim]) @ _turn(step.kick) / b
    fresh = 2 * kicked * step.drawn[..., None, None] / b**2
    return _State(
        first=moved + step.constant,
        second=step.matrix @ state.second @ _turn(step.matrix)
        + cross
        + _turn(cross)
        + _outer(step.constant, step.constant)
        + kicked / b,
        twins=step.matrix @ state.twins @ _turn(step.matrix) + spread + fresh,
    )


def _see(seen: _Seen, state: _State, step: _Step, Sigma: FloatArray, variance: FloatArray) -> _Seen:
    """What the samples see after a step: those drawn before, moved; those drawn now, with their own gradient."""
    dim, constant, kick = Sigma.shape[-1], step.constant, step.kick
    b, drawn = step.b[..., None, None, None, None], step.drawn[..., None, None, None, None]
    count, noise = seen.count[..., None, None, None, None], variance[..., None, None, None, None]
    wide_step, wide_kick, wide_Sigma = _wide(step.matrix), _wide(kick), _wide(Sigma)

    moved = _apply(wide_step, seen.first)
    cross = _outer(moved, np.broadcast_to(constant[..., None, None, :], moved.shape))
    each = isserlis(wide_Sigma, seen.second[..., :dim, :dim])
    each = each + count * noise * np.einsum("...pq,...rs->...pqrs", Sigma, Sigma)
    old = wide_step @ seen.second @ _turn(wide_step) + wide_kick @ each @ _turn(wide_kick) / b
    old = old + cross + _turn(cross)
    old = old + count * np.einsum("...pq,...mn->...pqmn", Sigma, _outer(constant, constant))
    old_first = moved + count[..., 0] * np.einsum("...pq,...m->...pqm", Sigma, constant)

    S, mean = state.second[..., :dim, :dim], state.first[..., :dim]
    after = _next(state, step, Sigma, variance)  # of a fresh sample: its own share of the noise is taken out again
    one = isserlis(Sigma, S) + variance[..., None, None] * Sigma
    others = after.second - kick @ one @ _turn(kick) / step.b[..., None, None] ** 2
    link = step.matrix @ state.second[..., :dim] + _outer(constant, mean)  # E (step z + constant) e'
    pulled = link @ Sigma
    pair = np.einsum("...pr,...mq->...pqmr", Sigma, pulled) + np.einsum("...qr,...mp->...pqmr", Sigma, pulled)
    with_own = pair @ _turn(wide_kick) / b
    own = wide_kick @ seen_noise(Sigma, S, variance) @ _turn(wide_kick) / b**2
    new = np.einsum("...pq,...mn->...pqmn", Sigma, others) + with_own + _turn(with_own) + own
    ahead = _apply(Sigma, mean)
    tilt = np.einsum("...pr,...q->...pqr", Sigma, ahead) + np.einsum("...qr,...p->...pqr", Sigma, ahead)
    new_first = np.einsum("...pq,...m->...pqm", Sigma, after.first) + _apply(wide_kick, tilt) / b[..., 0]
    pushed = (step.drawn / step.b * variance)[..., None, None] * (Sigma @ _turn(kick))
    return _Seen(
        second=old + drawn * new,
        first=old_first + drawn[..., 0] * new_first,
        match=seen.match @ _turn(step.matrix) - pushed,
        count=seen.count + step.drawn,
    )


def _run(task: RegressionTask, base: ArrayLike, expert: Expert, *, seeing: bool) -> tuple[_State, SampleOverlap | None]:
    Sigma, w, noise = checked(task)
    x0, n = np.asarray(base, dtype=np.float64), np.asarray(expert.n, dtype=np.float64)
    shape = np.broadcast_shapes(
        *(
            Sigma.shape[:-2],
            w.shape[:-1],
            x0.shape[:-1],
            noise.shape,
            n.shape,
            one_pass_steps(expert).present.shape[:-1],
        ),
        *(np.shape(expert.momentum), np.shape(expert.weight_decay)),
    )
    dim, variance = Sigma.shape[-1], noise**2
    away = np.broadcast_to(x0 - w, (*shape, dim))
    first = np.concatenate([away, np.zeros_like(away)], axis=-1)
    state = _State(first, _outer(first, first), np.zeros((*shape, 2 * dim, 2 * dim)))
    four = (*shape, dim, dim, 2 * dim)
    seen = _Seen(np.zeros((*four, 2 * dim)), np.zeros(four), np.zeros((*shape, dim, 2 * dim)), np.zeros(shape))
    with np.errstate(all="ignore"):
        for step in _written(expert, Sigma, w, shape):
            if seeing:
                seen = _see(seen, state, step, Sigma, variance)
            state = _next(state, step, Sigma, variance)
        if not seeing:
            return state, None
        share = seen.count / n
        fresh = _trace(Sigma @ state.second[..., :dim, :dim])
        overlap = SampleOverlap(
            square=share * fresh - np.einsum("...pqpq->...", seen.second[..., :dim, :dim]) / n,
            tilt=share[..., None] * _apply(Sigma, state.first[..., :dim])
            - np.einsum("...pqq->...p", seen.first[..., :dim]) / n[..., None],
            match=_trace(seen.match[..., :dim]) / n,
        )
    return state, overlap


def one_pass_moments(task: RegressionTask, base: ArrayLike, expert: Expert) -> RegressionMoments:
    """Exact moments of one pass of SGD, heavy ball or Nesterov over fresh Gaussian samples, with decay of both kinds.

    *Statement:* with ``e = x - w`` and buffer v, one step is affine in ``z = (e, v)``: ``z <- step z + constant + kick
    u``, u the noise of the batch gradient, ``E uu' = (Sigma S Sigma + Sigma tr(Sigma S) + s^2 Sigma)/b`` with
    ``S = E ee'`` before the step.  Twins differ by ``kick (g - g')/b`` after the step that draws the exchanged sample
    (``E (g-g')(g-g')' = 2 b E uu'``) and then follow the same recursion without label noise; ``epsilon^2`` is the mean
    over the n samples.  *Proof:* a step is independent of z (fresh samples); Isserlis' theorem.

    ``task`` and ``base`` (..., d) as in :class:`RegressionTask`; ``expert``: ``reshuffle``, at most one epoch (every
    sample is used at most once).  Units: ``risk`` loss, ``drift`` and ``epsilon`` param.  A second moment that
    overflows is ``inf``.  Raises :class:`AssumptionError` for samples used twice and for uncovered optimizers,
    :class:`RecipeError` for a malformed task.  Source: theory section 9 for Gaussian inputs; ours.

    >>> task = RegressionTask(np.eye(1), np.zeros(1), 0.0)
    >>> expert = Expert("a", n=4, batch_size=1, learning_rate=0.5, steps=1, sampling="reshuffle")
    >>> exact = one_pass_moments(task, [1.0], expert)  # x = 1 - a^2/2: mean 1/2, second moment 1 - 1 + 3/4
    >>> exact.mean.tolist(), float(exact.risk)
    ([0.5], 0.375)
    """
    state, _ = _run(task, base, expert, seeing=False)
    return _reported(task, base, expert, state)


def _reported(task: RegressionTask, base: ArrayLike, expert: Expert, state: _State) -> RegressionMoments:
    Sigma, w, noise = checked(task)
    dim = Sigma.shape[-1]
    with np.errstate(all="ignore"):
        mean, second = state.first[..., :dim], state.second[..., :dim, :dim]
        covariance = second - _outer(mean, mean)
        shift = mean + w - np.asarray(base, dtype=np.float64)
        risk = 0.5 * _trace(Sigma @ second) + 0.5 * noise**2
        drift = np.sqrt(np.maximum(np.sum(shift * shift, axis=-1) + _trace(covariance), 0.0))
        epsilon = np.sqrt(np.maximum(_trace(state.twins[..., :dim, :dim]), 0.0) / np.asarray(expert.n))
        fine = np.isfinite(risk) & np.isfinite(drift) & np.isfinite(epsilon)
    return RegressionMoments(
        mean=np.where(fine[..., None], mean + w, np.inf),
        covariance=np.where(fine[..., None, None], covariance, np.inf),
        risk=_plain(np.where(fine, risk, np.inf)),
        drift=_plain(np.where(fine, drift, np.inf)),
        epsilon=_plain(np.where(fine, epsilon, np.inf)),
    )


def one_pass_overlap(task: RegressionTask, base: ArrayLike, expert: Expert) -> SampleOverlap:
    """How much closer x_K is to its training samples than to fresh ones (see :class:`SampleOverlap`).

    Exact; the cost of a step is of order d^5.  Assumes and raises as :func:`one_pass_moments`.

    >>> task = RegressionTask(np.eye(1), np.zeros(1), 0.0)
    >>> expert = Expert("a", n=1, batch_size=1, learning_rate=0.1, steps=1, sampling="reshuffle")
    >>> found = one_pass_overlap(task, [1.0], expert)  # E (1 - a^2/10)^2 - E a^2 (1 - a^2/10)^2
    >>> round(float(found.square), 9), np.round(found.tilt, 9).tolist(), float(found.match)
    (0.28, [0.2], 0.0)
    """
    _, overlap = _run(task, base, expert, seeing=True)
    assert overlap is not None
    return overlap


def one_pass_merge(
    tasks: Sequence[RegressionTask],
    base: ArrayLike,
    experts: Sequence[Expert],
    coefficients: ArrayLike,
    weights: ArrayLike,
) -> MergeMoments:
    """Exact risk, training risk, gap, dispersion, stability of ``x_0 + sum alpha_i (x_i - x_0)`` after one pass each.

    *Statement:* ``E F(M) - E F_S(M) = sum_j p_j [alpha_j^2 square_j/2 + alpha_j tilt_j'c_j + alpha_j match_j]``, c_j
    the mean of what the other experts and the base add to ``M - w_j`` (:class:`SampleOverlap`).  *Proof:* ``M - w_j =
    alpha_j e_j + (a part independent of S_j)``; expand ``(a'(M - w_j) - xi)^2/2`` for a fresh and a training sample.

    Tasks may differ in ``w``, ``Sigma`` (which need not commute) and noise, experts in all hyperparameters.
    ``coefficients`` and ``weights`` (N, ...), ``base`` (..., d).  ``gap`` may be negative: a noiseless task whose
    learning rate is too large fits its training inputs worse than fresh ones.  A configuration that overflows is
    ``inf`` in every field.  Samples are independent between tasks.  Raises as :func:`one_pass_moments`.

    >>> task = RegressionTask(np.eye(1), np.zeros(1), 0.0)
    >>> expert = Expert("a", n=1, batch_size=1, learning_rate=0.1, steps=1, sampling="reshuffle")
    >>> exact = one_pass_merge([task], [1.0], [expert], [1.0], [1.0])  # E (1 - a^2/10)^2/2, E a^2 (1 - a^2/10)^2/2
    >>> round(float(exact.risk), 9), round(float(exact.training_risk), 9)
    (0.415, 0.275)
    """
    alpha, p = np.asarray(coefficients, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    x0 = np.asarray(base, dtype=np.float64)
    moments, overlaps = [], []
    for task, expert in zip(tasks, experts, strict=True):
        state, overlap = _run(task, x0, expert, seeing=True)
        assert overlap is not None
        moments.append(_reported(task, x0, expert, state))
        overlaps.append(overlap)
    merged = regression_merge(tasks, x0, moments, alpha, p)
    with np.errstate(all="ignore"):
        gap = np.zeros(())
        mean = x0 + sum((a[..., None] * (m.mean - x0) for a, m in zip(alpha, moments, strict=True)), np.zeros(()))
        for weight, a, task, moment, overlap in zip(p, alpha, tasks, moments, overlaps, strict=True):
            w = np.asarray(task.w, dtype=np.float64)
            rest = mean - w - a[..., None] * (moment.mean - w)
            part = a * overlap.square / 2 + np.sum(overlap.tilt * rest, axis=-1) + overlap.match
            gap = gap + weight * a * part
        training = np.asarray(merged.risk) - gap
        fine = np.isfinite(training) & np.isfinite(np.asarray(merged.V)) & np.isfinite(np.asarray(merged.stability))
    risk, left, apart, V, moved = (
        _plain(np.where(fine, value, np.inf)) for value in (merged.risk, training, gap, merged.V, merged.stability)
    )
    return MergeMoments(risk=risk, training_risk=left, gap=apart, V=V, stability=moved)
