"""LiNeS: scale the merged task vector up along the depth of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from merging.errors import MethodError
from merging.flat import FlatSpace, compute_dtype
from merging.layers import Layers, layers_of
from merging.linear_form import LinearForm
from merging.method import Method, Parameter, Rows, apply_flat, combine
from merging.types import TaskVector

Outside = Literal["first", "depth"]


def lines(
    task_vectors: Sequence[TaskVector],
    *,
    alpha: float = 1.0,
    beta: float = 0.5,
    outside: Outside = "first",
    layers: Layers | None = None,
) -> dict[str, Tensor]:
    """``lambda_l sum_i Delta_i`` in layer l of L, with ``lambda_l = alpha / N + beta (l - 1) / (L - 1)``.

    Shallow layers, whose features are general, are kept close to the average of the experts, deep ones move further.

    * One expert (editing): ``alpha + beta = 1`` leaves the last layer as it is; the paper tunes alpha in [0, 1].
    * Several: the paper takes ``alpha = 1`` in this unit (the average, in the first layer) and tunes beta.
    * Other methods' merged vectors: :func:`scale_by_depth`, with :func:`first_scale` for the paper's scale of alpha.

    Args:
        task_vectors: N mappings over the same tensors.
        alpha: scale of the first layer, in units of 1/N (the paper's alpha is this alpha / N).
        beta: how much larger the scale of the last layer is.
        outside: tensors before the first layer and after the last take the scale of the ``"first"`` layer (the
            official code, which does so for final norm and projection too), or go with the ``"depth"``: the first
            layer's before, the last layer's after.
        layers: which layer a tensor belongs to; by default read off the names (:func:`merging.layers.layers_of`).

    Raises:
        MethodError: there is no layer.

    Source: Wang, Dimitriadis, Favero, Ortiz-Jimenez, Fleuret and Frossard, "LiNeS: Post-training layer scaling prevents
    forgetting and enhances model merging", ICLR 2025 (arXiv:2410.17146), section 4; what is outside of the blocks, and
    what alpha is for several experts: the official code.
    """
    return apply_flat(
        task_vectors,
        lambda rows, space: lines_flat(rows, space, alpha=alpha, beta=beta, outside=outside, layers=layers),
    )


def lines_flat(
    rows: Rows,
    space: FlatSpace,
    *,
    alpha: float = 1.0,
    beta: float = 0.5,
    outside: Outside = "first",
    layers: Layers | None = None,
) -> Tensor:
    """:func:`lines` on N rows of shape ``(P,)``."""
    total = combine(rows)
    known = layers_of(space.names) if layers is None else layers
    scales = depth_scales(known, alpha / len(rows), beta, outside)
    for name, piece in space.segments():
        total[piece] *= scales[name]
    return total


def lines_form(
    experts: int,
    tensor: str,
    *,
    alpha: float = 1.0,
    beta: float = 0.5,
    outside: Outside = "first",
    layers: Layers | None = None,
) -> LinearForm:
    """The sum, times the scale of the tensor's layer.

    Raises:
        MethodError: the layers are not given, or there is none.
    """
    if layers is None:
        raise MethodError("the form of LiNeS for one tensor needs the layers of the whole model: give layers=")
    return LinearForm(factor=depth_scales(layers, alpha / experts, beta, outside)[tensor])


def depth_scales(layers: Layers, alpha: float, beta: float, outside: Outside = "first") -> dict[str, float]:
    """``alpha + beta (l - 1) / (L - 1)`` for each tensor in layer l = 1..L; see :func:`lines` for the others.

    Raises:
        MethodError: there is no layer.
    """
    if layers.count == 0:
        raise MethodError(
            f"no layer was found in names like '{next(iter(layers.index), '')}': number them with layers=Layers(...)"
        )
    return {
        name: alpha + beta * (layers.depth(name) if layer is not None or outside == "depth" else 0.0)
        for name, layer in layers.index.items()
    }


def scale_by_depth(
    merged: TaskVector, alpha: float, beta: float, *, outside: Outside = "first", layers: Layers | None = None
) -> dict[str, Tensor]:
    """Scale any merged (or single) task vector by ``alpha + beta (l - 1) / (L - 1)`` in layer l of L.

    ``base + scale_by_depth(ties(task_vectors), first_scale(task_vectors, merged), beta)`` is TIES with LiNeS.

    Args:
        merged: a task vector; left as it is.
        alpha: scale of the first layer.
        beta: how much larger the scale of the last layer is.
        outside: see :func:`lines`.
        layers: see :func:`lines`.

    Returns:
        Float32 tensors (float64 where any is stored so).

    Source: see :func:`lines`.
    """
    scales = depth_scales(layers_of(merged) if layers is None else layers, alpha, beta, outside)
    dtype = compute_dtype(merged.values())
    return {name: tensor.to(dtype) * scales[name] for name, tensor in merged.items()}


def first_scale(task_vectors: Sequence[TaskVector], merged: TaskVector) -> float:
    """The paper's alpha for a merge of N experts: ``|sum_i Delta_i|_1 / (N |merged|_1)``; 0 if ``merged`` is zero.

    It gives the first layer about the size that it has in the average, whatever the method's own scale: 1/N for the sum
    of the task vectors, 1 for their mean.
    """

    def size(tensors: Mapping[str, Tensor]) -> float:
        return float(sum(float(tensor.double().abs().sum()) for tensor in tensors.values()))

    total = apply_flat(task_vectors, lambda rows, space: combine(rows))
    length = size(merged)
    return size(total) / (len(task_vectors) * length) if length > 0.0 else 0.0


METHOD = Method(
    name="lines",
    function=lines,
    flat=lines_flat,
    summary="sum of the task vectors, scaled up along the depth",
    paper="Wang et al. 2025, arXiv:2410.17146",
    parameters=(
        Parameter("alpha", 1.0, "scale of the first layer, in units of 1/N"),
        Parameter("beta", 0.5, "how much larger the scale of the last layer is"),
        Parameter("outside", "first", "scale of stem, final norm and the like", choices=("first", "depth")),
    ),
    linear=True,
    elementwise=True,
    lipschitz=True,
    linear_form=lines_form,
    extras=("layers",),
)
