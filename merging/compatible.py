"""Whether checkpoints can be merged with each other, and which tensor is to blame if not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from merging.errors import CheckpointError, MethodError
from merging.lazy import specs
from merging.partition import Partition, partition
from merging.types import StateDict


def check_compatible(
    base: StateDict,
    experts: Mapping[str, StateDict],
    parts: Partition | None = None,
    *,
    remedies: str = "use experts fine-tuned from this base, or make the tensor private",
) -> None:
    """Check that every expert has the base's tensors, in shape and kind; private tensors are not compared.

    ``remedies`` says what to do about tensors that only one side has.

    Floating types may differ in width (the result is stored as the base is); an integer tensor where the base has a
    floating one is an error.

    Raises:
        CheckpointError: names the expert, the tensor and the remedy.
    """
    chosen = partition(base) if parts is None else parts
    own = specs(base)
    compared = [(name, own[name]) for kind in (chosen.coordinates, chosen.constants) for name in kind]
    known = {name for name, _ in compared}
    for expert, state in experts.items():
        found = specs(state)
        for name, reference in compared:
            spec = found.get(name)
            if spec is None:
                raise CheckpointError(f"{expert}: tensor '{name}' of the base is missing: {remedies}")
            if spec.shape != reference.shape:
                raise CheckpointError(
                    f"{expert}: tensor '{name}' has shape {spec.shape} where the base has "
                    f"{reference.shape}: use experts fine-tuned from this base, or make the tensor private"
                )
            if spec.floating != reference.floating or spec.dtype.is_complex:
                raise CheckpointError(
                    f"{expert}: tensor '{name}' has type {spec.dtype} where the base has {reference.dtype}: convert "
                    "it to a floating type" + ("" if reference.floating else " in neither, or integer in both")
                )
        if len(found) > len(known):
            for name in found:
                if name not in own and not chosen.is_private(name):
                    raise CheckpointError(f"{expert}: tensor '{name}' does not exist in the base: {remedies}")


def check_finite(
    base: StateDict,
    experts: Mapping[str, StateDict],
    parts: Partition,
    rows: Sequence[Tensor] | None = None,
    *,
    base_name: str = "base",
) -> None:
    """Check that everything that is merged is finite; ``rows`` are flat vectors that are looked at first, for speed.

    Raises:
        CheckpointError: names the checkpoint, the tensor and how many of its entries are NaN or infinite.
    """
    if rows is not None and all(bool(torch.isfinite(row.sum())) for row in rows):
        return
    for source, state in ((base_name, base), *experts.items()):
        for name in parts.coordinates:
            bad = int(torch.isfinite(state[name]).logical_not().sum())
            if bad:
                raise CheckpointError(
                    f"{source}: tensor '{name}' holds {bad} NaN or infinite values among {state[name].numel()}: use a "
                    "checkpoint saved before training diverged, or make the tensor private"
                )


def check_result(merged: StateDict, vector: Tensor, method: str) -> None:
    """Check that a merge of finite checkpoints is finite in its storage types (``vector``: before rounding to them).

    Raises:
        MethodError: names the tensor that overflowed.
    """
    limit = min(torch.finfo(dtype).max for dtype in {tensor.dtype for tensor in merged.values()})
    if vector.numel() == 0 or float(vector.abs().max()) <= limit:
        return
    for name, tensor in merged.items():
        if not bool(torch.isfinite(tensor.to(vector.dtype)).all()):
            raise MethodError(
                f"method '{method}' overflows {tensor.dtype} in tensor '{name}': use smaller coefficients"
            )
