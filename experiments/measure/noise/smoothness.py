"""Curvature as far as the constants of stability and drift need it: per-sample smoothness and the ends of a spectrum.

Hessians of the loss itself (not Gauss-Newton), by Hessian-vector products.  Eigenvalues found by iteration approach the
true ones from inside the spectrum: the smoothness is a lower estimate at the samples and points that were looked at.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from experiments.measure.noise.objective import Objective

_POWER = 0x504F
_DENSE = 48
_SHIFT_GUESS = 1e-30


def hessian_product(objective: Objective, inputs: Tensor, labels: Tensor, vector: Tensor) -> Tensor:
    """H v of the mean loss of a batch, without decay, (d,)."""

    def slope(theta: Tensor) -> Tensor:
        found: Tensor = grad(objective.mean)(theta, inputs, labels)
        return found

    product: Tensor = jvp(slope, (objective.theta,), (vector,))[1]
    return product


def sample_smoothness(
    objective: Objective, inputs: Tensor, labels: Tensor, *, iterations: int = 12, seed: int = 0, chunk: int = 8
) -> np.ndarray:
    """Largest absolute Hessian eigenvalue of every sample's loss at the point, (m,), by power iteration.

    Converges from below; a random start of seed ``default_rng([seed, 0x504F])``, common to all samples.
    """
    rng = np.random.default_rng([seed, _POWER])
    start = torch.from_numpy(rng.standard_normal(objective.size)).to(objective.theta.dtype)

    def one(image: Tensor, label: Tensor) -> Tensor:
        vector, size = start / start.norm(), torch.zeros((), dtype=start.dtype)
        for _ in range(iterations):
            product = hessian_product(objective, image[None], label[None], vector)
            size = product.norm()
            vector = product / size.clamp(min=_SHIFT_GUESS)
        return size

    with torch.no_grad():
        parts = [vmap(one)(x, y) for x, y in zip(torch.split(inputs, chunk), torch.split(labels, chunk), strict=True)]
    return np.asarray(torch.cat(parts).double().numpy())


def ends(
    objective: Objective, inputs: Tensor, labels: Tensor, *, seed: int = 0, iterations: int = 30
) -> tuple[float, Tensor, float, Tensor]:
    """Lowest and highest eigenvalue of a batch's Hessian with their eigenvectors (d,), without decay.

    Dense where d <= 48, else Lanczos (scipy's ``eigsh``) with at most ``iterations`` basis vectors and one restart's
    precision of 1 %; where it does not converge, the Ritz pairs of a plain Lanczos run.
    """
    d = objective.size
    dtype = objective.theta.dtype

    def product(vector: np.ndarray) -> np.ndarray:
        v = torch.from_numpy(np.ascontiguousarray(vector.reshape(-1))).to(dtype)
        with torch.no_grad():
            return hessian_product(objective, inputs, labels, v).double().numpy()

    if d <= _DENSE:
        matrix = np.stack([product(row) for row in np.eye(d)])
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    else:
        values, vectors = _lanczos(product, d, iterations, np.random.default_rng([seed, _POWER, 1]))
    low, high = (torch.from_numpy(vectors[:, i].copy()).to(dtype) for i in (0, -1))
    return float(values[0]), low / low.norm(), float(values[-1]), high / high.norm()


def _lanczos(product, d: int, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[no-untyped-def]
    """Ritz values and vectors of a Lanczos run with full reorthogonalisation (Golub and Van Loan, section 10.3)."""
    count = min(count, d)
    basis = np.zeros((count, d))
    vector = rng.standard_normal(d)
    vector /= np.linalg.norm(vector)
    diagonal, beside = [], []
    for k in range(count):
        basis[k] = vector
        image = product(vector)
        diagonal.append(float(vector @ image))
        for _ in range(2):
            image -= basis[: k + 1].T @ (basis[: k + 1] @ image)
        size = float(np.linalg.norm(image))
        if k == count - 1 or size <= 1e-10 * max(abs(v) for v in diagonal) or size == 0.0:
            break
        beside.append(size)
        vector = image / size
    from scipy.linalg import eigh_tridiagonal

    values, small = eigh_tridiagonal(np.array(diagonal), np.array(beside[: len(diagonal) - 1]))
    return values, basis[: len(diagonal)].T @ small
