"""Where a global smoothness constant exists: softmax regression, and deep linear networks on a ball (theory section 1).

A neural network has no global L.  Two models do not need one measured:

* *softmax regression* on fixed inputs a (the last layer of a network whose other layers are frozen, or any model that
  is linear in its parameters): the Hessian of one image is ``(diag p - p p') x a a'``, and ``diag p - p p' <= I/2``;
* *deep linear networks* with the cross-entropy on a ball around a point, from the spectral norms of their layers.

Constants are *certified* given the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from theory.errors import MergeboundError

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SoftmaxSmoothness:
    """Upper bounds on the curvature of softmax regression, everywhere.

    Attributes:
        risk: L of the mean over the inputs.
        sample: the largest L of one input, which every batch step respects (theorem 2).
        batch: L of any batch of ``batch_size`` distinct inputs (between the two).
        batch_size: b, or ``None``.
        tier: certified, given the inputs.
    """

    risk: float
    sample: float
    batch: float | None = None
    batch_size: int | None = None
    tier: str = "certified"


def softmax_smoothness(inputs: npt.ArrayLike, *, bias: bool = True, batch_size: int | None = None) -> SoftmaxSmoothness:
    """Global smoothness of the cross-entropy of a linear classifier, in its weights and biases.

    ``L(F) = l_max(A'A/n)/2`` with rows ``a`` (and a one for the bias), ``L`` of one input ``|a|^2/2``: every direction
    d of the logits has ``d'(diag p - p p')d = Var_p(d) <= range(d)^2/4 <= |d|^2/2`` (Popoviciu; attained for p = 1/2
    on two classes).  A batch of b distinct rows has at most ``min(max |a|^2, n l_max(A'A/n)/b)/2``.

    Args:
        inputs: features a, (n, d).
        bias: the classifier has biases.
        batch_size: bound a batch's smoothness too.

    Raises:
        MergeboundError: no finite (n, d) table, or a batch size outside 1..n.

    Source: Boehning, "Multinomial logistic regression algorithm", Ann. Inst. Statist. Math. 44, 1992 (``I/2``).

    >>> found = softmax_smoothness([[3.0, 4.0], [0.0, 0.0]], bias=False)
    >>> found.risk, found.sample
    (6.25, 12.5)
    """
    a = np.asarray(inputs, dtype=np.float64)
    if a.ndim != 2 or not a.size or not np.isfinite(a).all():
        raise MergeboundError(f"inputs have shape {a.shape} or are not finite: give features (images, width)")
    if bias:
        a = np.concatenate([a, np.ones((len(a), 1))], axis=1)
    if batch_size is not None and not 1 <= batch_size <= len(a):
        raise MergeboundError(f"batch_size = {batch_size}: give 1 to {len(a)}, the number of inputs")
    mean = float(np.linalg.norm(a, ord=2) ** 2 / len(a)) / 2
    sample = float((a**2).sum(axis=1).max()) / 2
    batch = None if batch_size is None else min(sample, mean * len(a) / batch_size)
    return SoftmaxSmoothness(mean, sample, batch, batch_size)


def deep_linear_smoothness(norms: npt.ArrayLike, input_norm: float, radius: float = 0.0) -> float:
    """Smoothness of the cross-entropy of ``W_D ... W_1 a`` in all weights, on a ball around a point.

    With ``s_l = |W_l|_2 + radius`` (a ball of that radius in the Euclidean norm of all weights together), a direction u
    with parts of norms ``u_l`` has ``|J u| <= |a| sum_l r_l u_l``, ``r_l = prod_{k != l} s_k``, and the second
    derivative of the logits along it at most ``2 |a| sum_{l < m} u_l u_m prod_{k != l, m} s_k``.  The loss has
    curvature at most 1/2 and a gradient of norm at most sqrt(2) in the logits, so the Hessian's norm is at most the
    largest eigenvalue of the D x D matrix ``|a|^2 r r'/2`` plus ``sqrt(2) |a| prod_{k != l, m} s_k`` off its diagonal.
    No global bound exists for D >= 2 (``radius = inf`` gives ``inf``).

    Args:
        norms: spectral norms of the D layers at the centre.
        input_norm: largest ``|a|``.
        radius: of the ball.

    Returns:
        An upper bound on the spectral norm of the Hessian, on the whole ball; certified.

    Raises:
        MergeboundError: negative or missing numbers.

    >>> deep_linear_smoothness([2.0], 3.0), deep_linear_smoothness([2.0, 1.0], 3.0, float("inf"))
    (4.5, inf)
    """
    s = np.asarray(norms, dtype=np.float64)
    if s.ndim != 1 or not len(s) or (s < 0).any() or not np.isfinite(s).all() or input_norm < 0 or not radius >= 0:
        raise MergeboundError("norms, input_norm and radius must be nonnegative, with one norm per layer")
    depth = len(s)
    if depth > 1 and np.isinf(radius):
        return float("inf")
    wide = s if depth == 1 else s + radius
    rest = np.array([np.prod(np.delete(wide, l)) for l in range(depth)])
    form = 0.5 * input_norm**2 * np.outer(rest, rest)  # |J u| <= |a| sum_l rest_l |u_l|
    for l, m in combinations(range(depth), 2):
        pair = np.sqrt(2.0) * input_norm * float(np.prod(np.delete(wide, [l, m])))
        form[l, m] += pair
        form[m, l] += pair
    return float(np.linalg.eigvalsh(form)[-1])
