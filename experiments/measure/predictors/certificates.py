"""Certificates of predicted merges: bounds on the joint risk from logits and from what they may miss.

All are theorems on the calibration images *given* the logits and remainders (:mod:`theory.certificate`).  With the
merge's own logits the output certificate is *certified* there; with predicted logits, or with a remainder read off from
another predictor, it is *estimated*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from experiments.measure.predictors.statistics import FieldStatistics
from theory.certificate import logit_range, output_bound, output_bound_labelled, remainder_bound
from theory.function_space import Array, cross_entropy, uniform_weights
from theory.linearization_error import loss_interval

Tier = Literal["certified", "estimated"]


@dataclass(frozen=True)
class Certificate:
    """Bounds on the joint risk of A merges, (A,) each, in nats.

    Attributes:
        name: of the certificate.
        upper: claimed to be at least the risk.
        lower: claimed to be at most the risk; zeros where the certificate is one-sided.
        tier: ``certified`` on these images if the logits are the merge's own, else ``estimated``.
    """

    name: str
    upper: Array
    lower: Array
    tier: Tier


def _weights(statistics: FieldStatistics, weights: npt.ArrayLike | None) -> Array:
    return uniform_weights(statistics.size) if weights is None else np.asarray(weights, dtype=np.float64)


def output_certificate(
    statistics: FieldStatistics,
    logits: Sequence[Array],
    *,
    labelled: bool = False,
    own_merge: bool = False,
    weights: npt.ArrayLike | None = None,
) -> Certificate:
    """``sqrt F_j(M) <= sqrt F_j(x_j) + sqrt(E range(delta)^2 / 8)``, or the form with labels, summed over tasks.

    Args:
        statistics: with every expert's own logits.
        logits: of the merges on each task, (A, n_j, C_j): their own, or predicted.
        labelled: the min form, which needs labels and is never larger where the change has one sign.
        own_merge: the logits are the merges' own: the certificate is a theorem on these images.
        weights: p_j.

    Source: theory.md section 8, output-space certificate.
    """
    own = statistics.own_risks()
    rows = []
    for j, h in enumerate(logits):
        change = h - statistics.own_logits(j)
        if labelled:
            rows.append(output_bound_labelled(statistics.own_logits(j), statistics.labels[j], change))
        else:
            rows.append(output_bound(own[j], change))
    upper = np.stack(rows, axis=-1) @ _weights(statistics, weights)
    name = "output_labelled" if labelled else "output"
    return Certificate(name, upper, np.zeros_like(upper), "certified" if own_merge else "estimated")


def remainder_certificate(
    statistics: FieldStatistics,
    logits: Sequence[Array],
    others: Sequence[Sequence[Array]],
    *,
    inflate: float = 1.0,
    sharp: bool = True,
    weights: npt.ArrayLike | None = None,
) -> Certificate:
    """A predictor's risk with what it may miss: the largest range of its distance to other predictors, per image.

    ``sqrt F_j(M) <= sqrt(E ell(h^)) + sqrt(E rho^2 / 8)`` with ``rho = inflate max_k range(h_k - h^)``; the sharp form
    moves each image's loss by rho (:func:`theory.linearization_error.loss_interval`) and is two-sided.  The smaller
    upper bound is taken.  It holds where no image's logits are further from the prediction than rho: *estimated*.

    Args:
        statistics: for labels.
        logits: h^ of each task, (A, n_j, C_j).
        others: predictions of other predictors, in the same form; the merge's own logits make it a theorem.
        inflate: factor on the distance; choose it on other experts.
        sharp: whether the sharp form is used too.
        weights: p_j.

    Source: theory.md section 8, remainder certificate.
    """
    p = _weights(statistics, weights)
    lower, upper = [], []
    for j, h in enumerate(logits):
        y = statistics.labels[j]
        rho = np.zeros(h.shape[:-1])
        for other in others:
            rho = np.maximum(rho, logit_range(other[j] - h))
        rho = inflate * rho
        low, high = loss_interval(cross_entropy(h, y), rho)
        one_sided = np.zeros_like(h)
        one_sided[..., 0] = rho
        bound = remainder_bound(h, y, one_sided)
        upper.append(np.minimum(bound, high.mean(axis=-1)) if sharp else bound)
        lower.append(low.mean(axis=-1))
    return Certificate("remainder", np.stack(upper, axis=-1) @ p, np.stack(lower, axis=-1) @ p, "estimated")


def smallest(found: Sequence[Certificate]) -> Certificate:
    """The smallest of several upper bounds: valid where all of them are; the least tier of them all."""
    tier: Tier = "certified" if all(one.tier == "certified" for one in found) else "estimated"
    upper = np.min([one.upper for one in found], axis=0)
    return Certificate("best", upper, np.max([one.lower for one in found], axis=0), tier)


@dataclass(frozen=True)
class Bracket:
    """The ends of several predictions of one quantity, (A,) each, and how far to trust them.

    Attributes:
        low, high: smallest and largest predicted risk.
        gap: ``log(high / low)``: 0 where they agree.
    """

    low: Array
    high: Array

    @property
    def gap(self) -> Array:
        """Logarithm of the ratio of the ends."""
        tiny = np.finfo(np.float64).tiny
        return np.log(np.maximum(self.high, tiny)) - np.log(np.maximum(self.low, tiny))


def bracket_of(predicted: Mapping[str, Array], names: Sequence[str] = ("secant", "tangent_base")) -> Bracket:
    """The bracket between some predictors' risks, by default from the secant to the tangent at the base."""
    rows = np.stack([np.asarray(predicted[name], dtype=np.float64) for name in names])
    return Bracket(rows.min(axis=0), rows.max(axis=0))
