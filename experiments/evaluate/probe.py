"""Linear probe: multinomial logistic regression on frozen features, its strength of decay chosen on validation images.

    minimise over W (C, d), b (C,):   mean_i CE(W z_i + b, y_i) + (l2 / 2) |W|^2,     z = (x - mean) / std on train

by scikit-learn's L-BFGS in float64, from the largest l2 of the grid to the smallest, each from the solution before.
Convergence is checked afterwards on the gradient of this very objective.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.evaluate.metrics import score
from experiments.evaluate.neighbours import check
from theory.errors import MergeboundError

_log = logging.getLogger(__name__)

GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""Values of l2 that are tried."""
GRADIENT = 1e-4
"""Largest entry of the objective's gradient that counts as converged."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Probe:
    """A fitted linear probe.

    Attributes:
        weight, bias: on standardised features, (C, d) and (C,); the bias of a class without training images is -inf.
        mean, std: of the training features, (d,); ``std`` is one where a feature is constant.
        l2: the chosen value.
        validation: accuracy on the validation images by l2.
        gradient: largest entry of the objective's gradient at the solution.
        iterations: of L-BFGS for the chosen l2.
        converged: ``gradient`` is at most :data:`GRADIENT`.
    """

    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    mean: Tensor = field(repr=False)
    std: Tensor = field(repr=False)
    l2: float
    validation: Mapping[float, float]
    gradient: float
    iterations: int
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """(m, d) to (m, C), float64, in chunks."""
        parts = [((part.double() - self.mean) / self.std) @ self.weight.T for part in torch.split(features, 8192)]
        return torch.cat(parts) + self.bias


def linear_probe(
    features: Tensor,
    labels: Tensor,
    validation: Tensor,
    validation_labels: Tensor,
    classes: int,
    *,
    grid: Sequence[float] = GRID,
    iterations: int = 1000,
) -> Probe:
    """Fit on the training features; of the grid, take what is best on the validation features.

    Ties of validation accuracy go to the lower validation loss, then to the larger l2.  The probe is not fitted again
    on training and validation images together.

    Args:
        features, labels: (n, d) and (n,).
        validation, validation_labels: (v, d) and (v,).
        classes: C.
        grid: positive values of l2.
        iterations: at most, for each value.

    Raises:
        MergeboundError: shapes that do not fit, fewer than two classes among the labels, or a bad grid.
    """
    check(features, labels, classes, "training")
    check(validation, validation_labels, classes, "validation")
    if not grid or not all(np.isfinite(value) and value > 0 for value in grid):
        raise MergeboundError(f"linear probe: grid = {tuple(grid)}; give positive values of l2")
    present = torch.unique(labels)
    if len(present) < 2:
        raise MergeboundError("linear probe: the training images are all of one class; give images of two at least")
    mean = features.double().mean(dim=0)
    spread = features.double().std(dim=0, correction=0)
    std = torch.where(spread > 1e-12 * (1.0 + mean.abs()), spread, torch.ones_like(spread))
    x, y = ((features.double() - mean) / std).numpy(), labels.numpy()
    found: list[tuple[tuple[float, float], Probe]] = []
    accuracies: dict[float, float] = {}
    for l2, weight, bias, steps in _path(x, y, sorted(set(grid), reverse=True), iterations):
        wide_weight = torch.zeros(classes, x.shape[1], dtype=torch.float64)
        wide_bias = torch.full((classes,), -torch.inf, dtype=torch.float64)
        wide_weight[present], wide_bias[present] = torch.from_numpy(weight), torch.from_numpy(bias)
        size = _gradient(x, np.searchsorted(present.numpy(), y), weight, bias, l2)
        probe = Probe(wide_weight, wide_bias, mean, std, l2, accuracies, size, steps, size <= GRADIENT)
        scores = score(probe.logits(validation), validation_labels)
        accuracies[l2] = float(scores.correct.mean())
        found.append(((-accuracies[l2], float(scores.loss.mean())), probe))
    best = min(found, key=lambda item: item[0])[1]
    if not best.converged:
        _log.warning(
            "linear probe: l2 = %g has a gradient of %.1e after %d iterations; raise iterations or l2",
            best.l2,
            best.gradient,
            best.iterations,
        )
    return best


def _path(
    x: Floats, y: NDArray[np.int64], grid: Sequence[float], iterations: int
) -> list[tuple[float, Floats, Floats, int]]:
    """Solutions (weight, bias, iterations) for each l2, each started from the one before."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    # With two classes scikit-learn fits one vector u = w_1 - w_0: |w_0|^2 + |w_1|^2 is |u|^2 / 2 at the minimum
    two = len(np.unique(y)) == 2
    model = LogisticRegression(tol=1e-7, max_iter=iterations, warm_start=True)
    out = []
    for l2 in grid:
        model.set_params(C=(2.0 if two else 1.0) / (l2 * len(x)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x, y)
        weight, bias = model.coef_, model.intercept_
        if two:
            weight, bias = np.vstack([-weight / 2.0, weight / 2.0]), np.concatenate([-bias / 2.0, bias / 2.0])
        out.append((l2, weight.copy(), bias.copy(), int(np.max(model.n_iter_))))
    return out


def _gradient(x: Floats, y: NDArray[np.int64], weight: Floats, bias: Floats, l2: float) -> float:
    """Largest entry of the objective's gradient."""
    logits = x @ weight.T + bias
    logits -= logits.max(axis=1, keepdims=True)
    p = np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(y)), y] -= 1.0
    return float(max(np.abs(p.T @ x / len(x) + l2 * weight).max(), np.abs(p.mean(axis=0)).max()))
