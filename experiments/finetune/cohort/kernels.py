"""Training of chains of linear layers on a processor, compiled: many steps of one expert after the other.

An expert's weights, gradient and momentum stay in the processor's own memory for a whole block of steps, and matrix
products are the linear algebra library's (numba's ``np.dot``).  No argument is checked: the caller does that.
``fastmath`` allows sums in another order and fused products, but no assumption about what is finite.

Numbers of an expert (``numbers``, of the weights' type): momentum, coupled decay, smoothing, largest norm (0: none),
beta2, epsilon, decoupled decay, SAM's radius (0: none).  Entries of the log: loss, norm of the shared and head gradient
before clipping, clip factor, norms of what was used.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

SGD, NESTEROV, ADAMW = range(3)
NUMBERS = 8
ENTRIES = 6
_FAST = {"contract", "reassoc", "nsz", "arcp"}
_RELU, _GELU, _TANH = 1, 2, 3


@njit(nogil=True, cache=True, fastmath=_FAST)
def _activate(z: np.ndarray, slope: np.ndarray, kind: int) -> None:
    """z becomes a(z), and ``slope`` a'(z); both flat."""
    if kind == _RELU:
        for i in range(z.size):
            value = z[i]
            positive = value > 0
            slope[i] = 1 if positive else 0
            z[i] = value if positive or value != value else 0
    elif kind == _TANH:
        for i in range(z.size):
            value = math.tanh(z[i])
            z[i] = value
            slope[i] = 1 - value * value
    elif kind == _GELU:
        for i in range(z.size):
            value = z[i]
            below = 0.5 * math.erfc(-value * 0.7071067811865476)
            slope[i] = below + value * 0.3989422804014327 * math.exp(-0.5 * value * value)
            z[i] = value * below
    else:
        for i in range(z.size):
            slope[i] = 1


@njit(nogil=True, cache=True, fastmath=_FAST)
def _loss(z: np.ndarray, labels: np.ndarray, rows: np.ndarray, smoothing: float) -> float:
    """Mean cross-entropy of logits z (b, classes), which become its gradient."""
    count, classes = z.shape
    share = smoothing / classes
    total = 0.0
    for i in range(count):
        line = z[i]
        largest = line[0]
        for c in range(classes):
            largest = max(largest, line[c])
        mass = line[0] * 0
        sum_of = line[0] * 0
        label = labels[rows[i]]
        at_label = line[label] - largest
        for c in range(classes):
            shifted = line[c] - largest
            sum_of += shifted
            line[c] = math.exp(shifted)
            mass += line[c]
        log_mass = math.log(mass)
        total += log_mass - (1.0 - smoothing) * at_label - share * sum_of
        scale = 1.0 / (mass * count)
        for c in range(classes):
            line[c] = line[c] * scale - share / count
        line[label] -= (1.0 - smoothing) / count
    mean: float = total / count
    return mean


@njit(nogil=True, cache=True, fastmath=_FAST)
def _gradient(
    x: np.ndarray,
    g: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    count: int,
    layers: np.ndarray,
    smoothing: float,
    first: int,
    values: np.ndarray,
    slopes: np.ndarray,
    errors: np.ndarray,
) -> float:
    """The batch loss of one expert; its gradient goes to g, for layers ``first`` and later.

    ``layers``: per layer inputs, outputs, start, bias start (-1: none), activation, place of its input among the
    ``values`` of a sample; the samples are the input of layer 0.
    """
    last = layers.shape[0] - 1
    for l in range(last + 1):
        inputs, outputs, start, bias, kind, place = layers[l]
        above = place + inputs
        matrix = x[start : start + inputs * outputs].reshape(inputs, outputs)
        out = values[above * count : (above + outputs) * count].reshape(count, outputs)
        np.dot(values[place * count : above * count].reshape(count, inputs), matrix, out)
        if bias >= 0:
            add = x[bias : bias + outputs]
            for i in range(count):
                line = out[i]
                for c in range(outputs):
                    line[c] += add[c]
        if l < last:
            part = slice(above * count, (above + outputs) * count)
            _activate(values[part], slopes[part], kind)
    classes = layers[last, 1]
    above = layers[last, 5] + layers[last, 0]
    part = slice(above * count, (above + classes) * count)
    errors[part] = values[part]
    loss: float = _loss(errors[part].reshape(count, classes), labels, rows, smoothing)
    for l in range(last, first - 1, -1):
        inputs, outputs, start, bias, kind, place = layers[l]
        above = place + inputs
        error = errors[above * count : (above + outputs) * count].reshape(count, outputs)
        matrix_g = g[start : start + inputs * outputs].reshape(inputs, outputs)
        np.dot(values[place * count : above * count].reshape(count, inputs).T, error, matrix_g)
        if bias >= 0:
            add = g[bias : bias + outputs]
            add[:] = 0
            for i in range(count):
                line = error[i]
                for c in range(outputs):
                    add[c] += line[c]
        if l > first:
            matrix = x[start : start + inputs * outputs].reshape(inputs, outputs)
            lower = errors[place * count : above * count]
            np.dot(error, matrix.T, lower.reshape(count, inputs))
            slope = slopes[place * count : above * count]
            for i in range(lower.size):
                lower[i] *= slope[i]
    return loss


@njit(nogil=True, cache=True, fastmath=_FAST)
def _norms(g: np.ndarray, x: np.ndarray, decay: float, lo: int, cut: int, hi: int) -> tuple[float, float]:
    """Norms of g + decay x in columns lo .. cut - 1 and cut .. hi - 1."""
    below, above = g[0] * 0, g[0] * 0
    for i in range(lo, cut):
        value = g[i] + decay * x[i]
        below += value * value
    for i in range(cut, hi):
        value = g[i] + decay * x[i]
        above += value * value
    return math.sqrt(below), math.sqrt(above)


@njit(nogil=True, cache=True, fastmath=_FAST)
def _update(
    x: np.ndarray,
    v: np.ndarray,
    square: np.ndarray,
    g: np.ndarray,
    rate: float,
    numbers: np.ndarray,
    rule: int,
    powers: np.ndarray,
    lo: int,
    hi: int,
) -> bool:
    """One step on columns lo .. hi - 1, with gradient ``g + decay x``; whether x stayed finite."""
    beta, decay = numbers[0], numbers[1]
    check = x[0] * 0
    if rule == ADAMW:
        one = check + 1
        beta2, epsilon, keep = numbers[4], numbers[5], one - rate * numbers[6]
        pace, root = rate / powers[0], powers[1]
        for i in range(lo, hi):
            gradient = g[i]
            v[i] += (one - beta) * (gradient - v[i])
            square[i] = beta2 * square[i] + (one - beta2) * gradient * gradient
            x[i] = keep * x[i] - pace * v[i] / (math.sqrt(square[i]) / root + epsilon)
            check += x[i] * 0
    elif rule == NESTEROV:
        for i in range(lo, hi):
            gradient = g[i] + decay * x[i]
            v[i] = beta * v[i] + gradient
            x[i] -= rate * (gradient + beta * v[i])
            check += x[i] * 0
    else:
        for i in range(lo, hi):
            v[i] = beta * v[i] + (g[i] + decay * x[i])
            x[i] -= rate * v[i]
            check += x[i] * 0
    finite: bool = check == 0
    return finite


@njit(nogil=True, cache=True, fastmath=_FAST)
def steps(
    x: np.ndarray,
    v: np.ndarray,
    square: np.ndarray,
    table: np.ndarray,
    labels: np.ndarray,
    index: np.ndarray,
    counts: np.ndarray,
    rates: np.ndarray,
    powers: np.ndarray,
    numbers: np.ndarray,
    layers: np.ndarray,
    rule: int,
    lo: int,
    hi: int,
    limit: int,
    log: np.ndarray,
) -> int:
    """At most ``limit`` steps of one expert.

    Args:
        x, v, square: (size,) weights and buffers, in place.
        table, labels: (rows, features), (rows,) samples.
        index, counts: (steps, batch), (steps,).
        rates, powers: (steps,) learning rates; (steps, 2) 1 - beta1^t and sqrt(1 - beta2^t).
        numbers: (NUMBERS,), see above.
        layers: (layers, 6) int64, see ``_gradient``.
        rule, lo, hi: update rule and trained columns.
        log: (steps, ENTRIES) float64, output.

    Returns:
        How many steps count.  If it is not ``limit``, the next step left the finite numbers, and may have changed the
        weights.
    """
    last = layers.shape[0] - 1
    shared = layers[last, 2]
    cut = min(max(lo, shared), hi)
    first = last if lo == shared else 0
    features, batch = table.shape[1], index.shape[1]
    space = batch * (layers[last, 5] + layers[last, 0] + layers[last, 1])
    values, slopes = np.empty(space, dtype=table.dtype), np.empty(space, dtype=table.dtype)
    errors, g, here = np.empty(space, dtype=table.dtype), np.zeros_like(x), np.empty_like(x)
    zero = x[0] * 0
    smoothing, largest, radius, decay = numbers[2], numbers[3], numbers[7], numbers[1]
    for step in range(limit):
        count = counts[step]
        rows = index[step]
        for i in range(count):
            line, sample = values[i * features : (i + 1) * features], table[rows[i]]
            for c in range(features):
                line[c] = sample[c]
        loss = 0.0
        sound = True
        for turn in range(2 if radius > 0 else 1):
            if turn == 1:  # at the worst neighbour
                below, above = _norms(g, x, zero, lo, cut, hi)
                reach = radius / max(math.sqrt(below * below + above * above), 1e-12)
                here[:] = x
                for i in range(lo, hi):
                    x[i] += reach * g[i]
            found = _gradient(x, g, labels, rows, count, layers, smoothing, first, values, slopes, errors)
            sound = sound and math.isfinite(found)
            if turn == 0:
                loss = found
            else:
                x[:] = here
        norm_shared, norm_head = _norms(g, x, decay, lo, cut, hi)
        used_shared, used_head, clip = norm_shared, norm_head, 1.0
        if largest > 0:
            below, above = _norms(g, x, zero, lo, cut, hi)
            clip = min(1.0, largest / (math.sqrt(below * below + above * above) + 1e-6))
            shrink = numbers.dtype.type(clip)
            for i in range(lo, hi):
                g[i] *= shrink
            used_shared, used_head = _norms(g, x, decay, lo, cut, hi)
        sound = sound and math.isfinite(norm_shared) and math.isfinite(norm_head)
        sound = sound and math.isfinite(used_shared) and math.isfinite(used_head)
        if not sound or not _update(x, v, square, g, rates[step], numbers, rule, powers[step], lo, hi):
            return step
        log[step, 0] = loss
        log[step, 1] = norm_shared
        log[step, 2] = norm_head
        log[step, 3] = clip
        log[step, 4] = used_shared
        log[step, 5] = used_head
    return limit
