"""Curvature of a task's risk at one point as scipy linear operators.

Kinds, for ``F(x) = (1/n) sum_z ell(h(x; z), y)`` with Jacobian J of the outputs h:

* ``hessian``: second derivatives of F;
* ``gauss_newton``: ``(1/n) sum J' B J``, B the loss's curvature by the outputs; positive semidefinite;
* ``fisher``: ``(1/n) sum E_y g g'`` over labels y of the network's own predictions; for the cross-entropy (and the
  squared error with unit noise) it *is* the Gauss-Newton matrix, and it is computed so;
* ``sampled_fisher``: the same with labels drawn once per image (``samples`` of them), a fixed matrix from then on;
* ``empirical_fisher``: ``(1/n) sum g g'`` with the true labels: not an estimate of the Fisher (Kunstner, Balles and
  Hennig, 2019, arXiv:1905.12558).

All of them are products with recorded graphs, reverse over reverse.  The library curvlinops 3.0.1 has the same
operators.  It takes Hessian products forward over ``jacrev``, which torch 2.15 gets wrong (by 0.25 % on a small vision
transformer) where a network has torch's own LayerNorm, and its draws and estimates carry neither named seeds nor
errors.  Elsewhere both agree to rounding, at about equal speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from experiments.measure.curvature.risk import EmpiricalRisk
from theory.errors import MergeboundError, nearest

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Kind = Literal["hessian", "gauss_newton", "fisher", "sampled_fisher", "empirical_fisher"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FISHER = 0xF15E
"""Names the stream of sampled labels."""
COLUMNS = 16
"""Vectors that are multiplied together, so that memory does not grow with their number."""

Bend = Callable[[slice, Tensor, Tensor], Tensor]


def curvature_operator(
    risk: EmpiricalRisk,
    point: Tensor,
    kind: Kind = "hessian",
    *,
    columns: Tensor | None = None,
    samples: int = 1,
    seed: int = 0,
) -> LinearOperator:
    """A symmetric (P, P) operator in float64 at one point.

    Memory: one batch of images with its graph, and :data:`COLUMNS` vectors.  Derivatives are taken in the risk's type.

    Args:
        risk: of one task; see :func:`experiments.measure.curvature.risk.task_risk`.
        point: x, (P,).
        kind: one of :data:`KINDS`.
        columns: only these coordinates, (m,) int64: the diagonal block of a layer (``Subject.columns``), (m, m).
        samples, seed: labels per image of ``sampled_fisher``.

    Raises:
        MergeboundError: another kind, or outputs that are not finite.

    Source: theory.md sections 2 and 8.
    """
    from scipy.sparse.linalg import LinearOperator

    check_kind(kind)
    place = None if columns is None else torch.as_tensor(columns, dtype=torch.int64)
    size = risk.size if place is None else len(place)
    multiply = _hessian(risk, point) if kind == "hessian" else _jacobian(risk, point, kind, samples, seed)

    def matmat(vectors: np.ndarray) -> np.ndarray:
        out = np.empty((size, vectors.shape[1]))
        for start in range(0, vectors.shape[1], COLUMNS):
            piece = torch.as_tensor(np.ascontiguousarray(vectors[:, start : start + COLUMNS].T, dtype=np.float64))
            if place is not None:
                piece = torch.zeros(len(piece), risk.size, dtype=torch.float64).index_copy_(1, place, piece)
            found = multiply(piece)
            out[:, start : start + COLUMNS] = (found if place is None else found[:, place]).numpy().T
        return out

    def matvec(vector: np.ndarray) -> np.ndarray:
        return matmat(np.reshape(vector, (-1, 1)))[:, 0]

    made: Any = LinearOperator
    operator: LinearOperator = made(
        (size, size), matvec=matvec, rmatvec=matvec, matmat=matmat, rmatmat=matmat, dtype=np.float64
    )
    return operator


def check_kind(kind: str) -> None:
    """Refuse an unknown kind.

    Raises:
        MergeboundError: names the nearest.
    """
    if kind not in KINDS:
        raise MergeboundError(f"kind = {kind!r}: {nearest(kind, KINDS)}")


def curvature_by_outputs(risk: EmpiricalRisk, point: Tensor, kind: Kind, *, samples: int = 1, seed: int = 0) -> Bend:
    """B of a kind other than ``hessian``: (rows, outputs (m, C), changes (D, m, C)) to B times the changes.

    Raises:
        MergeboundError: ``hessian``, which has none.
    """
    check_kind(kind)
    if kind == "hessian":
        raise MergeboundError("kind = 'hessian' is no product of Jacobians; choose gauss_newton or a Fisher matrix")
    if kind in ("gauss_newton", "fisher"):
        return lambda rows, outputs, changes: risk.loss.bend(outputs, changes)
    if kind == "empirical_fisher":
        return lambda rows, outputs, changes: _outer(risk.loss.slopes(outputs, risk.labels[rows])[None], changes)
    if samples < 1:
        raise MergeboundError(f"samples = {samples}: give 1 or more labels per image")
    outputs = risk.outputs(point)
    stream = np.random.default_rng([seed, FISHER])
    generator = torch.Generator().manual_seed(int(stream.integers(2**62)))
    drawn = [risk.loss.slopes(outputs, risk.loss.draw(outputs, generator)) for _ in range(samples)]
    slopes = torch.stack(drawn) / samples**0.5
    return lambda rows, _, changes: _outer(slopes[:, rows], changes)


def _outer(slopes: Tensor, changes: Tensor) -> Tensor:
    """``sum_s u_s (u_s . d)`` for slopes (S, m, C) and changes (D, m, C)."""
    return torch.einsum("smc,smk,dmk->dmc", slopes, slopes, changes)


def _hessian(risk: EmpiricalRisk, point: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda vectors: risk.hessian_products(point, vectors)


def _jacobian(risk: EmpiricalRisk, point: Tensor, kind: Kind, samples: int, seed: int) -> Callable[[Tensor], Tensor]:
    bend = curvature_by_outputs(risk, point, kind, samples=samples, seed=seed)

    def multiply(vectors: Tensor) -> Tensor:
        total = torch.zeros(vectors.shape, dtype=torch.float64)
        for rows, jacobian in risk.jacobians(point):
            for row, change in zip(total, bend(rows, jacobian.outputs, jacobian.push(vectors)), strict=True):
                row += jacobian.pull(change).double()
        return total / len(risk)

    return multiply


@dataclass(frozen=True)
class Precision:
    """Products in single precision against double.

    Attributes:
        kind: of the operator.
        relative_error: ``|A32 v - A64 v| / |A64 v|``, the largest over the vectors.
        symmetry: ``|u'Av - v'Au| / (|u| |Av|)`` in single precision, the largest over pairs.
        seed: of the vectors.
        tier: of both.
    """

    kind: str
    relative_error: float
    symmetry: float
    seed: int
    tier: str = "estimated"


PRECISION = 0x9EC1
"""Names the stream of the vectors of :func:`check_precision`."""


def check_precision(
    single: EmpiricalRisk,
    double: EmpiricalRisk,
    point: Tensor,
    kind: Kind = "hessian",
    *,
    vectors: int = 2,
    seed: int = 0,
) -> Precision:
    """How far single precision is from double, on normal vectors.

    Args:
        single, double: the same risk in both types (``task_risk`` with ``dtype=``).
        point: (P,).
        kind: which operator (sampled labels would differ between types: not allowed).
        vectors: how many.
        seed: names them.

    Raises:
        MergeboundError: types that are not these, or ``sampled_fisher``.
    """
    if single.dtype == double.dtype or double.dtype != torch.float64 or kind == "sampled_fisher":
        raise MergeboundError(
            f"precision of {kind}: give one risk in float32 and the same in float64, and no sampled labels"
        )
    v = np.random.default_rng([seed, PRECISION]).standard_normal((single.size, vectors))
    near = curvature_operator(single, point, kind) @ v
    true = curvature_operator(double, point, kind) @ v
    error = np.linalg.norm(near - true, axis=0) / np.maximum(np.linalg.norm(true, axis=0), 1e-300)
    cross = v.T @ near
    scale = np.outer(np.linalg.norm(v, axis=0), np.linalg.norm(near, axis=0)).max()
    return Precision(kind, float(error.max()), float(np.abs(cross - cross.T).max() / max(scale, 1e-300)), seed)
