"""EMR-Merging: elect one task vector, keep a mask and a rescaler per expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from merging.election import elected_sign
from merging.errors import MethodError
from merging.flat import FlatSpace
from merging.method import Method, Parameter, Rows, apply_flat, common_space
from merging.sums import magnitude
from merging.types import TaskVector

Rescaler = Literal["sum", "tensor_mean"]


@dataclass(frozen=True)
class Unified:
    """N experts compressed into one task vector, one bit per coordinate and expert, and one number per expert.

    Attributes:
        vector: the elected task vector.
        masks: per expert, boolean tensors of the same names and shapes.
        rescalers: one per expert.
    """

    vector: dict[str, Tensor]
    masks: tuple[dict[str, Tensor], ...]
    rescalers: tuple[float, ...]

    def expert(self, index: int) -> dict[str, Tensor]:
        """The task vector handed back for one expert: ``lambda_i m_i tau``."""
        mask, rescaler = self.masks[index], self.rescalers[index]
        return {name: tensor * mask[name].to(tensor) * rescaler for name, tensor in self.vector.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything as named tensors, for one file: ``unified.<name>``, ``mask<i>.<name>`` (boolean), ``rescalers``
        (float64, shape ``(N,)``)."""
        named = {f"unified.{name}": tensor for name, tensor in self.vector.items()}
        for index, mask in enumerate(self.masks):
            named |= {f"mask{index}.{name}": tensor for name, tensor in mask.items()}
        return named | {"rescalers": torch.tensor(self.rescalers, dtype=torch.float64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Unified:
        """What :meth:`tensors` wrote.

        Raises:
            MethodError: tensors that are missing or not boolean where they should be.
        """
        if "rescalers" not in tensors:
            raise MethodError("the tensors hold no 'rescalers': give those that Unified.tensors() returned")
        rescalers = tuple(tensors["rescalers"].tolist())
        names = [name.removeprefix("unified.") for name in tensors if name.startswith("unified.")]
        masks = []
        for index in range(len(rescalers)):
            keys = {name: f"mask{index}.{name}" for name in names}
            for key in keys.values():
                if key not in tensors or tensors[key].dtype != torch.bool:
                    raise MethodError(f"'{key}' is missing or not boolean: give those that Unified.tensors() returned")
            masks.append({name: tensors[key] for name, key in keys.items()})
        return cls({name: tensors[f"unified.{name}"] for name in names}, tuple(masks), rescalers)


def emr(task_vectors: Sequence[TaskVector], *, rescaler: Rescaler = "sum") -> dict[str, Tensor]:
    """The elected vector ``tau = gamma max{|Delta_i| : sign(Delta_i) = gamma}`` with ``gamma = sign(sum_i Delta_i)``.

    Without its masks and rescalers this is a merge like others; :func:`localized` applies them:
    ``m_i = [Delta_i tau > 0]`` and ``lambda_i = sum |Delta_i| / sum |m_i tau|`` give ``lambda_i m_i tau`` for expert i.
    ``tau`` is zero where the sum cancels exactly (the authors' code takes the negative entries there).

    Args:
        task_vectors: N mappings over the same tensors.
        rescaler: sums in ``lambda_i`` run over all coordinates (``"sum"``, the paper), or each tensor contributes its
            mean (``"tensor_mean"``, the authors' code; empty tensors contribute nothing).  Changes what
            :func:`localized` returns, not the merge.

    Source: Huang, Ye, Chen, He, Yue and Ouyang, "EMR-Merging: Tuning-free high-performance model merging", NeurIPS 2024
    (arXiv:2405.17461), section 3 and algorithm 1.
    """
    return apply_flat(task_vectors, lambda rows, space: emr_flat(rows, space, rescaler=rescaler))


def emr_flat(rows: Rows, space: FlatSpace, *, rescaler: Rescaler = "sum") -> Tensor:
    """:func:`emr` on N rows of shape ``(P,)``."""
    sign = elected_sign(rows)
    largest = torch.zeros_like(sign)
    for row in rows:
        torch.maximum(largest, row * sign, out=largest)
    return largest.mul_(sign).add_(0.0)  # which zero a maximum gives depends on the place in memory


def unify(task_vectors: Sequence[TaskVector], *, rescaler: Rescaler = "sum") -> Unified:
    """The elected task vector with every expert's mask and rescaler; see :func:`emr` for their definitions.

    A rescaler whose mask is empty is 1: it rescales nothing.
    """
    space = common_space(task_vectors)
    rows = [space.flatten(vector) for vector in task_vectors]
    merged = emr_flat(rows, space)
    masks, rescalers = [], []
    for row in rows:
        mask = row * merged.sign() > 0.0
        kept = _size(merged * mask.to(merged), space, rescaler)
        rescalers.append(_size(row, space, rescaler) / kept if kept > 0.0 else 1.0)
        masks.append(space.unflatten(mask))
    return Unified(space.unflatten(merged), tuple(masks), tuple(rescalers))


def localized(task_vectors: Sequence[TaskVector], *, rescaler: Rescaler = "sum") -> list[dict[str, Tensor]]:
    """The task vector handed back for each expert, ``lambda_i m_i tau``."""
    unified = unify(task_vectors, rescaler=rescaler)
    return [unified.expert(index) for index in range(len(unified.masks))]


def _size(row: Tensor, space: FlatSpace, rescaler: Rescaler) -> float:
    pieces = [(piece, piece.stop - piece.start) for _, piece in space.segments()]
    return sum(magnitude(row[piece]) / (1 if rescaler == "sum" else count) for piece, count in pieces if count > 0)


METHOD = Method(
    name="emr",
    function=emr,
    flat=emr_flat,
    summary="elect signs, take the largest entry that agrees; masks and rescalers per expert",
    paper="Huang et al. 2024, arXiv:2405.17461",
    parameters=(Parameter("rescaler", "sum", "how rescalers measure a task vector", choices=("sum", "tensor_mean")),),
    elementwise=True,
    idempotent=True,
    localized=localized,
)
