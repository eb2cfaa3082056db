"""Instances for the derivations about logits: random logits and changes of a few classes, and one network's fields."""

from __future__ import annotations

import numpy as np

from theory.certificate import logit_range, output_bound, output_bound_labelled, remainder_bound
from theory.function_space import cross_entropy, log_softmax
from theory.linearization_error import largest_loss_formula, loss_change, loss_interval, taylor_factor
from theory.symbolic import evaluate

Sides = tuple[float, float]


def _draw(rng: np.random.Generator, images: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    classes = int(rng.integers(2, 6))
    logits = rng.standard_normal((images, classes)) * rng.choice([0.1, 1.0, 5.0])
    change = rng.standard_normal((images, classes)) * rng.choice([0.1, 1.0, 5.0])
    return logits, change, rng.integers(0, classes, images)


def second_derivative(rng: np.random.Generator) -> Sides:
    """``phi''`` along a line of logits is the variance of the change under softmax (complex step of ``phi'``)."""
    h, change, y = _draw(rng)
    p = np.exp(log_softmax(h))[0]
    d = change[0] - p @ change[0]  # a constant over the classes changes nothing
    weights = p * np.exp(1e-30j * d)
    slope = (weights @ d) / weights.sum() - d[y[0]]
    return float(slope.imag / 1e-30), float(p @ d**2)


def popoviciu(rng: np.random.Generator) -> Sides:
    """``Var_p(d) <= range(d)^2/4``."""
    h, change, _ = _draw(rng)
    p = np.exp(log_softmax(h))[0]
    return float(p @ (change[0] - p @ change[0]) ** 2), float(logit_range(change)[0] ** 2 / 4)


def one_image(rng: np.random.Generator) -> Sides:
    """``sqrt ell(h + d) <= sqrt ell(h) + range(d)/sqrt 8`` for one image."""
    h, change, y = _draw(rng)
    moved = np.sqrt(cross_entropy(h + change, y))[0]
    return float(moved), float(np.sqrt(cross_entropy(h, y))[0] + logit_range(change)[0] / np.sqrt(8))


def certificate(rng: np.random.Generator) -> Sides:
    """The shipped certificate over several images."""
    h, change, y = _draw(rng, 6)
    return float(cross_entropy(h + change, y).mean()), float(remainder_bound(h, y, change))


def label_free(rng: np.random.Generator) -> Sides:
    """The same from the expert's own risk, without labels."""
    h, change, y = _draw(rng, 6)
    own = cross_entropy(h, y).mean()
    return float(cross_entropy(h + change, y).mean()), float(output_bound(own, change))


def labelled(rng: np.random.Generator) -> Sides:
    """The form with labels: the smaller of Taylor with the largest curvature and of the largest difference."""
    h, change, y = _draw(rng, 6)
    return float(cross_entropy(h + change, y).mean()), float(output_bound_labelled(h, y, change))


def taylor(rng: np.random.Generator) -> Sides:
    """``ell(h + d) <= ell(h) + (p - e_y) d + range(d)^2/8`` for one image."""
    h, change, y = _draw(rng)
    p = np.exp(log_softmax(h))[0]
    slope = p @ change[0] - change[0, y[0]]
    return float(cross_entropy(h + change, y)[0] - slope), float(
        cross_entropy(h, y)[0] + logit_range(change)[0] ** 2 / 8
    )


def largest_difference(rng: np.random.Generator) -> Sides:
    """``ell(h + d) - ell(h) <= max_c d_c - d_y``."""
    h, change, y = _draw(rng)
    rise = cross_entropy(h + change, y)[0] - cross_entropy(h, y)[0]
    return float(rise), float(change[0].max() - change[0, y[0]])


def sharp_form(rng: np.random.Generator) -> Sides:
    """``ell(h + d) <= log(1 + (e^ell - 1) e^range(d))``."""
    h, change, y = _draw(rng)
    return float(cross_entropy(h + change, y)[0]), float(
        evaluate(largest_loss_formula, cross_entropy(h, y), logit_range(change))[0]
    )


def sharp_is_attained(rng: np.random.Generator) -> Sides:
    """The sharp form is attained: the range on all wrong classes."""
    h, _, y = _draw(rng)
    h = np.clip(h, -2, 2)  # a loss that is not all rounding
    rho = float(rng.exponential()) + 0.1
    change = np.where(np.arange(h.shape[1]) == y[0], 0.0, rho)[None]
    _, high = loss_interval(cross_entropy(h, y), rho)
    return float(cross_entropy(h + change, y)[0]), float(np.ravel(high)[0])


def tilted_variance(rng: np.random.Generator) -> Sides:
    """``Var_{p_t}(d) <= e^{t range(d)} Var_p(d)`` along the line of logits."""
    h, change, _ = _draw(rng)
    t = float(rng.random())
    p, moved = (np.exp(log_softmax(logits))[0] for logits in (h, h + t * change))
    d = change[0]
    here, there = (float(q @ (d - q @ d) ** 2) for q in (p, moved))
    return there, float(np.exp(t * logit_range(change)[0]) * here)


def second_order(rng: np.random.Generator) -> Sides:
    """The rest after the slope is at most ``Var_p(d) psi(range d)``."""
    h, change, y = _draw(rng)
    p, d = np.exp(log_softmax(h))[0], change[0]
    rest = cross_entropy(h + change, y)[0] - cross_entropy(h, y)[0] - (p @ d - d[y[0]])
    variance = float(p @ (d - p @ d) ** 2)
    return float(rest) - 1e-12, float(variance * taylor_factor(logit_range(change))[0])


def shipped_change(rng: np.random.Generator) -> Sides:
    """The shipped account: the true change is below its upper end."""
    h, change, y = _draw(rng)
    found = loss_change(h, y, change)
    true = float(cross_entropy(h + change, y)[0] - cross_entropy(h, y)[0])
    return true - 1e-12, float(np.ravel(found.upper)[0])
