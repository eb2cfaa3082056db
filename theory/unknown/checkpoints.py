"""What checkpoints tell about their training: norms, angles and layer profile of task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from theory.dispersion import dispersion_from_gram
from theory.errors import RecipeError
from theory.operators import coefficients
from theory.recipe import Merge, per_expert
from theory.symbolic import FloatArray


@dataclass(frozen=True, eq=False)
class TaskVectors:
    """What is seen of the checkpoints: ``norms`` of the task vectors (N,), ``gram`` of inner products (N, N) or None,
    ``profile``: share of the squared norm in each layer (N, layers) or None."""

    names: tuple[str, ...]
    norms: FloatArray
    gram: FloatArray | None = None
    profile: FloatArray | None = None

    @property
    def effective_layers(self) -> FloatArray | None:
        """``1 / sum share^2`` per expert: over how many layers the task vector is spread."""
        return None if self.profile is None else np.asarray(1 / (self.profile**2).sum(axis=1))


def task_vectors(
    names: Sequence[str],
    *,
    norms: ArrayLike | None = None,
    cosines: ArrayLike | None = None,
    layer_norms: ArrayLike | None = None,
) -> TaskVectors:
    """Norms (N,) or layer norms (N, layers) of task vectors, and their cosines (N, N), checked for consistency.

    Raises :class:`RecipeError` for numbers that cannot come from vectors (a Gram matrix that is not positive
    semidefinite, layer norms that do not add up to the norms).

    >>> task_vectors(["a", "b"], layer_norms=[[3.0, 4.0], [1.0, 0.0]]).norms.tolist()
    [5.0, 1.0]
    """
    size = len(names)
    profile = None
    if layer_norms is not None:
        layers = np.asarray(layer_norms, dtype=np.float64)
        if layers.ndim != 2 or layers.shape[0] != size or not np.all(np.isfinite(layers) & (layers >= 0)):
            raise RecipeError(f"task vectors: layer_norms needs shape ({size}, layers) and numbers of at least 0")
        total = np.sqrt((layers**2).sum(axis=1))
        if norms is not None and not np.allclose(total, norms, rtol=1e-3):
            raise RecipeError("task vectors: layer_norms do not add up to norms (root of the sum of squares); check")
        norms = total
        profile = layers**2 / np.where(total > 0, total**2, 1.0)[:, None]
    if norms is None:
        raise RecipeError("task vectors: norms is missing; give one norm per expert, or layer_norms")
    lengths = np.asarray(norms, dtype=np.float64)
    if lengths.shape != (size,) or not np.all(np.isfinite(lengths) & (lengths >= 0)):
        raise RecipeError(f"task vectors: norms needs {size} finite numbers of at least 0, one per expert")
    gram = None
    if cosines is not None:
        angles = np.asarray(cosines, dtype=np.float64)
        if angles.shape != (size, size) or not np.allclose(angles, angles.T, atol=1e-6):
            raise RecipeError(f"task vectors: cosines needs a symmetric matrix of shape ({size}, {size})")
        if not np.allclose(np.diag(angles), 1, atol=1e-6) or np.linalg.eigvalsh(angles).min() < -1e-6 * size:
            raise RecipeError("task vectors: cosines are not those of any vectors (diagonal 1, no negative eigenvalue)")
        gram = angles * lengths[:, None] * lengths[None, :]
    return TaskVectors(tuple(names), lengths, gram, profile)


def with_task_vectors(merge: Merge, seen: TaskVectors) -> Merge:
    """The merge with measured drifts, and V from the Gram matrix where the merge is linear (both *estimated*).

    One run gives one norm: it stands for the rms over runs that the theorems speak of.

    >>> from theory import Expert, Merge
    >>> pair = Merge(tuple(Expert(name, n=9, batch_size=3, learning_rate=0.1, steps=2) for name in "ab"))
    >>> seen = task_vectors(["a", "b"], norms=[3.0, 4.0], cosines=[[1.0, 0.0], [0.0, 1.0]])
    >>> filled = with_task_vectors(pair, seen)
    >>> filled.experts[1].drift, filled.dispersion  # ||x_a - x_b||^2/4
    (4.0, 6.25)
    """
    require_same_experts(merge, seen)
    experts = tuple(replace(item, drift=float(norm)) for item, norm in zip(merge.experts, seen.norms, strict=True))
    if seen.gram is None or merge.method in ("ties", "dare"):
        return replace(merge, experts=experts)
    V = dispersion_from_gram(seen.gram, coefficients(merge), per_expert(merge, "weights"))
    return replace(merge, experts=experts, dispersion=float(V))


def require_same_experts(merge: Merge, seen: TaskVectors) -> None:
    """Raise :class:`RecipeError` unless task vectors and merge name the same experts in the same order."""
    names = tuple(expert.name for expert in merge.experts)
    if names != seen.names:
        raise RecipeError(f"task vectors: they belong to {', '.join(seen.names)}, the merge has {', '.join(names)}")
